"""Decoding speed against what a sweep varies: `+experiment=speed-by-context`, `-batch`, `-budget`, `-drafts`.

Two panels: tokens of all sequences a CPU second, and the same over the full cache's without speculation.
"""

import plotting
from efficiency import SPEED, repeated
from matplotlib.axes import Axes

RECORDS = "speed_by_context"
AXES = {  # the key of a record that varies -> what the axis says
    "batch_size": "sequences at once",
    "kv_budget": "kv_budget",
    "num_draft_tokens": "drafted tokens of a round",
    "prompt_tokens": "tokens of each prompt",
}
MEASURES = {
    SPEED: "tokens per CPU second, all sequences",
    "cpu_ratio_to_full": "over the full cache's, no speculation",
}


def varying(records: list[dict]) -> str:
    """The key of AXES that differs from record to record; of one record alone the length."""
    return next((key for key in AXES if len({record[key] for record in records}) > 1), "prompt_tokens")


def draw(axes: Axes, records: list[dict], key: str, measure: str) -> None:
    for index, name in enumerate(system["name"] for system in records[0]["systems"]):
        points = [next(s for s in record["systems"] if s["name"] == name) for record in records]
        x = [record[key] * 1.01 ** (index - 2) for record in records]  # beside each other
        style = plotting.look(name.partition("+")[0], index) | {"linestyle": "--" if "+" in name else "-"}
        error = plotting.spread(points, SPEED, f"{SPEED}_min", f"{SPEED}_max") if measure == SPEED else None
        axes.errorbar(x, [point[measure] for point in points], yerr=error, capsize=2, label=name, **style)
    axes.set(xscale="log", xlabel=AXES[key], ylabel=MEASURES[measure])
    axes.set_xticks([record[key] for record in records], [f"{record[key]:g}" for record in records])
    axes.minorticks_off()


def main() -> None:
    records = list(plotting.records(RECORDS).records.values())
    key = varying(records)
    records.sort(key=lambda record: record[key])
    made, panels = plotting.canvas(2, width=4.2)
    for axes, measure in zip(panels, MEASURES, strict=True):
        draw(axes, records, key, measure)
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    first = records[0]
    plotting.title(
        made, first["model"], f"{first['dtype']} ({first['linear']})", f"median and range of {repeated(first)}"
    )
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
