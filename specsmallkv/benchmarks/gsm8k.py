"""GSM8K: eight worked examples, then a word problem; the last number of the answer must be the right one.

Prompt and stop string: the chain-of-thought task of lm-evaluation-harness (examples of Wei et al., 2022).
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..config import RunConfig
from ..tasks.benchmark import ContextBenchmark
from .data import SAMPLES, HubSource, list_rows, need, rows_of
from .example import Example, Verdict
from .scorers import last_number

HUB_SOURCE = HubSource("openai/gsm8k", "main", "test")
MARK = "#### "  # stands before the answer in a row of the data


@dataclass(frozen=True, kw_only=True)
class Problem(Example):
    def judge(self, text: str) -> Verdict:
        answer = last_number(text)
        return Verdict(answer, float(answer is not None and answer == self.expected))


@dataclass
class GSM8K(ContextBenchmark):
    """The context is the eight examples."""

    def read(self, config: RunConfig) -> list[Example]:
        context = worked_examples()
        rows = islice(rows_of(self.data_path, "gsm8k.jsonl", HUB_SOURCE), self.num_examples)
        return [problem(row, where, context) for where, row in rows]


def problem(row: Any, where: str, context: str) -> Problem:
    question, answer = need(row, where, question=str, answer=str)
    expected = last_number(answer.rpartition(MARK)[2])
    return Problem(context=context, question=f"Q: {question}\nA:", expected=expected, stop=("Q:",), chat=False)


def worked_examples() -> str:
    rows = [row for _, row in list_rows(str(SAMPLES / "gsm8k_shots.json"))]
    return "".join(f"Q: {row['question']}\nA: {row['target']}\n\n" for row in rows)
