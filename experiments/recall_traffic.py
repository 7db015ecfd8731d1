"""What recall moves: new entries a round and bytes a token, against budget: `+experiment=kl-budget`."""

import plotting

from specsmallkv.figures import Measure

RECORDS = "kl_budget"


def main() -> None:
    rows = [row for row in plotting.rows(RECORDS) if row.get("recall_bytes")]
    for row in rows:  # older records tell the sum alone
        row.setdefault("recalled_per_token", row["recall_bytes"] / row["scored_tokens"] / row["target_kv_bytes_full"])
    made, (left, right) = plotting.canvas(2)
    plotting.draw(left, Measure("new_per_round", "Kept entries that were not resident before"), rows)
    plotting.draw(right, Measure("recalled_per_token", "Recalled per token / bytes of the full cache"), rows)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    left.legend()
    known = all("new_per_round_low" in row for row in rows)
    intervals = "95% bootstrap intervals over blocks" if known else "means alone: the record has no intervals"
    plotting.title(made, rows[0]["model"], f"n = {rows[0]['scored_tokens']} positions in drafted blocks", intervals)
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
