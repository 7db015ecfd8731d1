"""Several caches behind one forward pass, whose tokens are packed end to end."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache import TieredCache
from .tiered_layer import TieredLayer, num_queries


class LayerGroup(CacheLayerMixin):
    """The same layer of several sequences; what a row holds, and how much, is its own.

    counts: tokens of each row in this pass. They are packed: (1, H, sum of counts, D), row after row, no padding.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # rows are rolled back one by one, each in its own cache

    def __init__(self, rows: list[TieredLayer], counts: list[int]):
        self.rows, self.counts = rows, counts
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass  # each row does it at its first update

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append to every row's tail; returns this group twice, for the attention function to unpack."""
        new = (x.split(self.counts, dim=2) for x in (key_states, value_states))
        for row, k, v in zip(self.rows, *new, strict=True):
            row.update(k, v)
        return self, self

    def get_seq_length(self, *args: Any) -> int:
        return max(row.seen for row in self.rows)

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        return max(row.num_slots for row in self.rows) + num_queries(query), 0

    def get_max_length(self, *args: Any) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    @property
    def shape(self) -> torch.Size:
        longest = max(self.rows, key=lambda row: row.num_slots)
        return longest.shape


class CacheGroup(Cache):
    """Caches of independent sequences, the rows, behind a single forward pass; it keeps nothing itself.

    counts: new tokens of each row, any number; all of them are packed into one sequence of the model's, row after row.
    Their positions must be given (`positions`), since the model would count on.
    """

    def __init__(self, caches: list[TieredCache], counts: list[int]):
        self.caches, self.counts = caches, counts
        rows = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[LayerGroup(list(layers), counts) for layers in rows])

    def positions(self, device: torch.device) -> Tensor:
        """(1, sum of counts) logical positions of the new tokens."""
        own = (range(cache.seen, cache.seen + n) for cache, n in zip(self.caches, self.counts, strict=True))
        return torch.tensor([list(chain.from_iterable(own))], device=device)
