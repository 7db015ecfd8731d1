"""SpecSmallKV's policy: a set for each verify pass, by the draft's rows for the tokens of that pass."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..matching import REDUCTIONS
from ..oracle import LOOKAHEADS
from ..ranking import largest
from ..tiered_layer import TieredLayer
from .base import Plan
from .draft import DraftPolicy
from .evidence import Evidence

SELECTIONS = ("block", "query")


def union_of(sets: list[Tensor], num_candidates: int) -> tuple[Tensor, Tensor]:
    """The union of the queries' sets and who reads what of it.

    sets: per query, distinct indices (1, H_kv, c). Returns the union (1, H_kv, u), sorted, and a mask (1, H_kv, q, u);
    u is the largest union of the heads, the others repeat their first index in front, masked for every query.
    """
    batch, heads, _ = sets[0].shape
    member = torch.zeros(batch, heads, len(sets), num_candidates, dtype=torch.bool, device=sets[0].device)
    member.scatter_(3, torch.stack(sets, dim=2), True)
    anyone, index = member.any(dim=2), torch.arange(num_candidates, device=member.device)
    size = int(anyone.sum(dim=-1).max())
    chosen = torch.where(anyone, index, -1).sort(dim=-1).values[..., num_candidates - size :]
    union = chosen.maximum(anyone.int().argmax(dim=-1, keepdim=True))
    mask = member.gather(3, union.unsqueeze(2).expand(-1, -1, len(sets), -1))
    return union, mask & (chosen >= 0).unsqueeze(2)


@dataclass(kw_only=True)
class Lookahead(DraftPolicy):
    """SpecSmallKV: before each verify pass, recall what the draft's rows for those very tokens ask for.

    selection: "block", one set per verify block, exactly within the budget; "query", one set within the budget for
    each query, from its own row alone, so that what a query reads does not depend on blocks; their union is held.
    weigh_rows: rows of the block count by the chance that the draft gives them (block only). lookahead: which of them
    are read, all ("block") or, under selection=block, those of drafting steps ("drafted") or the first one ("first").
    group_reduction: over the query heads that share keys, "max" or "mean".
    own_share: part of the score that is the target's own attention in its last verify pass (block only).
    tail_factor: share of the draft's odds that the evicted remainder enters attention with, 0 is off; tail_pool: how
    many evicted tokens, as a multiple of the kept, are pooled by the draft's weights; tail_limit: what
    odds are cut to, inf: nothing (`tail_term.py`; block only).
    key_bits, value_bits: of K and of V of critical tokens, but the window's, and of the host store's, 4 or 8; None: as
    they come (`packed_layer.py`).
    """

    residency: str = "offload"
    selection: str = "block"
    window_size: int = 8
    weigh_rows: bool = True
    group_reduction: str = "max"
    lookahead: str = "block"
    own_share: float = 0.0
    tail_factor: float = 0.5
    tail_pool: float = 2.0
    tail_limit: float = 1.0
    key_bits: int | None = None
    value_bits: int | None = None
    every_round = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("selection", SELECTIONS)
        self._one_of("group_reduction", REDUCTIONS)
        self._one_of("lookahead", LOOKAHEADS)
        if self.selection == "query" and self.lookahead != "block":
            raise UserError(
                f"policy.lookahead={self.lookahead} leaves queries without a row, which policy.selection=query gives "
                "a set each; use policy.lookahead=block."
            )
        if not 0 <= self.own_share < 1:  # at 1 nothing would ever be recalled
            raise UserError(f"policy.own_share={self.own_share} is outside [0, 1); give e.g. 0.3, or 0 (off).")
        self._bits("key_bits")
        self._bits("value_bits")
        for key in ("tail_factor", "tail_pool"):
            if getattr(self, key) < 0:
                raise UserError(f"policy.{key}={getattr(self, key)} is negative; give 0 (off) or more.")
        if not self.tail_limit > 0:
            raise UserError(f"policy.tail_limit={self.tail_limit} is not above 0; give e.g. 1, or .inf (no limit).")

    def plan(self, index: int, layer: TieredLayer, evidence: Evidence, evicted_at: int | None = None) -> Plan:
        choose = super().plan
        if self.selection == "block":
            return choose(index, layer, evidence, evicted_at)
        assert evidence.saliency is not None, "saliency is filled before planning"
        rows = evidence.saliency.unbind(dim=2)
        plans = [choose(index, layer, replace(evidence, saliency=row), evicted_at) for row in rows]
        union, row_mask = union_of([plan.critical for plan in plans], plans[0].tail_start)
        return plans[0]._replace(critical=union, row_mask=row_mask)

    def plan_layers(
        self, layers: dict[int, TieredLayer], evidence: Evidence, evicted_at: int | None = None
    ) -> list[Plan]:
        """All at once where the draft chooses for a block: the layers then rank the same positions for equal sizes."""
        hooks = ("plan", "score", "predicted_score", "tiers", "plain_tiers", "layer_units", "layer_shares")
        changed = any(getattr(type(self), hook) is not getattr(Lookahead, hook) for hook in hooks)
        if (
            changed
            or self.marginal_share
            or self.selection == "query"
            or not evidence.trusts_draft
            or evicted_at is None
        ):
            return super().plan_layers(layers, evidence, evicted_at)
        assert evidence.saliency is not None, "saliency is filled before planning"
        tail_start = evicted_at - min(self.window_size, evicted_at)
        scores = torch.stack([evidence.saliency[index, :, :tail_start] for index in layers])
        scores[..., : self.num_sink_tokens] = torch.inf
        count = min(self.tiers(evicted_at).critical - (evicted_at - tail_start), tail_start)
        critical = largest(scores, count)
        return [Plan(own, own[..., :0], tail_start) for own in critical.split(1)]
