"""Retrieval examples: a long list and a question about one of its items, from files or made on the spot.

`lines` are LongEval's (names and numbers), `kv` those of Lost in the Middle (a JSON object of UUIDs). Nothing here
knows models; an answer is judged by the last number or UUID in it, as LongEval judges.
"""

import json
import random
import re
import uuid
from dataclasses import dataclass
from typing import Any

from ..benchmarks.example import Example, Verdict
from ..errors import UserError
from ..prompts import read_rows

KINDS = ("lines", "kv")
NUMBER = re.compile(r"\d+")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LINES_INTRODUCTION = (
    "Below is a list of lines. Each line has a name and a number, its REGISTER_CONTENT. Remember the number of every "
    "line; at the end you will be asked for one of them.\n\n"
)
KV_INTRODUCTION = (
    "Below is a JSON object. Remember the value of every key; at the end you will be asked for one of them.\n\n"
)


@dataclass(frozen=True, kw_only=True)
class ListExample(Example):
    """A list and a question about one item. asked: the item's key, which does not count as an answer."""

    kind: str
    expected: str
    asked: str = ""

    def judge(self, text: str) -> Verdict:
        answer = self.find_answer(text)
        return Verdict(answer, float(answer == self.expected))

    def find_answer(self, text: str) -> str | None:
        """What the text gives as the answer: its last number, or its last UUID that is not the key; None if none."""
        if self.kind == "lines":
            return next((str(int(number)) for number in reversed(NUMBER.findall(text))), None)
        return next((value for value in reversed(UUID.findall(text.lower())) if value != self.asked), None)


def read_examples(kind: str, path: str, count: int) -> list[ListExample]:
    """The first `count` rows of a JSONL file (.gz too). Raises UserError for a row of another format."""
    examples: list[ListExample] = []
    for where, row in read_rows("task.data_path", path):
        if len(examples) == count:
            break
        try:
            examples.append(_line_row(row) if kind == "lines" else _kv_row(row))
        except (KeyError, TypeError, ValueError):
            keys = "prompt and expected_number" if kind == "lines" else "ordered_kv_records, key and value (UUIDs)"
            raise UserError(f"{where} is no row of task.kind={kind}; it needs {keys}.") from None
    return examples


def _line_row(row: Any) -> ListExample:
    context, question = row["prompt"].rsplit("\n\n", 1)
    expected = str(int(row["expected_number"]))
    return ListExample(kind="lines", context=context + "\n\n", question=question.strip(), expected=expected)


def _kv_row(row: Any) -> ListExample:
    records = [(str(key), str(value)) for key, value in row["ordered_kv_records"]]
    if dict(records)[row["key"]] != row["value"] or not UUID.fullmatch(row["value"]):
        raise ValueError
    return _kv_example(records, row["key"], row["value"])


def make_examples(kind: str, num_items: int, count: int, seed: int) -> list[ListExample]:
    """Example i depends on the seed and on i alone, not on `count`."""
    make = _make_lines if kind == "lines" else _make_kv
    return [make(num_items, random.Random(f"{seed}-{index}")) for index in range(count)]


def _make_lines(num_items: int, rng: random.Random) -> ListExample:
    names: dict[str, int] = {}
    while len(names) < num_items:
        names.setdefault(f"{_word(rng)}-{_word(rng)}", rng.randrange(1, 50_000))
    lines = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in names.items())
    asked = rng.choice(list(names))
    question = f"The list is over. What is the REGISTER_CONTENT of line {asked}? Answer with the number."
    context, expected = LINES_INTRODUCTION + lines + "\n", str(names[asked])
    return ListExample(kind="lines", context=context, question=question, expected=expected, asked=asked)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))


def _make_kv(num_items: int, rng: random.Random) -> ListExample:
    def new() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    records = [(new(), new()) for _ in range(num_items)]
    return _kv_example(records, *rng.choice(records))


def _kv_example(records: list[tuple[str, str]], key: str, value: str) -> ListExample:
    context = KV_INTRODUCTION + json.dumps(dict(records), indent=1) + "\n\n"
    question = f'What is the value of the key "{key}"? Answer with the value.'
    return ListExample(kind="kv", context=context, question=question, expected=value, asked=key)
