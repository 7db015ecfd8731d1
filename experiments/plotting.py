"""What the plotting scripts share: which records they read, how a policy looks, where the picture goes.

    python experiments/SCRIPT.py [DIR] [PICTURE.svg]

DIR holds records at any depth, by default those of experiments/records/RECORDS, which the script names. Unless it is
named, the picture of committed records goes to experiments/pictures, called after the script and, if they are not
RECORDS, after them too; that of others goes into DIR. Needs matplotlib (in the `dev` and `plots` extras).
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from specsmallkv.errors import UserError
from specsmallkv.figures import Measure, figure, means_alone
from specsmallkv.records import Collection, Row, collect

HERE = Path(__file__).resolve().parent
plt.rcParams |= {
    "svg.fonttype": "none",  # text stays text: small, and searchable
    "svg.hashsalt": "specsmallkv",  # the same records make the same file
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Colours that colour-blind readers can tell apart (Okabe and Ito), and a shape each.
LOOKS = {
    "specsmallkv": ("#0072b2", "o"),
    "specsmallkv_packed": ("#882255", "o"),
    "smallkv": ("#009e73", "s"),
    "smallkv_paper": ("#56b4e9", "D"),
    "snapkv": ("#d55e00", "^"),
    "pyramidkv": ("#cc79a7", "v"),
    "h2o": ("#e69f00", "P"),
    "streaming_llm": ("#999999", "X"),
    "oracle": ("#000000", "."),
    "full": ("#000000", "_"),
    "transformers": ("#cc79a7", "v"),
    "assisted": ("#e69f00", "P"),
}
OTHERS = ["#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#999999", "#882255"]


def look(name: str, index: int = 0) -> dict[str, Any]:
    """Colour, marker and width of a line; a variant `snapkv:...` is no known policy and takes the index's."""
    color, marker = LOOKS.get(name, (OTHERS[index % len(OTHERS)], "o"))
    style, width = "--" if name in ("oracle", "full") else "-", 2.2 if name == "specsmallkv" else 1.2
    return {"color": color, "marker": marker, "markersize": 4, "linewidth": width, "linestyle": style}


TOTAL_TICKS = (0.05, 0.1, 0.2, 0.5, 1.0)


def draw(axes: Axes, measure: Measure, rows: list[Row], total: bool = False) -> None:
    """The measure against budget, a line for each policy with its intervals; the full cache is a level.

    total: against what is held together with the draft's cache.
    """
    if total:
        rows = [row | {"kv_budget": row["total_share_mean"], "matched_budget": None} for row in rows]
    drawn = figure(measure, [row for row in rows if row.get(measure.key) is not None])
    single = [{"name": bar["name"], "points": [bar]} for bar in drawn.get("bars", [])]  # of one budget
    for index, series in enumerate(ordered(drawn.get("series", single))):
        points, name = series["points"], series["name"]
        y = [p["y"] for p in points]
        if name == "full":
            axes.axhline(y[0], color="black", linewidth=1, linestyle=":", label="full")
            continue
        x = [p["x"] * 1.012 ** (index - 4) for p in points]  # beside each other, so that bars can be told apart
        error = spread(points, "y", "low", "high") if "low" in points[0] else None
        axes.errorbar(x, y, yerr=error, capsize=2, elinewidth=0.8, label=name, **look(name, index))
    axes.set_xlabel("held with the draft's cache" if total else "kv_budget: share of the full cache's bytes")
    axes.set_ylabel(measure.title)
    budget_axis(axes, TOTAL_TICKS if total else {row["kv_budget"] for row in rows if row["policy"] != "full"})
    if measure.log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)


def spread(points: list[Row], key: str, low: str = "", high: str = "") -> list[list[float]]:
    """Lengths of error bars; the interval of a column lies in KEY_low and KEY_high."""
    low, high = low or f"{key}_low", high or f"{key}_high"
    return [[max(0.0, p[key] - p[low]) for p in points], [max(0.0, p[high] - p[key]) for p in points]]


def budget_axis(axes: Axes, budgets: Iterable[float]) -> None:
    """Logarithmic, with the measured budgets as ticks."""
    ticks = sorted(set(budgets))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 * budget:g}%" for budget in ticks])
    axes.minorticks_off()
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 2, 2 * ticks[0])


def plain_ticks(axis: Axis) -> None:
    """On a logarithmic axis of a decade or two: 0.2, not 2 x 10^-1."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def ordered(series: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As LOOKS has them."""
    names = list(LOOKS)
    return sorted(series, key=lambda s: names.index(s["name"]) if s["name"] in names else len(names))


def directory(name: str) -> Path:
    """The one on the command line, else that of the committed records of that name."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "records" / name


def records(name: str) -> Collection:
    try:
        return collect(directory(name))
    except UserError as error:
        sys.exit(f"{error} {name} may not have been measured yet; experiments/README.md has its command.")


def rows(name: str) -> list[Row]:
    """The records' rows; of several texts their mean."""
    return means_alone(records(name).rows)


def canvas(columns: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side."""
    made, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    return made, list(axes[0])


def title(made: Figure, *parts: str) -> None:
    """What was measured, above all panels."""
    made.suptitle(", ".join(parts), fontsize=9)


def picture(script: str, name: str) -> Path:
    """Where it goes; name: of the records that are the script's own."""
    if len(sys.argv) > 2:
        return Path(sys.argv[2])
    source, stem = directory(name).resolve(), Path(script).stem
    if source.parent != HERE / "records":
        return source / f"{stem}.svg"
    added = source.name.removeprefix(name) if source.name.startswith(name) else f"_{source.name}"
    return HERE / "pictures" / f"{stem}{added}.svg"


def save(made: Figure, script: str, name: str) -> None:
    """Write the script's picture and say where."""
    path = picture(script, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, metadata={"Date": None})
    plt.close(made)
    print(path)
