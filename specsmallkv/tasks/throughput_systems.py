"""What `task=throughput` measures: transformers' own ways to generate, and ours, each from one prefill of the prompts.

A system decodes a number of tokens greedily from copies of the prompts' caches, for all of them at once, and says
what it did. Copies are made before the clock starts. End-of-sequence tokens end nothing, so that all decode equally
long.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.utils import logging as transformers_logging

from ..batch import BatchDecoder, Job, Row
from ..branching import first_logits
from ..cache import TieredCache
from ..controller import Adaptive
from ..decode import Decoder
from ..errors import UserError
from ..linear import Slot, exchange
from ..memory import peak_memory_bytes, reset_peak_memory
from ..prefill import in_chunks
from ..sequence import Counters, Round, Sequence

STOCK = ("transformers", "static", "assisted", "prompt_lookup")
ONE_BY_ONE = ("assisted", "prompt_lookup")  # of these, what takes no batch
SPECULATES, ADAPTS = "+draft", "+adaptive"  # behind a policy's name: with speculation, fixed or by the controller


@dataclass
class Run:
    """One repeat: what was decoded, how long it took and what it moved. passes: of the target; steps: of the draft.

    tokens: of each prompt. branch_seconds: until each had its own cache. rows: that the target's passes computed.
    headless: draft steps without the output layer.
    kv_read: bytes of K and V that attention had to read, by model. counters: of all sequences together.
    """

    tokens: list[list[int]] = field(default_factory=list)
    branch_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    passes: int = 0
    steps: int = 0
    headless: int = 0
    rows: int = 0
    target_kv_read: int = 0
    draft_kv_read: int = 0
    target_kv_attended: int = 0  # bytes that each query attended to, summed over queries
    draft_kv_attended: int = 0
    draft_rows: int = 0  # that the draft's steps computed, and of how many of them the logits
    draft_logits: int = 0
    peak_memory_bytes: int | None = None
    rounds: list[Round] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    @property
    def num_tokens(self) -> int:
        """Decoded while the clock ran: each prompt's first token comes from its prefill."""
        return sum(len(own) - 1 for own in self.tokens)


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
    """One policy, with or without speculation: a prompt through `Decoder.decode`, several through `BatchDecoder`."""

    def __init__(self, name: str, decoder: Decoder, prompts: list[Prompt]):
        self.name, self.decoder, self.prompts = name, decoder, prompts

    @property
    def lacks_costs(self) -> bool:
        """Whether the controller is yet to measure: then that would be timed with the first repeat."""
        controller = self.decoder.controller
        return isinstance(controller, Adaptive) and not controller.table.rows

    def run(self, num_tokens: int) -> Run:
        """`num_tokens` tokens behind each prompt's first one, which the prefill gave."""
        run = Run()
        for prompt in self.prompts:
            with clocked(self.decoder.device) as clock:
                run.sequences.append(self._branch(prompt.base, num_tokens))
                run.branch_seconds.append(clock()[0])
        passes = self._together(run) if len(self.prompts) > 1 else self._alone(run)
        next(passes)
        reset_peak_memory()
        with clocked(self.decoder.device) as clock:
            for rounds in passes:
                self._note(run, rounds)
            run.seconds, run.cpu_seconds = clock()
        run.peak_memory_bytes = peak_memory_bytes(self.decoder.device)
        for prompt, sequence in zip(self.prompts, run.sequences, strict=True):
            run.tokens.append(sequence.tokens[len(prompt.base.tokens) :])
            run.draft_kv_read += sequence.counters.draft_kv_read
            run.draft_kv_attended += sequence.counters.draft_kv_attended
            run.draft_rows += sequence.counters.draft_rows
            run.steps += sequence.counters.catch_ups
            run.headless += sequence.counters.catch_ups
            if prompt.base.draft is not None:
                prompt.base.draft.rollback(prompt.base.draft.seen - len(prompt.base.tokens))
        return run

    def ttft(self, run: Run) -> float:
        """Seconds to the first prompt's first token; one that is read in chunks is read by each branch itself."""
        prompt = self.prompts[0]
        return run.branch_seconds[0] if in_chunks(self.decoder.policy, len(prompt.base.tokens)) else prompt.seconds

    def _branch(self, base: Sequence, num_tokens: int) -> Sequence:
        sequence = self.decoder.branch(base)
        sequence.limit = len(base.tokens) + num_tokens + 1
        return sequence

    def _alone(self, run: Run) -> Iterator[list[tuple[Round, Sequence]]]:
        """The rounds of each pass; the first one is the prefill's."""
        run.counters = run.sequences[0].counters
        sequence = run.sequences[0]
        for pair in self.decoder.decode(sequence, first_logits(sequence, self.prompts[0].logits)):
            yield [pair]

    def _together(self, run: Run) -> Iterator[list[tuple[Round, Sequence]]]:
        batch, rows = BatchDecoder(self.decoder, len(self.prompts)), list[Row]()
        run.counters = batch.counters
        for number, (prompt, sequence) in enumerate(zip(self.prompts, run.sequences, strict=True)):
            generator = torch.Generator(self.decoder.device).manual_seed(0)
            self.decoder.first(sequence, first_logits(sequence, prompt.logits), generator)
            job = Job(prompt.base.tokens, sequence.limit - len(prompt.base.tokens))
            rows.append(Row(number, job, sequence, generator, 0.0))
        yield []
        while rows := [row for row in rows if not row.finished]:
            yield list(zip(batch.round(rows), (row.sequence for row in rows), strict=True))

    def _note(self, run: Run, rounds: list[tuple[Round, Sequence]]) -> None:
        headless = any(sequence.reread for _, sequence in rounds)
        run.passes += 1
        run.steps += max(round_.num_drafted for round_, _ in rounds) + headless
        run.headless += headless
        for round_, sequence in rounds:
            run.rounds.append(round_)
            run.rows += round_.num_drafted + 1
            run.draft_logits += round_.num_drafted
            run.target_kv_read += sequence.counters.last_target_bytes
            run.target_kv_attended += sequence.counters.last_target_bytes * (round_.num_drafted + 1)


class StockSystem:
    """transformers' `generate` on its own cache, filled from the prompt's. originals: plain layers to put back.

    "static" is its cache of fixed size, the others take the one that grows.
    """

    lacks_costs = False

    def __init__(
        self,
        name: str,
        prompts: list[Prompt],
        draft: PreTrainedModel | None,
        originals: list[Slot],
        options: dict[str, Any],
        drafting: dict[str, Any],
    ):
        """options: for `generate`; drafting: for the draft's own generation config (assisted generation)."""
        self.name, self.prompts, self.originals = name, prompts, originals
        self.model: PreTrainedModel = prompts[0].decoder.target
        self.draft, self.options, self.drafting = draft if name == "assisted" else None, options, drafting
        if name == "assisted" and draft is None:
            raise UserError("task.systems=assisted needs a draft model; set model.draft, or leave it out.")

    def run(self, num_tokens: int) -> Run:
        """As many tokens as ours, after the first one of the prefill."""
        known = [[*prompt.base.tokens, int(prompt.logits.argmax())] for prompt in self.prompts]
        bases, length = [prompt.base for prompt in self.prompts], len(known[0]) - 1
        ids = torch.tensor(known, device=self.model.device)
        empty = StaticCache(self.model.config, bases[0].limit) if self.name == "static" else DynamicCache()
        cache, run = filled([base.target for base in bases], length, empty), Run()
        with ExitStack() as stack:
            for model in filter(None, (self.model, self.draft)):
                stack.enter_context(stock(model, self.drafting if model is self.draft else {}))
            stack.enter_context(exchanged(self.originals))
            stack.enter_context(only_new_tokens(self.model, run, cache))
            options = dict(self.options)
            if self.draft is not None and bases[0].draft is not None:
                options["assistant_model"] = self.draft
                stack.enter_context(prefilled(self.draft, filled([bases[0].draft], length, DynamicCache()), run))
            reset_peak_memory()
            with clocked(self.model.device) as clock:
                out = stock_generate(self.model, ids, past_key_values=cache, max_new_tokens=num_tokens, **options)
                run.seconds, run.cpu_seconds = clock()
        run.peak_memory_bytes = peak_memory_bytes(self.model.device)
        run.tokens = out[:, length:].tolist()
        return run

    def prefill(self) -> float:
        """Seconds to the first token when transformers reads the first prompt itself."""
        ids = torch.tensor([self.prompts[0].base.tokens], device=self.model.device)
        with stock(self.model, {}), exchanged(self.originals), clocked(self.model.device) as clock:
            stock_generate(self.model, ids, max_new_tokens=1)
            return clock()[0]


def stock_generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """transformers' own, greedy. It would take the prompt's tokens of the padding's id for padding, hence the mask."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)


def filled(caches: list[TieredCache], length: int, copy: Cache) -> Cache:
    """An empty cache of transformers', with each cache's first `length` tokens in it; none has evicted any."""
    for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = (
            [x[:, :, :length] for x in own] for own in zip(*((y.keys, y.values) for y in layers), strict=True)
        )
        copy.update(torch.cat(keys), torch.cat(values), index)
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
def only_new_tokens(model: PreTrainedModel, run: Run, cache: Cache, cuts: bool = True) -> Iterator[None]:
    """Count passes and rows; the first assisted pass of transformers 5.3 and later would read all tokens again.

    cuts: what the cache holds is taken from the tokens; not where it holds less than was read.
    """

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        held = int(cache.get_seq_length()) if cuts else None
        if held is not None and kwargs["input_ids"].shape[1] > held:
            kwargs["input_ids"] = kwargs["input_ids"][:, held:]
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"][:, held:]
        run.passes += 1
        run.rows += kwargs["input_ids"].numel()
        return args, kwargs

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nbytes = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        run.target_kv_read += nbytes
        run.target_kv_attended += nbytes * kwargs["input_ids"].shape[1]

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def prefilled(draft: PreTrainedModel, cache: Cache, run: Run) -> Iterator[None]:
    """The draft's `generate`, called once a round by assisted generation, finds its cache filled at the first call.

    transformers has no argument for it, and reading the prompt again would be timed as decoding.
    """
    generate = draft.generate

    def with_cache(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **{"past_key_values": cache} | kwargs)

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nbytes, num_rows = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers), kwargs["input_ids"].shape[1]
        run.steps, run.draft_logits, run.draft_rows = run.steps + 1, run.draft_logits + 1, run.draft_rows + num_rows
        run.draft_kv_read += nbytes
        run.draft_kv_attended += nbytes * num_rows

    draft.generate, handle = with_cache, draft.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        del draft.generate
        handle.remove()
