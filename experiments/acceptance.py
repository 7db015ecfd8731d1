"""Drafts that a compressed target would accept, against budget: `+experiment=kl-budget`."""

import plotting

from specsmallkv.figures import Measure

RECORDS = "kl_budget"


def main() -> None:
    rows = plotting.rows(RECORDS)
    made, (axes,) = plotting.canvas(width=6)
    plotting.draw(axes, Measure("draft_agreement", "Drafts that are the greedy token"), rows)
    made.legend(loc="outside lower center", ncols=3)
    plotting.title(made, rows[0]["model"], f"n = {rows[0]['judged_drafts']} drafts", "95% bootstrap intervals")
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
