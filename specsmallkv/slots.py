"""Which slots of a layer hold the tokens that are wanted, and the entries of some slots.

Sets and look-ups are (B, H_kv, n) tensors, one set a KV head; what they mean is `tiered_layer.py`'s.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .tiered_layer import TieredLayer

SUMMED = 1024  # tokens


def slots_of(have: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of `wanted` (B, H_kv, c) in the sorted `have` (B, H_kv, n), 0 where absent, and which are there."""
    if not have.shape[2]:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    slot = torch.searchsorted(have.contiguous(), wanted.contiguous()).clamp_(max=have.shape[2] - 1)
    found = have.gather(2, slot) == wanted
    return slot.masked_fill(~found, 0), found


def select(source: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, H_kv, m) of `source` (B, H_kv, n, D), as a new tensor (B, H_kv, m, D) on its device."""
    return select_both((source,), index)[0]


def select_both(sources: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    """`select` from several sources of as many tokens, as K and V are; they may differ in D."""
    batch, heads, length, _ = sources[0].shape
    if not index.shape[2]:
        return tuple(source[:, :, :0].clone() for source in sources)
    index = index.to(sources[0].device)
    offset = torch.arange(0, batch * heads * length, length, device=index.device).view(batch, heads, 1)
    rows = (index + offset).flatten()
    flat = (source.reshape(-1, source.shape[3]) for source in sources)  # views: buffers are handed over whole
    return tuple(source.index_select(0, rows).view(*index.shape, -1) for source in flat)


class Found(NamedTuple):
    """What a layer has of the tokens (B, H_kv, c) that it is to keep.

    slot: where, 0 if absent; resident: whether; padding: a head's repetitions of its first one; num_new: the others.
    """

    slot: Tensor
    resident: Tensor
    padding: Tensor
    num_new: int


def look_up(layers: list["TieredLayer"], wanted: list[Tensor], padded: bool) -> list[Found]:
    """Of each layer; they hold as many tokens, and as many positions (B, H_kv, c) are wanted of each.

    padded: a head may repeat its first position.
    """
    batch, together = wanted[0].shape[0], torch.cat(wanted)
    slot, resident = slots_of(positions_of(layers), together)
    repeats = padded and together.shape[2]
    padding = F.pad(together.diff(dim=2) == 0, (1, 0)) if repeats else torch.zeros_like(resident)
    num_new = (~(resident | padding)).view(len(layers), -1).sum(dim=1).cpu().tolist()
    return [Found(*own) for own in zip(*(x.split(batch) for x in (slot, resident, padding)), num_new, strict=True)]


def positions_of(layers: list["TieredLayer"]) -> Tensor:
    """(layers x B, H_kv, num_slots) logical position of every slot, ascending, of layers that hold as many tokens."""
    kept = torch.cat([layer.kept_positions for layer in layers])
    tail = torch.arange(layers[0].tail_start, layers[0].seen, device=kept.device)
    return torch.cat((kept, tail.expand(*kept.shape[:2], -1)), dim=2)


def value_sum(values: Tensor) -> Tensor:
    """(B, H_kv, D) float32: sum over the tokens of (B, H_kv, n, D); on CPUs in parts.

    torch sums 16-bit numbers through a float32 copy: of all of them it would be new memory in every layer, which on a
    virtual machine costs ten times the sum.
    """
    if values.device.type != "cpu":
        return values.sum(dim=2, dtype=torch.float32)
    total = torch.zeros(*values.shape[:2], values.shape[3], dtype=torch.float32)
    for part in values.split(SUMMED, dim=2):
        total += part.float().sum(dim=2)
    return total


def enlarged(source: Tensor, slots: int, used: int) -> Tensor:
    """(B, H_kv, slots, D) with the first `used` slots of `source`, or `source` itself if it is large enough."""
    if source.shape[2] >= slots:
        return source
    larger = source.new_empty(*source.shape[:2], slots, source.shape[3])
    larger[:, :, :used] = source[:, :, :used]
    return larger


class Arrived(NamedTuple):
    """Entries that were sent ahead of a recall: positions (B, H_kv, m), sorted; parts as in the store, of them."""

    positions: Tensor
    parts: tuple[Tensor, ...]


def sent_over(rows: Tensor, device: torch.device) -> Tensor:
    """Host rows on the device; a GPU's copy holds up nobody only if it comes from pinned memory."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
