"""Any set of records as one table: which rows they have, what is common to them, and CSV, Markdown and LaTeX of it.

A record is one row, or one per entry of its `results` (fidelity, retrieval, benchmarks) or `systems` (throughput).
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

Row = dict[str, Any]
PARTS = ("results", "systems")
# What identifies a row, then what was measured, in the table's order; other numbers of a record follow in the CSV.
IDENTITY = (
    *("record", "task", "model", "name", "policy", "kv_budget", "matched_budget", "speculation", "num_draft_tokens"),
    *("text", "rows", "seed", "dtype", "device", "device_name"),
)
MEASURED = (
    *("kv_budget_effective", "kv_share_mean", "total_share_mean", "kl_mean", "kl_median", "top1_agreement", "nll"),
    *("attention_recall", "accuracy", "correct", "answered", "total", "tokens_per_second", "decode_tokens_per_second"),
    *("n", "acc", "acc_stderr", "acc_norm", "exact_match", "word_perplexity"),
    *("ratio_to_full", "ttft_seconds", "acceptance_rate", "acceptance_length", "target_kv_bytes"),
    *("target_kv_bytes_full", "target_kv_host_bytes", "draft_kv_bytes", "draft_weight_bytes", "scratch_bytes"),
    *("recall_bytes", "new_per_round", "peak_memory_bytes", "error"),
)
OF_THE_RECORD = ("task", "model", "speculation", "num_draft_tokens", "seed", "dtype", "device", "device_name", "error")
CONFIG = "config."  # begins the columns of settings
ALIKE = ("task", "model", "policy", "speculation")
SURROUNDINGS = ("versions", "git_hash", "device_name")
NOT_SETTINGS = ("run_dir", "quiet", "resume", "report", "trace")
# What a row shows by itself, and what is averaged over: runs that differ in nothing else are one setting.
NOT_A_SETTING = re.compile(
    r"seed|model\.(dtype|device)|prompt|(prompt|prompts|messages)_file|policy\.(kv_budget|_target_)|speculation\.(name|num_draft_tokens)"
    r"|task\.(text_files?|offset|data_path|policies|kv_budgets|systems)"
)
MEBIBYTE = 2**20


@dataclass
class Collection:
    """records: by path below the directory. rows: what they say, one dictionary each."""

    records: dict[str, dict[str, Any]]
    rows: list[Row]

    @property
    def failed(self) -> dict[str, str]:
        return {path: record["error"] for path, record in self.records.items() if record.get("error")}

    @property
    def settings(self) -> dict[str, Row]:
        """By the name that rows have of their record: its settings, but for what a row shows or is averaged over."""
        return {name_of(path): setting_of(record["config"]) for path, record in self.records.items()}


def collect(directory: Path) -> Collection:
    """Every record below the directory but reports' own. Raises UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"task.dir={directory} is no directory; give one with records below it.")
    records = {}
    for path in sorted(directory.rglob("*.json"), key=lambda path: natural(str(path))):
        record = as_record(path)
        if record is not None and record["task"] != "report":
            records[str(path.relative_to(directory))] = record
    if not records:
        raise UserError(f"task.dir={directory} holds no record; give the directory of a run or a sweep.")
    varied = varied_settings(records)
    rows = [
        row | {CONFIG + key: in_words(value) for key, value in held(varied[path], row, policy_of(record)).items()}
        for path, record in records.items()
        for row in rows_of(name_of(path), record)
    ]
    return Collection(records, rows)


def as_record(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"schema_version", "task", "config"} <= found.keys() else None


def name_of(path: str) -> str:
    """`3-model-policy/record.json` is called `3-model-policy`; a record of another name keeps it."""
    parent, _, file = path.rpartition("/")
    return parent or path if file == "record.json" else path.removesuffix(".json")


def rows_of(name: str, record: Mapping[str, Any]) -> list[Row]:
    parts = next((record[key] for key in PARTS if isinstance(record.get(key), list) and record[key]), None)
    setting = {"record": name} | {key: record.get(key) for key in OF_THE_RECORD}
    if parts is None:
        text = {"text": None}  # the generated text is no column
        return [setting | scalars(record) | text]
    said = {"text": None} if "systems" in record else {}  # what a system wrote; of fidelity's results it is a name
    return [setting | scalars(part) | said for part in parts]


def scalars(record: Mapping[str, Any]) -> Row:
    """Numbers and words; an interval becomes two columns."""
    found = {key: value for key, value in record.items() if isinstance(value, bool | int | float | str)}
    for key, value in record.items():
        if key.endswith("_interval") and isinstance(value, list):
            stem = key.removesuffix("_interval")
            found |= {f"{stem}_low": value[0], f"{stem}_high": value[1]}
    return found


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts 2-x before 10-x."""
    pieces = "".join(c if c.isdigit() else f"\0{c}\0" for c in text).split("\0")
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces if piece]


# --- what is common and what differs ------------------------------------------------------------------------------


def flat(config: Any, prefix: str = "") -> Row:
    """Nested settings by dotted key."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    found: Row = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def setting_of(config: Any) -> Row:
    return {key: value for key, value in flat(config or {}).items() if is_setting(key)}


def is_setting(key: str) -> bool:
    return key not in NOT_SETTINGS and not NOT_A_SETTING.fullmatch(key)


def differences(records: Mapping[str, Mapping[str, Any]]) -> tuple[Row, dict[str, Row]]:
    """Settings that all records share, and of each record the others; a key that one lacks differs."""
    flats = {path: flat(record["config"] or {}) for path, record in records.items()}
    keys = dict.fromkeys(key for settings in flats.values() for key in settings)
    keys = {key: None for key in keys if key not in NOT_SETTINGS}
    same = {key for key in keys if len({json.dumps(settings.get(key, "absent")) for settings in flats.values()}) == 1}
    first = next(iter(flats.values()))
    differing = {path: {key: own.get(key) for key in keys if key not in same} for path, own in flats.items()}
    return {key: first[key] for key in keys if key in same}, differing


def varied_settings(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """Of each record: its values of all settings in which some two of one task, model, policy and speculation differ.

    Between policies nearly all settings differ; their names stand for that.
    """
    alike: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for path, record in records.items():
        alike.setdefault(tuple(record.get(key) for key in ALIKE), {})[path] = record
    groups = [differences(group)[1].values() for group in alike.values()]
    varied = {key for group in groups for own in group for key in own if is_setting(key)}
    flats = {path: flat(record["config"] or {}) for path, record in records.items()}
    return {path: {key: value for key, value in own.items() if key in varied} for path, own in flats.items()}


def held(settings: Row, row: Row, own: str | None) -> Row:
    """Of a record's settings those that hold for this row: a policy's for the run's own one and for variants of it."""
    name, _, changes = str(row.get("policy")).partition(":")
    changed = {f"policy.{change.partition('=')[0].strip()}" for change in changes.split(",")}
    is_its_own = name == own
    return {k: v for k, v in settings.items() if not k.startswith("policy.") or (is_its_own and k not in changed)}


def policy_of(record: Mapping[str, Any]) -> str | None:
    return ((record["config"] or {}).get("policy") or {}).get("name")


def in_words(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value)  # null is a setting, too


def surroundings(records: Iterable[Mapping[str, Any]]) -> list[tuple[Row, int]]:
    """Versions, commit and machine, each combination with how many records have it."""
    counted = Counter(json.dumps({key: record.get(key) for key in SURROUNDINGS}) for record in records)
    return [(json.loads(found), count) for found, count in counted.most_common()]


# --- the table ------------------------------------------------------------------------------------------------------


def columns(rows: list[Row], everything: bool = False) -> list[str]:
    """Columns that say something: what varies (policy and budget always), settings too, and whatever was measured."""
    settings = dict.fromkeys(key for row in rows for key in row if key.startswith(CONFIG))
    known = [key for key in (*IDENTITY, *settings, *MEASURED) if any(row.get(key) is not None for row in rows)]
    if everything:
        return list(dict.fromkeys([*known, *(key for row in rows for key in row)]))
    always = ("record", "policy", "kv_budget")
    varies = {key for key in known if len({str(row.get(key)) for row in rows}) > 1}
    return [key for key in known if key in varies or key in always or key in MEASURED]


def as_csv(rows: list[Row]) -> str:
    """All rows and every number, as measured."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns(rows, everything=True), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_markdown(rows: list[Row]) -> str:
    """A table per task, since tasks measure different things."""
    parts = []
    for task, own in by_task(rows).items():
        names = columns(own)
        lines = [heading(key) for key in names], ["---:" if is_number(key, own) else "---" for key in names]
        body = [[shown(key, row.get(key)).replace("|", "\\|") for key in names] for row in own]
        parts.append(f"## {task}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in (*lines, *body)))
    return "\n".join(parts)


def as_latex(rows: list[Row]) -> str:
    """The same with booktabs."""
    parts = []
    for task, own in by_task(rows).items():
        names = columns(own)
        kinds = "".join("r" if is_number(key, own) else "l" for key in names)
        body = [[escaped(shown(key, row.get(key))) for key in names] for row in own]
        lines = [" & ".join(line) + r" \\" for line in ([escaped(heading(key)) for key in names], *body)]
        inner = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        parts.append(f"% {task}\n\\begin{{tabular}}{{{kinds}}}\n{inner}\n\\end{{tabular}}\n")
    return "\n".join(parts)


def by_task(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.get("task")), []).append(row)
    return found


def heading(key: str) -> str:
    return f"{key.replace('_bytes', '')} MiB" if "_bytes" in key else key.removeprefix(CONFIG)


def shown(key: str, value: Any) -> str:
    """For people: four digits, bytes in MiB."""
    if value is None:
        return ""
    if "_bytes" in key and isinstance(value, int | float):
        return f"{value / MEBIBYTE:.4g}"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())  # a cell is one line


def is_number(key: str, rows: list[Row]) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return all(isinstance(value, int | float) for value in values)


def escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c) or (f"\\{c}" if c in "&%$#_{}" else c) for c in text)
