"""Policies: which tokens of the target's cache stay critical, become marginal, or go.

A policy scores candidates; sizes, sinks, recent window and tiers are the same for all of them, so that they compare
byte for byte. A policy is stateless between sequences: what it freezes lies in the `Evidence` of the sequence.
To add one: a class with `score`, a YAML in conf/policy, a row in tests/test_policies.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionMass
from .backends import attention_probabilities
from .cache import RESIDENCIES, Candidates, TieredLayer, slots_of
from .errors import UserError
from .matching import METHODS, REDUCTIONS
from .oracle import LOOKAHEADS, AttentionOracle
from .own_attention import LastQueries
from .ranking import largest


@dataclass
class Evidence:
    """What a policy may look at, for one sequence.

    queries: the target's observation window per layer, (1, H_q, W, D). frozen: per layer, a policy's own memory.
    saliency: (L, H_kv, N) from the draft, for policies that ask for it; (L, H_kv, q, N), one per query of the coming
    verify pass, under `selection=query`. scaling: of the target's attention scores.
    mass: the target's accumulated attention, for policies that ask for it. budgeted: the target's layers that the
    budget is about; one with a sliding window is none of them.
    foreseen: by number of rows, the sum (M, N) of the draft's rows behind the prompt; all forks share it.
    last: the target's queries of the last verify pass, for policies that ask for them.
    """

    scaling: float
    budgeted: list[int] = field(default_factory=lambda: [0])
    oracle: AttentionOracle | None = None
    queries: dict[int, Tensor] = field(default_factory=dict)
    frozen: dict[int, Tensor] = field(default_factory=dict)
    saliency: Tensor | None = None
    mass: AttentionMass | None = None
    foreseen: dict[int, Tensor] = field(default_factory=dict)
    last: LastQueries | None = None

    @property
    def num_layers(self) -> int:
        return len(self.budgeted)

    def place(self, index: int) -> int:
        """Of layer `index` among those that share the budget."""
        return self.budgeted.index(index) if index in self.budgeted else index

    @property
    def trusts_draft(self) -> bool:
        return self.oracle is None or self.oracle.trusted

    def trusts_odds(self, least: float) -> bool:
        """Whether the draft's rows are alike enough to the target's to weigh values: `least` is a mean cosine."""
        return self.trusts_draft and (self.oracle is None or self.oracle.similarity >= least)

    def fork(self, reads_mass: bool) -> "Evidence":
        """The same prompt's evidence for another run: what a run changes is its own; it brings its own oracle."""
        mass = self.mass.clone() if self.mass and reads_mass else None
        return replace(self, frozen={}, saliency=None, oracle=None, mass=mass, last=None)


@dataclass(frozen=True)
class TierSizes:
    """Tokens per KV head: critical counts the recent window, marginal entries cost half as much."""

    critical: int
    marginal: int


class Plan(NamedTuple):
    """Arguments of `TieredLayer.retain`."""

    critical: Tensor
    marginal: Tensor
    tail_start: int
    row_mask: Tensor | None = None


@dataclass(kw_only=True)
class Policy(ABC):
    """Settings common to all policies.

    kv_budget: fraction of the full cache's bytes kept on the device, in (0, 1]. num_sink_tokens: first tokens, always
    kept. window_size: recent tokens, always kept; also the observation window. evict_block: tokens leave the window at
    committed lengths that are multiples of it. residency: "drop" or "offload". Raises UserError for bad values.
    """

    name: str
    kv_budget: float = 0.2
    num_sink_tokens: int = 4
    window_size: int = 32
    evict_block: int = 32
    residency: str = "drop"

    uses_draft = False  # needs the draft's attention rows
    uses_mass = False  # needs the target's accumulated attention
    reads_target = False  # looks at the target's true attention for the coming block (analysis only)
    every_round = False  # chooses anew before each verify pass (else once per eviction event)
    selection = "block"  # whose set a verify pass reads: the block's, or each query its own
    matching = "mixture"
    map_rows = 0.0  # rows of the observation window that a saved head map counts as
    group_reduction = "mean"  # of predictions over the query heads that share keys
    weigh_rows = False  # rows of a verify block count by the chance that they are accepted
    lookahead = "block"  # which of the draft's rows of a verify block are read: `oracle.LOOKAHEADS`
    tail_factor, tail_pool = 0.0, 0.0  # what the evicted remainder adds: `tail_term.py`
    marginal_share = 0.0
    compensation = "none"
    own_share = 0.0  # part of the score that is the target's own attention
    prefill_chunk = 0  # tokens that the target reads between two evictions of its prompt: `prefill.py`
    num_foreseen_tokens = 0  # that the draft writes behind the prompt, so that its rows count before they come

    def __post_init__(self) -> None:
        if not 0 < self.kv_budget <= 1:
            raise UserError(f"policy.kv_budget={self.kv_budget} is outside (0, 1]; it is the fraction kept, e.g. 0.2.")
        for key, least in (("num_sink_tokens", 0), ("window_size", 1), ("evict_block", 1)):
            if getattr(self, key) < least:
                raise UserError(f"policy.{key}={getattr(self, key)} is too small; give at least {least}.")
        if self.prefill_chunk < 0:
            raise UserError(
                f"policy.prefill_chunk={self.prefill_chunk} is negative; give 0 (off) or a number of tokens."
            )
        self._one_of("residency", RESIDENCIES)
        if self.every_round and self.residency != "offload":
            raise UserError(
                f"policy.residency={self.residency} leaves nothing to recall for {self.name}; use "
                "policy.residency=offload, or policy=smallkv to drop for good."
            )

    def _one_of(self, key: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, key) not in allowed:
            raise UserError(f"policy.{key}={getattr(self, key)} is unknown; choose one of {', '.join(allowed)}.")

    @property
    def evicts(self) -> bool:
        return self.kv_budget < 1

    @property
    def num_observed(self) -> int:
        """Rows of the prompt's observation window."""
        return self.window_size

    @property
    def reads_draft(self) -> bool:
        """Whether the draft's rows are really needed: nothing is evicted at budget 1."""
        return self.uses_draft and self.evicts

    @property
    def reads_mass(self) -> bool:
        return self.uses_mass and self.evicts

    @property
    def reads_last(self) -> bool:
        """Whether the queries of the last verify pass count for the next one."""
        return self.every_round and self.own_share > 0 and self.selection == "block" and self.reads_draft

    def compensates(self, evidence: Evidence) -> bool:
        """Whether verify passes may add marginal values, by the draft's rows for their own queries."""
        return self.marginal_share > 0 and self.compensation != "none"

    def layer_shares(self, num_layers: int) -> list[float]:
        """What each layer gets of the budget, relative to the others; not negative."""
        return [1.0] * num_layers

    def layer_units(self, seen: int, index: int, num_layers: int) -> float:
        """Budget of one layer in critical tokens per KV head; the mean over the layers is `kv_budget` x `seen`.

        Shares are flattened, all by one factor, until no layer gets less than sinks and window or more than all.
        """
        mean, least = self.kv_budget * seen, min(self.num_sink_tokens + self.window_size, seen)
        shares = self.layer_shares(num_layers)
        if min(shares) == max(shares):
            return mean
        average = sum(shares) / num_layers
        below, above = 1 - min(shares) / average, max(shares) / average - 1
        steepness = max(0.0, min(1.0, (mean - least) / (mean * below), (seen - mean) / (mean * above)))
        return mean * (1 + steepness * (shares[index] / average - 1))

    def tiers(self, seen: int, index: int = 0, num_layers: int = 1) -> TierSizes:
        """Sizes of one layer for `seen` committed tokens; sinks and window are kept even if the budget is smaller."""
        units = self.layer_units(seen, index, num_layers)
        critical = int((1 - self.marginal_share) * units + 1e-9)
        marginal = int(2 * (units - critical) + 1e-9) if self.marginal_share else 0
        if critical + marginal > seen:  # near budget 1 there are not enough tokens left to be marginal
            marginal = int(2 * (seen - units) + 1e-9)
            critical = int(units - marginal / 2 + 1e-9)
        least = min(self.num_sink_tokens + self.window_size, seen)
        if critical < least:
            critical, marginal = least, max(0, min(int(2 * (units - least)), seen - least))
        return TierSizes(critical, marginal)

    def due(self, seen: int) -> bool:
        """Whether a cache of `seen` committed tokens has to be planned now: if any layer has, the mean layer has."""
        return self.evicts and self.tiers(seen).critical < seen

    @abstractmethod
    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        """Importance of each candidate, (1, H_kv, n), of target layer `index`; higher stays."""

    def plan(self, index: int, layer: TieredLayer, evidence: Evidence, evicted_at: int | None = None) -> Plan:
        """Critical and marginal candidates and where the tail starts.

        evicted_at: committed length of the last eviction event, None for now; tokens since then wait in the tail.
        """
        committed = layer.seen if evicted_at is None else evicted_at
        sizes = self.tiers(committed, evidence.place(index), evidence.num_layers)
        tail_start = committed - min(self.window_size, committed)
        candidates = layer.candidates(tail_start)
        scores = self.score(index, layer, candidates, evidence)
        scores = scores.masked_fill(candidates.positions < self.num_sink_tokens, torch.inf)
        with_keys = scores[..., : candidates.num_with_keys]
        count = min(sizes.critical - (committed - tail_start), candidates.num_with_keys)
        critical = largest(with_keys, count)
        if not sizes.marginal:
            return Plan(critical, critical[..., :0], tail_start)
        rest = scores.scatter(-1, critical, -torch.inf)
        marginal = rest.topk(min(sizes.marginal, rest.shape[-1] - count), dim=-1).indices
        order = candidates.positions.gather(-1, marginal).argsort(dim=-1)
        return Plan(critical, marginal.gather(-1, order), tail_start)

    def plan_layers(
        self, layers: dict[int, TieredLayer], evidence: Evidence, evicted_at: int | None = None
    ) -> list[Plan]:
        """`plan` of several target layers on one device."""
        return [self.plan(index, layer, evidence, evicted_at) for index, layer in layers.items()]


@dataclass(kw_only=True)
class FullCache(Policy):
    """Keeps everything: the yardstick. Any budget counts as 1, so that a sweep over budgets may include it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kv_budget = 1.0

    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        raise AssertionError("the full cache never plans")


@dataclass(kw_only=True)
class StreamingLLM(Policy):
    """Attention sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453).

    prefill_chunk: tokens that the target reads between two evictions of its prompt; 0: it reads all of it first.
    """

    prefill_chunk: int = 0

    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        return candidates.positions.float()


@dataclass(kw_only=True)
class SnapKV(Policy):
    """The target's own attention from the prompt's last window, pooled, frozen after the prompt (arXiv 2404.14469).

    kernel_size: of the average pooling over positions, odd. Tokens generated later rank below the prompt, by recency.
    """

    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"policy.kernel_size={self.kernel_size} is not a positive odd number; give e.g. 7.")

    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        if index not in evidence.frozen:
            evidence.frozen[index] = self._window_scores(evidence.queries[index], layer, evidence.scaling)
        frozen, positions = evidence.frozen[index], candidates.positions
        last = frozen.shape[-1] - 1
        recency = positions / (layer.seen + 1.0) - 1  # below every frozen score, newest highest
        return torch.where(positions <= last, frozen.gather(-1, positions.clamp(max=last)), recency)

    def _window_scores(self, queries: Tensor, layer: TieredLayer, scaling: float) -> Tensor:
        window = min(self.window_size, queries.shape[2], layer.seen - 1)  # one token at least is older
        queries = queries[:, :, -window:]
        rows = attention_probabilities(queries, layer.keys, scaling)[..., :-window].mean(dim=2)  # (1, H_q, N - W)
        pooled = F.avg_pool1d(rows, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.unflatten(1, (layer.keys.shape[1], -1)).mean(dim=2)


@dataclass(kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's scores with budgets that fall linearly from the first to the last layer (arXiv 2406.02069).

    beta: the mean layer's budget over the last layer's, at least 1; larger is steeper.
    """

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise UserError(f"policy.beta={self.beta} is too small; give at least 1, which is flat, e.g. 20.")

    def layer_shares(self, num_layers: int) -> list[float]:
        steps = max(num_layers - 1, 1)
        return [1 + (1 - 1 / self.beta) * (1 - 2 * index / steps) for index in range(num_layers)]


@dataclass(kw_only=True)
class H2O(Policy):
    """Heavy hitters, by the attention received from all queries so far, and recent tokens (arXiv 2306.14048).

    recent_share: part of the critical tokens that are simply the most recent, in [0, 1); the window at least.
    prefill_chunk: as StreamingLLM's.
    """

    recent_share: float = 0.5
    prefill_chunk: int = 0
    uses_mass = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_share < 1:
            raise UserError(f"policy.recent_share={self.recent_share} is outside [0, 1); give e.g. 0.5.")

    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        assert evidence.mass is not None, "the mass is counted from the prompt on"
        critical = self.tiers(layer.seen, evidence.place(index), evidence.num_layers).critical
        recent = min(int(self.recent_share * critical), critical - self.num_sink_tokens)
        mass = evidence.mass.sums[index].gather(-1, candidates.positions)
        return mass.masked_fill(candidates.positions >= layer.seen - recent, torch.finfo(mass.dtype).max)


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


@dataclass(kw_only=True)
class SmallKV(DraftPolicy):
    """SmallKV (arXiv 2508.02751): draft saliency at every refresh, marginal tokens V-only and compensated.

    marginal_share: part of the budget's bytes spent on marginal tokens, in [0, 1); none where the head map's
    mean cosine is below marginal_similarity, or the draft is not trusted: poor odds do more harm than their bytes.
    compensation: "renormalised" (odds against the kept set), "raw" (the draft's own mass) or "none".
    own_share: part of the score that is the target's own attention so far, a mean over the queries that could see the
    token; the rest is the draft's, of the rows since the last refresh and of `num_foreseen_tokens` tokens that it
    writes behind the prompt before the first one (the idea of arXiv 2506.08373).
    """

    compensation: str = "renormalised"
    marginal_share: float = 0.25
    marginal_similarity: float = 0.7
    own_share: float = 0.5
    num_foreseen_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("compensation", ("none", "raw", "renormalised"))
        for key, most in (("marginal_share", "1)"), ("marginal_similarity", "1]"), ("own_share", "1]")):
            value = getattr(self, key)
            if not 0 <= value <= 1 or (most == "1)" and value == 1):
                raise UserError(f"policy.{key}={value} is outside [0, {most}; give e.g. 0.25.")
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


@dataclass(kw_only=True)
class Oracle(Policy):
    """Chooses by the target's own attention of the coming verify block: an upper bound, at twice the work.

    removed_from: share of the candidates, the most attended first, behind which removal begins; 1 removes the least
    attended, less asks what the tokens of a middle rank are worth (paper: Fig. 2, marginal tokens).
    """

    residency: str = "offload"
    removed_from: float = 1.0
    reads_target = True
    every_round = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.removed_from <= 1:
            raise UserError(f"policy.removed_from={self.removed_from} is outside [0, 1]; 1 removes the least.")

    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        assert evidence.saliency is not None, "saliency is filled before planning"
        attended = evidence.saliency[index].unsqueeze(0).gather(-1, candidates.positions)
        if self.removed_from == 1:
            return attended
        count = attended.shape[-1]
        rank = attended.argsort(dim=-1, descending=True).argsort(dim=-1)  # 0 is the most attended
        return torch.where(rank < self.removed_from * count, 2 * count - rank, rank).float()


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
    many evicted tokens, as a multiple of the kept, are pooled by the draft's weights (`tail_term.py`; block only).
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
        if not 0 <= self.own_share <= 1:
            raise UserError(f"policy.own_share={self.own_share} is outside [0, 1]; give e.g. 0.3, or 0 (off).")
        for key in ("tail_factor", "tail_pool"):
            if getattr(self, key) < 0:
                raise UserError(f"policy.{key}={getattr(self, key)} is negative; give 0 (off) or more.")

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
        hooks = ("plan", "score", "predicted_score", "tiers", "layer_units", "layer_shares")
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
