"""Two-speed drafting: steps of the draft read a small view of its own cache, one pass a round reads all of it.

A view has the tokens that the draft's last full pass attended most, the most recent ones and what follows. Where the
oracle reads more than a first row, the draft reads the block again after its steps, in one pass over its full cache:
that leaves exact keys and values, and exact rows to predict from. Elsewhere that pass is the next round's first step.
So a round reads the draft's cache once instead of once a step, and what a view misses is other drafts (as with the
sparse drafts of TriForce, arXiv 2404.11912, and MagicDec, arXiv 2408.11049). A draft with sliding windows has no view.
"""

import torch
from torch import Tensor

from .cache import TieredCache
from .ranking import largest
from .slots import select
from .tiered_layer import TieredLayer

# Cache over view, from which a view is used. Measured at 16 only, where opening it costs far less than it saves.
PAYS_FROM = 8
ONE_PASS_MORE = 4  # the same, times this, where rows of drafting steps would do and a view adds a pass: a loss at 16
RECENT_SHARE = 0.125  # of a view: the newest tokens
SINKS = 4  # first tokens, always in a view


def view_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float32 on CPUs, whose products are many times faster."""
    return torch.float32 if device.type == "cpu" else dtype


def is_viewed(size: int, cached: int, adds_pass: bool = False) -> bool:
    """Whether steps over a draft's cache of so many tokens read a view of `size` (0: none)."""
    return 0 < PAYS_FROM * (ONE_PASS_MORE if adds_pass else 1) * size <= cached


class DraftView:
    """A view of `cache`, from which nothing is evicted; one for all rounds of a sequence.

    size: tokens per KV head that it shows. room: tokens that may be appended while it is open.
    start: position from which on everything is shown; None while the view is closed.
    """

    def __init__(self, cache: TieredCache, size: int, room: int):
        self.cache, self.size = cache, size
        self.start: int | None = None
        first = cache.layers[0].k
        shape = (2, len(cache.layers), 1, first.shape[1], size + room, first.shape[3])
        self.buffer = torch.empty(shape, dtype=view_dtype(first.dtype, first.device), device=first.device)

    def open(self, rows: Tensor) -> None:
        """Choose by attention (M, n), the mean of some queries' rows, and gather; n may differ from what is cached."""
        self.start = self.cache.seen
        chosen = most_attended(rows, self.buffer.shape[1], self.buffer.shape[3], self.start, self.size)
        for index, layer in enumerate(self.cache.layers):
            own = chosen[index].unsqueeze(0)
            self.buffer[0, index, :, :, : self.size] = select(layer.k, own)
            self.buffer[1, index, :, :, : self.size] = select(layer.v, own)

    def close(self) -> None:
        """Drop from the cache what was computed through the view, if it is open."""
        if self.start is not None:
            self.cache.rollback(max(0, self.cache.seen - self.start))
            self.start = None

    def read(self, index: int, layer: TieredLayer) -> tuple[Tensor, Tensor]:
        """Keys and values (1, H_kv, n, D) of layer `index`: the chosen tokens and all since."""
        assert self.start is not None, "open it first"
        end = self.size + layer.seen - self.start
        keys, values = self.buffer[0, index, :, :, :end], self.buffer[1, index, :, :, :end]
        keys[:, :, self.size :] = layer.k[:, :, self.start : layer.seen]
        values[:, :, self.size :] = layer.v[:, :, self.start : layer.seen]
        return keys, values

    @property
    def shown_nbytes(self) -> int:
        """Of K and V that a step attends to, in the cache's type."""
        shown = self.size + (0 if self.start is None else self.cache.seen - self.start)
        return self.buffer[..., :shown, :].numel() * self.cache.layers[0].k.element_size()

    @property
    def nbytes(self) -> int:
        """Scratch on the device."""
        return self.buffer.nbytes


def most_attended(rows: Tensor, num_layers: int, num_kv_heads: int, seen: int, size: int) -> Tensor:
    """(L, H_kv, size) positions below `seen`, sorted: sinks, the newest, and what any head of a group attends most."""
    known = min(rows.shape[1], seen)
    scores = rows.new_zeros(num_layers, num_kv_heads, seen)
    scores[..., :known] = rows[:, :known].reshape(num_layers, num_kv_heads, -1, known).amax(dim=2)
    scores[..., :SINKS] = scores[..., seen - int(RECENT_SHARE * size) :] = torch.inf
    return largest(scores, size)
