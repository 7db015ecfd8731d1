"""The tiered KV cache of one model: a `TieredLayer` per attention layer."""

from typing import Any

from transformers.cache_utils import Cache

from .packed_layer import PackedLayer
from .tiered_layer import TieredLayer


class TieredCache(Cache):
    """All layers of one model. The draft's cache is one that never retains, i.e. a preallocated full cache."""

    layers: list[TieredLayer]

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        resident_capacity: list[int] | None = None,
        windows: list[int | None] | None = None,
        **layer_options: Any,
    ):
        """resident_capacity, windows: one per layer; the other options are alike for all."""
        slots, windows = resident_capacity or [capacity] * num_layers, windows or [None] * num_layers
        kind = PackedLayer if "key_bits" in layer_options else TieredLayer
        super().__init__(
            layers=[
                kind(capacity, slots[i], **layer_options)
                if window is None
                else TieredLayer(capacity, slots[i], window=window)
                for i, window in enumerate(windows)
            ]
        )

    @property
    def budgeted(self) -> list[TieredLayer]:
        """The layers that a budget is about: all but those with a sliding window."""
        return [layer for layer in self.layers if layer.window is None]

    @property
    def seen(self) -> int:
        return self.layers[0].seen

    def rollback(self, n: int) -> None:
        """Drop the last n tokens from every layer."""
        for layer in self.layers:
            layer.rollback(n)

    def grow(self, capacity: int, resident_capacity: list[int] | None = None) -> None:
        """Room for a longer sequence in every layer, e.g. for another turn."""
        for layer, slots in zip(self.layers, resident_capacity or [capacity] * len(self.layers), strict=True):
            layer.grow(capacity, slots)

    def copy_to(self, other: "TieredCache", length: int | None = None) -> None:
        """Append the first `length` tokens of this cache, from which nothing was evicted, to another one."""
        for old, new in zip(self.layers, other.layers, strict=True):
            assert not old.num_kept, "an evicted entry cannot be copied"
            new.update(old.keys[:, :, :length], old.values[:, :, :length])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.budgeted)

    @property
    def held_nbytes(self) -> int:
        """Bytes in use of all layers."""
        return self.nbytes + self.window_nbytes

    @property
    def window_nbytes(self) -> int:
        """Bytes in use of the sliding-window layers."""
        return sum(layer.nbytes for layer in self.layers if layer.window is not None)

    @property
    def allocated_nbytes(self) -> int:
        return sum(layer.allocated_nbytes for layer in self.layers)

    @property
    def host_nbytes(self) -> int:
        return sum(layer.host_nbytes for layer in self.layers)

    @property
    def full_nbytes(self) -> int:
        return sum(layer.full_nbytes for layer in self.budgeted)

    @property
    def sent_nbytes(self) -> int:
        """Scratch that the last entries sent ahead took on the devices."""
        return sum(layer.sent_nbytes for layer in self.layers)

    @property
    def recall_bytes(self) -> int:
        return sum(layer.recall_bytes for layer in self.layers)

    def kept_per_layer(self) -> list[dict[str, int]]:
        """Per layer: critical (K and V, tail included), marginal (V only) and total tokens of each KV head.

        A sliding-window layer also has its window.
        """
        return [
            {"critical": layer.num_slots, "marginal": layer.num_marginal, "total": layer.seen}
            | ({} if layer.window is None else {"window": layer.window})
            for layer in self.layers
        ]
