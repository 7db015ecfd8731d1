"""One text in the making: tokens come from `decode.py`, its text and its figures are here."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .generation_figures import memory_figures
from .memory import peak_memory_bytes
from .sampling import Sampler
from .sequence import Round, Sequence
from .streaming import TextStream

if TYPE_CHECKING:
    from .generator import SpecSmallKV

# States of a generation.
NEW, RUNNING, AT_REST, HANDED_OVER, RELEASED = "new", "running", "at rest", "handed over", "released"


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
        if self._state != NEW:
            raise UserError("A generation runs once, and this one has begun; call stream or generate again.")
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
