"""MT-Bench and Spec-Bench: questions of one or two turns, answered through one cache.

Neither is judged here. MT-Bench's answers go to files in FastChat's format; both are compared with the full cache's
answers, and Spec-Bench with the plain loop.
"""

import json
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..config import RunConfig
from ..errors import UserError
from ..tasks.benchmark import Benchmark
from ..tasks.systems import System
from .data import HubSource, chosen, need, rows_of
from .example import Example

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
SPEC_BENCH = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
SPEC_BENCH_FILES = ("question", *SPEC_BENCH[1:])  # MT-Bench's questions, then a file for each other category
HUB_SOURCES = {
    "mt_bench": [HubSource("HuggingFaceH4/mt_bench_prompts", None, "train")],
    "spec_bench": [
        HubSource("RedHatAI/speculator_benchmarks", None, "train", f"{name}.jsonl") for name in SPEC_BENCH_FILES
    ],
}


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    question_id: Any


@dataclass
class Conversations(Benchmark):
    """categories: those that are asked, empty is all; num_examples counts for each."""

    categories: list[str]
    known: ClassVar[tuple[str, ...]] = MT_BENCH  # what `categories` may name
    source: ClassVar[str] = "mt_bench"  # of its questions

    def read(self, config: RunConfig) -> list[Example]:
        wanted = dict.fromkeys(chosen(self.known, self.categories, "task.categories"), 0)
        found: list[Example] = []
        for where, row in rows_of(self.data_path, f"{self.source}.jsonl", *HUB_SOURCES[self.source]):
            example = question(row, where, self.known)
            if wanted.get(example.group, self.num_examples) < self.num_examples:
                wanted[example.group] += 1
                found.append(example)
        return found


@dataclass
class MTBench(Conversations):
    """The record names FastChat's answer files, one for each system."""

    def finish(self, systems: list[System], examples: list[Example], config: RunConfig) -> dict[str, Any]:
        folder = Path(str(config.run_dir)) / "model_answer"
        folder.mkdir(parents=True, exist_ok=True)
        return {"answer_files": [str(write_answers(system, examples, folder, config)) for system in systems]}


@dataclass
class SpecBench(Conversations):
    """MT-Bench's eight categories are one here, as in the published tables."""

    known, source = SPEC_BENCH, "spec_bench"


def question(row: Any, where: str, known: tuple[str, ...]) -> Question:
    """A row of FastChat's question file; the hub's copy calls its fields prompt and prompt_id."""
    if isinstance(row, dict) and "prompt" in row:
        row = row | {"turns": row["prompt"], "question_id": row.get("prompt_id")}
    identity, category, turns = need(row, where, question_id=(int, str), category=str, turns=list)
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where} has turns that are no list of texts; correct it there.")
    group = "mt_bench" if known is SPEC_BENCH and category in MT_BENCH else category
    if group not in known:
        raise UserError(f"{where} is of the category {category}; known are {', '.join(known)}.")
    return Question(context="", question=turns[0], turns=tuple(turns[1:]), group=group, question_id=identity)


def write_answers(system: System, examples: list[Example], folder: Path, config: RunConfig) -> Path:
    """FastChat's `model_answer` file of one system, so far as it has answered."""
    model_id = re.sub(r"[^\w.=-]+", "-", f"{config.model.name}-{system.name}-{system.kv_budget:g}")
    path = folder / f"{model_id}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for example, figures in zip(examples, system.figures, strict=False):
            assert isinstance(example, Question)
            row = {
                "question_id": example.question_id,
                "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{model_id}-{example.question_id}").hex,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": [text.strip() for text in figures["texts"]]}],
                "tstamp": time.time(),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
