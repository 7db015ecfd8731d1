"""Benchmarks against budget (paper: Fig. 5): `+experiment=ruler-budget`, `+experiment=benchmark-budget`.

DIR holds the records of either or both; two panels a benchmark: score, and agreement with the full cache's answers.
"""

import plotting

from specsmallkv.figures import Measure
from specsmallkv.records import by_task

RECORDS = "benchmarks"


def main() -> None:
    tasks = by_task(plotting.rows(RECORDS))
    made, axes = plotting.canvas(2 * len(tasks), width=3.6)
    for index, (task, rows) in enumerate(tasks.items()):
        score, agreement = axes[2 * index : 2 * index + 2]
        plotting.draw(score, Measure("accuracy", f"{task}: score, n = {rows[0]['total']}"), rows)
        plotting.draw(agreement, Measure("same_prefix", f"{task}: first tokens as full's"), rows)
        for panel in (score, agreement):
            panel.set_ylim(-0.03, 1.03)
    axes[0].legend()
    measured = [row for rows in tasks.values() for row in rows if row.get("same_prefix") is not None]
    known = all("same_prefix_low" in row for row in measured)  # older records lack them
    intervals = "95% intervals over examples" if known else "95% intervals of the score over examples"
    plotting.title(made, next(iter(tasks.values()))[0]["model"], intervals)
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
