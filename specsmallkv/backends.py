"""Softmax attention of a few queries over keys and values, by one of several backends that give the same.

Storage is GQA-native: queries of the heads that share a KV head become rows of one matrix, no key is ever repeated.
This file knows tensors only: neither caches nor who asks (`attention.py`).
"""

import os
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import has_arithmetic
from .attention_form import refuse_windows, softcap_of
from .errors import UserError

FOLD_LIMIT = 64  # longest query block whose group is folded into the query axis; beyond it the mask costs more
LONG = 1024  # values; from so many on a CPU that multiplies their type is faster without a float32 copy of them
MASS_BLOCK = 2**20  # probabilities that exist at once; bounds scratch, not the result


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(q, n) bool, True where attended: the last query sees every key, so all kept tokens are seen by all."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def fold(query: Tensor, num_kv_heads: int) -> Tensor:
    """(B, H_q, q, D) -> (B, H_kv, group * q, D): query heads that share a KV head become rows of one matrix."""
    return query.reshape(query.shape[0], num_kv_heads, -1, query.shape[3])


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
        with torch.inference_mode(False):  # a buffer of that mode could not be written to once the mode is left
            buffer = _scratch.buffer = torch.empty(stored.numel() * 5 // 4, dtype=torch.float32)
    return rows.float(), buffer[: stored.numel()].view(stored.shape).copy_(stored.detach())


def attention_scores(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Float32 scores (B, H_q, q, n), scaled and capped; query (B, H_q, q, D), keys (B, H_kv, n, D)."""
    return scaled(products(query, keys), scaling).view(*query.shape[:3], keys.shape[2])


def products(query: Tensor, keys: Tensor) -> Tensor:
    """Float32 (B, H_kv, group * q, n) of query (B, H_q, q, D) and keys (B, H_kv, n, D)."""
    query_, keys_ = widened(fold(query, keys.shape[1]), keys)
    return (query_ @ keys_.transpose(2, 3)).float()


def scaled(products: Tensor, scaling: float) -> Tensor:
    """Scores of products, which it may change: scaled and capped."""
    scores = products.mul_(scaling)
    softcap = softcap_of(scaling)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attention_probabilities(query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Float32 probabilities (B, H_q, q, n) of causal attention; query (B, H_q, q, D), keys (B, H_kv, n, D).

    mask (B, H_kv, q, n) bool, True where attended, takes the place of the causal one.
    """
    return masked_softmax(attention_scores(query, keys, scaling), mask)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities of scores (B, H_q, q, n), which it may change; mask (B, H_kv, q, n) or None: causal."""
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat_interleave(scores.shape[1] // mask.shape[1], dim=1), -torch.inf)
    elif scores.shape[2] > 1:
        count = scores.shape[2]  # earlier keys are seen by all
        scores[..., -count:].masked_fill_(~causal_mask(count, count, scores.device), -torch.inf)
    return scores.softmax(dim=-1)


def weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """(B, H_q, q, D) = weights (B, H_q, q, n) times values (B, H_kv, n, D), heads of a group sharing values."""
    rows = fold(weights, values.shape[1])
    narrow = values.device.type == "cpu" and values.shape[2] >= LONG and has_arithmetic(values.dtype)
    weights_, values_ = (rows.to(values.dtype), values) if narrow else widened(rows, values)
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
    return _flash(query, keys, values, scaling, mask)[0]


def _flash(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    assert mask is None, "flash-attn takes no mask"
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    options = {"softmax_scale": scaling, "causal": True, "return_attn_probs": True}
    output, log_sum, _ = flash_attn_func(q, k, v, **options)
    return output.transpose(1, 2), log_sum


def triton_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Our own kernel (`triton_attention.py`) for a few queries; torch's for the many of a prompt."""
    if query.shape[2] > FOLD_LIMIT:
        return sdpa_attention(query, keys, values, scaling, mask)
    return _triton(query, keys, values, scaling, mask)[0]


def _triton(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from .triton_attention import split_attention

    return split_attention(query, keys, values, scaling, mask)


Backend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
BACKENDS: dict[str, Backend] = {
    "sdpa": sdpa_attention,
    "reference": reference_attention,
    "flash": flash_attention,
    "triton": triton_attention,
}


def attention_with_sinks(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None, num_sinks: int
) -> tuple[Tensor, Tensor]:
    """Attention (B, H_q, q, D) and how much of it is on the first `num_sinks` keys, (B, H_q, q, 1)."""
    probabilities = attention_probabilities(query, keys, scaling, mask)
    return weighted_values(probabilities, values), probabilities[..., :num_sinks].sum(dim=-1, keepdim=True)


def sinks_by_sum(fused: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`attention_with_sinks` of a kernel that returns log sums (B, H_q, q): the sinks' scores tell their share."""

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None, num_sinks: int
    ) -> tuple[Tensor, Tensor]:
        output, log_sum = fused(query, keys, values, scaling, mask)
        scores = attention_scores(query.float(), keys[:, :, :num_sinks].float(), scaling)  # few: float32, as the sum's
        return output, (scores - log_sum.unsqueeze(-1)).exp().sum(dim=-1, keepdim=True).clamp(max=1)

    return attend


WITH_SINKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "sdpa": attention_with_sinks,
    "reference": attention_with_sinks,
    "flash": sinks_by_sum(_flash),
    "triton": sinks_by_sum(_triton),
}


def choose_backend(requested: str, device: torch.device) -> str:
    """Backend for `model.attention`; "auto" is SDPA. Raises UserError if it is unknown or can't run here."""
    if requested == "auto":
        return "sdpa"
    if requested not in BACKENDS:
        raise UserError(f"model.attention={requested} is unknown; choose one of auto, {', '.join(BACKENDS)}.")
    if requested in REQUIRED:
        REQUIRED[requested](device)
    return requested


def check_model(backend: str, config: Any) -> None:
    """UserError if the backend cannot do what this model's attention needs."""
    if backend == "flash":
        refuse_windows("model.attention=flash", config)


def check_selection(backend: str, selection: str) -> None:
    """UserError if the backend cannot give every query its own set."""
    if backend == "flash" and selection == "query":
        raise UserError(
            "model.attention=flash takes no mask, which policy.selection=query needs; use model.attention=sdpa."
        )


def _require_flash(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"model.attention=flash needs a CUDA device, not {device.type}; use model.attention=sdpa.")
    _require_package("flash", "flash_attn")


def _require_triton(device: torch.device) -> None:
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise UserError(
            f"model.attention=triton needs a CUDA device, not {device.type}; use model.attention=sdpa, or set "
            "TRITON_INTERPRET=1 to run the kernel slowly on the CPU."
        )
    _require_package("triton", "triton")


def _require_package(backend: str, module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise UserError(
            f"model.attention={backend} needs the package {module.replace('_', '-')}; pip install "
            f"'specsmallkv[{backend}]' or use model.attention=sdpa."
        ) from error


REQUIRED = {"flash": _require_flash, "triton": _require_triton}
