"""The rows of a benchmark's results: one per policy and budget, each with its subtasks, beside the full cache."""

from collections.abc import Callable
from typing import Any

from ..benchmarks.scorers import rouge_l
from ..intervals import bootstrap, score_interval
from ..policies import Policy
from .systems import AUTOREGRESSIVE, FULL, System

Figures = list[dict[str, Any]]
OF_FULLEST = (
    "target_kv_bytes",
    "target_kv_bytes_full",
    "kv_budget_effective",
    "target_kv_host_bytes",
    "kept_per_layer",
)


def results_of(systems: list[System]) -> list[dict[str, Any]]:
    """One row per system, compared with the full cache and the plain loop as far as these were measured."""
    found = {system.name: system.figures for system in systems}
    full, plain = found.get(FULL), found.get(AUTOREGRESSIVE)
    return [row_of(system, full, plain) for system in systems]


def row_of(system: System, full: Figures | None, plain: Figures | None) -> dict[str, Any]:
    """Bytes are those of the example that held most."""
    figures = system.figures
    fullest = max(figures, key=lambda f: f["target_kv_bytes"], default=dict.fromkeys(OF_FULLEST))
    row: dict[str, Any] = {"policy": system.name, "kv_budget": system.kv_budget}
    row["num_draft_tokens"] = system.decoder.num_draft_tokens
    row |= compared(figures, full, plain)
    groups = {f["group"]: f["group"] for f in figures}
    if any(groups):
        row["groups"] = {group: compared(figures, full, plain, group) for group in groups}
        row["group_mean"] = mean([part["accuracy"] for part in row["groups"].values()])
    return row | {key: fullest[key] for key in OF_FULLEST}


def compared(
    figures: Figures, full: Figures | None, plain: Figures | None, group: str | None = None
) -> dict[str, Any]:
    """Totals of all examples or of one group, with what pairs of systems tell."""
    wanted = [i for i, f in enumerate(figures) if group is None or f["group"] == group]
    row = totals([figures[i] for i in wanted])
    if full is not None and full is not figures:
        both = [i for i in wanted if i < len(full)]  # after Ctrl-C it may lack the last
        row |= beside_full([figures[i] for i in both], [full[i] for i in both])
    if plain is not None and plain is not figures:
        speed = totals([plain[i] for i in wanted if i < len(plain)])["decode_tokens_per_second"]
        own = row["decode_tokens_per_second"]
        row["speedup"] = own / speed if own and speed else None
    return row


def totals(figures: Figures) -> dict[str, Any]:
    """Scores with their interval, lengths, speed and acceptance."""
    scores = [f["score"] for f in figures if f["score"] is not None]
    total: Callable[[str], Any] = lambda key: sum(f[key] for f in figures)  # noqa: E731
    # The first token of every turn comes from reading the prompt.
    decoded = total("new_tokens") - sum(len(f["texts"]) for f in figures)
    return {
        "accuracy": mean(scores),
        "accuracy_interval": score_interval(scores),
        "correct": sum(score == 1 for score in scores) if scores else None,
        "answered": sum(f["answer"] is not None for f in figures),
        "finished": total("finished"),
        "total": len(figures),
        "new_tokens": total("new_tokens"),
        "mean_new_tokens": mean([f["new_tokens"] for f in figures]),
        "seconds": total("seconds"),
        "decode_tokens_per_second": decoded / total("decode_seconds") if decoded > 0 else None,
        "acceptance_rate": ratio(total("accepted_tokens"), total("drafted_tokens")),
        "acceptance_length": ratio(total("emitted_tokens"), total("rounds")),
        "recall_bytes": total("recall_bytes"),
    }


def beside_full(figures: Figures, full: Figures) -> dict[str, Any]:
    """Agreement with the full cache's answers, for which nobody has to know the right ones; paired scores."""
    pairs = list(zip(figures, full, strict=True))
    texts = [(ours, theirs) for f, g in pairs for ours, theirs in zip(f["texts"], g["texts"], strict=True)]
    prefixes = [common_prefix(f["tokens"], g["tokens"]) / len(g["tokens"]) for f, g in pairs]
    row: dict[str, Any] = {
        "same_text": mean([float(ours == theirs) for ours, theirs in texts]),
        "same_prefix": mean(prefixes),
        "same_prefix_interval": bootstrap(prefixes) if prefixes else None,
        "rouge_l_to_full": mean([1.0 if ours == theirs else rouge_l(ours, theirs) for ours, theirs in texts]),
    }
    gains = [f["score"] - g["score"] for f, g in pairs if f["score"] is not None]
    if gains:
        row |= {"accuracy_minus_full": mean(gains), "accuracy_minus_full_interval": bootstrap(gains)}
    return row


def headline(results: list[dict[str, Any]], chosen: Policy) -> dict[str, Any]:
    """The row of the run's own policy, at its budget if that was measured; else the first."""
    own = next((row for row in results if row["policy"] == chosen.name), results[0])
    return next((r for r in results if (r["policy"], r["kv_budget"]) == (chosen.name, chosen.kv_budget)), own)


def common_prefix(ours: list[int], theirs: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def mean(values: list[Any]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
