"""The texts that a task reads: files named by `task.text_file` or `task.text_files`, plain, JSONL or gzipped."""

from pathlib import Path

from ..errors import UserError
from ..generator import SpecSmallKV
from ..prompts import read_rows, read_text


def read_texts(task: str, text_file: str | None, text_files: list[str], text_field: str) -> dict[str, str]:
    """The texts by name: the file's, or its path where two files have one name. task: who asks.

    text_field: of JSONL rows. Raises UserError for files that cannot serve.
    """
    if text_file is not None and text_files:
        raise UserError("task.text_file and task.text_files are given together; keep one of them.")
    key = "task.text_files" if text_files else "task.text_file"
    paths = text_files or ([] if text_file is None else [text_file])
    if not paths:
        raise UserError(f"task={task} needs a text; set task.text_file=FILE or task.text_files=[FILE,FILE].")
    if len(set(paths)) < len(paths):
        raise UserError(f"{key}=[{','.join(paths)}] names a file twice; leave one out.")
    names = [Path(path).name for path in paths]
    return {
        name if names.count(name) == 1 else path: _content(key, path, text_field)
        for name, path in zip(names, paths, strict=True)
    }


def _content(key: str, path: str, text_field: str) -> str:
    """A text, or the rows of a JSONL file joined by blank lines."""
    if not path.removesuffix(".gz").endswith(".jsonl"):
        return read_text(key, path)
    parts = []
    for where, row in read_rows(key, path):
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "it is no JSON object"
            raise UserError(f"{where} has no text in {text_field}; set task.text_field ({has}).")
        parts.append(text)
    return "\n\n".join(parts)


def passage(
    spec: SpecSmallKV, name: str, content: str, offset: int, needed: int, lower: str, at_once: int | None = None
) -> list[int]:
    """The first `needed` tokens from a character on; lower: what would make a UserError's text long enough.

    at_once: as many of them as one sequence holds, by default all.
    """
    tokens = spec.pair.tokenizer(content[offset : offset + 12 * needed])["input_ids"]
    if len(tokens) < needed:
        raise UserError(
            f"the text {name} has {len(tokens)} tokens from character task.offset={offset} on, "
            f"{needed} are needed; lower {lower}."
        )
    spec.check_length(tokens[: at_once or needed], 1)
    return tokens[:needed]
