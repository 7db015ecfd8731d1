"""Policies without a draft: the full cache, and published eviction methods that read the target's own attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import attention_probabilities
from ..errors import UserError
from ..tiered_layer import Candidates, TieredLayer
from .base import Policy
from .evidence import Evidence


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
