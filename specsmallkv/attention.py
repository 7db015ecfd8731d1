"""Attention over the tiered cache, registered with transformers under one name; no model code is patched.

The cache layer arrives as an opaque handle (`TieredLayer.update` returns it), so this file decides how its tiers
are read: softmax attention over the device buffer (kept tokens, then a causal tail), plus the compensation for
marginal tokens (paper: marginal information compensation). It also lends an eye to the oracle: `AttentionCall`
asks a forward pass to record attention rows (draft), to keep its last queries or to sum its columns (target).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache import LayerGroup, TieredLayer
from .draft_view import DraftView
from .errors import UserError

NAME = "specsmallkv"
FOLD_LIMIT = 64  # longest query block whose group is folded into the query axis; beyond it the mask costs more
MASS_BLOCK = 2**20  # probabilities that exist at once while columns are summed


class Scaling(float):
    """Factor of the attention scores; with `softcap` c (Gemma2) a scaled score s becomes c tanh(s / c)."""

    softcap: float | None

    def __new__(cls, value: float, softcap: float | None = None) -> "Scaling":
        scaling = super().__new__(cls, value)
        scaling.softcap = softcap
        return scaling


def softcap_of(scaling: float) -> float | None:
    return scaling.softcap if isinstance(scaling, Scaling) else None


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


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(q, n) bool, True where attended: the last query sees every key, so all kept tokens are seen by all."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def fold(query: Tensor, num_kv_heads: int) -> Tensor:
    """(B, H_q, q, D) -> (B, H_kv, group * q, D): query heads that share a KV head become rows of one matrix."""
    return query.reshape(query.shape[0], num_kv_heads, -1, query.shape[3])


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


_scratch = threading.local()


def widened(rows: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of a product in one type: the cache's, but on CPUs float32, whose products are many times faster.

    stored (B, H_kv, n, D), keys or values, then lies in a buffer that the thread's next call overwrites: memory that
    is new each time would cost more than the product.
    """
    if stored.device.type != "cpu" or stored.dtype == torch.float32:
        return rows.to(stored.dtype), stored
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < stored.numel():
        buffer = _scratch.buffer = torch.empty(stored.numel() * 5 // 4, dtype=torch.float32)
    return rows.float(), buffer[: stored.numel()].view(stored.shape).copy_(stored)


def attention_probabilities(query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Float32 probabilities (B, H_q, q, n) of causal attention; query (B, H_q, q, D), keys (B, H_kv, n, D).

    mask (B, H_kv, q, n) bool, True where attended, takes the place of the causal one.
    """
    query_, keys_ = widened(fold(query, keys.shape[1]), keys)
    scores = (query_ @ keys_.transpose(2, 3)).float() * scaling
    if (softcap := softcap_of(scaling)) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(*query.shape[:3], keys.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat_interleave(query.shape[1] // keys.shape[1], dim=1), -torch.inf)
    elif query.shape[2] > 1:
        count = query.shape[2]  # earlier keys are seen by all
        scores[..., -count:].masked_fill_(~causal_mask(count, count, keys.device), -torch.inf)
    return scores.softmax(dim=-1)


def weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """(B, H_q, q, D) = weights (B, H_q, q, n) times values (B, H_kv, n, D), heads of a group sharing values."""
    weights_, values_ = widened(fold(weights, values.shape[1]), values)
    return (weights_ @ values_).view(*weights.shape[:3], values.shape[3]).to(values.dtype)


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention written out in float32; the yardstick for every other backend."""
    query, keys_, values_ = query.float(), keys.float(), values.float()
    num_queries, length = query.shape[2], keys.shape[2]
    step, parts = max(1, MASS_BLOCK // (query.shape[1] * length)), []
    for first in range(0, num_queries, step):
        last = min(first + step, num_queries)
        end = length if mask is not None else length - num_queries + last  # later keys are not seen
        own = None if mask is None else mask[:, :, first:last]
        probabilities = attention_probabilities(query[:, :, first:last], keys_[:, :, :end], scaling, own)
        parts.append(weighted_values(probabilities, values_[:, :, :end]))
    return torch.cat(parts, dim=2).to(values.dtype)


def sdpa_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """torch's fused attention; storage is GQA-native, so no head is ever repeated. It knows no soft cap."""
    if softcap_of(scaling) is not None:
        return reference_attention(query, keys, values, scaling, mask)
    q, n = query.shape[2], keys.shape[2]
    if q > FOLD_LIMIT and (mask is None or mask.stride(1) == 0):  # a window's mask is the same for all heads
        mask = mask[:, :1] if mask is not None else None if q == n else causal_mask(q, n, keys.device)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    group = query.shape[1] // keys.shape[1]
    if mask is not None:
        mask = mask.repeat(1, 1, group, 1)
    elif q > 1:
        mask = causal_mask(q, n, keys.device).repeat(group, 1)
    out = F.scaled_dot_product_attention(fold(query, keys.shape[1]), keys, values, attn_mask=mask, scale=scaling)
    return out.view(query.shape)


def flash_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """flash-attn (CUDA): its causal mask is aligned to the last key and its storage GQA-native, as ours."""
    from flash_attn import flash_attn_func

    assert mask is None, "flash-attn takes no mask"
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    return flash_attn_func(q, k, v, softmax_scale=scaling, causal=True).transpose(1, 2)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "sdpa": sdpa_attention,
    "reference": reference_attention,
    "flash": flash_attention,
}


def compensate(output: Tensor, layer: TieredLayer) -> Tensor:
    """o = (1 - sum w) o_L + sum w v over the marginal tier, w from `matching.marginal_weights`; (B, H_q, q, D)."""
    weights = layer.marginal_weights
    if weights is None or layer.num_marginal == 0:
        return output
    rest = (1 - weights.sum(dim=-1, keepdim=True)).to(output.dtype)
    return rest * output + weighted_values(weights, layer.marginal_v)


def attend(layer: TieredLayer, index: int, query: Tensor, scaling: float, call: AttentionCall) -> Tensor:
    """Output (B, H_q, q, D) of the last q tokens of a tiered layer, recorded as `call` asks."""
    if call.num_queries:
        earlier = call.queries.get(index, query[:, :, :0])
        call.queries[index] = torch.cat((earlier, query), dim=2)[:, :, -call.num_queries :]
    if call.mass:
        call.mass.add(index, layer, query, scaling)
    if call.view is not None:
        return _attend_view(call.view, layer, index, query, scaling, call.backend)
    keys, values = layer.everything() if call.everything else (layer.keys, layer.values)
    mask = None if call.everything and layer.window is None else visible(layer, query.shape[2])
    count = call.rows.count(layer, query.shape[2]) if call.rows else 0
    if call.rows and count:
        recorded = None if mask is None else mask[:, :, -count:]
        probabilities = attention_probabilities(query[:, :, -count:], keys, scaling, recorded)
        call.rows.store(index, layer.seen, probabilities)
        if count == query.shape[2]:  # a drafting step: its rows are the attention, nothing is computed twice
            return weighted_values(probabilities, values)
    if layer.tail_term is not None and not call.everything:  # its odds need the mass on the sinks
        probabilities = attention_probabilities(query, keys, scaling, mask)
        return layer.tail_term.add(weighted_values(probabilities, values), probabilities)
    return compensate(BACKENDS[call.backend](query, keys, values, scaling, mask), layer)


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


def choose_backend(requested: str, device: torch.device) -> str:
    """Backend for `model.attention`; "auto" is SDPA. Raises UserError if it is unknown or can't run here."""
    if requested == "auto":
        return "sdpa"
    if requested not in BACKENDS:
        raise UserError(f"model.attention={requested} is unknown; choose one of auto, {', '.join(BACKENDS)}.")
    if requested == "flash":
        _require_flash(device)
    return requested


def check_model(backend: str, config: Any) -> None:
    """UserError if the backend cannot do what this model's attention needs."""
    if backend == "flash":
        refuse_windows("model.attention=flash", config)


def refuse_windows(what: str, *configs: Any) -> None:
    """UserError for models with sliding windows or capped scores, from what only knows plain attention."""
    for config in configs:
        if any(layer_windows(config)) or getattr(config, "attn_logit_softcapping", None):
            raise UserError(
                f"{what} does not support sliding windows or capped scores, which this {config.model_type} model has; "
                "use another model."
            )


def attention_scaling(config: Any) -> Scaling:
    """1 / sqrt(head_dim), as Llama, Mistral and Qwen scale their scores; Gemma2 names its own and caps them."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scalar = getattr(config, "query_pre_attn_scalar", None) or head_dim
    return Scaling(scalar**-0.5, getattr(config, "attn_logit_softcapping", None))


def layer_windows(config: Any) -> list[int | None]:
    """Of each layer, how many tokens its queries see, themselves included; None for all before them."""
    num_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:  # then no text is longer than the window
        return [None] * num_layers
    if config.model_type == "mistral":  # its layers are all alike
        return [window] * num_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def check_selection(backend: str, selection: str) -> None:
    """UserError if the backend cannot give every query its own set."""
    if backend == "flash" and selection == "query":
        raise UserError(
            "model.attention=flash takes no mask, which policy.selection=query needs; use model.attention=sdpa."
        )


def _require_flash(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"model.attention=flash needs a CUDA device, not {device.type}; use model.attention=sdpa.")
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        raise UserError(
            "model.attention=flash needs the package flash-attn; pip install 'specsmallkv[flash]' or use "
            "model.attention=sdpa."
        ) from error


def use_tiered_attention(model: PreTrainedModel) -> None:
    """Route the model's attention here; harmless for other caches."""
    model.set_attn_implementation(NAME)
