"""One attention layer of the tiered KV cache (paper: critical, marginal and evicted tokens).

What lies where, for every batch row and KV head (heads are never repeated in storage):

    device buffer   [ kept: critical K and V, older tokens | tail: recent window, pending tokens, verify block ]
    marginal        V only, packed or as it is, positions beside it
    host store      K and V of every token older than the tail (residency "offload" only)

The kept region holds any subset of the older tokens, sorted by position; the tail is contiguous and ends at `seen`.
Keys are stored after RoPE, so positions stay logical and eviction never rotates anything. This file moves memory;
it does not know who decides what to keep (`policies/`) nor how attention is computed (`attention.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .packed_values import Stored, choose, pack, unpack
from .slots import (
    Arrived,
    Found,
    enlarged,
    look_up,
    positions_of,
    select,
    select_both,
    sent_over,
    slots_of,
    value_sum,
)

RESIDENCIES = ("drop", "offload")


@dataclass
class Candidates:
    """Tokens older than the coming tail, among which a policy chooses.

    positions: (B, H_kv, n) logical positions; the first `num_with_keys` still have K and V, the rest only V.
    """

    positions: Tensor
    num_with_keys: int


def num_queries(query: Any) -> int:
    """Of `get_mask_sizes`: transformers hands over a count or, in its older versions, positions."""
    return query if isinstance(query, int) else query.shape[0]


class TieredLayer(CacheLayerMixin):
    """One layer's KV cache.

    capacity: tokens the buffer holds until the first `retain` (prompt, new tokens and one verify block).
    resident_capacity: slots of the buffer that replaces it then; None keeps the first one for good.
    residency: "drop" frees what is not kept; "offload" keeps all of it in a host store of `capacity` tokens.
    host: device of that store.
    marginal_bits: in which marginal values are held; None: as they come.
    window: of a sliding-window layer, whose queries see so many tokens, themselves included. It stays exact, outside
    of every budget: nothing is kept but the tail, which `slide` shortens to what a window can still reach.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        capacity: int,
        resident_capacity: int | None = None,
        residency: str = "drop",
        host: str = "cpu",
        window: int | None = None,
        marginal_bits: int | None = None,
    ):
        super().__init__()
        self.window = window
        assert residency in RESIDENCIES, f"residency is {residency!r}, expected one of {RESIDENCIES}"
        self.capacity, self.resident_capacity = capacity, resident_capacity
        self.residency, self.host = residency, host
        self.marginal_bits = marginal_bits
        self.first_capacity: int | None = None  # of the buffer before the first `retain`, if it is evicted while read
        self.shares_memory: bool | None = None  # host and device are one memory; None until the first flush
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.is_initialized = False
        self.k = self.v = torch.empty(0, 0, 0, 0)  # (B, H_kv, slots, D)
        self.store: tuple[Tensor, ...] = ()  # K and V of the host store, (B, H_kv, capacity, D); empty without one
        self.seen = 0  # logical length, the verify block included
        self.tail_start = 0  # logical position of the first tail token
        self.kept_positions = torch.empty(0, 0, 0, dtype=torch.long)  # (B, H_kv, num_kept), sorted
        self.marginal_positions = self.kept_positions  # (B, H_kv, num_marginal), sorted
        self.marginal: Stored = (torch.empty(0, 0, 0, 0),)  # of (B, H_kv, num_marginal, D): `packed_values.py`
        self.older_value_sum = torch.empty(0, 0, 0)  # (B, H_kv, D) float32: sum of V over the host store
        self.tail_term: Any = None  # a tail_term.TailTerm, set with each set
        self.marginal_weights: Tensor | None = None  # (B, H_q, q, num_marginal), set before each verify pass
        self.row_mask: Tensor | None = None  # (B, H_kv, q, num_kept) bool: what each verify query reads; None: all
        self.sent: Callable[[], Arrived] | None = None  # what is under way from the host store (`recall.py`)
        self.sent_nbytes = 0  # scratch that the last shipment took
        self.recall_bytes = 0  # moved from the host store since the reset
        self.num_new = 0  # entries of the last retain that were not resident before, over all heads

    # --- what transformers calls -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        slots = self.first_capacity or self.capacity
        self.k, self.v = (x.new_empty(batch, heads, slots, dim) for x in (key_states, value_states))
        self.kept_positions = self.marginal_positions = torch.empty(
            batch, heads, 0, dtype=torch.long, device=key_states.device
        )
        self.marginal = pack(value_states[:, :, :0], self.marginal_bits)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append to the tail; returns this layer twice, as the opaque handle that the attention function unpacks."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._used, self._used + key_states.shape[2]
        assert end <= self.k.shape[2], f"{end} slots needed, {self.k.shape[2]} allocated"
        self.k[:, :, start:end], self.v[:, :, start:end] = key_states, value_states
        self.seen += key_states.shape[2]
        return self, self

    def get_seq_length(self, *args: Any) -> int:
        return self.seen  # logical: transformers derives positions from it

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        return self.num_slots + num_queries(query), 0

    def get_max_length(self, *args: Any) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def crop(self, n: int) -> None:
        """transformers' name for rollback: n < 0 drops -n tokens, n > 0 cuts to n tokens, 0 does nothing."""
        self.rollback(-n if n <= 0 else max(self.seen - n, 0))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.k.shape[:2], self.num_slots, self.k.shape[3]))

    # --- contents ----------------------------------------------------------------------------------------------

    @property
    def num_kept(self) -> int:
        return self.kept_positions.shape[2]

    @property
    def num_marginal(self) -> int:
        return self.marginal_positions.shape[2]

    @property
    def marginal_v(self) -> Tensor:
        """(B, H_kv, num_marginal, D), unpacked."""
        return unpack(self.marginal, self.marginal_bits if self.is_initialized else None)

    @property
    def num_slots(self) -> int:
        """Tokens with K and V on the device: kept and tail."""
        return self.num_kept + self.seen - self.tail_start

    @property
    def _tail_slot(self) -> int:
        """Where in the buffer the tail begins."""
        return self._tail_behind(self.num_kept)

    def _tail_behind(self, num_kept: int) -> int:
        return num_kept

    @property
    def _used(self) -> int:
        """Slots of the buffer in use."""
        return self._tail_slot + self.seen - self.tail_start

    @property
    def keys(self) -> Tensor:
        return self.k[:, :, : self.num_slots]

    @keys.setter
    def keys(self, value: Any) -> None:
        pass  # the base class assigns None

    @property
    def values(self) -> Tensor:
        return self.v[:, :, : self.num_slots]

    @values.setter
    def values(self, value: Any) -> None:
        pass

    @property
    def positions(self) -> Tensor:
        """(B, H_kv, num_slots) logical position of every slot, ascending."""
        return positions_of([self])

    def everything(self) -> tuple[Tensor, Tensor]:
        """K and V of all `seen` tokens (B, H_kv, seen, D), from the host store where they are not in the tail."""
        if not self.store:
            return self.keys, self.values
        older_k, older_v = self._older()
        tail = slice(self._tail_slot, self._used)
        return torch.cat((older_k, self.k[:, :, tail]), dim=2), torch.cat((older_v, self.v[:, :, tail]), dim=2)

    def _older(self) -> tuple[Tensor, ...]:
        """K and V of the host store on the device."""
        return tuple(part[:, :, : self.tail_start].to(self.k.device) for part in self.store)

    def stored_values(self, positions: Tensor) -> Tensor:
        """V (B, H_kv, m, D) of the host store, at positions (B, H_kv, m), where the store lies."""
        return select(self.store[-1], positions)

    def pooled(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Float32 products (B, H_kv, r, D) of rows (B, H_kv, r, m) and V of the host store, where the store lies."""
        return rows @ self.stored_values(positions).float()

    def kept_value_sum(self) -> Tensor:
        """(B, H_kv, D) float32: sum of V over the kept tokens."""
        return self.v[:, :, : self.num_kept].sum(dim=2, dtype=torch.float32)

    # --- one round ---------------------------------------------------------------------------------------------

    def rollback(self, n: int) -> None:
        """Drop the last n tokens, all of them still in the tail."""
        assert 0 <= n <= self.seen - self.tail_start, f"cannot roll back {n} of {self.seen - self.tail_start}"
        self.seen -= n

    def narrow(self, count: int) -> None:
        """Only the first `count` queries of the verify block that was planned will be read."""
        if self.marginal_weights is not None:
            self.marginal_weights = self.marginal_weights[:, :, :count]
        if self.row_mask is not None:
            self.row_mask = self.row_mask[:, :, :count]

    def num_resident(self, tail_start: int) -> int:
        """Tokens before `tail_start` with K and V on the device."""
        return self.num_kept + tail_start - self.tail_start

    def candidates(self, tail_start: int) -> Candidates:
        """What may be kept of the tokens before `tail_start`: with a host store all, else what is still here."""
        device = self.kept_positions.device
        if self.residency == "offload":
            everything = torch.arange(tail_start, device=device)
            return Candidates(everything.expand(*self.kept_positions.shape[:2], -1), tail_start)
        with_keys = self.positions[:, :, : self.num_resident(tail_start)]
        return Candidates(torch.cat((with_keys, self.marginal_positions), dim=2), with_keys.shape[2])

    def retain(
        self,
        critical: Tensor,
        marginal: Tensor,
        tail_start: int,
        row_mask: Tensor | None = None,
        room: int = 0,
        found: Found | None = None,
    ) -> None:
        """Make these candidates the resident set: evict the others and, from a host store, recall what is missing.

        critical (B, H_kv, c), marginal (B, H_kv, m): indices into `candidates(tail_start)`, both sorted by position;
        tokens from `tail_start` on become the tail. row_mask (B, H_kv, q, c): which of the critical tokens each of the
        q queries of the coming verify pass reads; only with it may a head repeat its first index, as padding.
        room: tokens that will be appended before the next call. found: what `look_up` says of the critical tokens.
        """
        kept, buffer = self._tail_behind(critical.shape[2]), self.k
        tail = slice(self._tail_slot + tail_start - self.tail_start, self._used)
        tail_k, tail_v = self.k[:, :, tail], self.v[:, :, tail]
        if kept != tail.start:  # else they stay where they are
            tail_k, tail_v = tail_k.clone(), tail_v.clone()
        if self.residency == "offload":  # candidates are all positions: an index is a position
            positions = critical, marginal
            self._flush(tail_start)
            parts = self._recall(critical, found or look_up([self], [critical], row_mask is not None)[0])
            values = pack(self.stored_values(marginal).to(self.v.device), self.marginal_bits)
        else:
            candidates = self.candidates(tail_start).positions
            positions = candidates.gather(2, critical), candidates.gather(2, marginal)
            parts = select_both((self.k, self.v), critical)
            values = choose(self.v[:, :, : tail.start], self.marginal, marginal, self.marginal_bits)
        length = kept + tail_k.shape[2]
        self._shrink(length + (room if row_mask is None else row_mask.shape[2]))
        self._hold(parts)
        if kept != tail.start or self.k is not buffer:
            self.k[:, :, kept:length], self.v[:, :, kept:length] = tail_k, tail_v
        (self.kept_positions, self.marginal_positions), self.tail_start = positions, tail_start
        self.marginal = values
        self.marginal_weights = self.tail_term = None
        self.row_mask = row_mask

    def _hold(self, parts: tuple[Tensor, ...]) -> None:
        """The kept tokens' K and V, as recalled, are the resident ones."""
        kept = parts[0].shape[2]
        self.k[:, :, :kept], self.v[:, :, :kept] = parts

    def slide(self, room: int) -> None:
        """Drop the tokens that no window reaches any more, once they are `room` or more; `room` more may come."""
        assert self.window is not None
        start = self.seen - self.window + 1  # what the next token's window begins with
        if start - self.tail_start >= room:
            nothing = self.kept_positions
            self.retain(nothing, nothing, start, room=room)

    def _flush(self, tail_start: int) -> None:
        """Copy the tail tokens before `tail_start` into the host store (the first time: hand the buffer over)."""
        if not self.store:
            moved = (x.to(self.host) for x in (self.k, self.v))
            self.store = tuple(enlarged(x, self.capacity, self.num_slots) for x in moved)
            self.older_value_sum = value_sum(self.v[:, :, :tail_start])
            self._see_store()
            return
        if tail_start == self.tail_start:
            return
        left = slice(self.num_kept, self.num_kept + tail_start - self.tail_start)
        for part, buffer in zip(self.store, (self.k, self.v), strict=True):
            part[:, :, self.tail_start : tail_start] = buffer[:, :, left].to(self.host)
        self.older_value_sum += value_sum(self.v[:, :, left])

    def _see_store(self) -> None:
        if self.shares_memory is None:
            self.shares_memory = self.store[0].device == self.k.device

    def send(self, positions: Tensor, arrive: Callable[[], Arrived]) -> None:
        """Entries (B, H_kv, m) of the host store are under way to the device; the next `retain` takes them in."""
        self.sent, self.sent_nbytes = arrive, positions.numel() * self.stored_bytes
        self.recall_bytes += self.sent_nbytes

    def _recall(self, wanted: Tensor, found: Found) -> tuple[Tensor, ...]:
        """The store's parts at positions `wanted` (B, H_kv, c). Over a bus only what is not there yet moves."""
        slot, resident, padding, self.num_new = found
        if self.shares_memory:
            self.recall_bytes += self.num_new * self.stored_bytes
            return select_both(self.store, wanted)
        here = self._resident()
        arrived = self.sent() if self.sent else Arrived(wanted[:, :, :0], tuple(part[:, :, :0] for part in here))
        self.sent = None
        place, ahead = slots_of(arrived.positions, wanted)
        ahead &= ~resident
        late = self.num_new - (int((ahead & ~padding).sum()) if arrived.positions.shape[2] else 0)
        self.recall_bytes += late * self.stored_bytes
        missing = (~(resident | ahead)).flatten().nonzero().squeeze(1)
        filled = (self._fill(own, store, slot, wanted, missing) for own, store in zip(here, self.store, strict=True))
        if not arrived.positions.shape[2]:
            return tuple(filled)
        sent, use = select_both(arrived.parts, place), ahead.unsqueeze(-1)
        return tuple(torch.where(use, own, part) for own, part in zip(sent, filled, strict=True))

    def _resident(self) -> tuple[Tensor, ...]:
        """Of the tokens in the order of `positions`, what the host store has of them, on the device."""
        return self.k, self.v

    def _fill(self, source: Tensor, store: Tensor, slot: Tensor, wanted: Tensor, missing: Tensor) -> Tensor:
        filled = select(source, slot)
        head = torch.arange(wanted.shape[0] * wanted.shape[1], device=wanted.device).view(*wanted.shape[:2], 1)
        index = (wanted + head * store.shape[2]).flatten()[missing].to(store.device)
        rows = store.reshape(-1, store.shape[3]).index_select(0, index)
        filled.view(-1, store.shape[3])[missing] = sent_over(rows, source.device)
        return filled

    def _shrink(self, needed: int) -> None:
        """Replace the prompt-sized buffer, freed or handed over to the host store, by the resident one.

        The union of several queries' sets, or a layer without marginal tokens, may need more slots than planned for;
        the buffer then follows.
        """
        slots = min(max(self.resident_capacity or self.capacity, needed), self.capacity)
        handed_over = bool(self.store) and self.k.data_ptr() == self.store[0].data_ptr()
        if self.k.shape[2] != slots or handed_over:
            batch, heads, _, dim = self.k.shape
            self.k, self.v = (x.new_empty(batch, heads, slots, dim) for x in (self.k, self.v))

    def grow(self, capacity: int, resident_capacity: int | None = None) -> None:
        """Room for `capacity` tokens, `resident_capacity` of them resident; contents stay, nothing ever shrinks."""
        shrunk = self.k.shape[2] < self.capacity
        self.capacity = max(self.capacity, capacity)
        if self.resident_capacity is not None:
            self.resident_capacity = max(self.resident_capacity, resident_capacity or 0)
        if not self.is_initialized:
            return
        slots = self.resident_capacity if shrunk and self.resident_capacity else self.capacity
        self.k, self.v = (enlarged(x, slots, self._used) for x in (self.k, self.v))
        self.store = tuple(enlarged(part, self.capacity, self.tail_start) for part in self.store)

    # --- bytes, counted from the tensors ------------------------------------------------------------------------

    @property
    def entry_bytes(self) -> int:
        """K and V of one token in one head."""
        return 2 * self.k.shape[3] * self.k.element_size()

    @property
    def stored_bytes(self) -> int:
        """What one token in one head takes in the host store, and on its way from there."""
        return sum(part.shape[3] * part.element_size() for part in self.store)

    @property
    def marginal_nbytes(self) -> int:
        """Bytes of the marginal values, with their scales and offsets."""
        return sum(part.nbytes for part in self.marginal)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V in use on the device."""
        return self.keys.nbytes + self.values.nbytes + self.marginal_nbytes

    @property
    def allocated_nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.marginal_nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes in use in the host store: every token older than the tail."""
        return sum(part[:, :, : self.tail_start].nbytes for part in self.store)

    @property
    def full_nbytes(self) -> int:
        """What a full cache of the same logical length holds."""
        return self.k.shape[0] * self.k.shape[1] * self.seen * self.entry_bytes
