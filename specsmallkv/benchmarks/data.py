"""Where a benchmark's rows come from: a file of the user's, the hub, or the small sample in the package."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..hub_text import load_hub
from ..prompts import read_rows, read_text

KEY = "task.data_path"
HUB = "hub"  # the value of the key that stands for the hub
SAMPLES = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
Row = tuple[str, Any]  # where it stands, for messages, and what it holds


class HubSource(NamedTuple):
    """A data set of the hub. file: the one file of a repository of plain files; its only split is then `train`."""

    repository: str
    configuration: str | None
    split: str
    file: str | None = None


def rows_of(data_path: str | None, sample: str, *hub: HubSource) -> Iterator[Row]:
    """Rows of `data_path`: JSONL or a JSON list (.gz too), the hub's sources one after the other, or a sample.

    Raises UserError for what cannot be read, with file and line.
    """
    if data_path == HUB and not hub:
        raise UserError(f"{KEY}={HUB} has no rows for this task; docs/benchmarks.md says where its files are.")
    if data_path == HUB:
        for source in hub:
            yield from hub_rows(source)
    elif data_path is not None and data_path.removesuffix(".gz").endswith(".json"):
        yield from list_rows(data_path)
    else:
        yield from read_rows(KEY, str(SAMPLES / sample) if data_path is None else data_path)


def list_rows(path: str, field: str | None = None) -> Iterator[Row]:
    """Rows of a JSON file: a list, or with `field` an object whose field is one."""
    try:
        content = json.loads(read_text(KEY, path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{KEY}={path} is not JSON ({error}); correct it there.") from None
    rows = content.get(field) if field and isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"{KEY}={path} holds no list of rows{f' named {field}' if field else ''}; give one that does.")
    for number, row in enumerate(rows, start=1):
        yield f"{KEY}={path} row {number}", row


def hub_rows(source: HubSource) -> Iterator[Row]:
    """Rows of a dataset on the hub, through the optional `datasets` library."""
    rows = load_hub(f"{KEY}={HUB}", source.repository, source.configuration, source.split, file=source.file)
    name = " ".join(filter(None, (source.repository, source.configuration or source.file)))
    for number, row in enumerate(rows, start=1):
        yield f"{name} row {number}", row


def need(row: Any, where: str, **kinds: Any) -> list[Any]:
    """The row's fields of these names, checked; a UserError names the first that is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            wanted = " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
            raise UserError(f"{where} has no field {name} of type {wanted}; this task needs {', '.join(kinds)}.")
    return [row[name] for name in kinds]


def chosen(known: tuple[str, ...] | list[str], asked: list[str], key: str = "task.tasks") -> list[str]:
    """The subtasks that are asked for, all if the list is empty; a UserError for an unknown one."""
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"{key} names {unknown[0]}, which is none of {', '.join(known)}.")
    return list(dict.fromkeys(asked)) or list(known)
