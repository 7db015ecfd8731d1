"""What all benchmarks hand to the loop of `tasks/benchmark.py`: something to ask, and how an answer is judged."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """answer: what the text gives as its answer, None if it gives none. score: 0 to 1; None where nobody judges."""

    answer: str | None
    score: float | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """context + question is the prompt's text; `prefix` begins the answer behind the chat template, if there is one.

    expected: the right answer or answers, as the rows' file shows them. group: the subtask or category that it counts
    in. max_new_tokens: the benchmark's own length; None is the run's, which is the upper limit in any case. stop:
    strings that end the answer, besides the run's. chat: whether it is a chat message; None is as the run says.
    turns: what the user says after each answer.
    """

    context: str
    question: str
    expected: Any = None
    group: str = ""
    prefix: str = ""
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    chat: bool | None = None
    turns: tuple[str, ...] = ()

    def judge(self, text: str) -> Verdict:
        """The answer in the text and its score; an empty text answers nothing."""
        return Verdict(text.strip() or None, None)
