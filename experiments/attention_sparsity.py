"""How few tokens hold the attention, and what removing tokens of a middle rank costs (paper: Fig. 2).

`+experiment=attention-similarity` for the left, `+experiment=removed-ranks` for the other panels; DIR holds both.
"""

import plotting
from matplotlib.axes import Axes

RECORDS = "attention"
KEY = "removed_from="


def begins(row: dict) -> float:
    """Rank at which removal begins; if the policy sets none, the least attended tokens go."""
    return float(row["policy"].partition(KEY)[2]) if KEY in row["policy"] else row["kv_budget"]


def trained(record: dict) -> bool:
    return record["task"] == "calibrate" and not record["config"]["task"]["untrained"]


def draw_sparsity(axes: Axes, sparsity: list[dict]) -> None:
    shares = [row["share"] for row in sparsity]
    for layer in zip(*(row["mass_per_layer"] for row in sparsity), strict=True):
        axes.plot(shares, layer, color="#0072b2", linewidth=0.6, alpha=0.35)
    points = [{"y": r["mass"], "low": r["mass_interval"][0], "high": r["mass_interval"][1]} for r in sparsity]
    error, style = plotting.spread(points, "y", "low", "high"), plotting.look("specsmallkv")
    axes.errorbar(shares, [row["mass"] for row in sparsity], yerr=error, capsize=2, label="mean of all heads", **style)
    axes.set(xlabel="tokens, the most attended first", ylabel="attention mass (sinks left out)", xscale="log")
    axes.set_xticks(shares, ["" if share == 0.7 else f"{share:.0%}" for share in shares], fontsize=7)
    axes.minorticks_off()
    axes.legend()


def draw_removed(axes: Axes, removed: list[plotting.Row], key: str, ylabel: str) -> None:
    x, y = [begins(row) for row in removed], [row[key] for row in removed]
    axes.errorbar(x, y, yerr=plotting.spread(removed, key), capsize=2, **plotting.look("", 1))
    axes.set(xlabel="rank at which removal begins (0: the most attended)", ylabel=ylabel)
    axes.set_title(f"{1 - removed[0]['kv_budget']:.0%} of the tokens removed", fontsize=9)


def main() -> None:
    collection = plotting.records(RECORDS)
    calibrated = next(record for record in collection.records.values() if trained(record))
    removed = sorted((row for row in plotting.means_alone(collection.rows) if row["task"] == "fidelity"), key=begins)
    made, (left, middle, right) = plotting.canvas(3, width=4.2)
    draw_sparsity(left, calibrated["sparsity"])
    draw_removed(middle, removed, "kl_mean", "KL(full, policy), nats per token")
    middle.set_yscale("log")
    plotting.plain_ticks(middle.yaxis)
    draw_removed(right, removed, "top1_agreement", "Top-1 agreement with full")
    heads = f"left: n = {sum(map(len, calibrated['cosine_per_head']))} heads"
    positions = f"others: n = {removed[0]['scored_tokens']} positions"
    plotting.title(made, removed[0]["model"], heads, positions, "95% bootstrap intervals")
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
