"""The weights of a model: read from safetensors, complete and frozen; what tells models apart, and what they weigh."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from . import tensor_parallel
from .errors import UserError
from .linear import PackedLinear
from .memory import is_out_of_memory, shortage
from .placement import DeviceMap, empty_model
from .sources import check_weights, model_class, read_config, typed_config
from .trimmed_head import IDS_KEY, trim_head


def load_weights(
    directory: Path,
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    quiet: bool,
    spread: DeviceMap | None,
    split: bool = False,
) -> PreTrainedModel:
    config = typed_config(directory, source)
    check_weights(directory, source)
    where = spread or ({} if device.type == "cpu" else {"": device})
    placement: dict[str, Any] = {"device_map": where} if where else {}
    if split:
        tensor_parallel.check_heads(config.num_key_value_heads, source)
        placement = tensor_parallel.plan()
    try:
        with _loading_messages(quiet):
            model, report = model_class(read_config(directory, source), source).from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **placement,
            )
    except (OSError, RuntimeError, MemoryError, ImportError, SafetensorError, ValueError) as error:
        if is_out_of_memory(error):
            raise _does_not_fit(source, dtype, device, error) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"the weights of {source} cannot be loaded ({reason}); download them again.") from error
    _refuse_incomplete(report["missing_keys"], source)
    if split:
        tensor_parallel.mark(model)
    return freeze(model)


def _does_not_fit(source: str, dtype: torch.dtype, device: torch.device, error: Exception) -> UserError:
    precision = str(dtype).removeprefix("torch.")
    remedy = "use a smaller model or model.dtype=bfloat16" + ("" if device.type == "cpu" else ", or model.device=cpu")
    return UserError(f"{source} does not fit on {device} in {precision}: {shortage(error)}; {remedy}.")


def load_sharing_embeddings(
    directory: Path, source: str, target: PreTrainedModel, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    config = typed_config(directory, source)
    check_weights(directory, source)
    model = empty_model(directory, source)
    try:
        weights = load_file(directory / "model.safetensors", device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights of {source} cannot be loaded ({error}); fetch them again.") from error
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getattr(model, name)().weight = getattr(target, name)().weight
    head_token_ids = weights.pop(IDS_KEY, None)
    own = {name: weight.to(dtype) for name, weight in weights.items()}
    left, unknown = model.load_state_dict(own, strict=False, assign=True)
    _refuse_incomplete([name for name in left if model.get_parameter(name).is_meta], source)
    if unknown:
        raise UserError(f"{source} has unexpected weights such as {unknown[0]}; distil it again with task=distill.")
    # Its buffers are computed, not stored, and still lie on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if head_token_ids is not None:
        trim_head(model, head_token_ids)
    return freeze(model)


def _refuse_incomplete(missing: Any, source: str) -> None:
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights such as {min(missing)}; download it again.")


@contextmanager
def _loading_messages(quiet: bool) -> Iterator[None]:
    """transformers' report of missing weights is checked here, not printed."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart, e.g. to key a saved head map; the same for float32 and bfloat16 copies of bf16 weights."""
    if known := getattr(model, "specsmallkv_fingerprint", None):
        return known
    config = model.config
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    digest = hashlib.sha256(repr([getattr(config, name) for name in (*names, "vocab_size")]).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        sample = tensor_parallel.whole(weight.detach()).flatten()[:: max(1, weight.numel() // 64)]
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def loaded_bytes(model: PreTrainedModel, besides: PreTrainedModel | None = None) -> int:
    """Bytes of the model's parameters and packed layers but for those that `besides` has too."""
    own, others = _weights(model), _weights(besides) if besides else {}
    return sum(nbytes for key, nbytes in own.items() if key not in others)


def _weights(model: PreTrainedModel) -> dict[int, int]:
    packed = {id(x.blocks): x.nbytes for x in model.modules() if isinstance(x, PackedLinear)}
    held = map(tensor_parallel.local, model.parameters())
    return {p.data_ptr(): p.numel() * p.element_size() for p in held} | packed
