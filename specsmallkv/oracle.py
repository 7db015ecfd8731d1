"""The draft as attention oracle: its rows, gathered while it drafts, and what they predict for the target.

One `AttentionOracle` belongs to one sequence. It holds the rows of the coming verify block (scratch that each round
overwrites) and the running sum of the accepted rows since the last refresh (paper: saliency shift compensation).
Rejected rows never enter the sum, so there is nothing to roll back but the block itself.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from .attention import AttentionRows, window_mask
from .backends import attention_probabilities
from .cache import TieredCache
from .matching import TRUSTED_SIMILARITY, HeadMap, HeadMapFit, Prior, over_groups, pooled_history
from .tensor_parallel import Shard

LOOKAHEADS = ("block", "drafted", "first")


def rows_ahead(lookahead: str, block: int) -> int:
    """How many rows of a verify block of so many tokens are read: all, those of drafting steps, or the first one.

    The last draft's row is no drafting step's: it takes one more.
    """
    return {"block": block, "drafted": max(block - 1, 1), "first": 1}[lookahead]


def is_trusted(similarity: float) -> bool:
    """Whether a draft whose map has this mean cosine tells enough to be asked at all."""
    return similarity > TRUSTED_SIMILARITY


class AttentionOracle:
    """num_kv_heads: of the target. block: buffer for the rows of one verify block, (M, k + 1, capacity).

    prior: a saved head map, if there is one. lookahead: which rows of a block decide, one of LOOKAHEADS. shard: whose
    heads they are, if several processes share the target.
    """

    def __init__(
        self,
        block: AttentionRows,
        num_kv_heads: int,
        prior: Prior | None = None,
        lookahead: str = "block",
        shard: Shard | None = None,
    ):
        self.block, self.num_kv_heads, self.prior, self.lookahead = block, num_kv_heads, prior, lookahead
        self.shard = shard or Shard()
        self.head_map: HeadMap | None = None
        self.similarity = 1.0  # as `HeadMap.mean_similarity`, once there is a map
        self._sum = torch.zeros(block.buffer.shape[0], block.buffer.shape[2], device=block.buffer.device)
        self._count = 0.0
        self.history: Tensor | None = None  # (L, H_q, N): the target's own attention before, pooled
        self._fit: HeadMapFit | None = None
        self.recent_rows: Tensor | None = None  # (M, n): mean over the last block's rows, once one was planned for
        self._predicted: Tensor | None = None  # what `mean_predictions` is to give, if `lookahead_saliency` kept it

    @property
    def nbytes(self) -> int:
        """Scratch on the device."""
        held = (self.history, self.recent_rows)
        return self.block.nbytes + self._sum.nbytes + sum(x.nbytes for x in held if x is not None)

    @property
    def trusted(self) -> bool:
        """Whether the draft tells enough to be asked at all; if not, `snapkv` chooses."""
        return is_trusted(self.similarity)

    @property
    def num_rows(self) -> int:
        """Of the block, how many decide; of known tokens all, which one pass of the draft reads anyway."""
        if self.block.known:
            return self.block.num_rows
        return min(rows_ahead(self.lookahead, self.block.num_queries), self.block.num_rows)

    @property
    def rows(self) -> Tensor:
        """(M, `num_rows`, N) of the block."""
        return self.block.values[:, : self.num_rows]

    @property
    def num_sinks(self) -> int:
        """First columns that the fit left out."""
        assert self._fit is not None, "fit before asking"
        return self._fit.sinks

    def observe(
        self,
        draft_rows: Tensor,
        queries: dict[int, Tensor],
        cache: TieredCache,
        scaling: float,
        num_sinks: int,
    ) -> None:
        """Another chunk of the observation window: evidence for the head map, the history and the first interval.

        draft_rows (M, W, N) end with the query at N - 1; queries per target layer (1, H_q, W, D) are the same ones;
        the cache still holds all tokens. History and interval are those of the last chunk.
        """
        self._fit, length = self._fit or HeadMapFit(num_sinks, len(cache.layers)), draft_rows.shape[2]
        self._fit.add_draft(draft_rows)
        history = []
        for index, layer in enumerate(cache.layers):
            mask = window_mask(layer, queries[index].shape[2], length)
            rows = attention_probabilities(queries[index], layer.keys[:, :, :length], scaling, mask)[0]
            rows = rows.to(draft_rows.device)  # layers may be spread over several
            self._fit.add_layer(index, rows, None if self.history is None else self.history[index])
            history.append(pooled_history(rows))
        self._fit.end_chunk()
        self.history = torch.stack(history)
        self._sum[:, :length], self._count = draft_rows.sum(dim=1), draft_rows.shape[1]

    def fit(self, method: str) -> None:
        """The head map of all that was observed."""
        assert self._fit is not None, "observe before fitting"
        self._take(self._fit.solve(method, self.prior))

    def adopt(self, head_map: HeadMap, method: str, draft_rows: Tensor) -> None:
        """A saved map alone, where no window can be observed; draft_rows (M, W, N) are the first interval."""
        self._take(head_map.by(method))
        self._sum[:, : draft_rows.shape[2]], self._count = draft_rows.sum(dim=1), draft_rows.shape[1]

    def _take(self, head_map: HeadMap) -> None:
        self.head_map, self.similarity = head_map, self.shard.mean(head_map.mean_similarity)

    def share(self, method: str, prior: Prior | None = None, lookahead: str = "block") -> "AttentionOracle":
        """Another oracle on the same block of rows and the same fit, with its own map and interval."""
        assert self._fit is not None, "fit before sharing"
        other = AttentionOracle(self.block, self.num_kv_heads, prior, lookahead, self.shard)
        other._fit = self._fit
        other._take(self._fit.solve(method, prior))
        other.history = self.history
        other._sum.copy_(self._sum)
        other._count = self._count
        return other

    def believed_heads(self, least: float) -> Tensor:
        """(L, H_q) bool: heads that are predicted with a cosine above `least`; none if the draft is not trusted."""
        assert self.head_map is not None, "the head map is fitted before anybody asks"
        return (self.head_map.similarity > least) & self.trusted

    def add(self, rows: Tensor, count: int) -> None:
        """Count the sum (M, n) of `count` further rows, foreseen ones, as the interval's."""
        self._sum[:, : rows.shape[1]] += rows
        self._count += count

    def grow(self, block: AttentionRows) -> None:
        """Another, larger block buffer for a longer sequence; map and interval stay."""
        longer = torch.zeros(block.buffer.shape[0], block.buffer.shape[2], device=block.buffer.device)
        longer[:, : self._sum.shape[1]] = self._sum
        self.block, self._sum = block, longer

    def commit(self, num_rows: int) -> None:
        """Add the block's first `num_rows` rows, whose queries were accepted; one by one, so order never matters."""
        rows = self.rows[:, :num_rows].unbind(1)
        for row in rows:
            self._sum[:, : row.shape[1]] += row
        self._count += len(rows)

    def attended(self) -> Tensor:
        """(M, n), up to a factor: what the draft attended last, in the last block or else in the interval."""
        return self._sum if self.recent_rows is None else self.recent_rows

    def interval_saliency(self, length: int) -> Tensor:
        """(L, H_kv, length): mean over the accepted rows since the last refresh, earlier ones halved at each."""
        return self.saliency(self._sum[:, :length] / max(self._count, 1e-9))

    def saliency(self, mean_rows: Tensor, reduction: str = "mean") -> Tensor:
        """(L, H_kv, length): what the mean (M, length) of any rows predicts."""
        assert self.head_map is not None, "the head map is fitted before anybody asks"
        return self.head_map.saliency(mean_rows, self.num_kv_heads, reduction, self.history)

    def refresh(self) -> None:
        """Begin a new interval; the past counts half, so that an interval of one or two rows does not decide alone."""
        self._sum /= 2
        self._count /= 2

    def lookahead_saliency(
        self, length: int, by_chance: bool = False, reduction: str = "mean", keep: bool = False
    ) -> Tensor:
        """(L, H_kv, length): mean over the rows of the coming verify block, by the chance that they are accepted.

        keep: `mean_predictions` is asked next; where all layers were predicted at once it need not predict again.
        """
        self.recent_rows, self._predicted, parts = self.block.mean(by_chance, self.num_rows), None, []
        for predicted in self.mean_predictions():
            parts.append(over_groups(predicted, self.num_kv_heads, reduction)[..., :length])
        if keep and len(parts) == 1:
            self._predicted = predicted
        return torch.cat(parts)

    def first_saliency(self, length: int, reduction: str = "mean") -> Tensor:
        """(L, H_kv, length): of the coming verify block's first row alone, while the others are still to come."""
        return self.saliency(self.block.values[:, 0, :length], reduction)

    def row_saliencies(self, length: int, reduction: str = "mean") -> Tensor:
        """(L, H_kv, q, length): each row of the coming verify block on its own, bit for bit the same in any block.

        What enters here may depend on that row and on what is fixed at eviction events, else `selection=query` is not
        exact. So no product spans two rows: its rounding could depend on how many there are.
        """
        self.recent_rows = self.block.mean(False, self.num_rows)
        rows = self.block.values[:, :, :length].unbind(dim=1)
        predictions = [self.saliency(row, reduction) for row in rows]
        return torch.stack(predictions, dim=2)

    def predict(self, layer: int) -> Tensor:
        """(H_q, q, N): predicted rows of the coming verify block."""
        assert self.head_map is not None, "the head map is fitted before anybody asks"
        return self.head_map.predict(layer, self.rows, None if self.history is None else self.history[layer])

    def predictions(self) -> Iterator[Tensor]:
        """`predict` of every target layer in turn, in few products."""
        assert self.head_map is not None, "the head map is fitted before anybody asks"
        return chain.from_iterable(self.head_map.predictions(self.rows, self.history))

    def mean_predictions(self) -> Iterator[Tensor]:
        """Of all target layers in turn, some at a time: the row (n, H_q, N) that chose for the coming verify block."""
        assert self.head_map is not None and self.recent_rows is not None, "saliency was asked for before"
        if self._predicted is not None:
            kept, self._predicted = self._predicted, None
            return iter((kept,))
        return (x.squeeze(2) for x in self.head_map.predictions(self.recent_rows.unsqueeze(1), self.history))
