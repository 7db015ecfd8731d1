"""Attention over the tiered cache, registered with transformers under one name; no model code is patched.

The cache layer arrives as an opaque handle (`TieredLayer.update` returns it), so this file decides how its tiers
are read: softmax attention over the device buffer (kept tokens, then a causal tail), plus the compensation for
marginal tokens (paper: marginal information compensation). It also lends an eye to the oracle: `AttentionCall`
asks a forward pass to record attention rows (draft), to keep its last queries or to sum its columns (target).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention_form import Scaling
from .backends import (
    BACKENDS,
    FOLD_LIMIT,
    MASS_BLOCK,
    WITH_SINKS,
    attention_probabilities,
    causal_mask,
    weighted_values,
)
from .cache_group import LayerGroup
from .draft_view import DraftView
from .packed_layer import PackedLayer
from .packed_values import weighted_sum
from .tiered_layer import TieredLayer

NAME = "specsmallkv"
WRITTEN_OUT = 8  # queries of a pass that records some: up to so many, one way through the keys serves all


class AttentionRows:
    """Attention probabilities of all heads of one model for a run of consecutive query positions.

    values: (M, T, N) float32, M = layers x query heads; row t belongs to the query at `first_position` + t and is zero
    beyond it. One sequence at a time.
    """

    def __init__(self, num_layers: int, num_heads: int, num_rows: int, length: int, device: torch.device):
        self.num_heads, self.first_position = num_heads, 0
        self.buffer = torch.zeros(num_layers * num_heads, num_rows, length, device=device)
        self.num_rows = self.num_queries = num_rows
        self.length, self.known = length, True
        self.chances = [1.0]

    def start(self, first_position: int, num_rows: int, known: bool = True) -> None:
        """Record the next `num_rows` queries, the first of which stands at `first_position`.

        known: their tokens are, so that one pass records all rows; of drafts it may leave out the last ones.
        """
        self.first_position, self.known = first_position, known
        self.num_rows = self.num_queries = num_rows  # the latter as it was before `narrow`
        self.length = first_position + num_rows
        self.chances = [1.0]

    def narrow(self, num_rows: int) -> None:
        """Forget the rows behind the first `num_rows`, which nobody follows up."""
        self.num_rows, self.length = num_rows, self.first_position + num_rows
        self.chances = self.chances[:num_rows]

    def expect(self, probability: float) -> None:
        """The draft gives its next proposal this probability: the row behind it matters by the product so far."""
        self.chances.append(self.chances[-1] * probability)

    @property
    def values(self) -> Tensor:
        return self.buffer[:, : self.num_rows, : self.length]

    def mean(self, by_chance: bool, num_rows: int) -> Tensor:
        """(M, N): mean over the first `num_rows`, by the chance that their queries come to be (known ones: plain)."""
        if not by_chance or len(self.chances) < num_rows:
            return self.values[:, :num_rows].mean(dim=1)
        chances = self.chances[:num_rows]
        rows, total = self.values[:, :num_rows].unbind(dim=1), sum(chances)
        mean = rows[0] * (chances[0] / total)
        for row, chance in zip(rows[1:], chances[1:], strict=True):
            mean.add_(row, alpha=chance / total)
        return mean

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def count(self, layer: TieredLayer, num_queries: int) -> int:
        """How many of the last `num_queries` queries are to be recorded."""
        return max(0, min(num_queries, layer.seen - self.first_position))

    def store(self, layer_index: int, end: int, probabilities: Tensor) -> None:
        """probabilities (1, H, r, n): rows of the queries that end before position `end`."""
        heads = slice(layer_index * self.num_heads, (layer_index + 1) * self.num_heads)
        last = end - self.first_position
        rows = self.buffer[heads, last - probabilities.shape[2] : last]
        rows[..., : probabilities.shape[3]] = probabilities[0]
        rows[..., probabilities.shape[3] : self.length] = 0


class AttentionMass:
    """Attention that each token has received from all committed queries so far, per layer (H2O's accumulated scores).

    sums: per layer, (1, H_kv, capacity) float32 by logical position, mean over the heads of a group. A query counts
    once, also where it is read again. pending: per layer, the queries of a verify pass; those that are committed wait
    for `count`, since one product for all between two evictions costs little more than one for each.
    per_query_head: every query head's own sums instead, (1, H_q, capacity); for caches that evict nothing.
    """

    def __init__(self, capacity: int, per_query_head: bool = False):
        self.capacity, self.per_query_head = capacity, per_query_head
        self.sums: dict[int, Tensor] = {}
        self.pending: dict[int, Tensor] = {}
        self.waiting: dict[int, Tensor] = {}
        self._counted: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.sums.values())

    def clone(self) -> "AttentionMass":
        other = AttentionMass(self.capacity)
        other.sums = {index: x.clone() for index, x in self.sums.items()}
        other._counted, other.waiting = dict(self._counted), dict(self.waiting)
        return other

    def grow(self, capacity: int) -> None:
        """Room for a longer sequence; the sums stay."""
        missing = max(0, capacity - self.capacity)
        self.capacity += missing
        self.sums = {index: F.pad(x, (0, missing)) for index, x in self.sums.items()}

    def add(self, index: int, layer: TieredLayer, query: Tensor, scaling: float) -> None:
        """Count those of the last queries (1, H_q, q, D) of a layer that are new."""
        if layer.window is not None:  # outside of the budget
            return
        length, slots = query.shape[2], layer.num_slots
        new = min(length, layer.seen - self._counted.get(index, 0))
        heads = query.shape[1] if self.per_query_head else layer.keys.shape[1]
        step = max(1, MASS_BLOCK // (query.shape[1] * slots))
        if index not in self.sums:
            self.sums[index] = torch.zeros((1, heads, self.capacity), device=query.device)
        for first in range(length - new, length, step):
            block = query[:, :, first : first + step]
            end = slots - length + first + block.shape[2]
            probabilities = attention_probabilities(block, layer.keys[:, :, :end], scaling)
            columns = probabilities.sum(2).unflatten(1, (heads, -1)).mean(2)
            positions = layer.positions[:, :, :end].repeat_interleave(heads // layer.keys.shape[1], dim=1)
            self.sums[index].scatter_add_(2, positions, columns)
        self._counted[index] = layer.seen

    def commit(self, layers: list[TieredLayer]) -> None:
        """The pending queries that were not rolled back wait to be counted."""
        for index, queries in self.pending.items():
            if layers[index].window is not None:
                continue
            earlier = self.waiting.get(index, queries[:, :, :0])
            accepted = layers[index].seen - self._counted[index] - earlier.shape[2]
            self.waiting[index] = torch.cat((earlier, queries[:, :, :accepted]), dim=2)
        self.pending = {}

    def count(self, layers: list[TieredLayer], scaling: float) -> None:
        """Count what waits, before anything is evicted: at lengths that do not depend on how the tokens came."""
        for index, queries in self.waiting.items():
            self.add(index, layers[index], queries, scaling)
        self.waiting = {}


@dataclass
class AttentionCall:
    """What one forward pass wants of attention: the backend, and optionally its rows, last queries or column sums.

    queries: filled per layer with the last `num_queries` queries, (B, H_q, W, D), after RoPE.
    """

    backend: str = "sdpa"
    rows: AttentionRows | None = None
    mass: AttentionMass | None = None
    num_queries: int = 0
    everything: bool = False  # read every key, the host store's too (analysis only)
    view: DraftView | None = None  # read what it holds instead of the cache
    queries: dict[int, Tensor] = field(default_factory=dict)


def window_mask(layer: TieredLayer, num_queries: int, end: int | None = None) -> Tensor | None:
    """(1, H_kv, q, n) bool of a sliding-window layer: the last queries before position `end` and the slots up to it.

    None where every query sees all that is before it, as in other layers.
    """
    end = layer.seen if end is None else end
    if layer.window is None or end - layer.tail_start <= layer.window:
        return None
    positions = torch.arange(layer.tail_start, end, device=layer.k.device)
    distance = positions[-num_queries:, None] - positions
    return ((distance >= 0) & (distance < layer.window)).expand(1, layer.k.shape[1], -1, -1)


def visible(layer: TieredLayer, num_queries: int) -> Tensor | None:
    """(B, H_kv, q, num_slots) bool: kept tokens as `row_mask` says, the tail causally; None without a row mask.

    In a sliding-window layer, which keeps no others, the window's tokens.
    """
    if layer.window is not None:
        return window_mask(layer, num_queries)
    if layer.row_mask is None:
        return None
    assert layer.row_mask.shape[2] == num_queries, "sets were planned for another number of queries"
    tail = causal_mask(num_queries, layer.num_slots, layer.row_mask.device)[:, layer.num_kept :]
    return torch.cat((layer.row_mask, tail.expand(*layer.row_mask.shape[:3], -1)), dim=-1)


def compensate(output: Tensor, layer: TieredLayer) -> Tensor:
    """o = (1 - sum w) o_L + sum w v over the marginal tier, w from `matching.marginal_weights`; (B, H_q, q, D)."""
    weights = layer.marginal_weights
    if weights is None or layer.num_marginal == 0:
        return output
    rest = (1 - weights.sum(dim=-1, keepdim=True)).to(output.dtype)
    return rest * output + weighted_sum(weights, layer.marginal, layer.marginal_bits)


def read_tiers(layer: TieredLayer, query: Tensor, scaling: float, mask: Tensor | None, backend: str) -> Tensor:
    """Attention (B, H_q, q, D) over what is kept, with what marginal or evicted tokens add to it."""
    term = layer.tail_term
    if isinstance(layer, PackedLayer) and layer.kept and query.shape[2] <= FOLD_LIMIT:
        assert not layer.num_marginal, "packed layers add no marginal values"
        output, on_sinks = layer.attention(query, scaling, mask, term.num_sinks if term else 0)
        return term.add(output, on_sinks) if term else output
    keys, values = layer.keys, layer.values
    if term is not None:  # its odds need the mass on the sinks
        output, on_sinks = WITH_SINKS[backend](query, keys, values, scaling, mask, term.num_sinks)
        return term.add(output, on_sinks)
    if backend == "triton" and layer.marginal_weights is not None and layer.num_marginal:
        from .triton_attention import Marginal, split_attention

        marginal = Marginal(layer.marginal_weights, layer.marginal, layer.marginal_bits)
        return split_attention(query, keys, values, scaling, mask, marginal=marginal)[0]
    return compensate(BACKENDS[backend](query, keys, values, scaling, mask), layer)


def attend(layer: TieredLayer, index: int, query: Tensor, scaling: float, call: AttentionCall) -> Tensor:
    """Output (B, H_q, q, D) of the last q tokens of a tiered layer, recorded as `call` asks."""
    if call.num_queries:
        earlier = call.queries.get(index, query[:, :, :0])
        call.queries[index] = torch.cat((earlier, query), dim=2)[:, :, -call.num_queries :]
    if call.mass:
        call.mass.add(index, layer, query, scaling)
    if call.view is not None:
        return _attend_view(call.view, layer, index, query, scaling, call.backend)
    mask = None if call.everything and layer.window is None else visible(layer, query.shape[2])
    count = call.rows.count(layer, query.shape[2]) if call.rows else 0
    if not (call.everything or count):
        return read_tiers(layer, query, scaling, mask, call.backend)
    keys, values = layer.everything() if call.everything else (layer.keys, layer.values)
    if call.rows and count:
        few = query.shape[2] <= WRITTEN_OUT and not layer.num_kept  # else tiers add to what is not recorded
        written_out = query.shape[2] if few else count
        recorded = None if mask is None else mask[:, :, -written_out:]
        probabilities = attention_probabilities(query[:, :, -written_out:], keys, scaling, recorded)
        call.rows.store(index, layer.seen, probabilities[:, :, -count:])
        if written_out == query.shape[2]:  # the rows are the attention, nothing is computed twice
            return weighted_values(probabilities, values)
    if call.everything:
        return compensate(BACKENDS[call.backend](query, keys, values, scaling, mask), layer)
    return read_tiers(layer, query, scaling, mask, call.backend)


def _attend_view(
    view: DraftView, layer: TieredLayer, index: int, query: Tensor, scaling: float, backend: str
) -> Tensor:
    keys, values = view.read(index, layer)
    if keys.dtype == query.dtype:
        return BACKENDS[backend](query, keys, values, scaling, None)
    return weighted_values(attention_probabilities(query, keys, scaling), values).to(query.dtype)


def attend_rows(
    group: LayerGroup, index: int, query: Tensor, scaling: float, calls: list[AttentionCall] | None
) -> Tensor:
    """Output (1, H_q, sum of q, D): the queries of each row attend to its own layer as its own call asks."""
    calls = calls or [AttentionCall() for _ in group.rows]
    rows = zip(group.rows, query.split(group.counts, dim=2), calls, strict=True)
    return torch.cat([attend(layer, index, own, scaling, call) for layer, own, call in rows], dim=2)


class Deferred(NamedTuple):
    """K and V (1, H_kv, q, D) of a compiled layer, which are appended when attention is called (`compiled.py`)."""

    k: Tensor
    v: Tensor

    @property
    def shape(self) -> torch.Size:  # kvpress, once imported, asks every key that attention is called with
        return self.k.shape


def tiered_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # the sixth parameter by position: kvpress wraps this call
    scaling: float | None = None,
    attention_call: Any = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer; plain tensors (any other cache) go to its own SDPA.

    attention_call: an AttentionCall, or a list of them for a `CacheGroup`, one per row.
    """
    if isinstance(key, Deferred):
        return torch.ops.specsmallkv.attend(query, key.k, key.v, scaling, softcap), None
    if not isinstance(key, TieredLayer | LayerGroup):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = Scaling(query.shape[3] ** -0.5 if scaling is None else scaling, softcap)
    index: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(key, LayerGroup):
        output = attend_rows(key, index, query, scale, attention_call)
    else:
        output = attend(key, index, query, scale, attention_call or AttentionCall())
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tiered_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_tiered_attention(model: PreTrainedModel) -> None:
    """Route the model's attention here; harmless for other caches."""
    model.set_attn_implementation(NAME)
