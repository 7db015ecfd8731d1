"""What is kept against what is truly attended, over decoding (paper: Fig. 1b): `+experiment=saliency-shift`."""

import numpy as np
import plotting

RECORDS = "saliency_shift"

MOST_BINS, LEAST_IN_BIN = 8, 9
BUDGET = 0.1  # drawn of records with several


def over_decoding(points: list[list[float]], column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and its 95% interval (normal) in bins of tokens since the prompt."""
    found = np.array([[p[0], p[column]] for p in points if p[column] is not None])
    edges = np.linspace(0, found[:, 0].max() + 1, bins(points) + 1)
    number = np.digitize(found[:, 0], edges) - 1
    groups = [found[number == index, 1] for index in range(bins(points))]
    half = [1.96 * group.std(ddof=1) / np.sqrt(len(group)) for group in groups]
    return (edges[1:] + edges[:-1]) / 2, np.array([group.mean() for group in groups]), np.array(half)


def bins(points: list[list[float]]) -> int:
    return max(1, min(MOST_BINS, len(points) // LEAST_IN_BIN))


def main() -> None:
    collection = plotting.records(RECORDS)
    (record,) = collection.records.values()
    results = [row for row in record["results"] if row["text"] == "mean"] or record["results"]
    budget = min((row["kv_budget"] for row in results), key=lambda budget: abs(budget - BUDGET))
    results = [row for row in results if row["kv_budget"] == budget]
    made, panels = plotting.canvas(2)
    titles = ("Jaccard: kept and truly most attended", "Attention mass on what is kept")
    for column, (axes, title) in enumerate(zip(panels, titles, strict=True), start=1):
        for index, row in enumerate(results):
            name, (x, y, half) = row["policy"], over_decoding(row["over_decoding"], column)
            axes.errorbar(x, y, yerr=half, capsize=2, elinewidth=0.8, label=name, **plotting.look(name, index))
        axes.set_xlabel("tokens decoded since the prompt")
        axes.set_ylabel(title)
        axes.set_ylim(0.6 if column == 2 else 0, 1)
    made.legend(*panels[1].get_legend_handles_labels(), loc="outside right center")
    points = results[0]["over_decoding"]
    blocks = f"n = {len(points)} blocks in {bins(points)} bins"
    plotting.title(made, record["model"], f"kv_budget {budget}", blocks, "95% intervals")
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
