"""Values in fewer bits, of marginal tokens or of critical ones, so that the same bytes hold more of them.

Each KV head's vector of a token has a scale and an offset of its own, in the cache's type (per-token quantisation of V
as in KIVI, arXiv 2402.02750). A marginal token's weight is small, and so is the rounding's part in the output; over
many critical tokens it averages out.
"""

import torch
from torch import Tensor

from .backends import fold, weighted_values, widened
from .slots import select

BITS = (4, 8)
Stored = tuple[Tensor, ...]  # (values,) as they are, or (codes uint8, scale and offset), all (B, H_kv, m, ...)


def pack(values: Tensor, bits: int | None, dtype: torch.dtype | None = None) -> Stored:
    """Of values (B, H_kv, m, D): codes (B, H_kv, m, D * bits / 8) and (B, H_kv, m, 2); bits None: the values.

    dtype: of scales and offsets; None: the values' own.
    """
    if bits is None:
        return (values,)
    dtype = dtype or values.dtype
    low, high = values.aminmax(dim=-1, keepdim=True)
    low = low.to(dtype)
    scale = ((high.float() - low.float()) / (2**bits - 1)).clamp_min(torch.finfo(dtype).tiny).to(dtype)
    levels = ((values.float() - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:  # the first half of the head's dimensions in the low bits, the second in the high ones
        assert values.shape[3] % 2 == 0, f"{values.shape[3]} dimensions cannot be packed in pairs"
        first, second = levels.chunk(2, dim=-1)
        levels = first | second << 4
    return levels, torch.cat((scale, low), dim=-1)


def levels_of(codes: Tensor, bits: int) -> list[Tensor]:
    """Of the head's dimensions in order, uint8."""
    return [codes] if bits == 8 else [codes & 15, codes >> 4]


def unpack(stored: Stored, bits: int | None) -> Tensor:
    """Values (B, H_kv, m, D), in the cache's type."""
    if bits is None:
        return stored[0]
    codes, affine = stored
    scale, offset = affine.float().split(1, dim=-1)
    return (torch.cat(levels_of(codes, bits), dim=-1) * scale + offset).to(affine.dtype)


def weighted_sum(weights: Tensor, stored: Stored, bits: int | None) -> Tensor:
    """`backends.weighted_values` of weights (B, H_q, q, m); the scales go to the weights, so codes are a factor."""
    if bits is None:
        return weighted_values(weights, stored[0])
    total = pooled(fold(weights.float(), stored[0].shape[1]), stored, bits)
    return total.view(*weights.shape[:3], -1).to(stored[1].dtype)


def pooled(rows: Tensor, stored: Stored, bits: int | None) -> Tensor:
    """Float32 products (B, H_kv, r, D) of rows (B, H_kv, r, m) and values."""
    if bits is None:
        return rows @ stored[0].float()
    codes, affine = stored
    scale, offset = per_column(affine)
    weighted = rows * scale
    total = torch.cat([_product(weighted, part) for part in levels_of(codes, bits)], dim=-1)
    return total.add_(rows @ offset.transpose(2, 3))


def per_column(affine: Tensor) -> tuple[Tensor, ...]:
    """Scales and offsets (B, H_kv, 1, m) float32 of (B, H_kv, m, 2): each contiguous, or a pass over them is slow."""
    return affine.float().transpose(2, 3).contiguous().split(1, dim=2)


def _product(rows: Tensor, levels: Tensor) -> Tensor:
    """In float32 on every device: levels are not centred, and the offsets cancel most of the product."""
    left, right = widened(rows, levels if levels.device.type == "cpu" else levels.float())
    return left @ right


def choose(values: Tensor, stored: Stored, index: Tensor, bits: int | None) -> Stored:
    """Entries `index` (B, H_kv, m) of values (B, H_kv, n, D) followed by what is stored; only new ones are packed."""
    count, held = values.shape[2], stored[0].shape[2]
    if not held or not index.shape[2]:
        return pack(select(values, index), bits)
    if not count:
        return tuple(select(part, index) for part in stored)
    fresh = pack(select(values, index.clamp(max=count - 1)), bits)
    old = tuple(select(part, (index - count).clamp(min=0)) for part in stored)
    is_new = (index < count).unsqueeze(-1)
    return tuple(torch.where(is_new, a, b) for a, b in zip(fresh, old, strict=True))


def entry_cost(head_dim: int, itemsize: int, bits: int | None) -> float:
    """Bytes of a marginal token over those of one with key and value, both in numbers of `itemsize` bytes."""
    if bits is None:
        return 0.5
    return (head_dim * bits / 8 + 2 * itemsize) / (2 * head_dim * itemsize)
