"""Passes of the models: over tokens of one sequence, in chunks if they are many, or of several, packed end to end.

`decode.py` says which passes a round takes; what attention reads and records in one is told by its `AttentionCall`.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import AttentionCall, AttentionMass, AttentionRows
from .attention_form import layer_windows
from .cache import TieredCache
from .cache_group import CacheGroup
from .trimmed_head import ContextTokens, context_logits

PREFILL_CHUNK = 2048  # tokens per prefill pass; bounds the activations, not the result


class Passes:
    """What runs a target and, if there is one, its draft. attention: a name in backends.BACKENDS."""

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel | None, attention: str):
        self.target, self.draft_model, self.attention = target, draft, attention

    def forward(
        self,
        model: PreTrainedModel | None,
        cache: TieredCache | None,
        tokens: list[int],
        call: AttentionCall,
        num_logits: int = 1,
    ) -> Tensor:
        """Float32 logits (num_logits, V) of the last positions; 0: hidden states (q, d), no output layer."""
        assert model is not None and cache is not None
        ids = input_ids(model, tokens)
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "attention_call": call}
        if num_logits == 0:
            return model.base_model(input_ids=ids, **options)[0][0].float()
        return model(input_ids=ids, logits_to_keep=num_logits, **options).logits[0].float()

    def forward_group(
        self,
        model: PreTrainedModel | None,
        caches: list[TieredCache],
        tokens: list[list[int]],
        calls: list[AttentionCall],
        logits: str = "all",
    ) -> list[Tensor]:
        """One model over some tokens of each of several sequences, packed end to end: float32 logits of each.

        logits: "all" positions, (q, V) a row, the "last" of every row, (1, V), or "none", which leaves the output
        layer out and gives hidden states.
        """
        assert model is not None
        counts = [len(own) for own in tokens]
        group = CacheGroup(caches, counts)
        last = torch.tensor(counts, device=model.device).cumsum(0) - 1
        output = (model.base_model if logits == "none" else model)(
            input_ids=input_ids(model, list(chain.from_iterable(tokens))),
            position_ids=group.positions(model.device),
            past_key_values=group,
            use_cache=True,
            attention_call=calls,
            **({"logits_to_keep": last} if logits == "last" else {}),
        )
        return list(output[0][0].float().split([1] * len(counts) if logits == "last" else counts))

    def feed(
        self, model: PreTrainedModel, cache: TieredCache, tokens: list[int], mass: AttentionMass | None = None
    ) -> Tensor:
        """Process tokens in chunks; logits (V,) of the last one (empty if there are none)."""
        logits = torch.empty(0)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            logits = self.forward(model, cache, chunk, AttentionCall(self.attention, mass=mass))[-1]
        return logits

    def draft_step(
        self,
        cache: TieredCache | None,
        pending: list[int],
        call: AttentionCall,
        context: ContextTokens | None,
        held: list[int],
    ) -> Tensor:
        """One pass of the draft: logits (V,) behind the last pending token; held: what `context` is to follow."""
        if context is None:
            return self.forward(self.draft_model, cache, pending, call)[-1]
        assert self.draft_model is not None
        hidden = self.forward(self.draft_model, cache, pending, call, num_logits=0)[-1:]
        return context_logits(self.draft_model, hidden, [context], [held])[0]

    def new_rows(self, num_rows: int, length: int) -> AttentionRows:
        assert self.draft_model is not None
        config = self.draft_model.config
        return AttentionRows(
            config.num_hidden_layers, config.num_attention_heads, num_rows, length, self.draft_model.device
        )


def input_ids(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """(1, q). A draft may lack a few of the ids that pad the target's vocabulary, which sampling at a high temperature
    can emit; it then reads its own last one: what it proposes decides nothing."""
    return torch.tensor([tokens], device=model.device).clamp_(max=model.config.vocab_size - 1)


def full_cache(model: PreTrainedModel, capacity: int) -> TieredCache:
    """A cache that never evicts, e.g. the draft's."""
    return TieredCache(model.config.num_hidden_layers, capacity, windows=layer_windows(model.config))
