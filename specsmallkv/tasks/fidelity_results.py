"""The rows of `task=fidelity`'s results: one per text, kind of rows, policy and budget, their means, and ratios."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..metrics import bootstrap_interval, mean_interval
from ..trials import Trial

MEAN = "mean"  # what stands for the text's name in rows of means
RIVALS = ("snapkv", "oracle")  # whose KL at the same budget every other's is divided by
SUMMED = ("scored_tokens", "recall_bytes")
AVERAGED = (
    "kl_mean",
    "kl_median",
    "top1_agreement",
    "nll",
    "nll_full",
    "attention_recall",
    "jaccard",
    "kv_share_mean",
    "total_share_mean",
    "new_per_round",
)


@dataclass
class Result:
    """figures: a row of the record. budget: by which rows are compared.

    Per text: kl, agrees of every position; draft_agrees of every draft that was judged; new_entries of every round;
    moved, full of every block: bytes recalled, and what its tokens would each read of the full cache.
    """

    figures: dict[str, Any]
    budget: float
    kl: list[list[float]]
    agrees: list[list[float]]
    draft_agrees: list[list[float]]
    new_entries: list[list[float]]
    moved: list[list[float]]
    full: list[list[float]]

    def key(self, *names: str) -> tuple[Any, ...]:
        return (*(self.figures[name] for name in names), self.budget)


def summary(trial: Trial, text: str, rows: str) -> Result:
    """What one trial measured on one text."""
    scores, counters, cache = trial.scores, trial.sequence.counters, trial.sequence.target
    figures: dict[str, Any] = {
        "text": text,
        "rows": rows,
        "policy": trial.policy.name,
        "kv_budget": trial.policy.kv_budget,
        "scored_tokens": len(scores.kl),
        "kl_mean": mean(scores.kl),
        "kl_median": float(torch.tensor(scores.kl).median()),
        "top1_agreement": mean(scores.agrees),
        "nll": mean(scores.nll),
        "nll_full": mean(scores.nll_full),
        "attention_recall": mean([share for layers in trial.recall for share in layers]),
        "attention_recall_per_layer": [mean(layer) for layer in zip(*trial.recall, strict=True)],
        "jaccard": mean(trial.jaccard),
        "over_decoding": [list(point) for point in trial.over_decoding],
        "kv_share_mean": mean(trial.byte_share),
        "total_share_mean": mean(trial.total_share),
        "target_kv_bytes": counters.max_target_bytes,
        "target_kv_bytes_full": counters.full_bytes_then,
        "target_kv_host_bytes": cache.host_nbytes,
        "target_kv_prefill_bytes": counters.prefill_bytes,
        "recall_bytes": cache.recall_bytes,
        "new_per_round": mean(counters.new_entries),
        "kept_per_layer": cache.kept_per_layer(),
    }
    if trial.budget != trial.policy.kv_budget:
        figures["matched_budget"] = trial.budget
    agrees, draft_agrees = ([float(same) for same in found] for found in (scores.agrees, trial.draft_agrees))
    moved, full = ([float(value) for value in column] for column in zip(*trial.recalled, strict=True))
    samples = [scores.kl], [agrees], [draft_agrees], [list(counters.new_entries)], [moved], [full]
    return with_intervals(Result(figures, trial.budget, *samples))


def with_intervals(result: Result) -> Result:
    """The result with the intervals of its means, and with the share of drafts that its greedy tokens agree with."""
    row = result.figures
    row["kl_mean_interval"], row["top1_agreement_interval"] = mean_interval(result.kl), mean_interval(result.agrees)
    if all(result.draft_agrees):
        row["draft_agreement"] = mean(map(mean, result.draft_agrees))
        row["draft_agreement_interval"] = mean_interval(result.draft_agrees)
        row["judged_drafts"] = sum(map(len, result.draft_agrees))
    if row["recall_bytes"]:
        row["new_per_round_interval"] = mean_interval(result.new_entries)
        row["recalled_per_token"] = mean(map(mean, result.moved)) / mean(map(mean, result.full))
        row["recalled_per_token_interval"] = bootstrap_interval(result.moved, result.full)
    return result


def with_means(results: list[Result]) -> list[Result]:
    """The results and, if there are several texts, their means over the texts."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.key("rows", "policy"), []).append(result)
    several = any(len(group) > 1 for group in groups.values())
    return results + ([over_texts(group) for group in groups.values()] if several else [])


def over_texts(results: list[Result]) -> Result:
    """One policy and budget over its texts: means, sums, and the bytes of the text that held most."""
    rows = [result.figures for result in results]
    figures = dict(max(rows, key=lambda row: row["target_kv_bytes"])) | {"text": MEAN}
    figures |= {key: sum(row[key] for row in rows) for key in SUMMED}
    figures |= {key: mean(row[key] for row in rows) for key in AVERAGED}
    per_layer = zip(*(row["attention_recall_per_layer"] for row in rows), strict=True)
    figures["attention_recall_per_layer"] = [mean(layer) for layer in per_layer]
    points = [point for row in rows for point in row["over_decoding"]]
    figures["over_decoding"] = sorted(points, key=lambda point: point[0])
    names = ("kl", "agrees", "draft_agrees", "new_entries", "moved", "full")
    per_text = {name: [values for result in results for values in getattr(result, name)] for name in names}
    return with_intervals(Result(figures, results[0].budget, **per_text))


def with_ratios(results: list[Result]) -> list[dict[str, Any]]:
    """The rows, each beside snapkv and the oracle at its budget, if they were measured."""
    found = {result.key("text", "rows", "policy"): result for result in results}
    for result in results:
        row = result.figures
        for name in RIVALS:
            rival = found.get((row["text"], row["rows"], name, result.budget))
            if rival is None:
                continue
            row[f"kl_ratio_to_{name}"] = row["kl_mean"] / max(rival.figures["kl_mean"], 1e-12)
            row[f"kl_ratio_to_{name}_interval"] = bootstrap_interval(result.kl, rival.kl)
            if name == "oracle":
                row["top1_minus_oracle"] = row["top1_agreement"] - rival.figures["top1_agreement"]
    return [result.figures for result in results]


def mean(values: Iterable[float]) -> float:
    """NaN, which a record shows as null, if there are none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")
