"""Decoder layers through torch.compile, for short passes: drafting steps, verify passes, windows (`model.compile`).

A layer's norms, projections, RoPE and MLP become one graph, which all layers of a model share; a pass of one token has
one graph and all wider ones have another. Attention and the cache are Python over lengths that grow. So the graph has
them as one opaque operator, `specsmallkv::attend`, and CUDA graphs are recorded on both sides of it only. Prefill with
its longer passes, other caches, embeddings and the output layer run as they are.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import AttentionCall, Deferred, tiered_attention, use_tiered_attention
from .attention_form import layer_windows
from .cache import TieredCache
from .cache_group import CacheGroup
from .errors import UserError
from .memory import is_out_of_memory
from .tensor_parallel import shard_of

if TYPE_CHECKING:
    from .models import ModelPair

MAX_TOKENS = 128  # of a compiled pass, all rows of a batch together; bounds how many CUDA graphs are recorded
GRAPHS = "reduce-overhead"  # the mode that records CUDA graphs
NUM_GRAPHS = 64  # most graphs of the one function: models x widths (1 or more) x kinds of layers; torch stops at 8
SPLITS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


class _Pass(threading.local):
    """What the layer that is running attends with: its attention module, the cache and an AttentionCall."""

    attention: nn.Module | None = None
    cache: TieredCache | CacheGroup | None = None
    call: Any = None


_running = _Pass()


@torch.library.custom_op("specsmallkv::attend", mutates_args=(), **SPLITS)
def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """Append key and value (1, H_kv, q, D) to the running layer's cache; attention (1, q, H_q, D) of the query."""
    module = _running.attention
    assert module is not None and _running.cache is not None, "called within a layer"
    layer, _ = _running.cache.update(key, value, module.layer_idx)
    options = {"scaling": scaling, "softcap": softcap, "attention_call": _running.call}
    return tiered_attention(module, query, layer, layer, None, **options)[0]


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3])


class DeferredCache:
    """Stands in for a cache within a graph: keeps nothing, hands keys and values on to `attend`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Deferred, Deferred]:
        both = Deferred(key_states, value_states)
        return both, both


def check_compile(mode: str | None, device: torch.device, linear: str) -> None:
    """UserError where `model.compile` cannot work, before anything is loaded."""
    if mode is None:
        return
    if linear != "torch":
        raise UserError(
            f"model.compile={mode} cannot look into model.linear={linear} layers; use "
            "model.linear=torch, with model.dtype=float32 if this CPU computes slowly in bfloat16."
        )
    if mode == GRAPHS and device.type != "cuda":
        raise UserError(
            f"model.compile={mode} records CUDA graphs, which {device} has not; use model.compile=default."
        )
    if mode == GRAPHS and not SPLITS:
        raise UserError(
            f"model.compile={mode} needs a torch that cuts CUDA graphs around an operator (2.9 or newer), not "
            f"{torch.__version__}; use model.compile=default."
        )


def compile_pair(pair: "ModelPair", mode: str | None, backend: str = "inductor") -> None:
    """Compile what both models do around attention, now. UserError if they are spread, or this machine cannot."""
    if mode is None:
        return
    for model in filter(None, (pair.target, pair.draft)):
        if shard_of(model).size > 1 or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise UserError(f"model.compile={mode} needs each model whole on one device; leave it out.")
        compile_layers(model, mode, backend)
        try:
            _run_once(model)
        except (RuntimeError, OSError, ImportError) as error:
            if is_out_of_memory(error):
                raise
            raise _cannot_compile(mode, model.device, error) from error
    pair.compile = mode


def _cannot_compile(mode: str, device: torch.device, error: Exception) -> UserError:
    told = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = told[1] if len(told) > 1 and told[0].endswith("raised:") else told[0]
    needed = "Triton" if device.type == "cuda" else "a C++ compiler (g++) and Python's headers"
    return UserError(
        f"model.compile={mode} fails on {device} ({reason[:200].rstrip('.')}); install {needed}, or leave "
        "model.compile out."
    )


def compile_layers(model: PreTrainedModel, mode: str, backend: str = "inductor") -> None:
    """Route the model's short passes over our caches through one compiled function; the first of them compiles."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), NUM_GRAPHS))
    run = torch.compile(_call, dynamic=True, mode=mode, backend=backend)
    for index, layer in enumerate(model.base_model.layers):
        layer.forward = _short_passes(layer, run, begins=index == 0)


def _call(layer: nn.Module, hidden_states: Tensor, options: dict[str, Any]) -> Tensor:
    return type(layer).forward(layer, hidden_states, **options)


def _short_passes(layer: Any, run: Callable[..., Tensor], begins: bool) -> Callable[..., Tensor]:
    """The layer's forward: compiled for few tokens and our caches, else its own."""
    own, deferred = layer.forward, DeferredCache()

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        cache = options.get("past_key_values")
        if not isinstance(cache, TieredCache | CacheGroup) or hidden_states.shape[1] > MAX_TOKENS:
            return own(hidden_states, **options)
        if begins:
            torch.compiler.cudagraph_mark_step_begin()  # what graphs of the last pass gave is not read any more
        _running.attention, _running.cache = layer.self_attn, cache
        _running.call = options.pop("attention_call", None)
        try:
            return run(layer, hidden_states, options | {"past_key_values": deferred, "attention_mask": None})
        finally:  # else the cache would outlive its sequence
            _running.attention = _running.cache = _running.call = None

    return forward


@torch.inference_mode()
def _run_once(model: PreTrainedModel) -> None:
    """A pass of each kind, so that nothing is compiled while a text is decoded (CUDA graphs come with each width)."""
    use_tiered_attention(model)
    for count in (1, 2):
        cache = TieredCache(model.config.num_hidden_layers, count, windows=layer_windows(model.config))
        ids = torch.zeros((1, count), dtype=torch.long, device=model.device)
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True, attention_call=AttentionCall())
