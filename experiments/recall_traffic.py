"""What recall moves: new entries a round and bytes a token, against budget: `+experiment=kl-budget`."""

import plotting

from specsmallkv.figures import Measure

RECORDS = "kl_budget"


def main() -> None:
    rows = [row for row in plotting.rows(RECORDS) if row.get("recall_bytes")]
    for row in rows:
        row["recalled"] = row["recall_bytes"] / row["scored_tokens"] / row["target_kv_bytes_full"]
    made, (left, right) = plotting.canvas(2)
    plotting.draw(left, Measure("new_per_round", "Kept entries that were not resident before"), rows)
    plotting.draw(right, Measure("recalled", "Recalled per token / bytes of the full cache"), rows)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    left.legend()
    plotting.title(made, rows[0]["model"], f"n = {rows[0]['scored_tokens']} positions", "drafted blocks")
    plotting.save(made, __file__)


if __name__ == "__main__":
    main()
