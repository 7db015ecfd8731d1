"""What `task=throughput` measures: transformers' own ways to generate, and ours, each from one prefill of the prompt.

A system decodes a number of tokens greedily from a copy of the prompt's caches and says what it did. Copies are made
before the clock starts. End-of-sequence tokens end nothing, so that all decode equally long.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..cache import TieredCache
from ..decode import Decoder
from ..errors import UserError
from ..linear import Slot, exchange
from ..memory import peak_memory_bytes, reset_peak_memory
from ..sequence import Round, Sequence

STOCK = ("transformers", "assisted", "prompt_lookup")
SPECULATES, ADAPTS = "+draft", "+adaptive"  # behind a policy's name: with speculation, fixed or by the controller


@dataclass
class Run:
    """One repeat: what was decoded, how long it took and what it moved. passes: of the target; steps: of the draft.

    headless: draft steps without the output layer. kv_read: bytes of K and V that attention had to read, by model.
    """

    tokens: list[int]
    seconds: float
    cpu_seconds: float
    passes: int
    steps: int = 0
    headless: int = 0
    rows: int = 0  # that the target's passes computed
    target_kv_read: int = 0
    draft_kv_read: int = 0
    peak_memory_bytes: int | None = None
    rounds: list[Round] = field(default_factory=list)
    sequence: Sequence | None = None


@contextmanager
def clocked(device: torch.device) -> Iterator[Callable[[], tuple[float, float]]]:
    """Yields a function that gives wall and CPU seconds, the device's work included."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()

    def read() -> tuple[float, float]:
        synchronize(device)
        return time.perf_counter() - wall, time.process_time() - cpu

    yield read


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Prompt:
    """A prompt that both models have read once. base: our caches of it; decoder: the one that read it."""

    decoder: Decoder
    base: Sequence
    logits: torch.Tensor  # (V,) of the last token
    seconds: float  # of the target's prefill
    draft_seconds: float


def read_prompt(decoder: Decoder, tokens: list[int], num_tokens: int, mass: Any) -> Prompt:
    """Prefill of both models, with room for `num_tokens` more. mass: gives an empty `AttentionMass`, or None."""
    base = decoder.start(tokens, num_tokens)
    base.evidence.mass = mass(base.target.layers[0].capacity) if mass else None
    with clocked(decoder.device) as clock:
        logits = decoder.prefill(base)
        seconds, _ = clock()
    with clocked(decoder.device) as clock:
        decoder.prefill_draft(base)
        draft_seconds, _ = clock()
    return Prompt(decoder, base, logits, seconds, draft_seconds)


class OwnSystem:
    """One policy, with or without speculation, through `Decoder.decode`."""

    def __init__(self, name: str, decoder: Decoder, prompt: Prompt):
        self.name, self.decoder, self.prompt = name, decoder, prompt

    def run(self, num_tokens: int) -> Run:
        """`num_tokens` tokens behind the first one, which the prefill gave."""
        base = self.prompt.base
        sequence = self.decoder.branch(base)
        sequence.limit = len(base.tokens) + num_tokens + 1
        rounds = self.decoder.decode(sequence, self.prompt.logits)
        next(rounds)
        reset_peak_memory()
        run = Run([], 0.0, 0.0, 0, sequence=sequence)
        with clocked(self.decoder.device) as clock:
            for round_, _ in rounds:
                self._note(run, round_, sequence)
            run.seconds, run.cpu_seconds = clock()
        run.peak_memory_bytes = peak_memory_bytes(self.decoder.device)
        run.tokens = sequence.tokens[len(base.tokens) :]
        if base.draft is not None:
            base.draft.rollback(base.draft.seen - len(base.tokens))
        return run

    def _note(self, run: Run, round_: Round, sequence: Sequence) -> None:
        run.rounds.append(round_)
        run.passes += 1
        run.rows += round_.num_drafted + 1
        run.target_kv_read += sequence.counters.last_target_bytes
        headless = 1 if sequence.reading is not None else 0
        run.steps += round_.num_drafted + headless
        run.headless += headless
        if sequence.draft is not None:
            run.draft_kv_read += (round_.num_drafted + headless) * sequence.draft.nbytes


class StockSystem:
    """transformers' `generate` on its own cache, filled from the prompt's. originals: unpacked layers to put back."""

    def __init__(
        self,
        name: str,
        prompt: Prompt,
        draft: PreTrainedModel | None,
        originals: list[Slot],
        options: dict[str, Any],
        drafting: dict[str, Any],
    ):
        """options: for `generate`; drafting: for the draft's own generation config (assisted generation)."""
        self.name, self.prompt, self.originals = name, prompt, originals
        self.model: PreTrainedModel = prompt.decoder.target
        self.draft, self.options, self.drafting = draft if name == "assisted" else None, options, drafting
        if name == "assisted" and draft is None:
            raise UserError("task.systems=assisted needs a draft model; set model.draft, or leave it out.")

    def run(self, num_tokens: int) -> Run:
        """As many tokens as ours, after the first one of the prefill."""
        base = self.prompt.base
        ids = torch.tensor([[*base.tokens, int(self.prompt.logits.argmax())]], device=self.model.device)
        cache, run = dynamic_cache(base.target, len(base.tokens)), Run([], 0.0, 0.0, 0)
        with ExitStack() as stack:
            for model in filter(None, (self.model, self.draft)):
                stack.enter_context(stock(model, self.drafting if model is self.draft else {}))
            stack.enter_context(exchanged(self.originals))
            stack.enter_context(only_new_tokens(self.model, run, cache))
            options = dict(self.options)
            if self.draft is not None and base.draft is not None:
                options["assistant_model"] = self.draft
                stack.enter_context(prefilled(self.draft, dynamic_cache(base.draft, len(base.tokens)), run))
            reset_peak_memory()
            with clocked(self.model.device) as clock:
                out = self.model.generate(
                    ids, past_key_values=cache, max_new_tokens=num_tokens, do_sample=False, **options
                )
                run.seconds, run.cpu_seconds = clock()
        run.peak_memory_bytes = peak_memory_bytes(self.model.device)
        run.tokens = out[0, len(base.tokens) :].tolist()
        return run

    def prefill(self) -> float:
        """Seconds to the first token when transformers reads the prompt itself."""
        ids = torch.tensor([self.prompt.base.tokens], device=self.model.device)
        with stock(self.model, {}), exchanged(self.originals), clocked(self.model.device) as clock:
            self.model.generate(ids, max_new_tokens=1, do_sample=False)
            return clock()[0]


def dynamic_cache(cache: TieredCache, length: int) -> DynamicCache:
    """transformers' cache with a copy of the first `length` tokens, from which nothing was evicted."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
    return copy


@contextmanager
def stock(model: PreTrainedModel, settings: dict[str, Any]) -> Iterator[None]:
    """The model as transformers alone would run it: its SDPA attention, greedy, no end-of-sequence token."""
    attention, config = model.config._attn_implementation, model.generation_config
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of how its own drafting calls `generate`
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, **settings)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.generation_config = config
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def exchanged(slots: list[Slot]) -> Iterator[None]:
    """These layers in the place of the packed ones."""
    packed = exchange(slots)
    try:
        yield
    finally:
        exchange(packed)


@contextmanager
def only_new_tokens(model: PreTrainedModel, run: Run, cache: DynamicCache) -> Iterator[None]:
    """Count passes and rows; the first assisted pass of transformers 5.3 and later would read all tokens again."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        held, ids = cache.get_seq_length(), kwargs["input_ids"]
        if ids.shape[1] > held:
            kwargs["input_ids"] = ids[:, held:]
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"][:, held:]
        run.passes += 1
        run.rows += kwargs["input_ids"].shape[1]
        return args, kwargs

    def after(*_: Any) -> None:
        run.target_kv_read += sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)

    handles = (model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def prefilled(draft: PreTrainedModel, cache: DynamicCache, run: Run) -> Iterator[None]:
    """The draft's `generate`, called once a round by assisted generation, finds its cache filled at the first call.

    transformers has no argument for it, and reading the prompt again would be timed as decoding.
    """
    generate = draft.generate

    def with_cache(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **{"past_key_values": cache} | kwargs)

    def after(*_: Any) -> None:
        run.steps += 1
        run.draft_kv_read += sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)

    draft.generate, handle = with_cache, draft.register_forward_hook(after)
    try:
        yield
    finally:
        del draft.generate
        handle.remove()
