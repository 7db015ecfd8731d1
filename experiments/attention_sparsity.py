"""How few tokens hold the attention, and what removing tokens of a middle rank costs (paper: Fig. 2).

`+experiment=attention-similarity` for the left, `+experiment=removed-ranks` for the right panel; DIR holds both.
"""

import plotting

RECORDS = "attention"
KEY = "removed_from="


def begins(row: dict) -> float:
    """Rank at which removal begins; if the policy sets none, the least attended tokens go."""
    return float(row["policy"].partition(KEY)[2]) if KEY in row["policy"] else row["kv_budget"]


def trained(record: dict) -> bool:
    return record["task"] == "calibrate" and not record["config"]["task"]["untrained"]


def main() -> None:
    collection = plotting.records(RECORDS)
    sparsity = next(record["sparsity"] for record in collection.records.values() if trained(record))
    removed = sorted((row for row in plotting.means_alone(collection.rows) if row["task"] == "fidelity"), key=begins)
    made, (left, right) = plotting.canvas(2)
    shares = [row["share"] for row in sparsity]
    for layer in zip(*(row["mass_per_layer"] for row in sparsity), strict=True):
        left.plot(shares, layer, color="#0072b2", linewidth=0.6, alpha=0.35)
    left.plot(shares, [row["mass"] for row in sparsity], label="mean of the layers", **plotting.look("specsmallkv"))
    left.set(xlabel="tokens, the most attended first", ylabel="attention mass (sinks left out)", xscale="log")
    left.set_xticks(shares, ["" if share == 0.7 else f"{share:.0%}" for share in shares], fontsize=7)
    left.minorticks_off()
    left.legend()
    x, y = [begins(row) for row in removed], [row["kl_mean"] for row in removed]
    right.errorbar(x, y, yerr=plotting.spread(removed, "kl_mean"), capsize=2, **plotting.look("", 1))
    right.set(xlabel="rank at which removal begins (0: the most attended)", ylabel="KL(full, policy), nats per token")
    right.set_yscale("log")
    plotting.plain_ticks(right.yaxis)
    right.set_title(f"{1 - removed[0]['kv_budget']:.0%} of the tokens removed", fontsize=9)
    positions = f"right: n = {removed[0]['scored_tokens']} positions"
    plotting.title(made, removed[0]["model"], positions, "95% bootstrap intervals")
    plotting.save(made, __file__)


if __name__ == "__main__":
    main()
