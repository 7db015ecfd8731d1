"""The tail term: what the evicted remainder adds to attention, weighted by the draft's odds.

    o = (o_L + sum_i r_i v_i) / (1 + sum_i r_i),   r_i = factor * s * pred mass of i / pred mass of L without the sinks

with s the share of the target's own attention on L that is not on the sinks (the head map is fitted without their
columns, so odds are taken against the rest of L). Two remainders: the evicted tokens that rank next, whose values the
host pools with the draft's weights, and all others, whose plain mean value stands for them. Only the two pooled
vectors of each query reach the device. This file does not know who chose L.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import TieredLayer, select

BELIEVED_SIMILARITY = 0.4  # cosine of the head map below which a head's odds are not believed at all


@dataclass
class TailTerm:
    """odds (1, H_q, q, 2) against L without the sinks, factor included; values (1, H_q, q, 2, D); num_sinks in L."""

    odds: Tensor
    values: Tensor
    num_sinks: int

    def narrow(self, count: int) -> "TailTerm":
        """Of the first `count` queries."""
        return TailTerm(self.odds[:, :, :count], self.values[:, :, :count], self.num_sinks)

    def add(self, output: Tensor, probabilities: Tensor) -> Tensor:
        """output (1, H_q, q, D) of attention over L, probabilities (1, H_q, q, n) of its slots, sinks first."""
        beside_sinks = 1 - probabilities[..., : self.num_sinks].sum(dim=-1, keepdim=True)
        odds = self.odds * beside_sinks
        added = (odds.unsqueeze(-1) * self.values).sum(dim=-2)
        return ((output.float() + added) / (1 + odds.sum(dim=-1, keepdim=True))).to(output.dtype)


def tail_term(
    predicted: Tensor, saliency: Tensor, layer: TieredLayer, num_sinks: int, factor: Tensor, pool: float
) -> TailTerm | None:
    """The tail term of one layer for the coming verify block, None where nothing is evicted.

    predicted (H_q, q, N): rows of the block; saliency (H_kv, >= tail_start) ranks; factor (H_q,): share of
    each head's odds that is believed; pool: how many evicted tokens are pooled by weight, as a multiple of the kept.
    """
    rows = predicted.unflatten(0, (saliency.shape[0], -1))  # (H_kv, group, q, N)
    kept = layer.kept_positions[0]
    evicted = torch.ones(kept.shape[0], layer.tail_start, dtype=torch.bool, device=kept.device).scatter(1, kept, False)
    count = layer.tail_start - kept.shape[1]
    if count <= 0:
        return None
    held = rows.gather(-1, kept[:, None, None].expand(*rows.shape[:3], -1)).sum(dim=-1)
    held += rows[..., layer.tail_start :].sum(dim=-1)
    mass = (rows.sum(dim=-1) - held).clamp_min(0)  # of the evicted: one pass over the rows, no masked copy of them
    against = held - rows[..., :num_sinks].sum(dim=-1)  # sinks are always kept
    ranked = saliency[:, : layer.tail_start].masked_fill(~evicted, -1)
    near = ranked.topk(min(int(pool * kept.shape[1]), count), dim=-1, sorted=False).indices  # (H_kv, p)
    near_values = select(layer.store_v, near.unsqueeze(0)).to(predicted.device)[0].float()
    weights = rows.gather(-1, near[:, None, None].expand(*rows.shape[:3], -1))
    near_mass = weights.sum(dim=-1)
    pooled = (weights.flatten(1, 2) @ near_values).view(*near_mass.shape, -1)
    pooled = pooled / near_mass.clamp_min(1e-9).unsqueeze(-1)
    far_sum = layer.older_value_sum[0] - layer.v[0, :, : kept.shape[1]].float().sum(1) - near_values.sum(1)
    far = (far_sum / max(count - near.shape[1], 1))[:, None, None].expand_as(pooled)
    odds = torch.stack((near_mass, (mass - near_mass).clamp_min(0)), dim=-1) / against.clamp_min(1e-6).unsqueeze(-1)
    values = torch.stack((pooled, far), dim=-2)
    odds = factor[:, None, None] * odds.flatten(0, 1)
    return TailTerm(odds.unsqueeze(0), values.flatten(0, 1).unsqueeze(0), num_sinks)
