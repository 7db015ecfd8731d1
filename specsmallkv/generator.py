"""The Python API: text in, text out, with the figures of the run.

    spec = SpecSmallKV.from_pretrained("Qwen/Qwen2-7B-Instruct", draft="Qwen/Qwen2-0.5B-Instruct", kv_budget=0.1)
    print(spec.generate("Why is the sky blue?").text)

Everything about tokens happens in `decode.py`; this file turns prompts into ids, ids into text and counters
into figures.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel

from .backends import check_selection, choose_backend
from .config import ModelConfig
from .controller import Controller
from .decode import Decoder
from .errors import UserError
from .generation_batch import GenerationBatch, settings_of_each
from .memory import peak_memory_bytes
from .models import ModelPair, load_pair
from .policies import Policy
from .prefill import check_prefill
from .presets import load_policy
from .prompts import Messages
from .sampling import Sampler
from .sequence import Round, Sequence
from .streaming import TextStream

# States of a generation.
NEW, RUNNING, AT_REST, HANDED_OVER, RELEASED = "new", "running", "at rest", "handed over", "released"
WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")  # `sampling.py` does what they do
MEMORY_FIGURES = (
    "rounds",
    "drafted_tokens",
    "drafted_per_round",
    "undrafted_rounds",
    "accepted_tokens",
    "acceptance_rate",
    "acceptance_length",
    "target_kv_bytes",
    "target_kv_bytes_full",
    "kv_budget_effective",
    "target_kv_allocated_bytes",
    "target_kv_host_bytes",
    "target_kv_window_bytes",
    "target_kv_prefill_bytes",
    "draft_kv_bytes",
    "scratch_bytes",
    "recall_bytes",
    "new_per_round",
    "kept_per_layer",
    "head_map_similarity",
    "phase_seconds",
)


@dataclass
class GenerationSettings:
    """How one text is generated. stop: strings that end it, not part of it; chat: None is "if there is a template".

    compress_after: so many prompt tokens are compressed before the rest is read, as if it came in a later turn.
    """

    max_new_tokens: int = 128
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    stop: tuple[str, ...] = ()
    chat: bool | None = None
    ignore_eos: bool = False
    compress_after: int | None = None


class Generation:
    """One text in the making: iterate for its pieces; `text` and `figures()` hold what there is at any time.

    reused_tokens: how many prompt tokens the caches of the generation that this one continues had read.
    observer: is shown every round when it is complete (`trace.py`); its own time is not in `seconds`.
    finished: it came to its end, by length, end-of-sequence token or stop string. number: its place in a batch.
    """

    def __init__(
        self,
        spec: "SpecSmallKV",
        prompt_ids: list[int],
        settings: GenerationSettings,
        continues: Sequence | None = None,
    ):
        self.spec, self.prompt_ids, self.settings = spec, prompt_ids, settings
        self._stream = TextStream(spec.pair.tokenizer, settings.stop)
        self.finished, self.number = False, 0
        self.token_ids: list[int] = []
        self.seconds = self.ttft_seconds = 0.0
        self.sequence: Sequence | None = None
        self.observer: Callable[[Round, Sequence], None] | None = None
        self._observing = 0.0  # seconds
        self._continued = continues
        self.reused_tokens = continues.target.seen if continues else 0
        self._state = NEW
        self._memory: dict[str, Any] | None = None  # once the caches went to the next turn

    @property
    def text(self) -> str:
        return self._stream.text

    def __iter__(self) -> Iterator[str]:
        started = time.perf_counter()
        for round_ in self._rounds():
            yield self.take(round_, started)
            if self._stream.stopped:
                break
        yield self.finish()

    def take(self, round_: Round, started: float) -> str:
        """The text that a round makes certain; started: when the prompt began to be read."""
        self.ttft_seconds = self.ttft_seconds or time.perf_counter() - started - self._observing
        pieces = [self._push(token) for token in round_.tokens if not self._stream.stopped]
        self.seconds = time.perf_counter() - started - self._observing
        return "".join(pieces)

    def finish(self) -> str:
        """No round follows: the text that was held back."""
        self.finished = True
        return "" if self._stream.stopped else self._stream.finish()

    @property
    def stopped(self) -> bool:
        """A stop string ended the text."""
        return self._stream.stopped

    def _rounds(self) -> Iterator[Round]:
        spec, settings = self.spec, self.settings
        if self.reused_tokens and self._state != NEW:
            raise UserError("A generation that continues another runs once, since it changes the caches it was given.")
        self._state, continued, self._continued = RUNNING, self._continued, None
        rounds = spec.decoder(settings.sampler).generate(
            self.prompt_ids, settings.max_new_tokens, self.stop_ids, settings.seed, settings.compress_after, continued
        )
        for round_, self.sequence in rounds:
            self._state = AT_REST
            self._observe(round_)
            yield round_
            if self._state == HANDED_OVER:
                return
            self._state = RUNNING
        self._state = AT_REST

    def _observe(self, round_: Round) -> None:
        if self.observer is not None and self.sequence is not None:
            started = time.perf_counter()
            self.observer(round_, self.sequence)
            self._observing += time.perf_counter() - started

    @property
    def stop_ids(self) -> set[int]:
        return set() if self.settings.ignore_eos else self.spec.pair.eos_token_ids

    def check_continuation(self, ids: list[int]) -> None:
        """Raise a UserError unless a prompt `ids` may take over the caches of this generation."""
        if self._state != AT_REST or self.sequence is None:
            reasons = {NEW: "has not run", HANDED_OVER: "was continued already", RELEASED: "ran in a batch"}
            reason = reasons.get(self._state, "was interrupted")
            raise UserError(f"The generation to continue {reason}, so it has no caches to give; leave continues out.")
        held = self.sequence.tokens[: self.sequence.target.seen]
        same = next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))
        if same < len(held) or len(ids) == len(held):
            there, here = (self.spec.pair.tokenizer.decode(x[same : same + 8]) for x in (held, ids))
            raise UserError(
                f"The prompt does not go on from the generation to continue: after {same} equal tokens it has "
                f"{here!r} where the caches hold {there!r}; leave continues out, or give token ids that begin with "
                "prompt_ids + token_ids."
            )

    def hand_over(self) -> Sequence:
        """The caches, for the next turn; the figures stay as they are."""
        assert self.sequence is not None, "check_continuation comes first"
        sequence = self.sequence
        self._release(HANDED_OVER)
        return sequence

    def release(self) -> None:
        """Let the caches go; the figures stay as they are."""
        self._release(RELEASED)

    def _release(self, state: str) -> None:
        self._memory, self.sequence, self._state = memory_figures(self.sequence), None, state

    def _push(self, token: int) -> str:
        self.token_ids.append(token)
        return self._stream.push(token)

    def figures(self) -> dict[str, Any]:
        """The measured keys of the record (docs/record.md): lengths, speed, acceptance, bytes."""
        decoding = max(self.seconds - self.ttft_seconds, 1e-9)
        count = len(self.token_ids)
        figures: dict[str, Any] = {
            "prompt_tokens": len(self.prompt_ids),
            "new_tokens": count,
            "text": self.text,
            "seconds": self.seconds,
            "ttft_seconds": self.ttft_seconds,
            "tokens_per_second": count / max(self.seconds, 1e-9),
            "decode_tokens_per_second": (count - 1) / decoding if count > 1 else None,
            "peak_memory_bytes": peak_memory_bytes(self.spec.pair.target.device),
            "finished": self.finished,
        }
        return figures | (self._memory or memory_figures(self.sequence))


def memory_figures(sequence: Sequence | None) -> dict[str, Any]:
    """Acceptance and bytes of one sequence, null before its first token.

    The target's bytes are those of the fullest round after prefill.
    """
    if sequence is None:
        return dict.fromkeys(MEMORY_FIGURES)
    counters, target, held, oracle = sequence.counters, sequence.target, sequence.held(), sequence.evidence.oracle
    used = counters.max_target_bytes or held["target_kv_bytes"]
    full = counters.full_bytes_then or held["target_kv_bytes_full"]
    return held | {
        "rounds": counters.rounds,
        "drafted_tokens": counters.drafted,
        "drafted_per_round": counters.drafted / counters.rounds if counters.rounds else None,
        "undrafted_rounds": counters.undrafted,
        "accepted_tokens": counters.accepted,
        "acceptance_rate": counters.accepted / counters.drafted if counters.drafted else None,
        "acceptance_length": counters.emitted / counters.rounds if counters.rounds else None,
        "target_kv_bytes": used,
        "target_kv_bytes_full": full,
        "kv_budget_effective": used / max(full, 1),
        "target_kv_prefill_bytes": counters.prefill_bytes or None,
        "recall_bytes": target.recall_bytes,
        "new_per_round": sum(counters.new_entries) / len(counters.new_entries) if counters.new_entries else None,
        "kept_per_layer": target.kept_per_layer(),
        "head_map_similarity": float(oracle.head_map.similarity.mean()) if oracle and oracle.head_map else None,
        "phase_seconds": counters.seconds,
    }


class SpecSmallKV:
    """A target, a draft that both speculates and predicts the target's attention, and a policy that uses it.

    num_draft_tokens: 0 turns speculation off. attention: auto, sdpa, reference, flash or triton. controller:
    `controller.py`, e.g. `Adaptive()`, which drafts `num_draft_tokens` at most. Raises UserError for what cannot work
    together.
    """

    def __init__(
        self,
        pair: ModelPair,
        policy: Policy,
        num_draft_tokens: int = 3,
        attention: str = "auto",
        controller: Controller | None = None,
    ):
        if num_draft_tokens < 0:
            raise UserError(f"num_draft_tokens={num_draft_tokens} is negative; give 0 (no speculation) or more.")
        if pair.draft is None and (num_draft_tokens or policy.reads_draft):
            raise UserError(
                f"policy={policy.name} with num_draft_tokens={num_draft_tokens} needs a draft model; set model.draft, "
                "or use policy=full or policy=snapkv with speculation=none."
            )
        check_selection(attention, policy.selection)
        check_prefill(policy, pair.head_map)
        self.pair, self.policy, self.num_draft_tokens = pair, policy, num_draft_tokens
        self.attention, self.controller = choose_backend(attention, pair.target.device), controller

    @classmethod
    def from_pretrained(
        cls,
        target: str,
        draft: str | None = None,
        *,
        policy: str | Policy = "specsmallkv",
        kv_budget: float | None = None,
        num_draft_tokens: int = 3,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "auto",
        head_map: str | None = None,
        head_map_check: bool = True,
        linear: str = "auto",
        draft_view_size: int = 512,
        draft_vocab_size: int = 0,
        compile: str | None = None,
    ) -> "SpecSmallKV":
        """Load a pair (hub ids, local directories or other sources of `models.py`) and a preset of conf/policy.

        head_map: a file that `task=calibrate` wrote for this pair; UserError if it belongs to other models, unless
        head_map_check is false. draft_view_size: tokens of its own long cache that the draft's steps read; 0: all.
        draft_vocab_size: tokens, those of the lowest ids, that it may propose besides its context's; 0: all.
        compile: torch.compile's mode for short passes, "default" or "reduce-overhead".
        """
        if isinstance(policy, str):
            policy = load_policy(policy, **({} if kv_budget is None else {"kv_budget": kv_budget}))
        elif kv_budget is not None:
            raise UserError(f"kv_budget={kv_budget} is given beside a policy object; set it on the policy.")
        needs_draft = bool(num_draft_tokens) or policy.reads_draft
        options = dtype, device, attention, head_map, head_map_check, linear, draft_vocab_size, compile
        config = ModelConfig(target, target, draft, *options)
        controller = Controller(view_size=draft_view_size)
        return cls(load_pair(config, need_draft=needs_draft), policy, num_draft_tokens, attention, controller)

    def decoder(self, sampler: Sampler | None = None, policy: Policy | None = None) -> Decoder:
        """A decoder under the generator's own policy or another one."""
        pair, controller = self.pair, self.controller
        if policy is not None and policy is not self.policy and controller is not None:
            controller = controller.anew()
        return Decoder(
            pair.target,
            pair.draft,
            policy or self.policy,
            self.num_draft_tokens,
            sampler,
            self.attention,
            pair.head_map,
            controller,
        )

    def encode(
        self, prompt: str | Messages, chat: bool | None = None, beginning: list[int] | None = None
    ) -> list[int]:
        """Prompt ids; a string becomes one user message unless `chat` is false or there is no template.

        beginning: ids that are kept as they are if the text begins with theirs, since models do not always split
        their own words as the tokenizer does.
        """
        text, add_special_tokens = self.render(prompt, chat)
        tokenizer = self.pair.tokenizer
        said = tokenizer.decode(beginning, clean_up_tokenization_spaces=False) if beginning else ""
        if beginning and text.startswith(said):
            return beginning + tokenizer(text[len(said) :], add_special_tokens=False)["input_ids"]
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def encode_parts(
        self, context: str, question: str, chat: bool | None = None, prefix: str = ""
    ) -> tuple[list[int], int]:
        """Ids of the prompt context + question, and how many of them lie before the question.

        The border changes no id; a token that spans it counts as the question's. prefix: how the answer begins.
        """
        text, add_special_tokens = self.render(context + question, chat)
        border = text.rindex(question.strip())  # templates strip
        text += prefix
        encoded = self.pair.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        return encoded["input_ids"], next(i for i, end in enumerate(ends) if end > border)

    def render(self, prompt: str | Messages, chat: bool | None = None) -> tuple[str, bool]:
        """The text that is tokenised, and whether the tokenizer adds its special tokens to it."""
        tokenizer = self.pair.tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if not has_template and (chat or not isinstance(prompt, str)):
            raise UserError(
                f"{self.pair.target_origin} model has no chat template; give a plain prompt and chat=false."
            )
        if isinstance(prompt, str) and (not has_template or chat is False):
            return prompt, True
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
        except TemplateError as error:  # many templates refuse a role, or an order of roles
            raise UserError(f"The chat template refuses the messages ({error}); correct their roles.") from error

    def stream(
        self, prompt: str | Messages | list[int], continues: Generation | None = None, **settings: Any
    ) -> Generation:
        """A `Generation` to iterate over. prompt: text, chat messages or token ids; settings as GenerationSettings,
        with temperature, top_p and top_k accepted directly.

        continues: an earlier generation that the prompt (the whole conversation) begins with. Its caches are taken
        over, so that only what is new is read; it cannot be continued twice. Raises UserError if the prompt differs.
        """
        sampling = {key: settings.pop(key) for key in ("temperature", "top_p", "top_k") if key in settings}
        if sampling:
            settings["sampler"] = Sampler(**sampling)
        chosen = GenerationSettings(**settings)
        said = continues.sequence.tokens if continues and continues.sequence else None
        is_ids = isinstance(prompt, list) and all(isinstance(x, int) for x in prompt)
        ids: list[int] = prompt if is_ids else self.encode(prompt, chosen.chat, said)  # type: ignore
        self.check_length(ids, chosen.max_new_tokens)
        self._check_turns(ids, chosen.compress_after, continues)
        return Generation(self, ids, chosen, continues.hand_over() if continues else None)

    def _check_turns(self, ids: list[int], compress_after: int | None, continues: Generation | None) -> None:
        if compress_after is not None and not 1 <= compress_after <= len(ids):
            raise UserError(f"compress_after={compress_after} is not within the prompt; give 1 to {len(ids)} tokens.")
        if continues is None:
            return
        if compress_after is not None:
            raise UserError(f"compress_after={compress_after} and continues are given together; keep one of them.")
        if continues.spec is not self:
            raise UserError("The generation to continue is another generator's; call stream on that one.")
        continues.check_continuation(ids)

    def generate(
        self, prompt: str | Messages | list[int], continues: Generation | None = None, **settings: Any
    ) -> Generation:
        """The finished `Generation`; arguments as for `stream`."""
        generation = self.stream(prompt, continues, **settings)
        for _ in generation:
            pass
        return generation

    def stream_batch(
        self, prompts: list[str | Messages | list[int]], batch_size: int = 8, **settings: Any
    ) -> GenerationBatch:
        """A `GenerationBatch` to iterate over for finished generations; each is what `generate` gives for its prompt.

        Settings as for `stream`; `seed` and `max_new_tokens` may be lists, one value for each prompt. All prompts are
        checked before the first is read. Raises UserError.
        """
        each = settings_of_each(len(prompts), settings)
        generations = [self.stream(prompt, **own) for prompt, own in zip(prompts, each, strict=True)]
        return GenerationBatch(self, generations, batch_size)

    def generate_batch(
        self, prompts: list[str | Messages | list[int]], batch_size: int = 8, **settings: Any
    ) -> list[Generation]:
        """All finished generations, in order of the prompts; arguments as for `stream_batch`."""
        batch = self.stream_batch(prompts, batch_size, **settings)
        for _ in batch:
            pass
        return batch.generations

    def check_length(self, ids: list[int], max_new_tokens: int) -> None:
        if not ids:
            raise UserError("The prompt has no tokens; give some text.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} is not positive; give at least 1.")
        for model in filter(None, (self.pair.target, self.pair.draft)):
            window, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
            if outside := [i for i in (min(ids), max(ids)) if not 0 <= i < vocabulary]:
                raise UserError(
                    f"Token id {outside[0]} is outside the vocabulary of {vocabulary}; use the pair's tokenizer."
                )
            if len(ids) + max_new_tokens > window:
                raise UserError(
                    f"The prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the context window "
                    f"of {window} tokens; shorten one of them."
                )

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """For transformers' `model.generate(ids, custom_generate=spec.custom_generate)`: ids (1, prompt + new)."""
        if model is not self.pair.target:
            raise UserError("custom_generate was called on another model; call it on spec.pair.target.")
        refuse_unsupported(generation_config, input_ids, logits_processor)
        prompt = input_ids[0].tolist()
        self.check_length(prompt, generation_config.max_length - len(prompt))
        sampler, seed = sampler_of(generation_config), int(torch.randint(2**63 - 1, ()))
        ids = list(prompt)
        decoder = self.decoder(sampler)
        budget = generation_config.max_length - len(prompt)
        for round_, _ in decoder.generate(prompt, budget, eos_ids(generation_config), seed):
            for token in round_.tokens:
                ids.append(token)
                if stopping_criteria(torch.tensor([ids], device=input_ids.device), None).all():
                    return torch.tensor([ids], device=input_ids.device)
        return torch.tensor([ids], device=input_ids.device)


def refuse_unsupported(generation_config: Any, input_ids: torch.Tensor, logits_processor: Any) -> None:
    """What this generator would silently ignore is refused."""
    neutral = {
        "num_beams": (None, 1),
        "num_return_sequences": (None, 1),
        "repetition_penalty": (None, 1.0),
        "no_repeat_ngram_size": (None, 0),
        "min_new_tokens": (None, 0),
        "min_p": (None, 0.0),
        "typical_p": (None, 1.0),
        "bad_words_ids": (None,),
        "suppress_tokens": (None,),
        "min_length": (None, 0),
        "guidance_scale": (None, 1.0),
        "return_dict_in_generate": (None, False),
    }
    for key, values in neutral.items():
        if getattr(generation_config, key, None) not in values:
            raise UserError(
                f"{key}={getattr(generation_config, key)} is not supported by this generator; pass {key}={values[-1]}."
            )
    for processor in logits_processor or ():
        if type(processor).__name__ not in WARPERS:
            raise UserError(f"{type(processor).__name__} is not supported by this generator; leave it out.")
    if input_ids.shape[0] != 1:
        raise UserError(f"custom_generate got a batch of {input_ids.shape[0]}; give one sequence at a time.")


def sampler_of(generation_config: Any) -> Sampler:
    if not generation_config.do_sample:
        return Sampler()
    return Sampler(
        1.0 if generation_config.temperature is None else generation_config.temperature,
        1.0 if generation_config.top_p is None else generation_config.top_p,
        generation_config.top_k or 0,
    )


def eos_ids(generation_config: Any) -> set[int]:
    ids = generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
