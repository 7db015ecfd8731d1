"""Keys in few bits: each channel is centred and scaled first, then each vector has a scale and an offset of its own.

Some channels of a key are tens of times larger than the others, the same ones in all tokens (KIVI, arXiv 2402.02750);
unscaled, they would take all levels. `packed_layer.py` says by which keys centre and spread are judged.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import fold, widened
from .packed_values import Stored, levels_of, pack, per_column

SAMPLED = 1024  # tokens that the channels are judged by, spread over those that are there
NARROWEST = 0.01  # of the head's median spread: a channel that seemed constant may not stay so


class ChannelScale(NamedTuple):
    """Centre and spread of each channel, (B, H_kv, 1, D), in the cache's type."""

    centre: Tensor
    spread: Tensor


def channel_scale(keys: Tensor) -> ChannelScale:
    """Mean and mean deviation over keys (B, H_kv, n, D); the sinks' odd vectors move these little."""
    assert keys.shape[2], "channels cannot be judged by no token"
    sample = keys[:, :, :: max(1, keys.shape[2] // SAMPLED)].float()
    centre = sample.mean(dim=2, keepdim=True)
    spread = (sample - centre).abs().mean(dim=2, keepdim=True)
    narrowest = max(NARROWEST, sample.shape[2] ** -0.5)  # a few tokens tell a channel's spread badly
    least = narrowest * spread.median(dim=-1, keepdim=True).values
    spread = torch.where(least > 0, spread.maximum(least), 1.0)
    return ChannelScale(centre.to(keys.dtype), spread.to(keys.dtype))


def pack_keys(keys: Tensor, channels: ChannelScale, bits: int) -> Stored:
    """Of keys (B, H_kv, m, D): codes (B, H_kv, m, D * bits / 8), scales and offsets (B, H_kv, m, 2)."""
    return pack((keys.float() - channels.centre) / channels.spread, bits, keys.dtype)


def unpack_keys(stored: Stored, channels: ChannelScale, bits: int) -> Tensor:
    """Keys (B, H_kv, m, D), in the cache's type."""
    codes, affine = stored
    scale, offset = affine.float().split(1, dim=-1)
    normal = torch.cat(levels_of(codes, bits), dim=-1) * scale + offset
    return torch.addcmul(channels.centre.float(), normal, channels.spread.float()).to(affine.dtype)


def key_products(query: Tensor, stored: Stored, channels: ChannelScale, bits: int) -> Tensor:
    """Float32 products (B, H_kv, group * q, m) of query (B, H_q, q, D) with packed keys; only their codes are read."""
    codes, affine = stored
    scale, offset = per_column(affine)
    rows = fold(query.float(), codes.shape[1])
    scaled = rows * channels.spread
    parts = levels_of(codes, bits)
    products, *others = map(_products, scaled.chunk(len(parts), dim=-1), parts)
    for other in others:
        products.add_(other)
    constant = rows @ channels.centre.float().transpose(2, 3)
    return products.mul_(scale).addcmul_(scaled.sum(dim=-1, keepdim=True), offset).add_(constant)


def _products(rows: Tensor, levels: Tensor) -> Tensor:
    """In float32 on every device: scores go through an exponential."""
    left, right = widened(rows, levels if levels.device.type == "cpu" else levels.float())
    return left @ right.transpose(2, 3)
