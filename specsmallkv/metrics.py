"""How far a compressed cache is from the full one: distributions, attention mass, overlap of sets."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .backends import attention_probabilities
from .tiered_layer import TieredLayer


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) in nats per row; both are log-probabilities (n, V), -inf where a token is impossible."""
    terms = full.exp() * (full - other)
    return torch.where(full > -torch.inf, terms, 0.0).sum(-1)


def attention_recall(layer: TieredLayer, queries: Tensor, full_keys: Tensor, scaling: float) -> float:
    """Share of the full cache's attention mass that falls on what the layer reads as critical.

    queries (1, H_q, q, D) and full_keys (1, H_kv, n, D) of the full run; the layer holds the same n tokens.
    """
    rows = attention_probabilities(queries, full_keys, scaling)
    grouped = rows.unflatten(1, (full_keys.shape[1], -1))  # (1, H_kv, group, q, n)
    index = layer.kept_positions[:, :, None, None].expand(*grouped.shape[:4], -1)
    kept = grouped.gather(-1, index) * _read(layer, queries.shape[2]).unsqueeze(2)
    return float((kept.sum(-1) + grouped[..., layer.tail_start :].sum(-1)).mean())


def jaccard_of_top(layer: TieredLayer, queries: Tensor, full_keys: Tensor, scaling: float) -> float:
    """Jaccard similarity of the kept set and the truly most attended tokens before the tail (paper: Fig. 1b).

    One comparison for the block, or one for each query that has its own set.
    """
    rows = attention_probabilities(queries, full_keys, scaling).unflatten(1, (full_keys.shape[1], -1))
    attended, read = rows.mean(dim=2)[..., : layer.tail_start], _read(layer, queries.shape[2])
    if layer.row_mask is None:
        attended, read = attended.mean(dim=2, keepdim=True), read[:, :, :1]
    size = int(read[0, 0, 0].sum())
    true = attended.topk(size, dim=-1).indices
    index = layer.kept_positions.unsqueeze(2).expand_as(read)
    kept = torch.zeros_like(attended).scatter_add(3, index, read.to(attended.dtype))
    both = kept.gather(3, true).sum(-1)
    return float((both / (2 * size - both).clamp_min(1)).mean())


def mass_caught(predicted: Tensor, true: Tensor, share: float) -> Tensor:
    """Share of the true rows' mass on the tokens that the predicted rows rank highest, (..., T).

    Both (..., T, N); share: of the N tokens, at least one.
    """
    count = max(1, int(share * true.shape[-1]))
    chosen = predicted.topk(count, dim=-1).indices
    return true.gather(-1, chosen).sum(-1) / true.sum(-1).clamp_min(1e-9)


def _read(layer: TieredLayer, num_queries: int) -> Tensor:
    """(1, H_kv, q, num_kept) bool: which kept tokens each of the verify pass's first q queries read."""
    if layer.row_mask is not None:
        return layer.row_mask[:, :, :num_queries]
    kept = layer.kept_positions
    return torch.ones(1, device=kept.device, dtype=torch.bool).expand(*kept.shape[:2], num_queries, kept.shape[2])


@dataclass
class Scores:
    """Per scored position: KL, agreement of the argmax, negative log-likelihood of the text under both caches.

    greedy: whether the text's token is the one that greedy decoding would have chosen.
    """

    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    nll_full: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, full: Tensor, following: list[int]) -> None:
        """logits (n, V), the full cache's log-probabilities (n, V) and the n tokens of the text that come next."""
        ours = logits.float().log_softmax(-1)
        index = torch.tensor(following, device=logits.device).unsqueeze(1)
        self.kl += kl_divergence(full, ours).tolist()
        self.agrees += (ours.argmax(-1) == full.argmax(-1)).tolist()
        self.greedy += (ours.argmax(-1) == index.squeeze(1)).tolist()
        self.nll += (-ours.gather(1, index)).squeeze(1).tolist()
        self.nll_full += (-full.gather(1, index)).squeeze(1).tolist()


def mean_interval(texts: list[list[float]]) -> tuple[float, float]:
    """95% interval of a mean over texts, resampled as in `bootstrap_interval`."""
    return bootstrap_interval(texts, [[1.0] * len(values) for values in texts])


def bootstrap_interval(
    ours: list[list[float]], others: list[list[float]], runs: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the ratio of two means over texts, each a mean over its positions.

    Positions are resampled in pairs within each text; a text counts as much as any other.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(2, runs)
    for pair in zip(ours, others, strict=True):
        positions = torch.tensor(pair)  # (2, n)
        index = torch.randint(positions.shape[1], (runs, positions.shape[1]), generator=generator)
        totals += positions[:, index].mean(-1)
    means = totals / len(ours)
    low, high = (means[0] / means[1].clamp_min(1e-12)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
