"""The Python API: text in, text out, with the figures of the run.

    spec = SpecSmallKV.from_pretrained("Qwen/Qwen2-7B-Instruct", draft="Qwen/Qwen2-0.5B-Instruct", kv_budget=0.1)
    print(spec.generate("Why is the sky blue?").text)

Everything about tokens happens in `decode.py`; this file turns prompts into ids, ids into text and counters
into figures.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention import choose_backend
from .config import ModelConfig
from .decode import Decoder, Round, Sequence
from .errors import UserError
from .memory import peak_memory_bytes
from .models import ModelPair, load_pair
from .policies import Policy
from .presets import load_policy
from .prompts import Messages
from .sampling import Sampler
from .streaming import TextStream

WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")  # `sampling.py` does what they do
MEMORY_FIGURES = (
    "rounds",
    "drafted_tokens",
    "accepted_tokens",
    "acceptance_rate",
    "acceptance_length",
    "target_kv_bytes",
    "target_kv_bytes_full",
    "kv_budget_effective",
    "target_kv_allocated_bytes",
    "target_kv_host_bytes",
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
    """How one text is generated. stop: strings that end it, not part of it; chat: None is "if there is a template"."""

    max_new_tokens: int = 128
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    stop: tuple[str, ...] = ()
    chat: bool | None = None
    ignore_eos: bool = False


class Generation:
    """One text in the making: iterate for its pieces; `text` and `figures()` hold what there is at any time."""

    def __init__(self, spec: "SpecSmallKV", prompt_ids: list[int], settings: GenerationSettings):
        self._spec, self.prompt_ids, self._settings = spec, prompt_ids, settings
        self._stream = TextStream(spec.pair.tokenizer, settings.stop)
        self.token_ids: list[int] = []
        self.seconds = self.ttft_seconds = 0.0
        self.sequence: Sequence | None = None

    @property
    def text(self) -> str:
        return self._stream.text

    def __iter__(self) -> Iterator[str]:
        started = time.perf_counter()
        for round_ in self._rounds():
            self.ttft_seconds = self.ttft_seconds or time.perf_counter() - started
            pieces = [self._push(token) for token in round_.tokens if not self._stream.stopped]
            self.seconds = time.perf_counter() - started
            yield "".join(pieces)
            if self._stream.stopped:
                return
        yield self._stream.finish()

    def _rounds(self) -> Iterator[Round]:
        spec, settings = self._spec, self._settings
        stop_ids: set[int] = set() if settings.ignore_eos else spec.pair.eos_token_ids
        decoder = spec.decoder(settings.sampler)
        for round_, sequence in decoder.generate(self.prompt_ids, settings.max_new_tokens, stop_ids, settings.seed):
            self.sequence = sequence
            yield round_

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
            "peak_memory_bytes": peak_memory_bytes(self._spec.pair.target.device),
        }
        return figures | memory_figures(self.sequence)


def memory_figures(sequence: Sequence | None) -> dict[str, Any]:
    """Acceptance and bytes of one sequence, null before its first token.

    The target's bytes are those of the fullest round after prefill.
    """
    if sequence is None:
        return dict.fromkeys(MEMORY_FIGURES)
    counters, target, oracle = sequence.counters, sequence.target, sequence.evidence.oracle
    used, full = counters.max_target_bytes or target.nbytes, counters.full_bytes_then or target.full_nbytes
    return {
        "rounds": counters.rounds,
        "drafted_tokens": counters.drafted,
        "accepted_tokens": counters.accepted,
        "acceptance_rate": counters.accepted / counters.drafted if counters.drafted else None,
        "acceptance_length": counters.emitted / counters.rounds if counters.rounds else None,
        "target_kv_bytes": used,
        "target_kv_bytes_full": full,
        "kv_budget_effective": used / max(full, 1),
        "target_kv_allocated_bytes": target.allocated_nbytes,
        "target_kv_host_bytes": target.host_nbytes,
        "draft_kv_bytes": sequence.draft.nbytes if sequence.draft else 0,
        "scratch_bytes": oracle.nbytes if oracle else 0,
        "recall_bytes": target.recall_bytes,
        "new_per_round": sum(counters.new_entries) / len(counters.new_entries) if counters.new_entries else None,
        "kept_per_layer": target.kept_per_layer(),
        "head_map_similarity": float(oracle.head_map.similarity.mean()) if oracle and oracle.head_map else None,
        "phase_seconds": counters.seconds,
    }


class SpecSmallKV:
    """A target, a draft that both speculates and predicts the target's attention, and a policy that uses it.

    num_draft_tokens: 0 turns speculation off. attention: auto, sdpa, reference or flash. Raises UserError for what
    cannot work together.
    """

    def __init__(self, pair: ModelPair, policy: Policy, num_draft_tokens: int = 3, attention: str = "auto"):
        if num_draft_tokens < 0:
            raise UserError(f"num_draft_tokens={num_draft_tokens} is negative; give 0 (no speculation) or more.")
        if pair.draft is None and (num_draft_tokens or policy.reads_draft):
            raise UserError(
                f"policy={policy.name} with num_draft_tokens={num_draft_tokens} needs a draft model; set model.draft, "
                "or use policy=full or policy=snapkv with speculation=none."
            )
        self.pair, self.policy, self.num_draft_tokens = pair, policy, num_draft_tokens
        self.attention = choose_backend(attention, pair.target.device)

    @classmethod
    def from_pretrained(
        cls,
        target: str,
        draft: str | None = None,
        *,
        policy: str | Policy = "specsmallkv",
        kv_budget: float | None = None,
        num_draft_tokens: int = 3,
        dtype: str = "bfloat16",
        device: str = "auto",
        attention: str = "auto",
    ) -> "SpecSmallKV":
        """Load a pair (hub ids, local directories or other sources of `models.py`) and a preset of conf/policy."""
        if isinstance(policy, str):
            policy = load_policy(policy, **({} if kv_budget is None else {"kv_budget": kv_budget}))
        elif kv_budget is not None:
            raise UserError(f"kv_budget={kv_budget} is given beside a policy object; set it on the policy.")
        needs_draft = bool(num_draft_tokens) or policy.reads_draft
        config = ModelConfig(target, target, draft, dtype, device, attention)
        return cls(load_pair(config, need_draft=needs_draft), policy, num_draft_tokens, attention)

    def decoder(self, sampler: Sampler) -> Decoder:
        return Decoder(self.pair.target, self.pair.draft, self.policy, self.num_draft_tokens, sampler, self.attention)

    def encode(self, prompt: str | Messages, chat: bool | None = None) -> list[int]:
        """Prompt ids; a string becomes one user message unless `chat` is false or there is no template."""
        tokenizer = self.pair.tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if not has_template and (chat or not isinstance(prompt, str)):
            raise UserError(
                f"{self.pair.target_origin} model has no chat template; give a plain prompt and chat=false."
            )
        if not has_template or chat is False:
            return tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def stream(self, prompt: str | Messages | list[int], **settings: Any) -> Generation:
        """A `Generation` to iterate over. prompt: text, chat messages or token ids; settings as GenerationSettings,
        with temperature, top_p and top_k accepted directly."""
        sampling = {key: settings.pop(key) for key in ("temperature", "top_p", "top_k") if key in settings}
        if sampling:
            settings["sampler"] = Sampler(**sampling)
        chosen = GenerationSettings(**settings)
        is_ids = isinstance(prompt, list) and all(isinstance(x, int) for x in prompt)
        ids = prompt if is_ids else self.encode(prompt, chosen.chat)  # type: ignore[arg-type]
        self.check_length(ids, chosen.max_new_tokens)  # type: ignore[arg-type]
        return Generation(self, ids, chosen)  # type: ignore[arg-type]

    def generate(self, prompt: str | Messages | list[int], **settings: Any) -> Generation:
        """The finished `Generation`."""
        generation = self.stream(prompt, **settings)
        for _ in generation:
            pass
        return generation

    def check_length(self, ids: list[int], max_new_tokens: int) -> None:
        if not ids:
            raise UserError("The prompt has no tokens; give some text.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} is not positive; give at least 1.")
        for model in filter(None, (self.pair.target, self.pair.draft)):
            window = model.config.max_position_embeddings
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
