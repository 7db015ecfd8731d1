"""BIG-Bench Hard: 27 tasks with three worked examples each; what follows "answer is" must be the target.

Prompts: the chain-of-thought files of Suzgun et al., 2022, read from the benchmark's own directory layout. The hub's
copy has the questions alone; its prompts are those in the package.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..prompts import read_text
from ..tasks.benchmark import ContextBenchmark
from .data import HUB, KEY, SAMPLES, HubSource, Row, chosen, hub_rows, list_rows, need
from .example import Example, Verdict
from .scorers import answer_after

RULE = "-----\n"  # between the canary and a prompt
OPTION = re.compile(r"\([A-Z]\)")
HUB_REPOSITORY = "SaylorTwift/bbh"  # one configuration a task, as lm-evaluation-harness reads it
FOLDERS = ("tasks", "bbh")  # of the task files; the repository's is called bbh


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    def judge(self, text: str) -> Verdict:
        answer = answer_after(text)
        option = OPTION.match(answer or "")
        answer = option[0] if option else answer
        return Verdict(answer, float(answer == self.expected))


@dataclass
class BBH(ContextBenchmark):
    """tasks: names of task files; empty: all there are. num_examples counts for each. The context is the examples."""

    tasks: list[str]

    def read(self, config: RunConfig) -> list[Example]:
        local = self.data_path not in (None, HUB)
        root = Path(str(self.data_path)).expanduser() if local else SAMPLES / "bbh"
        rows = hub_tasks(root) if self.data_path == HUB else folder_tasks(root)
        return [asked for name in chosen(list(rows), self.tasks) for asked in self._questions(rows[name], name, root)]

    def _questions(self, rows: Iterator[Row], name: str, root: Path) -> list[Question]:
        prompt = read_text(KEY, str(root / "cot-prompts" / f"{name}.txt")).rpartition(RULE)[2].strip()
        return [question(row, where, name, prompt) for where, row in islice(rows, self.num_examples)]


def folder_tasks(root: Path) -> dict[str, Iterator[Row]]:
    """Rows of each task of a folder, read when they are asked for."""
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if folder is None or not (root / "cot-prompts").is_dir():
        raise UserError(f"{KEY}={root} holds no tasks/ (or bbh/) and cot-prompts/; give a clone of BIG-Bench-Hard.")
    return {path.stem: list_rows(str(path), "examples") for path in sorted(folder.glob("*.json"))}


def hub_tasks(root: Path) -> dict[str, Iterator[Row]]:
    """The same from the hub, for every task that has a prompt in the package."""
    names = sorted(path.stem for path in (root / "cot-prompts").glob("*.txt"))
    return {name: hub_rows(HubSource(HUB_REPOSITORY, name, "test")) for name in names}


def question(row: Any, where: str, name: str, prompt: str) -> Question:
    asked, target = need(row, where, input=str, target=str)
    text = f"Q: {asked}\nA: Let's think step by step."
    return Question(context=f"{prompt}\n\n", question=text, expected=target, group=name, stop=("\nQ:",), chat=False)
