"""What all policies share: tier sizes, sinks, recent window, budget of each layer. A policy only scores candidates.

So they compare byte for byte. A policy is stateless between sequences: what it freezes lies in the `Evidence`.
"""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..errors import UserError
from ..packed_values import BITS, entry_cost
from ..ranking import largest
from ..tiered_layer import RESIDENCIES, Candidates, TieredLayer
from .evidence import Evidence


@dataclass(frozen=True)
class TierSizes:
    """Tokens per KV head: critical counts the recent window, marginal entries cost `Policy.marginal_cost` as much."""

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
    tail_factor, tail_pool, tail_limit = 0.0, 0.0, math.inf  # what the evicted remainder adds: `tail_term.py`
    marginal_share = 0.0
    marginal_bits = cast("int | None", None)  # of the marginal values; None: as the cache holds them
    # of K and of V of critical tokens outside of the window, and of the host store's; None: as they come
    key_bits, value_bits = cast("int | None", None), cast("int | None", None)
    critical_cost = 1.0  # bytes of such a token over those of a plain one; set and lost as the next but one
    packing_overhead = 0.0  # plain tokens whose bytes go to the sinks' keys, kept as they are, and to channels' scales
    marginal_cost = 0.5  # bytes of a marginal entry over a critical one's; set by `fitted`, lost by `replace`
    compensation = "none"
    own_share = 0.0  # part of the score that is the target's own attention
    prefill_chunk = 0  # tokens that the target reads between two evictions of its prompt: `prefill.py`
    keeps_window = False  # the window's queries stay after the first eviction, for a `score` that asks for them again
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

    def _bits(self, key: str) -> None:
        if getattr(self, key) not in (None, *BITS):
            known = ", ".join(map(str, BITS))
            raise UserError(f"policy.{key}={getattr(self, key)} is unknown; choose one of null, {known}.")

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
        plain = self.plain_tiers(seen, index, num_layers)
        if not self.packs:
            return plain
        window = min(self.window_size, seen)
        rest = plain.critical - window - self.packing_overhead
        critical = window + max(int(rest / self.critical_cost), self.num_sink_tokens)
        return TierSizes(min(seen, critical), plain.marginal)

    def num_slots(self, seen: int, index: int, num_layers: int) -> int:
        """Tokens of the budget whose K and V lie in the layer's buffer as they come."""
        critical = self.plain_tiers(seen, index, num_layers).critical
        return min(self.window_size, critical) if self.packs else critical

    @property
    def packs(self) -> bool:
        """Whether critical tokens outside of the window are held in fewer bits."""
        return self.key_bits is not None or self.value_bits is not None

    def plain_tiers(self, seen: int, index: int = 0, num_layers: int = 1) -> TierSizes:
        """Sizes if critical tokens are held as they come."""
        units, cost = self.layer_units(seen, index, num_layers), self.marginal_cost
        critical = int((1 - self.marginal_share) * units + 1e-9)
        marginal = int((units - critical) / cost + 1e-9) if self.marginal_share else 0
        if critical + marginal > seen:  # there are not enough tokens left to be marginal
            marginal = int((seen - units) / (1 - cost) + 1e-9)
            critical = int(units - cost * marginal + 1e-9)
        least = min(self.num_sink_tokens + self.window_size, seen)
        if critical < least:
            critical, marginal = least, max(0, min(int((units - least) / cost), seen - least))
        return TierSizes(critical, marginal)

    def fitted(self, head_dim: int, itemsize: int) -> "Policy":
        """For a cache of heads of so many numbers of so many bytes each: what packed and marginal entries cost there.

        Raises UserError if heads cannot be packed; warns of a budget that all tokens, packed, do not need.
        """
        own, packed = copy.copy(self), (self.key_bits, self.value_bits, self.marginal_bits)
        if 4 in packed and head_dim % 2:
            raise UserError(f"{self.name} packs numbers in pairs, but heads have {head_dim}; use 8 bits, or null.")
        if self.key_bits is not None:
            own.packing_overhead = self.num_sink_tokens / 2 + 1
        own.marginal_cost = entry_cost(head_dim, itemsize, self.marginal_bits)
        own.critical_cost = sum(entry_cost(head_dim, itemsize, bits) for bits in (self.key_bits, self.value_bits))
        if own.critical_cost < self.kv_budget < 1:
            keys, values = (bits or "null" for bits in packed[:2])
            warnings.warn(
                f"policy.kv_budget={self.kv_budget} is more than all tokens need with policy.key_bits={keys} and "
                f"policy.value_bits={values}, {own.critical_cost:.2f} of the full cache; lower it, or use more bits.",
                stacklevel=1,  # one place for all callers, so that it is told once
            )
        return own

    def due(self, seen: int) -> bool:
        """Whether a cache of `seen` committed tokens has to be planned now: if any layer has, the mean layer has."""
        return self.evicts and self.plain_tiers(seen).critical < seen

    def recalls(self, evidence: Evidence) -> bool:
        """Whether tokens of a host store may come back."""
        return True

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
        choices = candidates.num_with_keys if self.recalls(evidence) else layer.num_resident(tail_start)
        count = min(sizes.critical - (committed - tail_start), choices)
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
