"""Policies that score by what the draft's attention predicts: their base class, and SmallKV itself."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..matching import METHODS
from ..slots import slots_of
from ..tiered_layer import Candidates, TieredLayer
from .base import Plan, Policy
from .evidence import Evidence
from .static import SnapKV


@dataclass(kw_only=True)
class DraftPolicy(Policy):
    """Scores by the saliency that the draft's attention predicts.

    matching: "one_hot" or "mixture". observation_size: prompt rows that the head map is fitted on. map_rows: how
    many of them a saved head map counts as; 0: it is not used, inf: it alone is. prefill_chunk: tokens that the target
    reads between two evictions of its prompt, by a saved head map alone; 0: it reads all of it before anything goes.
    """

    matching: str = "mixture"
    observation_size: int = 128
    map_rows: float = 128
    prefill_chunk: int = 0
    uses_draft = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("matching", METHODS)
        if self.observation_size < 1:
            raise UserError(f"policy.observation_size={self.observation_size} is not positive; give at least 1.")
        if not self.map_rows >= 0:
            raise UserError(f"policy.map_rows={self.map_rows} is no number of rows; give 0 (no saved map) or more.")

    @property
    def num_observed(self) -> int:
        return max(self.observation_size, self.window_size)

    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        choose = self.predicted_score if evidence.trusts_draft else self._without_draft
        return choose(index, layer, candidates, evidence)

    def predicted_score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        """Importance of each candidate, (1, H_kv, n), where the draft is believed."""
        assert evidence.saliency is not None, "saliency is filled before planning"
        return evidence.saliency[index].unsqueeze(0).gather(-1, candidates.positions)

    def _without_draft(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        """What `snapkv` would keep, its wider recent window included; like there, what is gone does not come back."""
        rival = SnapKV(name="snapkv", num_sink_tokens=self.num_sink_tokens)
        scores = rival.score(index, layer, candidates, evidence)
        newest = int(candidates.positions.max()) + self.window_size - rival.window_size
        scores = scores.masked_fill(candidates.positions > newest, torch.finfo(scores.dtype).max)
        return scores.masked_fill(~slots_of(layer.positions, candidates.positions)[1], -torch.inf)

    def recalls(self, evidence: Evidence) -> bool:
        return evidence.trusts_draft


@dataclass(kw_only=True)
class SmallKV(DraftPolicy):
    """SmallKV (arXiv 2508.02751): draft saliency at every refresh, marginal tokens V-only and compensated.

    marginal_share: part of the budget's bytes spent on marginal tokens, in [0, 1); none where the head map's
    mean cosine is below marginal_similarity, or the draft is not trusted: poor odds do more harm than their bytes.
    marginal_bits: of their values, 4 or 8, each vector with a scale and an offset of its own; None: as they come.
    compensation: "renormalised" (odds against the kept set), "raw" (the draft's own mass) or "none".
    own_share: part of the score that is the target's own attention so far, a mean over the queries that could see the
    token; the rest is the draft's, of the rows since the last refresh and of `num_foreseen_tokens` tokens that it
    writes behind the prompt before the first one (the idea of arXiv 2506.08373).
    """

    compensation: str = "renormalised"
    marginal_share: float = 0.25
    marginal_similarity: float = 0.7
    marginal_bits: int | None = 4
    own_share: float = 0.5
    num_foreseen_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("compensation", ("none", "raw", "renormalised"))
        for key, most in (("marginal_share", "1)"), ("marginal_similarity", "1]"), ("own_share", "1]")):
            value = getattr(self, key)
            if not 0 <= value <= 1 or (most == "1)" and value == 1):
                raise UserError(f"policy.{key}={value} is outside [0, {most}; give e.g. 0.25.")
        self._bits("marginal_bits")
        if self.num_foreseen_tokens < 0:
            raise UserError(
                f"policy.num_foreseen_tokens={self.num_foreseen_tokens} is negative; give 0 (off) or more."
            )

    @property
    def uses_mass(self) -> bool:  # type: ignore[override]
        return self.own_share > 0

    def compensates(self, evidence: Evidence) -> bool:
        return super().compensates(evidence) and evidence.trusts_odds(self.marginal_similarity)

    def predicted_score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        by_draft = super().predicted_score(index, layer, candidates, evidence)
        if not self.uses_mass:
            return by_draft
        assert evidence.mass is not None, "the mass is counted from the prompt on"
        positions = candidates.positions
        own = evidence.mass.sums[index].gather(-1, positions) / (layer.seen - positions)
        sinks = positions < self.num_sink_tokens  # kept anyway; their mass would drown the rest
        own, by_draft = (distribution(x.masked_fill(sinks, 0)) for x in (own, by_draft))
        return self.own_share * own + (1 - self.own_share) * by_draft

    def plan(self, index: int, layer: TieredLayer, evidence: Evidence, evicted_at: int | None = None) -> Plan:
        if self.marginal_share and not evidence.trusts_odds(self.marginal_similarity):
            return replace(self, marginal_share=0.0).plan(index, layer, evidence, evicted_at)
        return super().plan(index, layer, evidence, evicted_at)


def distribution(scores: Tensor) -> Tensor:
    """Non-negative scores (..., n), scaled to sum to 1."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-12)
