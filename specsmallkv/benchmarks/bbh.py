"""BIG-Bench Hard: 27 tasks with three worked examples each; what follows "answer is" must be the target.

Prompts: the chain-of-thought files of Suzgun et al., 2022, read from the benchmark's own directory layout.
"""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..prompts import read_text
from ..tasks.benchmark import ContextBenchmark
from .data import HUB, KEY, SAMPLES, chosen, hub_rows, list_rows, need
from .example import Example, Verdict
from .scorers import answer_after

RULE = "-----\n"  # between the canary and a prompt
OPTION = re.compile(r"\([A-Z]\)")
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
        if self.data_path == HUB:
            hub_rows(None).__next__()
        root = Path(self.data_path).expanduser() if self.data_path else SAMPLES / "bbh"
        folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
        if folder is None or not (root / "cot-prompts").is_dir():
            raise UserError(
                f"{KEY}={root} holds no tasks/ (or bbh/) and cot-prompts/; give a clone of BIG-Bench-Hard."
            )
        names = chosen(sorted(path.stem for path in folder.glob("*.json")), self.tasks)
        return [question for name in names for question in self._questions(folder / f"{name}.json", name, root)]

    def _questions(self, file: Path, name: str, root: Path) -> list[Question]:
        prompt = read_text(KEY, str(root / "cot-prompts" / f"{name}.txt")).rpartition(RULE)[2].strip()
        rows = islice(list_rows(str(file), "examples"), self.num_examples)
        return [question(row, where, name, prompt) for where, row in rows]


def question(row: Any, where: str, name: str, prompt: str) -> Question:
    asked, target = need(row, where, input=str, target=str)
    text = f"Q: {asked}\nA: Let's think step by step."
    return Question(context=f"{prompt}\n\n", question=text, expected=target, group=name, stop=("\nQ:",), chat=False)
