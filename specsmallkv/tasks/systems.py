"""What answers: a policy at a budget or a baseline, from a prompt that both models have read once for all.

Every system goes on from a copy of the target's cache; the draft's cache is shared and rolled back after each. Later
turns of a conversation take the system's own caches over.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor

from ..attention import AttentionMass
from ..benchmarks.example import Example
from ..branching import first_logits
from ..config import RunConfig
from ..decode import Decoder
from ..errors import UserError
from ..generation_figures import memory_figures
from ..generator import SpecSmallKV
from ..policies import Policy
from ..presets import load_policy
from ..sampling import Sampler
from ..sequence import Sequence
from ..streaming import TextStream
from ..trimmed_head import whole_head

FULL, AUTOREGRESSIVE, DRAFT_ALONE = "full", "autoregressive", "draft"
ANSWER = "specsmallkv-answer"  # stands for one where a conversation is rendered
BASELINES = (FULL, AUTOREGRESSIVE, DRAFT_ALONE)
SUMMED = (
    "rounds",
    "drafted_tokens",
    "accepted_tokens",
    "emitted_tokens",
    "recall_bytes",
    "new_tokens",
    "decode_seconds",
)


@dataclass
class Reading:
    """A prompt's first part, read once for all; `turn` are the tokens after it, logits (V,) those of its last."""

    sequence: Sequence
    logits: Tensor
    turn: list[int]

    @property
    def prompt_tokens(self) -> int:
        return len(self.sequence.tokens) + len(self.turn)

    def rewind(self) -> None:
        """Take from the draft's cache, which all branches share, what the last one added."""
        if (draft := self.sequence.draft) is not None:
            draft.rollback(draft.seen - len(self.sequence.tokens))

    def release(self) -> None:
        """Let both caches and what was observed go."""
        for cache in filter(None, (self.sequence.target, self.sequence.draft)):
            for layer in cache.layers:
                layer.reset()
        self.sequence.evidence.oracle, self.sequence.evidence.queries = None, {}


@dataclass
class Answer:
    """One text per turn, all new tokens, and what was measured. finished: no turn ran into its length."""

    texts: list[str]
    tokens: list[int]
    finished: bool
    figures: dict[str, Any]

    @property
    def text(self) -> str:
        return "\n\n".join(self.texts)


@dataclass
class System:
    """One line of the results: a policy at a budget, or a baseline; figures: one entry an example."""

    name: str
    kv_budget: float
    decoder: Decoder
    figures: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, spec: SpecSmallKV, reading: Reading, example: Example, config: RunConfig) -> Answer:
        """Every turn's text; the shared draft is rolled back afterwards."""
        started = time.perf_counter()
        own = read_alone(self.decoder, reading) if self.name == DRAFT_ALONE else reading
        sequence = self.decoder.branch(own.sequence)
        logits = self.decoder.extend(sequence, own.turn) if own.turn else first_logits(sequence, own.logits)
        answer = self._decode(spec, sequence, logits, example, config)
        messages = [{"role": "user", "content": example.context + example.question}]
        for turn in example.turns:
            messages += [{"role": "assistant", "content": answer.texts[-1]}, {"role": "user", "content": turn}]
            ids = next_prompt(spec, sequence, later_text(spec, messages, chat_of(example, config)))
            spec.check_length(ids, limit_of(example, config))
            sequence = self.decoder.resume(sequence, ids, limit_of(example, config))
            logits = self.decoder.extend(sequence, ids[sequence.target.seen :])
            answer = joined(answer, self._decode(spec, sequence, logits, example, config))
        reading.rewind()
        answer.figures["seconds"] = time.perf_counter() - started
        return answer

    def _decode(
        self, spec: SpecSmallKV, sequence: Sequence, logits: Tensor, example: Example, config: RunConfig
    ) -> Answer:
        """One turn's text, up to a stop string, an end of sequence or the limit."""
        stream, tokens = TextStream(spec.pair.tokenizer, (*example.stop, *config.stop)), []
        stop_ids = set() if config.ignore_eos else spec.pair.eos_token_ids
        first = None
        for round_, _ in self.decoder.decode(sequence, logits, stop_ids, config.seed):
            first = first or time.perf_counter()
            for token in round_.tokens if not stream.stopped else ():
                stream.push(token)
                tokens.append(token)
                if stream.stopped:
                    break
            if stream.stopped:
                break
        decode_seconds = time.perf_counter() - (first or 0.0)
        stream.finish()
        figures = memory_figures(sequence) | {
            "new_tokens": len(tokens),
            "decode_seconds": decode_seconds,
            "emitted_tokens": sequence.counters.emitted,
        }
        finished = stream.stopped or tokens[-1] in stop_ids
        return Answer([stream.text], tokens, finished, figures)


def joined(earlier: Answer, later: Answer) -> Answer:
    """Two turns as one: sums, and the bytes of the fuller one."""
    fuller = max(earlier.figures, later.figures, key=lambda figures: figures["target_kv_bytes"])
    figures = dict(fuller) | {key: earlier.figures[key] + later.figures[key] for key in SUMMED}
    texts, tokens = earlier.texts + later.texts, earlier.tokens + later.tokens
    return Answer(texts, tokens, earlier.finished and later.finished, figures)


def make_systems(
    spec: SpecSmallKV, policies: list[Policy], baselines: list[str], sampler: Sampler
) -> Iterator[System]:
    """The grid, then the baselines, nothing twice; the draft alone only if there is one."""
    full, names = load_policy(FULL), set()
    for policy in [*policies, *([full] if FULL in baselines else [])]:
        if (name := (policy.name, policy.kv_budget)) not in names:
            names.add(name)
            yield System(*name, spec.decoder(sampler, policy))
    if AUTOREGRESSIVE in baselines:
        yield System(AUTOREGRESSIVE, 1.0, Decoder(spec.pair.target, None, full, 0, sampler, spec.attention))
    if DRAFT_ALONE in baselines and spec.pair.draft is not None:
        if whole_head(spec.pair.draft) is not None:
            raise UserError(
                f"task.baselines={DRAFT_ALONE} needs the draft's whole vocabulary; leave model.draft_vocab_size at 0, "
                "or this baseline out."
            )
        yield System(DRAFT_ALONE, 1.0, Decoder(spec.pair.draft, None, full, 0, sampler, spec.attention))


def read_once(
    spec: SpecSmallKV,
    systems: list[System],
    policy: Policy,
    ids: list[int],
    border: int,
    room: int,
    earlier: Reading | None = None,
) -> Reading:
    """Both models read the first `border` tokens, nothing is compressed yet; room: tokens that may follow `ids`.

    policy: one whose prefill leaves what all systems need (`grid.neediest`). earlier: a reading whose beginning is
    taken over as far as it is the same, e.g. the examples of a few-shot prompt; it is released.
    """
    decoder = spec.decoder(policy=policy)
    sequence = decoder.start(ids[:border], len(ids) - border + room)
    sums = any(system.decoder.policy.reads_mass for system in systems)  # over a whole prompt: no part can be taken
    if sums:
        sequence.evidence.mass = AttentionMass(sequence.target.layers[0].capacity)
    if earlier is not None:
        if not sums:
            take_beginning(earlier.sequence, sequence, policy.num_observed)
        earlier.release()
    logits = decoder.prefill(sequence)
    decoder.prefill_draft(sequence)
    return Reading(sequence, logits, ids[border:])


def take_beginning(earlier: Sequence, sequence: Sequence, num_observed: int) -> None:
    """Copy to both caches what two prompts have in common, at most up to the new one's observation window."""
    pairs = zip(earlier.tokens[: earlier.target.seen], sequence.tokens[: -num_observed - 1], strict=False)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if count:
        earlier.target.copy_to(sequence.target, count)
        if earlier.draft is not None and sequence.draft is not None:
            earlier.draft.copy_to(sequence.draft, count)


def read_alone(decoder: Decoder, reading: Reading) -> Reading:
    """The same for the draft as a model of its own, from the cache it has if it has one."""
    base = reading.sequence
    sequence = decoder.start(base.tokens, base.limit - len(base.tokens))
    if base.draft is None:
        return Reading(sequence, decoder.prefill(sequence), reading.turn)
    base.draft.copy_to(sequence.target)
    sequence.target.rollback(1)  # its last token is read again, for the logits
    sequence.tokens = base.tokens[:-1]
    return Reading(sequence, reading.logits, [base.tokens[-1], *reading.turn])


# --- lengths and turns ---------------------------------------------------------------------------------------------


def limit_of(example: Example, config: RunConfig) -> int:
    """New tokens of one turn: the benchmark's own length, at most the run's."""
    return min(example.max_new_tokens or config.max_new_tokens, config.max_new_tokens)


def chat_of(example: Example, config: RunConfig) -> bool | None:
    return example.chat if config.chat is None else config.chat


def later_text(spec: SpecSmallKV, messages: list[dict[str, str]], chat: bool | None) -> str:
    """A conversation's text behind its last answer; messages end with that answer and the user's next turn."""
    if chat is False or not getattr(spec.pair.tokenizer, "chat_template", None):
        return f"\n\n{messages[-1]['content']}\n\n"
    marked = [*messages[:-2], messages[-2] | {"content": ANSWER}, messages[-1]]  # templates may rewrite an answer
    _, found, rest = spec.render(marked, chat)[0].partition(ANSWER)
    if not found:
        raise UserError(
            "The chat template leaves out what the model answered, so a second turn cannot go on from its cache; "
            "use chat=false."
        )
    return rest


def next_prompt(spec: SpecSmallKV, sequence: Sequence, text: str) -> list[int]:
    """What was read and said, without an end-of-sequence token, then the text's ids."""
    said = sequence.tokens
    if said[-1] in spec.pair.eos_token_ids:
        said = said[:-1]
    return said + spec.pair.tokenizer(text, add_special_tokens=False)["input_ids"]
