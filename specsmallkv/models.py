"""Load a target and a draft that fit each other.

Weights come from safetensors through transformers' own classes (`weights.py`); no code from a checkpoint is ever run.
Loaded models are in eval mode and frozen. Nothing here knows policies.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import random_model, tensor_parallel
from .compiled import check_compile, compile_pair
from .config import DTYPES, ModelConfig, check_model_settings
from .errors import UserError
from .four_bits import check_bits, round_linears
from .linear import Packed, can_pack, choose_linear, pack_linears
from .matching import HeadMap
from .placement import DeviceMap, device_map
from .saved_map import load_head_map
from .sources import read_config, resolve, typed_config
from .tokenizer import byte_tokenizer, check_tokenizers_agree, live_vocabulary, load_tokenizer
from .trimmed_head import TrimmedHead, frequent_tokens, trim_head
from .weights import fingerprint, freeze, load_sharing_embeddings, load_weights, loaded_bytes

UNTRAINED = "untrained:"  # before a draft's source: the same model with random weights in its layers
DRAFT_KEY = "specsmallkv_draft"  # in the config.json of a draft that `task=distill` wrote
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, str]  # model, tokenizer, origin


@dataclass
class ModelPair:
    """Origins, as the record shows them: "safetensors", "dequantised GGUF", "random weights", "distilled draft".

    head_map: a saved one, if the configuration names it.
    linear: how weights lie, "torch", "packed" or "blocked" (`linear.py`).
    compile: torch.compile's mode (`compiled.py`), if any.
    """

    target: PreTrainedModel
    draft: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    target_origin: str
    draft_origin: str | None
    head_map: HeadMap | None = None
    linear: str = "torch"
    compile: str | None = None

    def pack(self, form: str, draft_bits: int | None = None) -> None:
        """Replace linear layers by ones for inference only: the draft's by four-bit ones if draft_bits says so, others
        by "packed" or "blocked" ones; under "torch" they stay."""
        check_compile(self.compile, self.target.device, form)
        packed: Packed = {}
        for model in filter(None, (self.target, self.draft)):
            rounds = draft_bits is not None and model is self.draft
            if rounds or form != "torch":
                model.specsmallkv_fingerprint = fingerprint(model)  # while it has its weights
            if rounds:
                round_linears(model)
            if form != "torch":
                pack_linears(model, form, packed)
        self.linear = form

    @property
    def eos_token_ids(self) -> set[int]:
        configs = (self.target.generation_config, self.target.config, self.tokenizer)
        ids: Any = next((c.eos_token_id for c in configs if getattr(c, "eos_token_id", None) is not None), [])
        return set(ids) if isinstance(ids, list | tuple) else {ids}

    @property
    def special_token_ids(self) -> set[int]:
        """What every head has to know: ends, turns and other markers that the vocabulary really has."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder, *self.eos_token_ids}
        return special & set(range(self.target.config.vocab_size))

    @property
    def target_weight_bytes(self) -> int:
        return loaded_bytes(self.target)

    @property
    def draft_weight_bytes(self) -> int:
        """The draft's own tensors; what it shares with the target is counted there."""
        return loaded_bytes(self.draft, besides=self.target) if self.draft else 0


def load_pair(config: ModelConfig, need_draft: bool, quiet: bool = False) -> ModelPair:
    check_model_settings(config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, config.linear)
    split = config.device == tensor_parallel.DEVICE
    linear = linear_of(config, dtype, device)
    check_compile(config.compile, device, linear)
    if need_draft:
        check_bits(config.draft_bits, device, config.compile is not None)
    if need_draft and not config.draft:
        raise UserError(f"model {config.name} names no draft; set model.draft, or use policy=full speculation=none.")
    target, tokenizer, origin = load_target(
        config.target, dtype, device, quiet, _spread(config, need_draft, dtype, quiet), split
    )
    pair = ModelPair(target, None, tokenizer, origin, None)
    if need_draft and config.draft:
        _add_draft(pair, config, dtype, quiet)
    if linear != "torch" or (config.draft_bits and pair.draft):
        pair.pack(linear, config.draft_bits)
    compile_pair(pair, config.compile)
    return pair


def linear_of(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """`model.linear` resolved; UserError if this pair cannot have it."""
    split = config.device == tensor_parallel.DEVICE
    if split and config.linear == "auto":
        return "torch"
    linear = choose_linear(config.linear, dtype, device, compiled=config.compile is not None)
    if split and linear != "torch":
        raise UserError(f"model.linear={linear} needs whole layers; use model.linear=torch with a split target.")
    return linear


def _spread(config: ModelConfig, need_draft: bool, dtype: torch.dtype, quiet: bool) -> DeviceMap | None:
    """Where the target's modules lie if it needs several GPUs; None: on one device."""
    if config.device != "auto":
        return None
    draft = config.draft.removeprefix(UNTRAINED) if need_draft and config.draft else None
    return device_map(config.target, draft, dtype, quiet, torch.cuda.device_count())


def _add_draft(pair: ModelPair, config: ModelConfig, dtype: torch.dtype, quiet: bool) -> None:
    """Load the draft beside the target and check that both fit each other."""
    assert config.draft is not None
    target = pair.target
    pair.draft, tokenizer, pair.draft_origin = load_draft(
        config.draft, target, dtype, target.device, config.target, pair.tokenizer, quiet
    )
    check_tokenizers_agree(pair.tokenizer, tokenizer, config.target, config.draft)
    _check_vocabulary_fits(config, target, pair.draft, pair.tokenizer)
    _warn_if_larger(config, target, pair.draft)
    pair.head_map = None if config.head_map is None else _saved_head_map(config, target, pair.draft)
    if config.draft_vocab_size:
        _cut_vocabulary(pair, config)


def refuse_cut(config: ModelConfig, trained_rows: int | None) -> None:
    """UserError for a draft whose head has only so many rows by training."""
    if config.draft_vocab_size and trained_rows is not None:
        raise UserError(
            f"model.draft_vocab_size={config.draft_vocab_size} cannot cut the head of {config.draft}, which has "
            f"{trained_rows} tokens by training; leave it at 0."
        )


def _cut_vocabulary(pair: ModelPair, config: ModelConfig) -> None:
    """Of the draft's head, special tokens and those of the lowest ids remain; see `trimmed_head.py`."""
    draft, size = pair.draft, config.draft_vocab_size
    assert draft is not None
    head = draft.get_output_embeddings()
    refuse_cut(config, len(head.weight) if isinstance(head, TrimmedHead) else None)
    special = pair.special_token_ids & set(live_vocabulary(pair.tokenizer).values())
    if size < len(special):
        raise UserError(f"model.draft_vocab_size={size} is below the {len(special)} special tokens; raise it.")
    if size < len(head.weight):
        draft.specsmallkv_fingerprint = fingerprint(draft)  # of the model as it was
        trim_head(draft, frequent_tokens([], size, len(head.weight), special), keep_full=True)


def load_target(
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    quiet: bool = False,
    spread: DeviceMap | None = None,
    split: bool = False,
) -> Loaded:
    """Any source, on one device or, with `spread`, its modules where that says; split: shared by all processes."""
    if source.startswith("random:"):
        if split:
            raise UserError(f"model.target={source} is never split; use model.device=auto.")
        model = random_model.build(source, dtype).to(device)
        return freeze(model), byte_tokenizer(), "random weights"
    directory = resolve(source, quiet)
    model = load_weights(directory, source, dtype, device, quiet, spread, split)
    origin = getattr(model.config, "specsmallkv_origin", "safetensors")
    return model, load_tokenizer(directory, source), origin


def load_draft(
    source: str,
    target: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    target_source: str,
    target_tokenizer: PreTrainedTokenizerBase,
    quiet: bool = False,
) -> Loaded:
    """Any source, or a distilled draft, which uses the target's embeddings and tokenizer; UNTRAINED before either."""
    if source.startswith(UNTRAINED):
        source = source.removeprefix(UNTRAINED)
        model, tokenizer, _ = load_draft(source, target, dtype, device, target_source, target_tokenizer, quiet)
        random_model.untrain(model)
        return model, tokenizer, "random weights"
    if source.startswith("random:"):
        return load_target(source, dtype, device)
    directory = resolve(source, quiet)
    facts = read_config(directory, source).get(DRAFT_KEY)
    if facts is None or not facts["shares_embeddings"]:
        return load_target(source, dtype, device, quiet)
    if tensor_parallel.shard_of(target).size > 1:
        raise UserError(
            f"{source} uses the target's embeddings, which a target split over processes does not have as a whole; "
            "use a draft with weights of its own, or model.device=auto."
        )
    _check_distilled_for(facts, directory, source, target, target_source)
    model = load_sharing_embeddings(directory, source, target, dtype, device)
    return model, target_tokenizer, "distilled draft"


def resolve_dtype(name: str, device: torch.device, linear: str = "torch") -> torch.dtype:
    """The torch type of `model.dtype`; auto is bfloat16 where the device computes in it or `linear.py` helps out."""
    if name not in DTYPES:
        raise UserError(f"model.dtype={name!r} is not possible; use one of {', '.join(DTYPES)}.")
    if name == "auto":
        helped = linear in ("auto", "packed") and can_pack(torch.bfloat16, device)
        return torch.bfloat16 if helped or computes_in_bfloat16(device) else torch.float32
    return getattr(torch, name)


def computes_in_bfloat16(device: torch.device) -> bool:
    """False for CPUs without AVX-512, where torch's bfloat16 products were measured 7 times slower than float32."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def resolve_device(name: str) -> torch.device:
    if name == tensor_parallel.DEVICE:
        return tensor_parallel.local_device()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device={name!r} is no device; use auto, cpu, mps, cuda or cuda:N.") from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UserError(f"model.device={name} is not there ({count} {device.type} devices); use auto or cpu.")
    return device


def _saved_head_map(config: ModelConfig, target: PreTrainedModel, draft: PreTrainedModel) -> HeadMap:
    """The map that `model.head_map` names, on the draft's device; UserError if it belongs to other models."""
    assert config.head_map is not None
    saved = load_head_map(config.head_map)
    saved.check_shape(target.config, draft.config)
    if config.head_map_check:
        saved.check_models(fingerprint(target), fingerprint(draft))
    return saved.head_map.to(draft.device)


def _check_distilled_for(
    facts: dict[str, Any], directory: Path, source: str, target: PreTrainedModel, target_source: str
) -> None:
    config = typed_config(directory, source)
    same_shape = all(getattr(config, name) == getattr(target.config, name) for name in ("hidden_size", "vocab_size"))
    same_target = facts["target"] == target_source or facts.get("target_fingerprint") == fingerprint(target)
    if not (same_shape and same_target):
        raise UserError(
            f"draft {source} was distilled for {facts['target']} and shares its embeddings, so it cannot "
            f"serve {target_source}; set model.draft to another model or model.target={facts['target']}."
        )


def _check_vocabulary_fits(
    config: ModelConfig, target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Matrices may be padded differently, but no token may lie beyond the smaller one."""
    last, rows = max(live_vocabulary(tokenizer).values()), (target.config.vocab_size, draft.config.vocab_size)
    if last >= min(rows):
        raise UserError(
            f"token id {last} lies beyond the smaller vocabulary of {config.target} ({rows[0]}) and "
            f"{config.draft} ({rows[1]}); set model.draft to a smaller model of the target's own family."
        )


def _warn_if_larger(config: ModelConfig, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    sizes = [sum(p.numel() for p in model.parameters()) for model in (draft, target)]
    if sizes[0] > sizes[1]:
        warnings.warn(
            f"draft {config.draft} ({sizes[0] / 1e6:,.1f}M parameters) is larger than target {config.target} "
            f"({sizes[1] / 1e6:,.1f}M), so drafting costs more than it saves; are they swapped?",
            stacklevel=3,
        )
