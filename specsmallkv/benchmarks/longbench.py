"""LongBench (Bai et al., 2023), its sixteen English tasks: official prompts, lengths, truncation and scorers.

Prompts and lengths are quoted in data/benchmarks/longbench/tasks.json. A prompt that is too long loses its middle, as
the benchmark's `pred.py` does it.
"""

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..generator import SpecSmallKV
from ..tasks.benchmark import ContextBenchmark
from ..tasks.systems import limit_of
from . import scorers
from .data import HUB, KEY, SAMPLES, Row, chosen, need, rows_of
from .example import Example, Verdict
from .longbench_sources import in_longbench_fields

SCORERS: dict[str, Callable[[str, str], float]] = {
    "narrativeqa": scorers.qa_f1,
    "qasper": scorers.qa_f1,
    "multifieldqa_en": scorers.qa_f1,
    "hotpotqa": scorers.qa_f1,
    "2wikimqa": scorers.qa_f1,
    "musique": scorers.qa_f1,
    "gov_report": scorers.rouge_l,
    "qmsum": scorers.rouge_l,
    "multi_news": scorers.rouge_l,
    "triviaqa": scorers.qa_f1,
    "samsum": scorers.rouge_l,
    "passage_count": scorers.count,
    "passage_retrieval_en": scorers.paragraph_number,
    "lcc": scorers.code_similarity,
    "repobench-p": scorers.code_similarity,
}
CLASSIFIED = "trec"  # its scorer knows the row's classes
NAMES = (*list(SCORERS)[:9], CLASSIFIED, *list(SCORERS)[9:])  # in the benchmark's order
ONE_LINE = ("trec", "triviaqa", "samsum")  # only the answer's first line is judged
NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")  # asked without a chat template
ROOM = 256  # tokens left for the chat template where task.max_length is not given
HUB_REPOSITORY, HUB_FILE = "THUDM/LongBench", "data.zip"


@dataclass(frozen=True, kw_only=True)
class Document(Example):
    """score: of one prediction against one reference."""

    expected: list[str]
    score: Callable[[str, str], float]

    def judge(self, text: str) -> Verdict:
        answer = scorers.first_line(text) if self.group in ONE_LINE else text
        return Verdict(text.strip() or None, max((self.score(answer, truth) for truth in self.expected), default=0.0))


@dataclass
class LongBench(ContextBenchmark):
    """tasks: of NAMES, empty is all; num_examples counts for each. data_path: folder of NAME.jsonl, one such file, or
    one of HotpotQA's or QMSum's own (`longbench_sources.py`).

    max_length: longest prompt in tokens, before the chat template; None: as the models' context windows allow.
    """

    tasks: list[str]
    max_length: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 2):
            raise UserError(f"task.max_length={self.max_length} is no length; give at least 2 tokens, or null.")

    def read(self, config: RunConfig) -> list[Example]:
        published = json.loads((SAMPLES / "longbench" / "tasks.json").read_text(encoding="utf-8"))
        names = chosen(NAMES, self.tasks)
        found: list[Example] = []
        for name in names:
            rows = islice(self._rows(name), self.num_examples)
            found += [document(row, where, name, **published[name]) for where, row in rows]
        if not found:
            raise UserError(f"{KEY}={self.data_path} has no rows of {', '.join(names)}; name the file's own task.")
        return found

    def _rows(self, name: str) -> Iterator[Row]:
        """A file's rows count for the task that they or the file's name belong to."""
        path = Path(hub_folder() if self.data_path == HUB else self.data_path or SAMPLES / "longbench").expanduser()
        if not path.is_dir():
            rows = in_longbench_fields(rows_of(str(path), ""))
            stem = path.name.partition(".")[0]
            return (row for row in rows if isinstance(row[1], dict) and row[1].get("dataset", stem) == name)
        file = next((file for ext in ("jsonl", "jsonl.gz") if (file := path / f"{name}.{ext}").is_file()), None)
        if file is None and self.tasks:
            raise UserError(f"{KEY}={path} has no {name}.jsonl; leave the task out, or add the file.")
        return in_longbench_fields(rows_of(str(file), "")) if file else iter(())

    def fit(self, examples: list[Example], spec: SpecSmallKV, config: RunConfig) -> list[Example]:
        models = [model for model in (spec.pair.target, spec.pair.draft) if model is not None]
        window = min(model.config.max_position_embeddings for model in models)
        longest = [self.max_length or window - limit_of(example, config) - ROOM for example in examples]
        return [without_middle(e, spec.pair.tokenizer, n) for e, n in zip(examples, longest, strict=True)]


def document(row: Any, where: str, name: str, prompt: str, max_new_tokens: int) -> Document:
    context, asked, answers = need(row, where, context=str, input=str, answers=(list, str))
    score = SCORERS.get(name) or partial(scorers.classification, classes=need(row, where, all_classes=list)[0])
    head, _, tail = prompt.partition("{context}")
    return Document(
        context=head + context,
        question=tail.replace("{input}", asked),
        expected=references(answers, where),
        group=name,
        score=score,
        max_new_tokens=max_new_tokens,
        chat=False if name in NO_CHAT else None,
    )


def references(answers: list[str] | str, where: str) -> list[str]:
    """Some copies of the data hold the list as text."""
    try:
        parsed = ast.literal_eval(answers) if isinstance(answers, str) else answers
    except (SyntaxError, ValueError):
        parsed = None
    if not isinstance(parsed, list) or not parsed or not all(isinstance(answer, str) for answer in parsed):
        raise UserError(f"{where} has answers that are no list of texts; correct it there.")
    return parsed


def without_middle(example: Example, tokenizer: Any, longest: int) -> Example:
    """The example with its text cut to `longest` tokens: half from the start, half from the end."""
    ids = tokenizer(example.context + example.question)["input_ids"]
    if len(ids) <= longest:
        return example
    half, asked = longest // 2, example.question.strip()
    as_is = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    start, end = (tokenizer.decode(part, **as_is) for part in (ids[:half], ids[-half:]))
    border = end.rfind(asked)
    if half < 1 or border < 0:
        raise UserError(
            f"A prompt of {example.group} would be cut to {longest} tokens, which leaves less than its question; "
            "give more with task.max_length or a model with a longer context window."
        )
    return replace(example, context=start + end[:border], question=end[border:])


def hub_folder() -> str:
    """The benchmark's archive, fetched and unpacked once; a UserError if the hub cannot be reached."""
    import zipfile

    from huggingface_hub import hf_hub_download

    try:
        archive = Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset"))
    except Exception as error:  # offline, moved, no disk: a dozen types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{KEY}={HUB}: {HUB_REPOSITORY} cannot be loaded ({reason}); give a local folder.") from None
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(archive.parent)
    return str(archive.parent / "data")
