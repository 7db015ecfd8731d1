"""Where a target's layers lie: on one device, or spread over all CUDA devices where one is too small for the pair.

The draft is never spread: it lies on the target's first device, beside the embeddings. Sizes come from the
configurations, before any weight is read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import UserError
from .sources import model_class, read_config, resolve, typed_config

WEIGHT_SHARE = 0.8  # of a device's free memory; caches, rows and activations need the rest
GIBIBYTE = 2**30
DeviceMap = dict[str, Any]  # module -> device, as transformers' `device_map`


def free_memory(index: int) -> int:
    """Bytes that weights may take on a CUDA device."""
    return int(WEIGHT_SHARE * torch.cuda.mem_get_info(index)[0])


def empty_model(directory: Path, source: str) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return model_class(read_config(directory, source), source)(typed_config(directory, source))


def device_map(
    target: str,
    draft: str | None,
    dtype: torch.dtype,
    quiet: bool,
    num_devices: int,
    free: Callable[[int], int] = free_memory,
) -> DeviceMap | None:
    """None if target and draft (sources) fit on the first device; else the device of each module of the target.

    Raises UserError if all devices together are too small.
    """
    if num_devices < 2 or target.startswith("random:"):
        return None
    model, beside = empty_model(resolve(target, quiet), target), _draft_bytes(draft, dtype, quiet)
    first, needed = free(0), _weight_bytes(model, dtype)
    if needed + beside <= first:
        return None
    room = [first - beside, *(free(index) for index in range(1, num_devices))]
    found = _spread(model, dtype, room)
    if found is None:
        needs, has = (f"{count / GIBIBYTE:.1f} GiB" for count in (needed + beside, sum(room) + beside))
        raise UserError(
            f"{target} and its draft have {needs} of weights in {str(dtype).removeprefix('torch.')}, which do not fit "
            f"on the {num_devices} CUDA devices ({has} for weights); use a smaller model, model.dtype=bfloat16 or "
            "model.device=cpu."
        )
    return found


def _spread(model: PreTrainedModel, dtype: torch.dtype, room: list[int]) -> DeviceMap | None:
    """Modules in the order in which they are used, the devices about equally full.

    None if they do not fit, or if the embeddings, and so the draft, would not lie on the first device.
    """
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(model.config.num_hidden_layers)), "model.norm"]
    fixed = {"model.rotary_emb": 0}
    if model.config.tie_word_embeddings:
        fixed["lm_head"] = 0
    else:
        names.append("lm_head")
    sizes = [_weight_bytes(model.get_submodule(name), dtype) for name in names]
    for percent in range(1, 101):
        places = fill(sizes, [percent * space // 100 for space in room])
        if places and places[0] == 0:
            return fixed | dict(zip(names, places, strict=True))
    return None


def fill(sizes: list[int], room: list[int]) -> list[int] | None:
    """Device of each part: as many as fit on the first one, then the next; None if some fit nowhere."""
    places, device, used = [], 0, 0
    for size in sizes:
        while device < len(room) and used + size > room[device]:
            device, used = device + 1, 0
        if device == len(room):
            return None
        places.append(device)
        used += size
    return places


def _draft_bytes(source: str | None, dtype: torch.dtype, quiet: bool) -> int:
    if source is None or source.startswith("random:"):
        return 0
    return _weight_bytes(empty_model(resolve(source, quiet), source), dtype)


def _weight_bytes(model: torch.nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize
