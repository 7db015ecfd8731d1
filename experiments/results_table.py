"""The results table of the main README, from a record of task=fidelity: `+experiment=kl-budget-long`.

    python experiments/results_table.py [DIR]

KL of each policy by budget, mean of the texts, and specsmallkv's over snapkv's and the oracle's: their ratio with its
95% interval (bootstrap over positions, paired), and the least and largest ratio of a text.
"""

import sys
from pathlib import Path

from specsmallkv.figures import MEAN
from specsmallkv.records import Row, collect

RECORDS = Path(__file__).resolve().parent / "records" / "kl_budget_qwen_2k"
OURS, PACKED, RIVALS = "specsmallkv", "specsmallkv:key_bits=8,value_bits=4", ("snapkv", "oracle")
PRESET = "specsmallkv_packed"  # the same
POLICIES = ("pyramidkv", "snapkv", "h2o", "smallkv", OURS, PACKED, PRESET, "oracle")
TOLD = {OURS: f"**`{OURS}`**", PACKED: f"`{OURS}`, keys in 8 and values in 4 bits"}


def find(rows: list[Row], policy: str, budget: float) -> list[Row]:
    """The mean over the texts first, then theirs; a single text is its own mean."""
    own = [row for row in rows if (row["policy"], row["kv_budget"]) == (policy, budget)]
    return sorted(own, key=lambda row: row["text"] != MEAN)


def ratio(rows: list[Row], rival: str) -> str:
    key, texts = f"kl_ratio_to_{rival}", rows[1:] or rows
    whole = "{:.3f} [{:.3f}, {:.3f}]".format(*(rows[0][name] for name in (key, f"{key}_low", f"{key}_high")))
    return f"{whole}, {min(row[key] for row in texts):.2g} to {max(row[key] for row in texts):.2g}"


def table(rows: list[Row]) -> list[str]:
    policies = [name for name in POLICIES if any(row["policy"] == name for row in rows)]
    rivals = [name for name in RIVALS if name in policies]
    heads = [TOLD.get(name, f"`{name}`") for name in policies]
    heads += [f"`{OURS}` / `{rival}` [95%], least and largest of the texts" for rival in rivals]
    lines = [f"| `kv_budget` | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for budget in sorted({row["kv_budget"] for row in rows if row["policy"] == OURS}):
        means = [f"{find(rows, name, budget)[0]['kl_mean']:.3g}" for name in policies]
        cells = [f"**{mean}**" if name == OURS else mean for name, mean in zip(policies, means, strict=True)]
        cells += [ratio(find(rows, OURS, budget), rival) for rival in rivals]
        lines.append(f"| {budget:.2f} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(collect(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDS).rows)))
