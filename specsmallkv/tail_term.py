"""The tail term: what the evicted remainder adds to attention, weighted by the draft's odds.

    o = (o_L + sum_i r_i v_i) / (1 + sum_i r_i),   r_i = s * f_i * min(1, limit / sum_j f_j),
    f_i = factor * pred mass of i / pred mass of L without the sinks

with s the share of the target's own attention on L that is not on the sinks (the head map is fitted without their
columns, so odds are taken against the rest of L). A draft that spreads its attention gives the evicted tokens far too
large odds in a few heads, hence the limit. Two remainders: the evicted tokens that rank next, whose values the
host pools with the draft's weights, and all others, whose plain mean value stands for them. Odds and values are those
of the row that chose, the mean over a verify block's, and serve all queries that read the set: with a row for each the
KL was the same (experiments/LOG.md, 2026-11-26). Only two pooled vectors of each head reach the device. This file does
not know who chose L.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .ranking import largest
from .tiered_layer import TieredLayer

BELIEVED_SIMILARITY = 0.4  # cosine of the head map below which a head's odds are not believed at all


@dataclass
class TailTerm:
    """odds (1, H_q, 1, 2) against L without the sinks, factor included; values (1, H_q, 2, D); num_sinks in L."""

    odds: Tensor
    values: Tensor
    num_sinks: int

    def add(self, output: Tensor, on_sinks: Tensor) -> Tensor:
        """output (1, H_q, q, D) of attention over L; on_sinks (1, H_q, q, 1), its share that lies on the sinks."""
        odds = self.odds * (1 - on_sinks)
        return ((output.float() + odds @ self.values) / (1 + odds.sum(dim=-1, keepdim=True))).to(output.dtype)


def tail_terms(
    predicted: Tensor,
    saliency: Tensor,
    layers: list[TieredLayer],
    num_sinks: int,
    factor: Tensor,
    pool: float,
    limit: float = math.inf,
) -> list[TailTerm | None]:
    """The tail terms of layers on one device whose tails begin alike and which keep as many; None: nothing is evicted.

    predicted (L, H_q, N): the row that chose; saliency (L, H_kv, >= tail_start) ranks; factor (L, H_q): share of
    each head's odds that is believed; pool: how many evicted tokens are pooled by weight, as a multiple of the kept;
    limit: what both remainders' odds together are cut to.
    """
    start, num_kept, num_kv_heads = layers[0].tail_start, layers[0].num_kept, saliency.shape[1]
    if (count := start - num_kept) <= 0:
        return [None] * len(layers)
    rows = predicted.unflatten(1, (num_kv_heads, -1)).flatten(0, 1)  # (L * H_kv, group, N)
    kept = torch.cat([layer.kept_positions[0] for layer in layers])  # (L * H_kv, c)
    ranked = saliency[..., :start].flatten(0, 1).scatter(1, kept, -1)
    near = largest(ranked, min(int(pool * num_kept), count))  # (L * H_kv, p)
    held = _at(rows, kept).sum(dim=-1) + rows[..., start:].sum(dim=-1)
    against = held - rows[..., :num_sinks].sum(dim=-1)  # sinks are always kept
    weights = _at(rows, near)
    near_mass = weights.sum(dim=-1)
    far_mass = (rows.sum(dim=-1) - held - near_mass).clamp_min(0)
    odds = torch.stack((near_mass, far_mass), dim=-1) / against.clamp_min(1e-6).unsqueeze(-1)
    odds = factor.unsqueeze(-1) * odds.view(*factor.shape, 2)
    odds *= (limit / odds.sum(dim=-1, keepdim=True)).clamp_max(1)
    weights /= near_mass.clamp_min(1e-9).unsqueeze(-1)
    values = _pooled(layers, *(x.unflatten(0, (len(layers), num_kv_heads)) for x in (near, weights)))
    return [TailTerm(odds[i, None, :, None], values[i, None], num_sinks) for i in range(len(layers))]


def _at(rows: Tensor, positions: Tensor) -> Tensor:
    """(n, group, p) of rows (n, group, N) at positions (n, p)."""
    return rows.gather(-1, positions.unsqueeze(1).expand(-1, rows.shape[1], -1))


def _pooled(layers: list[TieredLayer], near: Tensor, weights: Tensor) -> Tensor:
    """(L, H_q, 2, D): values near (L, H_kv, p), pooled by weights (L, H_kv, group, p), and the mean of the others."""
    weights = torch.cat((weights, torch.ones_like(weights[:, :, :1])), dim=2)  # one row more: their plain sum
    num_kept, products, kept = layers[0].num_kept, [], []
    on_host = weights.to(layers[0].store[-1].device)
    for layer, positions, own_weights in zip(layers, near.split(1), on_host, strict=True):
        products.append(layer.pooled(own_weights.unsqueeze(0), positions)[0])
        kept.append(layer.kept_value_sum()[0])
    pooled, near_sum = torch.stack(products).to(weights.device).split((weights.shape[2] - 1, 1), dim=2)
    others = torch.cat([layer.older_value_sum for layer in layers]) - torch.stack(kept) - near_sum.squeeze(2)
    far = others / max(layers[0].tail_start - num_kept - near.shape[-1], 1)
    return torch.stack((pooled, far.unsqueeze(2).expand_as(pooled)), dim=3).flatten(1, 2)
