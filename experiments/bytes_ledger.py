"""All bytes of a pair against the full cache alone, measured and by formula: `+experiment=efficiency`.

A pair holds (b T + D + s) N + W bytes for N tokens: T and D per token of the target's and the draft's full cache, b
the budget, s the scratch of the draft's rows, W the draft's weights. The full cache is T N, so the pair breaks even at
N = W / ((1 - b) T - D - s) tokens, of all sequences of a batch together. Sizes of other pairs are those of their
config.json, in bfloat16.
"""

import numpy as np
import plotting

RECORDS = "efficiency"

SYSTEM = "specsmallkv+draft"
# Layers, KV heads and head size of target and draft; layers x query heads of the draft and the target; parameters.
PAIRS = {
    "qwen2.5-coder-1.5b": ((28, 2, 128), (24, 2, 64), 24 * 14, 28 * 12, 0.494e9),
    "qwen2-7b": ((28, 4, 128), (24, 2, 64), 24 * 14, 28 * 28, 0.494e9),
    "qwen3-8b": ((36, 8, 128), (28, 8, 128), 28 * 16, 36 * 32, 0.596e9),
    "llama3.1-8b": ((32, 8, 128), (16, 8, 64), 16 * 32, 32 * 32, 1.236e9),
    "qwen2-72b": ((80, 8, 128), (28, 4, 128), 28 * 28, 80 * 64, 7.616e9),
}
BLOCK = 4  # rows of a verify block
BUDGETS = (0.05, 0.1, 0.2)  # at which break-even is printed
NEVER = 1e9  # tokens
PARTS = {
    "target_kv_bytes": "target KV",
    "draft_kv_bytes": "draft KV",
    "scratch_bytes": "scratch",
    "draft_weight_bytes": "draft weights",
}


def break_even(target: float, draft: float, scratch: float, weights: float, budget: float) -> float:
    """Tokens at which the pair holds as much as the full cache; infinite if each token costs more than it saves."""
    saved = (1 - budget) * target - draft - scratch
    return weights / saved if saved > 0 else float("inf")


def per_token(pair: str) -> tuple[float, float, float, float]:
    """T, D, s in bytes, and W."""
    target, draft, draft_heads, target_heads, parameters = PAIRS[pair]
    scratch = 4 * (draft_heads * (BLOCK + 2) + target_heads)  # rows, their mean, their sum; history
    return 4 * float(np.prod(target)), 4 * float(np.prod(draft)), scratch, 2 * parameters


def measured(records: list[dict]) -> list[dict]:
    """One entry per length of context."""
    rows = [(r["prompt_tokens"], s) for r in records for s in r["systems"] if s["name"] == SYSTEM]
    return [{"tokens": tokens, **system} for tokens, system in sorted(rows, key=lambda row: row[0])]


def print_break_even(pairs: dict[str, tuple[float, float, float, float]]) -> None:
    """README's table."""
    print("| pair | tokens at kv_budget " + " / ".join(f"{budget:g}" for budget in BUDGETS) + " |\n|---|---|")
    for pair, sizes in pairs.items():
        tokens = [break_even(*sizes, budget) for budget in BUDGETS]
        print(f"| `{pair}` | {' / '.join(f'{n:,.0f}' if n < NEVER else 'never' for n in tokens)} |")


def main() -> None:
    records = list(plotting.records(RECORDS).records.values())
    points, budget, mib = measured(records), records[0]["kv_budget"], 2**20
    made, (left, right) = plotting.canvas(2)
    x = np.arange(len(points))
    full = [p["target_kv_bytes_full"] / mib for p in points]
    left.bar(x - 0.2, full, 0.38, color="#999999", label="full cache alone")
    bottom = np.zeros(len(points))
    for (key, label), color in zip(PARTS.items(), plotting.OTHERS, strict=False):
        height = np.array([p[key] / mib for p in points])
        left.bar(x + 0.2, height, 0.38, bottom, color=color, label=label)
        bottom += height
    left.set_xticks(x, [f"{p['tokens']:,}" for p in points])
    left.set(xlabel="prompt tokens", ylabel="MiB", title="measured")
    left.set_ylim(top=1.3 * bottom.max())
    left.legend(loc="upper left", ncols=2)
    last = points[-1]
    sizes = [last[key] / last["tokens"] for key in ("target_kv_bytes_full", "draft_kv_bytes", "scratch_bytes")]
    pairs = {f"{records[0]['model']}, measured": (*sizes, last["draft_weight_bytes"])}
    pairs |= {pair: per_token(pair) for pair in PAIRS}
    print_break_even(pairs)
    budgets = np.linspace(0.02, 0.6, 200)
    for index, (pair, (target, draft, scratch, weights)) in enumerate(pairs.items()):
        style = plotting.look("", index) | {"marker": ""}
        tokens = break_even(target, draft, scratch, weights, budget)
        curve = [break_even(target, draft, scratch, weights, b) for b in budgets]
        where = f"{tokens:,.0f} at {budget:g}" if tokens < NEVER else "never"
        right.plot(budgets, curve, label=f"{pair}: {where}", **style)
    right.set(xlabel="kv_budget", ylabel="tokens of context", yscale="log", ylim=(100, 1e6))
    right.set_title("where one sequence breaks even", fontsize=9)
    right.legend(fontsize=7)
    counted = "bytes counted from tensors", "n = 1 prompt a length: nothing is sampled"
    plotting.title(made, records[0]["model"], f"{records[0]['dtype']}, kv_budget {budget:g}", *counted)
    plotting.save(made, __file__, RECORDS)


if __name__ == "__main__":
    main()
