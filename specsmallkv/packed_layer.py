"""A tiered layer whose critical tokens are held in few bits, so that the same bytes hold more of them.

    device buffer   [ tail: as it comes ]
    kept            codes of K and V, with scales and offsets
    sink keys       as they come: they are unlike all others, and scores are most sensitive to them
    host store      codes of every token older than the tail

A token is packed when it leaves the tail; recall moves codes. A prompt that nothing leaves is never packed. Channels
of keys are judged by all that have left; until those are SETTLED tokens, the host store has them as they came, too,
and each time more leave, they are judged and packed anew: a short first turn must not set the scale of a long chat.
"""

from typing import Any

import torch
from torch import Tensor

from .backends import masked_softmax, products, scaled, weighted_values
from .packed_keys import ChannelScale, channel_scale, key_products, pack_keys, unpack_keys
from .packed_values import Stored, pack, pooled, unpack, weighted_sum
from .slots import select_both
from .tiered_layer import TieredLayer

# Rounding by 8 tokens is ten times that by 900, by 32 four times, by 256 1.4 times (LOG, 2026-11-27).
SETTLED = 256


def with_sinks(kept: Tensor, sinks: Tensor, positions: Tensor, dim: int) -> Tensor:
    """`kept` with the sinks' own in their places along `dim`; positions of kept, broadcastable to it."""
    count = sinks.shape[dim]
    if not count:
        return kept
    own = sinks.gather(dim, positions.clamp(max=count - 1).expand_as(kept))
    return torch.where(positions < count, own, kept)


class PackedLayer(TieredLayer):
    """key_bits, value_bits: of the kept tokens' K and V and of the host store's, None: as they come.

    num_sink_tokens: first tokens whose keys stay as they are besides. residency is "offload".
    """

    def __init__(
        self, *args: Any, key_bits: int | None, value_bits: int | None, num_sink_tokens: int = 0, **options: Any
    ):
        self.key_bits, self.value_bits, self.num_sink_tokens = key_bits, value_bits, num_sink_tokens
        super().__init__(*args, **options)
        assert self.residency == "offload", "what was packed is recalled from a host store"

    def reset(self) -> None:
        super().reset()
        self.kept: Stored = ()  # codes and affine of K, then of V, of the kept tokens
        self.left: Stored = ()  # of those that have just left the tail
        self.sink_keys = torch.empty(0, 0, 0, 0)  # (B, H_kv, num_sink_tokens, D)
        self.channels = ChannelScale(self.sink_keys, self.sink_keys)
        self.early: Tensor | None = None  # on the host, keys (B, H_kv, n, D) that are packed anew when more come

    # --- contents ----------------------------------------------------------------------------------------------

    def _tail_behind(self, num_kept: int) -> int:
        return 0

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """K and V of the tail."""
        return self.k[:, :, : self._used], self.v[:, :, : self._used]

    @property
    def keys(self) -> Tensor:
        """Unpacked; attention reads the codes instead."""
        own = self.tail[0]
        return torch.cat((self._keys_of(self.kept, self.kept_positions), own), dim=2) if self.kept else own

    @keys.setter
    def keys(self, value: Any) -> None:
        pass  # the base class assigns None

    @property
    def values(self) -> Tensor:
        """Unpacked."""
        own = self.tail[1]
        return torch.cat((self._values_of(self.kept), own), dim=2) if self.kept else own

    @values.setter
    def values(self, value: Any) -> None:
        pass

    def stored_values(self, positions: Tensor) -> Tensor:
        return unpack(select_both(self.store[self._first_of_v :], positions), self.value_bits)

    def kept_value_sum(self) -> Tensor:
        return self._value_sum(self.kept)

    def _value_sum(self, parts: Stored) -> Tensor:
        """Of what the codes stand for, so that sums of different tokens can be subtracted."""
        batch, heads, count, _ = parts[0].shape
        ones = torch.ones(batch, heads, 1, count, device=parts[0].device)
        return pooled(ones, parts[self._first_of_v :], self.value_bits).squeeze(2)

    def pooled(self, rows: Tensor, positions: Tensor) -> Tensor:
        return pooled(rows, select_both(self.store[self._first_of_v :], positions), self.value_bits)

    def _older(self) -> tuple[Tensor, ...]:
        older = super()._older()
        positions = torch.arange(self.tail_start, device=self.k.device).expand(*self.k.shape[:2], -1)
        return self._keys_of(older, positions), self._values_of(older)

    @property
    def _first_of_v(self) -> int:
        """The parts before it are of K."""
        return 1 if self.key_bits is None else 2

    def _values_of(self, parts: Stored) -> Tensor:
        return unpack(parts[self._first_of_v :], self.value_bits)

    def _keys_of(self, parts: Stored, positions: Tensor) -> Tensor:
        if self.key_bits is None:
            return parts[0]
        keys = unpack_keys(parts[:2], self.channels, self.key_bits)
        return with_sinks(keys, self.sink_keys, positions.unsqueeze(3), 2)

    def attention(self, query: Tensor, scaling: float, mask: Tensor | None, num_sinks: int) -> tuple[Tensor, Tensor]:
        """As `backends.attention_with_sinks`, of query (B, H_q, q, D) over kept and tail."""
        (tail_k, tail_v), num_kept = self.tail, self.num_kept
        scores = scaled(torch.cat((self._products(query), products(query, tail_k)), dim=3), scaling)
        probabilities = masked_softmax(scores.view(*query.shape[:3], -1), mask)
        of_kept, of_tail = probabilities.split((num_kept, tail_k.shape[2]), dim=3)
        output = weighted_sum(of_kept, self.kept[self._first_of_v :], self.value_bits)
        output += weighted_values(of_tail, tail_v)
        return output, probabilities[..., :num_sinks].sum(dim=-1, keepdim=True)

    def _products(self, query: Tensor) -> Tensor:
        """Of query and the kept keys, as `backends.products`."""
        if self.key_bits is None:
            return products(query, self.kept[0])
        on_kept = key_products(query, self.kept[:2], self.channels, self.key_bits)
        # Positions ascend: sinks come first, unless the first one is repeated.
        reach = slice(self.sink_keys.shape[2] if self.row_mask is None else None)
        on_sinks = products(query, self.sink_keys)
        on_kept[..., reach] = with_sinks(on_kept[..., reach], on_sinks, self.kept_positions[:, :, None, reach], 3)
        return on_kept

    # --- one round ---------------------------------------------------------------------------------------------

    def _flush(self, tail_start: int) -> None:
        """Pack the tail tokens before `tail_start` and copy them into the host store."""
        count = tail_start - self.tail_start
        if self.store and not count:
            self.left = tuple(part[:, :, :0] for part in self.kept)
            return
        k, v = self.k[:, :, :count], self.v[:, :, :count]
        self.left = *self._pack_keys(k), *pack(v, self.value_bits)
        if not self.store:
            self.kept = tuple(part[:, :, :0] for part in self.left)
            self.store = tuple(
                part.new_empty(*part.shape[:2], self.capacity, part.shape[3], device=self.host) for part in self.left
            )
            self.older_value_sum = torch.zeros_like(v[:, :, 0], dtype=torch.float32)
            self._see_store()
        for part, own in zip(self.store, self.left, strict=True):
            part[:, :, self.tail_start : tail_start] = own.to(self.host)
        self.older_value_sum += self._value_sum(self.left)

    def _pack_keys(self, keys: Tensor) -> Stored:
        """Of the tokens that leave the tail next."""
        if self.key_bits is None:
            return (keys,)
        if self.tail_start < SETTLED:
            self._judge(keys, self.key_bits)
        return pack_keys(keys, self.channels, self.key_bits)

    def _judge(self, keys: Tensor, bits: int) -> None:
        """Set the channels' scale by all that have left the tail and by `keys`; what is stored is packed anew."""
        early = keys[:, :, :0] if self.early is None else self.early.to(keys.device)
        seen = torch.cat((early, keys), dim=2) if early.shape[2] else keys
        sinks = min(self.num_sink_tokens, seen.shape[2])
        self.sink_keys = seen[:, :, :sinks].clone()
        self.channels = channel_scale(seen[:, :, sinks:] if seen.shape[2] > sinks else seen)
        self.early = seen.to(self.host, copy=True) if seen.shape[2] < SETTLED else None
        if self.store:
            packed = pack_keys(early, self.channels, bits)
            self.kept = *select_both(packed, self.kept_positions), *self.kept[2:]
            for part, own in zip(self.store, packed, strict=False):
                part[:, :, : self.tail_start] = own.to(self.host)
            self.sent = None  # what is on its way has the former scale

    def _resident(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(parts, dim=2) for parts in zip(self.kept, self.left, strict=True))

    def _hold(self, parts: tuple[Tensor, ...]) -> None:
        self.kept, self.left = parts, ()

    # --- bytes -------------------------------------------------------------------------------------------------

    @property
    def kept_nbytes(self) -> int:
        """With what unpacks them."""
        return sum(part.nbytes for part in (*self.kept, self.sink_keys, *self.channels))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tail) + self.kept_nbytes + self.marginal_nbytes

    @property
    def allocated_nbytes(self) -> int:
        return super().allocated_nbytes + self.kept_nbytes

    @property
    def host_nbytes(self) -> int:
        return super().host_nbytes + (0 if self.early is None else self.early.nbytes)
