"""Distance to the full cache against budget: `+experiment=kl-budget`."""

import plotting

from specsmallkv.figures import Measure

RECORDS = "kl_budget"


def main() -> None:
    rows = plotting.rows(RECORDS)
    made, (left, middle, right) = plotting.canvas(3, width=4.2, height=3.8)
    measured = [row for row in rows if row["policy"] != "full"]
    kl = Measure("kl_mean", "KL(full, policy), nats per token", log=True)
    plotting.draw(left, kl, measured)
    plotting.draw(middle, kl, measured, total=True)
    plotting.draw(right, Measure("top1_agreement", "Top-1 agreement with full"), measured)
    made.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    known = any(key.startswith("kl_mean_") for row in measured for key in row)  # older records have no intervals
    intervals = ["95% bootstrap intervals"] if known else []
    plotting.title(made, rows[0]["model"], f"n = {rows[0]['scored_tokens']} positions", *intervals)
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
