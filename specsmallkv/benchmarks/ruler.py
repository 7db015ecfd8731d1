"""RULER (Hsieh et al., 2024): made at any length in tokens, or read from files that the benchmark's scripts wrote."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..generator import SpecSmallKV
from ..prompts import read_text
from ..tasks.benchmark import ContextBenchmark
from ..tasks.systems import chat_of, limit_of
from .data import KEY, SAMPLES, chosen, need, rows_of
from .example import Example, Verdict
from .ruler_make import Made, Needles, common_words, frequent_words, variable_tracking
from .scorers import string_match_all, string_match_part

NEEDLES = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", num_keys=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", num_values=4),
    "niah_multiquery": Needles("essay", "words", "numbers", num_queries=4),
}
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # by the family, as in the benchmark's constants
NAMES = (*NEEDLES, "vt", "cwe", "fwe")
PREFIXES = (" The special magic", " Answer:")  # how answer prefixes begin that a file has inside of its input
Maker = Callable[[int, random.Random, list[str]], Made]


@dataclass(frozen=True, kw_only=True)
class Puzzle(Example):
    expected: list[str]

    def judge(self, text: str) -> Verdict:
        score = string_match_part if self.group.startswith("qa") else string_match_all  # of a question's aliases one
        return Verdict(text.strip() or None, score(text, self.expected))


@dataclass
class Ruler(ContextBenchmark):
    """tasks: of NAMES, empty is all. length: tokens of prompt and answer together, chat template included.

    seed: of what is made (None: the run's). haystack_file: text of the essays; None: the package's. data_path: a file
    of the benchmark's own; then nothing is made. num_examples counts for each task.
    """

    tasks: list[str]
    length: int
    seed: int | None
    haystack_file: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen(NAMES, self.tasks)
        if self.length < 1:
            raise UserError(f"task.length={self.length} is too small; give the tokens of a prompt, e.g. 4096.")
        if self.seed is not None and type(self.seed) is not int:
            raise UserError(f"task.seed={self.seed} is not a whole number; give one, or null for the run's seed.")

    def read(self, config: RunConfig) -> list[Example]:
        if self.data_path is None:
            self._essay = read_text("task.haystack_file", self.haystack_file or str(SAMPLES / "text.txt")).split()
            return []
        path = Path(self.data_path).expanduser().absolute()
        name = path.name.partition(".")[0]
        group = path.parent.name if name == "validation" else name  # RULER's scripts write TASK/validation.jsonl
        rows = islice(rows_of(self.data_path, ""), self.num_examples)
        return [from_row(row, where, group) for where, row in rows]

    def fit(self, examples: list[Example], spec: SpecSmallKV, config: RunConfig) -> list[Example]:
        return examples if self.data_path is not None else [*self._made(spec, config)]

    def _made(self, spec: SpecSmallKV, config: RunConfig) -> Iterator[Example]:
        """Example i of a task depends on the seed, the task, the length and i alone."""
        seed = config.seed if self.seed is None else self.seed
        for name in chosen(NAMES, self.tasks):
            for index in range(self.num_examples):
                yield self._longest(name, f"{seed}-{name}-{index}", spec, config)

    def _longest(self, name: str, seed: str, spec: SpecSmallKV, config: RunConfig) -> Example:
        """The largest haystack that fits the length."""

        def make(size: int) -> tuple[Example, int]:
            example = puzzle(maker(name, self.length)(size, random.Random(seed), self._essay), name)
            ids, _ = spec.encode_parts(example.context, example.question, chat_of(example, config), example.prefix)
            return example, len(ids) + limit_of(example, config)

        low, high = 1, 2
        if (least := make(low)[1]) > self.length:
            raise UserError(f"task.length={self.length} is too small for {name}; give at least {least}.")
        while make(high)[1] <= self.length:
            low, high = high, 2 * high
        while high - low > max(1, low // 200):
            middle = (low + high) // 2
            low, high = (middle, high) if make(middle)[1] <= self.length else (low, middle)
        return make(low)[0]


def maker(name: str, length: int) -> Maker:
    if name in NEEDLES:
        return NEEDLES[name].make
    others: dict[str, Maker] = {
        "vt": variable_tracking,
        "cwe": partial(common_words, length=length),
        "fwe": partial(frequent_words, length=length),
    }
    return others[name]


def puzzle(made: Made, name: str) -> Puzzle:
    return Puzzle(
        context=made.context,
        question=made.question,
        prefix=made.prefix,
        expected=made.outputs,
        group=name,
        max_new_tokens=NEW_TOKENS.get(name.partition("_")[0], NEW_TOKENS["niah"]),
    )


def from_row(row: Any, where: str, group: str) -> Puzzle:
    """A row of the benchmark's; the last line is the question, and older files have the answer's prefix in it."""
    text, outputs = need(row, where, input=str, outputs=list)
    if not outputs or not all(isinstance(output, str) for output in outputs):
        raise UserError(f"{where} has outputs that are no list of texts; correct it there.")
    context, _, question = text.rstrip("\n").rpartition("\n")
    prefix = row.get("answer_prefix", "")
    if not question.strip() or not isinstance(prefix, str) or not context:
        raise UserError(f"{where} has an input without a question in its last line; {KEY} takes files of RULER's.")
    places = [question.rfind(mark) for mark in PREFIXES]
    if not prefix and max(places) > 0:
        question, prefix = question[: max(places)], question[max(places) :]
    return puzzle(Made(f"{context}\n", question, prefix, outputs), group)
