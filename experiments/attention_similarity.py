"""Target rows against what the draft's predict, head by head (paper: Fig. 1c): `+experiment=attention-similarity`."""

import plotting
from matplotlib.axes import Axes

RECORDS = "attention"
SHARES = ("0.05", "0.1")  # of the tokens, at which the record has the mass caught

Lines = list[tuple[str, plotting.Row]]


def lines_of(records: list[dict]) -> Lines:
    """What is compared: maps of the draft, and the two controls."""
    trained = next(record for record in records if not record["config"]["task"]["untrained"])
    untrained = next(record for record in records if record["config"]["task"]["untrained"])
    single, mixed = (min(trained["results"], key=lambda r: abs(r["num_draft_heads"] - n)) for n in (1, 16))
    best = next(row for row in untrained["results"] if row["chosen"])
    ours = [(f"mixture of {mixed['num_draft_heads']} draft heads", mixed), ("best single draft head", single)]
    controls = [("control: a random draft head", trained["controls"][0]), ("control: untrained draft, mixture", best)]
    return ours + controls


def draw_cosines(axes: Axes, lines: Lines) -> None:
    for index, (name, row) in enumerate(lines):
        low, high = zip(*row["cosine_interval_per_layer"], strict=True)
        style = plotting.look(name, index)
        whole = "{:.2f} [{:.2f}, {:.2f}]".format(row["cosine"], *row["cosine_interval"])
        axes.plot(row["cosine_per_layer"], label=f"{name}: {whole}", **style)
        axes.fill_between(range(len(low)), low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="target layer", ylabel="cosine to the target's rows", ylim=(0, 1))


def draw_mass(axes: Axes, lines: Lines) -> None:
    bars = [(row, "", color) for (_, row), color in zip(lines, plotting.OTHERS, strict=False)]
    for index, (row, whose, color) in enumerate([*bars, (lines[0][1], "_oracle", "black")]):
        keys = [f"mass_at_{share}{whose}" for share in SHARES]
        points = [{"y": row[key], "low": row[f"{key}_interval"][0], "high": row[f"{key}_interval"][1]} for key in keys]
        places, error = [x + index / 6 for x in range(len(SHARES))], plotting.spread(points, "y", "low", "high")
        label = "the true row itself" if whose else None
        style = {"color": color, "ecolor": "#555555", "capsize": 2, "label": label}
        axes.bar(places, [point["y"] for point in points], 1 / 6, yerr=error, **style)
    axes.set(ylabel="attention mass caught", ylim=(0, 1))
    axes.set_xticks([1 / 3, 4 / 3], [f"top {float(share):.0%}" for share in SHARES])


def main() -> None:
    records = [r for r in plotting.records(RECORDS).records.values() if r["task"] == "calibrate"]
    lines, first = lines_of(records), records[0]
    made, (left, right) = plotting.canvas(2, height=3.8)
    draw_cosines(left, lines)
    draw_mass(right, lines)
    made.legend(loc="outside lower center", ncols=2)
    heads = sum(map(len, first["cosine_per_head"]))
    counts = f"{len(first['texts'])} texts", f"{first['num_rows']} rows", f"n = {heads} heads"
    plotting.title(made, first["model"], *counts, "95% bootstrap intervals over heads")
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
