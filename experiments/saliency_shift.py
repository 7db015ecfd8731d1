"""What is kept against what is truly attended, over decoding (paper: Fig. 1b): `+experiment=saliency-shift`."""

import numpy as np
import plotting

RECORDS = "saliency_shift"

BINS = 8


def over_decoding(points: list[list[float]], column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and its 95% interval (normal) in bins of tokens since the prompt."""
    found = np.array([[p[0], p[column]] for p in points if p[column] is not None])
    edges = np.linspace(0, found[:, 0].max() + 1, BINS + 1)
    number = np.digitize(found[:, 0], edges) - 1
    groups = [found[number == index, 1] for index in range(BINS)]
    half = [1.96 * group.std(ddof=1) / np.sqrt(len(group)) for group in groups]
    return (edges[1:] + edges[:-1]) / 2, np.array([group.mean() for group in groups]), np.array(half)


def main() -> None:
    collection = plotting.records(RECORDS)
    (record,) = collection.records.values()
    results = [row for row in record["results"] if row["text"] == "mean"] or record["results"]
    made, panels = plotting.canvas(2)
    titles = ("Jaccard: kept and truly most attended", "Attention mass on what is kept")
    for column, (axes, title) in enumerate(zip(panels, titles, strict=True), start=1):
        for row in results:
            name, (x, y, half) = row["policy"], over_decoding(row["over_decoding"], column)
            axes.errorbar(x, y, yerr=half, capsize=2, elinewidth=0.8, label=name, **plotting.look(name))
        axes.set_xlabel("tokens decoded since the prompt")
        axes.set_ylabel(title)
        axes.set_ylim(0.6 if column == 2 else 0, 1)
    made.legend(*panels[1].get_legend_handles_labels(), loc="outside right center")
    count, budget = len(results[0]["over_decoding"]), results[0]["kv_budget"]
    blocks = f"n = {count} blocks in {BINS} bins"
    plotting.title(made, record["model"], f"kv_budget {budget}", blocks, "95% intervals")
    plotting.save(made, __file__)


if __name__ == "__main__":
    main()
