"""kvpress's SnapKV as a system of `task=throughput` (extra `peers`, in an environment with transformers 5.2).

Its press compresses a prompt while transformers reads it, once, before anything is timed. Decoding is one token a pass
with positions given, as in kvpress's own pipeline, since the cache no longer tells how long the text is.
"""

from typing import Any

import torch
from transformers import DynamicCache

from ..errors import UserError
from ..linear import Slot
from ..memory import peak_memory_bytes, reset_peak_memory
from ..policies import Policy, SnapKV
from .throughput_systems import Prompt, Run, StockSystem, clocked, exchanged, only_new_tokens, stock

KVPRESS = "kvpress"


def press_of(policy: Policy) -> Any:
    """kvpress's SnapKV with the budget, window and pooling of ours. Raises UserError where kvpress is missing."""
    assert isinstance(policy, SnapKV)
    try:
        from kvpress import SnapKVPress
    except ImportError as error:
        raise UserError(
            "task.systems=kvpress needs the package kvpress, which needs transformers 5.2; pip install -c "
            'constraints-peers.txt -e ".[peers]" in an environment of its own, or leave it out.'
        ) from error
    options = {"window_size": policy.window_size, "kernel_size": policy.kernel_size}
    return SnapKVPress(compression_ratio=1 - policy.kv_budget, **options)


class PressSystem(StockSystem):
    """policy: ours, whose budget, window and pooling the press takes."""

    def __init__(self, prompts: list[Prompt], originals: list[Slot], policy: Policy):
        super().__init__(KVPRESS, prompts, None, originals, {}, {})
        self.press = press_of(policy)
        self._kept: DynamicCache | None = None

    @torch.inference_mode()
    def run(self, num_tokens: int) -> Run:
        """As many tokens as ours, after the first one of our prefill."""
        with stock(self.model, {}), exchanged(self.originals):
            cache, run = self._compressed(), Run()
            first = [int(prompt.logits.argmax()) for prompt in self.prompts]
            tokens = [torch.tensor(first, device=self.model.device)]
            reset_peak_memory()
            with only_new_tokens(self.model, run, cache, cuts=False), clocked(self.model.device) as clock:
                for step in range(num_tokens):
                    tokens.append(self._next(tokens[-1], cache, step))
                run.seconds, run.cpu_seconds = clock()
        run.peak_memory_bytes = peak_memory_bytes(self.model.device)
        run.tokens = torch.stack(tokens, dim=1).tolist()
        return run

    def _next(self, tokens: torch.Tensor, cache: DynamicCache, step: int) -> torch.Tensor:
        """The tokens (B,) behind these, which stand at `step` behind the prompt."""
        position = torch.full((len(tokens), 1), len(self.prompts[0].base.tokens) + step, device=tokens.device)
        logits = self.model(input_ids=tokens.unsqueeze(1), past_key_values=cache, position_ids=position).logits
        return logits[:, -1].argmax(-1)

    def _compressed(self) -> DynamicCache:
        """A copy of what the press leaves of the prompts."""
        if self._kept is None:
            self._kept = DynamicCache()
            prompts = torch.tensor([prompt.base.tokens for prompt in self.prompts], device=self.model.device)
            with self.press(self.model):
                self.model(input_ids=prompts, past_key_values=self._kept, logits_to_keep=1)
        copy = DynamicCache()
        for index, layer in enumerate(self._kept.layers):
            copy.update(layer.keys.clone(), layer.values.clone(), index)
        return copy
