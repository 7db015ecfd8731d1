"""Benchmarks against budget (paper: Fig. 5): `+experiment=ruler-budget`, `+experiment=benchmark-budget` and others.

DIR holds the records of one or more; panels of a benchmark: its score, if it has one, and agreement with the full
cache's answers.
"""

import plotting

from specsmallkv.figures import Measure
from specsmallkv.records import Row, by_task

RECORDS = "benchmarks"


def main() -> None:
    tasks = by_task(plotting.rows(RECORDS))
    panels = [(rows, measure) for task, rows in tasks.items() for measure in measures(task, rows)]
    made, axes = plotting.canvas(len(panels), width=3.6)
    for panel, (rows, measure) in zip(axes, panels, strict=True):
        plotting.draw(panel, measure, rows)
        panel.set_ylim(-0.03, 1.03)
    axes[0].legend()
    measured = [row for rows in tasks.values() for row in rows if row.get("same_prefix") is not None]
    known = all("same_prefix_low" in row for row in measured)  # older records lack them
    intervals = "95% intervals over examples" if known else "95% intervals of the score over examples"
    plotting.title(made, next(iter(tasks.values()))[0]["model"], intervals)
    plotting.save(made, __file__, RECORDS)


def measures(task: str, rows: list[Row]) -> list[Measure]:
    n = next(row["total"] for row in rows if row.get("total"))
    found = (
        Measure("accuracy", f"{task}: score, n = {n}"),
        Measure("same_prefix", f"{task}: first tokens as full's, n = {n}"),
    )
    return [measure for measure in found if any(row.get(measure.key) is not None for row in rows)]


if __name__ == "__main__":
    main()
