"""Attention matching (paper: similarity of attention across scales): which draft heads speak for which target head.

`pred[l, h][t, j] = sum_m w[l, h, m] * a[m][t, j]` with non-negative weights w that sum to 1, so that a prediction is,
like every draft row a[m][t], a distribution over tokens: predictions are normalised per head and row before anybody
averages them. w is fitted on an observation window of prompt queries with the attention-sink columns left out, since
sinks are alike in all heads and would drown the rest.

M = draft layers x draft heads; all rows float32. This file does not know where rows come from or what they decide.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("one_hot", "mixture")
REDUCTIONS = ("mean", "max")
NUM_MIXED_HEADS = 16  # prototype, Qwen2.5-Coder pair: .49 cosine for the best single head, .57 for 4, .60 for 16
NUM_SWEEPS = 50  # coordinate descent; 16 unknowns converge in far fewer


@dataclass
class HeadMap:
    """weights: (L, H_q, M), rows sum to 1. similarity: (L, H_q), cosine of prediction and target on the window."""

    weights: Tensor
    similarity: Tensor

    def predict(self, layer: int, rows: Tensor) -> Tensor:
        """Predicted target rows (H_q, T, N) of one layer from draft rows (M, T, N)."""
        return torch.einsum("hm,mtn->htn", self.weights[layer], rows)

    def saliency(self, mean_rows: Tensor, num_kv_heads: int, reduction: str = "mean") -> Tensor:
        """Predictions of row means (M, N), reduced over the heads of each group: (L, H_kv, N)."""
        layers, heads, _ = self.weights.shape
        grouped = self.weights.view(layers, num_kv_heads, heads // num_kv_heads, -1)
        if reduction == "mean":
            return grouped.mean(dim=2) @ mean_rows
        return torch.stack(
            [(layer @ mean_rows).amax(dim=1) for layer in grouped]
        )  # layer by layer: 1 / L of the memory


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

    def __init__(self, num_sink_tokens: int):
        self.sinks = num_sink_tokens
        self.gram: Tensor | float = 0.0  # (M, M)
        self.correlations: list[Tensor] = []  # per layer (H_q, M)
        self.squares: list[Tensor] = []  # per layer (H_q,)

    def _columns(self, rows: Tensor) -> Tensor:
        return rows[..., self.sinks :].reshape(rows.shape[0], -1)

    def add(self, draft_rows: Tensor, target_rows: Iterable[Tensor]) -> None:
        """draft_rows (M, W, N); target_rows: (H_q, W, N) of each layer, the same queries and keys."""
        draft = self._columns(draft_rows)
        self.gram = self.gram + draft @ draft.T
        sums = [(target @ draft.T, target.square().sum(-1)) for target in map(self._columns, target_rows)]
        if self.correlations:
            sums = [(a + c, b + d) for (a, b), c, d in zip(sums, self.correlations, self.squares, strict=True)]
        self.correlations, self.squares = [a for a, _ in sums], [b for _, b in sums]

    def solve(self, method: str) -> HeadMap:
        """ "one_hot": the most similar draft head (paper); "mixture": non-negative least squares over the best few."""
        assert method in METHODS, f"matching is {method!r}, expected one of {METHODS}"
        assert isinstance(self.gram, Tensor), "rows are added before solving"
        correlation, norms = torch.stack(self.correlations), torch.stack(self.squares).sqrt()  # (L, H_q, M), (L, H_q)
        lengths = self.gram.diagonal().clamp_min(1e-12).sqrt()
        count = 1 if method == "one_hot" else min(NUM_MIXED_HEADS, len(self.gram))
        best = (correlation / lengths).topk(count, dim=-1).indices  # (L, H_q, n)
        gram = self.gram[best.unsqueeze(-1), best.unsqueeze(-2)]
        mixed = nonnegative_least_squares(gram, correlation.gather(-1, best))
        mixed[..., 0] += (mixed.sum(-1) == 0).float()  # nothing correlates: fall back on the most similar
        weights = torch.zeros_like(correlation).scatter(-1, best, mixed)
        similarity = cosine(weights, self.gram, correlation, norms)
        return HeadMap(weights / weights.sum(-1, keepdim=True), similarity)


def cosine(weights: Tensor, gram: Tensor, correlation: Tensor, norms: Tensor) -> Tensor:
    """Of mixtures and targets, (L, H_q), from the sums of a fit."""
    predicted = ((weights @ gram) * weights).sum(-1).clamp_min(1e-24).sqrt()
    return (weights * correlation).sum(-1) / (predicted * norms).clamp_min(1e-12)


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
