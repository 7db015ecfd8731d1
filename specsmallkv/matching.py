"""Attention matching (paper: similarity of attention across scales): which draft heads speak for which target head.

`pred[l, h][t, j] = sum_m w[l, h, m] * a[m][t, j]` with non-negative weights w that sum to 1, so that a prediction is,
like every draft row a[m][t], a distribution over tokens: predictions are normalised per head and row before anybody
averages them. w is fitted on an observation window of prompt queries with the attention-sink columns left out, since
sinks are alike in all heads and would drown the rest.

M = draft layers x draft heads; all rows float32. This file does not know where rows come from or what they decide.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixing import Mixer, column_blocks

METHODS = ("one_hot", "mixture")
REDUCTIONS = ("mean", "max")
NUM_MIXED_HEADS = 16  # prototype, Qwen2.5-Coder pair: .49 cosine for the best single head, .57 for 4, .60 for 16
HISTORY_POOL = 7  # neighbours, as in SnapKV
HISTORY_MARGIN = 0.05  # cosine by which a head's own history must be better than the draft
TRUSTED_SIMILARITY = 0.3  # mean cosine of all heads below which the draft is not asked; random weights: 0.1
AT_ONCE = 2**22  # predicted probabilities that exist at once; bounds scratch, not the result
NUM_SWEEPS = 50  # coordinate descent; 16 unknowns converge in far fewer


@dataclass
class HeadMap:
    """weights: (L, H_q, M) over draft heads. similarity: (L, H_q), cosine of prediction and target on the window.

    history_weights: (L, H_q), of the target's own pooled attention before, so that a head that the draft cannot tell
    falls back on what it did itself; None: the draft alone. All weights of a head sum to 1.
    draft_similarity: (L, H_q), the cosine that the draft's part had before any head fell back; None: as `similarity`.
    """

    weights: Tensor
    similarity: Tensor
    history_weights: Tensor | None = None
    draft_similarity: Tensor | None = None
    _mixers: dict[tuple[int, int], Mixer] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def mean_similarity(self) -> float:
        """Mean cosine of all heads with what the draft alone predicts of them."""
        return float((self.similarity if self.draft_similarity is None else self.draft_similarity).mean())

    def to(self, device: torch.device) -> "HeadMap":
        """The map, without history, on another device."""
        return HeadMap(self.weights.to(device), self.similarity.to(device))

    def by(self, method: str) -> "HeadMap":
        """The map as it is, or under "one_hot" each head's heaviest draft head alone."""
        if method != "one_hot":
            return self
        return replace(self, weights=F.one_hot(self.weights.argmax(-1), self.weights.shape[-1]).float())

    def predict(self, layer: int, rows: Tensor, history: Tensor | None = None) -> Tensor:
        """Predicted target rows (H_q, T, N) of one layer from draft rows (M, T, N) and history (H_q, N or fewer)."""
        predicted = torch.einsum("hm,mtn->htn", self.weights[layer], rows)
        if self.history_weights is not None and history is not None:
            predicted[..., : history.shape[-1]] += (self.history_weights[layer, :, None] * history)[:, None]
        return predicted

    def predictions(self, rows: Tensor, history: Tensor | None = None) -> Iterator[Tensor]:
        """`predict` of all layers in turn, some at a time: (n, H_q, T, N); history (L, H_q, N or fewer).

        Layers share a product, which is several times faster than one each, as far as AT_ONCE allows.
        """
        num_layers, num_heads, _ = self.weights.shape
        count = max(1, AT_ONCE // (num_heads * rows[0].numel()))
        blocks = column_blocks(rows)
        for start in range(0, num_layers, count):
            predicted = self._mixer(start, min(start + count, num_layers))(blocks).view(-1, num_heads, *rows.shape[1:])
            if self.history_weights is not None and history is not None:
                own = self.history_weights[start : start + count]
                for layer, head in own.nonzero().tolist():  # few; all others would be read and written for nothing
                    predicted[layer, head, :, : history.shape[-1]] += own[layer, head] * history[start + layer, head]
            yield predicted

    def _mixer(self, start: int, end: int) -> Mixer:
        if (start, end) not in self._mixers:
            self._mixers[start, end] = Mixer(self.weights[start:end].flatten(0, 1))
        return self._mixers[start, end]

    def saliency(
        self, mean_rows: Tensor, num_kv_heads: int, reduction: str = "mean", history: Tensor | None = None
    ) -> Tensor:
        """Predictions of row means (M, N), reduced over each group's heads: (L, H_kv, N); history (L, H_q, n)."""
        past = None if history is None else history[:, :, : mean_rows.shape[1]]
        predictions = self.predictions(mean_rows.unsqueeze(1), past)
        return torch.cat([over_groups(predicted.squeeze(2), num_kv_heads, reduction) for predicted in predictions])


def over_groups(predicted: Tensor, num_kv_heads: int, reduction: str) -> Tensor:
    """Predicted rows (n, H_q, N), reduced over the query heads that share keys: (n, H_kv, N)."""
    heads = predicted.unflatten(1, (num_kv_heads, -1))
    return heads.mean(dim=2) if reduction == "mean" else heads.amax(dim=2)


class Prior(NamedTuple):
    """A head map from other texts, which counts as so many rows of the prompt's window; inf: it alone decides."""

    head_map: HeadMap
    num_rows: float

    def trust(self, num_observed: int) -> float:
        """Share of the prior beside `num_observed` rows, in [0, 1]."""
        return 1.0 if math.isinf(self.num_rows) else self.num_rows / max(self.num_rows + num_observed, 1e-9)


def nonnegative_least_squares(gram: Tensor, correlation: Tensor) -> Tensor:
    """min |D w - t|^2 for w >= 0 by coordinate descent, batched.

    gram (..., n, n) = D'D, correlation (..., n) = D't; returns w (..., n).
    """
    weights = torch.zeros_like(correlation)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12)
    for _ in range(NUM_SWEEPS):
        before = weights.clone()
        for i in range(correlation.shape[-1]):
            residual = correlation[..., i] - (gram[..., i, :] * weights).sum(-1)
            weights[..., i] = (weights[..., i] + residual / diagonal[..., i]).clamp_min(0)
        if (weights - before).abs().max() < 1e-5:
            break
    return weights


class HeadMapFit:
    """Sums that the least squares need, over chunks of the window: no rows exist for all of it, or for all layers."""

    def __init__(self, num_sink_tokens: int, num_layers: int):
        self.sinks, self.num_rows = num_sink_tokens, 0
        self.gram: Tensor | float = 0.0  # (M, M)
        self.correlations: list[Any] = [0.0] * num_layers  # (H_q, M) each
        self.squares: list[Any] = [0.0] * num_layers  # (H_q,)
        # of the history: its square, its product with the target, and the target's square then, (H_q,) each
        self.history: list[tuple[Tensor, ...] | None] = [None] * num_layers

    def _columns(self, rows: Tensor) -> Tensor:
        return rows[..., self.sinks :].reshape(rows.shape[0], -1)

    def add_draft(self, draft_rows: Tensor) -> None:
        """draft_rows (M, W, N) of the next chunk; `add_layer` of every layer follows, then `end_chunk`."""
        self.draft = self._columns(draft_rows)
        self.gram = self.gram + self.draft @ self.draft.T
        self.num_rows += draft_rows.shape[1]

    def add_layer(self, index: int, target_rows: Tensor, history: Tensor | None = None) -> None:
        """target_rows (H_q, W, N), the same queries and keys; history (H_q, n): what was known before them."""
        target = self._columns(target_rows)
        self.correlations[index] = self.correlations[index] + target @ self.draft.T
        target_square = target.square().sum(-1)
        self.squares[index] = self.squares[index] + target_square
        if history is not None:
            past = history[:, self.sinks :]
            square = target_rows.shape[1] * past.square().sum(-1)
            product = (target_rows.sum(dim=1)[:, self.sinks : history.shape[1]] * past).sum(-1)
            sums, before = (square, product, target_square), self.history[index]
            self.history[index] = sums if before is None else tuple(a + b for a, b in zip(sums, before, strict=True))

    def end_chunk(self) -> None:
        """Free the rows: a fit lives as long as its sequence, and they take more than the target's whole cache."""
        del self.draft

    def merge(self, other: "HeadMapFit") -> None:
        """Add the sums of another window or text."""
        self.gram, self.num_rows = self.gram + other.gram, self.num_rows + other.num_rows
        self.correlations = [a + b for a, b in zip(self.correlations, other.correlations, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]

    def solve(self, method: str, prior: Prior | None = None, num_heads: int = NUM_MIXED_HEADS) -> HeadMap:
        """ "one_hot": the most similar draft head (paper); "mixture": non-negative least squares over the best few.

        prior: a saved map, averaged with what the rows say; under one_hot the heaviest head stays.
        """
        assert method in METHODS, f"matching is {method!r}, expected one of {METHODS}"
        weights = self._weights(1 if method == "one_hot" else num_heads)
        similarity = self.similarity_of(weights)
        if prior is not None:
            trust, saved = prior.trust(self.num_rows), prior.head_map
            weights = weights.lerp(saved.weights, trust)
            if method == "one_hot":
                weights = F.one_hot(weights.argmax(-1), weights.shape[-1]).float()
            similarity = self.similarity_of(weights).lerp(saved.similarity, trust)
        if method == "one_hot" or any(sums is None for sums in self.history):
            return HeadMap(weights, similarity)
        return self._fall_back(weights, similarity)

    def _weights(self, num_heads: int) -> Tensor:
        """(L, H_q, M): non-negative least squares over each head's `num_heads` most similar draft heads."""
        assert isinstance(self.gram, Tensor), "rows are added before solving"
        correlation = torch.stack(self.correlations)
        lengths = self.gram.diagonal().clamp_min(1e-12).sqrt()
        best = (correlation / lengths).topk(min(num_heads, len(self.gram)), dim=-1).indices  # (L, H_q, n)
        gram, wanted = self.gram[best.unsqueeze(-1), best.unsqueeze(-2)], correlation.gather(-1, best)
        mixed = nonnegative_least_squares(gram, wanted)
        mixed[..., 0] += (mixed.sum(-1) == 0).float()  # nothing correlates: fall back on the most similar
        return torch.zeros_like(correlation).scatter(-1, best, mixed / mixed.sum(-1, keepdim=True))

    def similarity_of(self, weights: Tensor) -> Tensor:
        """(L, H_q): cosine of what the weights (L, H_q, M) predict and the target, over all rows added."""
        correlation, norms = torch.stack(self.correlations), torch.stack(self.squares).sqrt()
        predicted = ((weights @ self.gram) * weights).sum(-1).clamp_min(1e-24).sqrt()
        return (weights * correlation).sum(-1) / (predicted * norms).clamp_min(1e-12)

    def _fall_back(self, weights: Tensor, similarity: Tensor) -> HeadMap:
        """Heads that their own history tells clearly better than the draft does follow the history."""
        squares, products, targets = (torch.stack(sums) for sums in zip(*filter(None, self.history), strict=True))
        of_history = products / (squares * targets).sqrt().clamp_min(1e-12)
        own = of_history > similarity + HISTORY_MARGIN
        weights = weights.masked_fill(own.unsqueeze(-1), 0)
        return HeadMap(weights, torch.where(own, of_history, similarity), own.float(), similarity)


def pooled_history(target_rows: Tensor) -> Tensor:
    """Mean of target rows (H_q, W, N) over the W queries, pooled over neighbours as SnapKV does: (H_q, N)."""
    mean = target_rows.mean(dim=1)
    return F.avg_pool1d(mean, HISTORY_POOL, stride=1, padding=HISTORY_POOL // 2)


def marginal_weights(predicted: Tensor, kept: Tensor, marginal: Tensor, tail_start: int, compensation: str) -> Tensor:
    """Weights of the marginal values in `attention.compensate`, (1, H_q, q, m).

    predicted (H_q, q, N) rows of the verify block; kept (1, H_kv, c), marginal (1, H_kv, m) positions.
    "renormalised": odds of M against the kept set L, normalised over both; "raw": the predicted probability itself.
    """
    rows = predicted.unsqueeze(0).unflatten(1, (kept.shape[1], -1))  # (1, H_kv, group, q, N)

    def at(positions: Tensor) -> Tensor:
        index = positions[:, :, None, None].expand(*rows.shape[:4], -1)
        return rows.gather(-1, index)

    weights = at(marginal)
    if compensation == "renormalised":
        mass = at(kept).sum(-1) + rows[..., tail_start:].sum(-1) + weights.sum(-1)
        weights = weights / mass.clamp_min(1e-9).unsqueeze(-1)
    return weights.flatten(1, 2)
