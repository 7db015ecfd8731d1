"""What a set of records shows in pictures: which rows make a line, what stands on the axes; `web/study.js` draws it.

A figure is lines over the budget where a policy was measured at several, else bars. Rows of a line that differ in
nothing but seed, run or text are averaged; the bar on a point is their range, or the interval that the rows bring.
What else differs between rows that would be one point is told in their lines' names.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .records import Row, by_task, held

MEAN = "mean"  # what fidelity calls the row of all texts
SERIES_KEYS = ("model", "name", "policy", "speculation", "num_draft_tokens", "rows")
COUNTED = ("num_draft_tokens",)
MAX_BARS = 40


@dataclass(frozen=True)
class Measure:
    """A column worth a picture. share: its axis is 0 to 1; log: its axis is logarithmic; unit: what divides it."""

    key: str
    title: str
    share: bool = False
    log: bool = False
    unit: int = 1


MEASURES = (
    Measure("kl_mean", "KL from the full cache, nats", log=True),
    Measure("top1_agreement", "Same most probable token as the full cache", share=True),
    Measure("accuracy", "Accuracy", share=True),
    Measure("tokens_per_second", "Tokens per second"),
    Measure("decode_tokens_per_second", "Tokens per second after the first"),
    Measure("acceptance_rate", "Drafts accepted", share=True),
    Measure("acceptance_length", "Tokens per verify pass"),
    Measure("target_kv_bytes", "Target's KV on the device, MiB", unit=2**20),
    Measure("recall_bytes", "Recalled from host memory, MiB", unit=2**20),
)


def figures(rows: list[Row], settings: Mapping[str, Row] | None = None) -> list[dict[str, Any]]:
    """One per task and measure that some row has. settings: of each record, as `Collection.settings`."""
    found = []
    for task, own in by_task(means_alone(rows)).items():
        for measure in MEASURES:
            having = [row for row in own if row.get(measure.key) is not None]
            if having:
                found.append({"task": task} | figure(measure, having, settings))
    return found


def means_alone(rows: list[Row]) -> list[Row]:
    """Where a record has rows of several texts and their mean, the mean."""
    averaged = {row["record"] for row in rows if row.get("text") == MEAN}
    return [row for row in rows if row["record"] not in averaged or row.get("text") == MEAN]


def figure(measure: Measure, rows: list[Row], settings: Mapping[str, Row] | None = None) -> dict[str, Any]:
    """Lines over budgets, or bars."""
    name = told_apart(rows, namer(rows), settings or {})
    lines: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        lines.setdefault(name(row), {}).setdefault(abscissa(row), []).append(row)
    described = {"key": measure.key, "title": measure.title, "share": measure.share, "log": measure.log}
    if any(len(points) > 1 for points in lines.values()):
        series = [
            {"name": line, "points": [point(measure, x, same) for x, same in sorted(points.items())]}
            for line, points in sorted(lines.items())
        ]
        return described | {"kind": "lines", "x": "kv_budget", "series": series}
    bars = [
        {"name": line, "budget": x} | point(measure, x, same)
        for line, points in sorted(lines.items())
        for x, same in sorted(points.items())
    ]
    return described | {"kind": "bars", "bars": bars[:MAX_BARS], "left_out": max(0, len(bars) - MAX_BARS)}


def abscissa(row: Row) -> float:
    """The budget; `matched_budget` is the one at which a policy with another's total of bytes is compared."""
    value = row.get("matched_budget") or row.get("kv_budget")
    return float(value) if isinstance(value, int | float) else 1.0


def namer(rows: list[Row]) -> Callable[[Row], str]:
    """How the line of a row is called: its policy, and what else differs between the rows."""
    varies = [key for key in SERIES_KEYS if len({str(row.get(key)) for row in rows}) > 1]

    def name(row: Row) -> str:
        words = [str(row[key]) for key in varies if key not in COUNTED and row.get(key)]
        if "num_draft_tokens" in varies and row.get("num_draft_tokens") is not None:
            words.append(f"{row['num_draft_tokens']} drafts")
        return ", ".join(words) or str(row.get("policy") or row.get("name") or row["record"])

    return name


def told_apart(rows: list[Row], name: Callable[[Row], str], settings: Mapping[str, Row]) -> Callable[[Row], str]:
    """`name`, with the settings that differ between rows of one name and budget behind it."""
    cells: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        cells.setdefault((name(row), abscissa(row)), []).append(setting(row, settings))
    differing = dict.fromkeys(
        key
        for cell in cells.values()
        for key in dict.fromkeys(k for own in cell for k in own)
        if len({json.dumps(own.get(key)) for own in cell}) > 1
    )

    def longer(row: Row) -> str:
        own = setting(row, settings)
        return ", ".join([name(row), *(f"{key.rpartition('.')[2]} {own[key]}" for key in differing if key in own)])

    return longer


def setting(row: Row, settings: Mapping[str, Row]) -> Row:
    """Of the record's settings those that hold for this row: its policy's are another's where several stand in one."""
    own = settings.get(row["record"], {})
    return {k: v for k, v in held(own, row, own.get("policy.name")).items() if k != "policy.name"}


def point(measure: Measure, x: float, rows: list[Row]) -> dict[str, Any]:
    """The mean of rows of one setting, and their range or the interval of a single one."""
    values = [row[measure.key] / measure.unit for row in rows]
    found = {"x": x, "y": sum(values) / len(values), "count": len(rows), "record": rows[0]["record"]}
    if len(rows) > 1:
        return found | {"low": min(values), "high": max(values)}
    low, high = (rows[0].get(f"{measure.key}_{side}") for side in ("low", "high"))
    return found if low is None else found | {"low": low, "high": high}
