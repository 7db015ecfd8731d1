"""Distance to the full cache against budget: `+experiment=kl-budget`."""

import plotting

from specsmallkv.figures import Measure

RECORDS = "kl_budget"


def main() -> None:
    rows = plotting.rows(RECORDS)
    made, (left, right) = plotting.canvas(2)
    measured = [row for row in rows if row["policy"] != "full"]
    plotting.draw(left, Measure("kl_mean", "KL(full, policy), nats per token", log=True), measured)
    plotting.draw(right, Measure("top1_agreement", "Top-1 agreement with the full cache"), measured)
    left.legend(ncols=2)
    plotting.title(made, rows[0]["model"], f"n = {rows[0]['scored_tokens']} positions", "95% bootstrap intervals")
    plotting.save(made, __file__)


if __name__ == "__main__":
    main()
