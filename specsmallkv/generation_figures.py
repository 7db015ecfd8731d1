"""Figures of one sequence, as the record has them (docs/record.md): acceptance and bytes."""

from typing import Any

from .sequence import Sequence

MEMORY_FIGURES = (
    "rounds",
    "drafted_tokens",
    "drafted_per_round",
    "undrafted_rounds",
    "accepted_tokens",
    "acceptance_rate",
    "acceptance_length",
    "target_kv_bytes",
    "target_kv_bytes_full",
    "kv_budget_effective",
    "target_kv_allocated_bytes",
    "target_kv_host_bytes",
    "target_kv_window_bytes",
    "target_kv_prefill_bytes",
    "draft_kv_bytes",
    "scratch_bytes",
    "recall_bytes",
    "new_per_round",
    "kept_per_layer",
    "head_map_similarity",
    "phase_seconds",
)


def memory_figures(sequence: Sequence | None) -> dict[str, Any]:
    """Acceptance and bytes of one sequence, null before its first token.

    The target's bytes are those of the fullest round after prefill.
    """
    if sequence is None:
        return dict.fromkeys(MEMORY_FIGURES)
    counters, target, held, oracle = sequence.counters, sequence.target, sequence.held(), sequence.evidence.oracle
    used = counters.max_target_bytes or held["target_kv_bytes"]
    full = counters.full_bytes_then or held["target_kv_bytes_full"]
    return held | {
        "rounds": counters.rounds,
        "drafted_tokens": counters.drafted,
        "drafted_per_round": counters.drafted / counters.rounds if counters.rounds else None,
        "undrafted_rounds": counters.undrafted,
        "accepted_tokens": counters.accepted,
        "acceptance_rate": counters.accepted / counters.drafted if counters.drafted else None,
        "acceptance_length": counters.emitted / counters.rounds if counters.rounds else None,
        "target_kv_bytes": used,
        "target_kv_bytes_full": full,
        "kv_budget_effective": used / max(full, 1),
        "target_kv_prefill_bytes": counters.prefill_bytes or None,
        "recall_bytes": target.recall_bytes,
        "new_per_round": sum(counters.new_entries) / len(counters.new_entries) if counters.new_entries else None,
        "kept_per_layer": target.kept_per_layer(),
        "head_map_similarity": float(oracle.head_map.similarity.mean()) if oracle and oracle.head_map else None,
        "phase_seconds": counters.seconds,
    }
