"""Several policies at several budgets in one run: the grid that `task.policies` and `task.kv_budgets` span."""

from dataclasses import replace

from ..policies import Policy
from ..presets import load_policy
from ..presets import names as preset_names

SHARED_FIELDS = ("num_sink_tokens", "window_size", "evict_block")


def policy_grid(chosen: Policy, names: list[str], kv_budgets: list[float]) -> list[Policy]:
    """Every named preset at every budget; the run's own policy keeps its settings.

    SHARED_FIELDS that were changed from that policy's preset apply to all; otherwise each preset brings its own.
    """
    preset = load_policy(chosen.name) if chosen.name in preset_names("policy") else None
    values = {key: getattr(chosen, key) for key in SHARED_FIELDS}
    shared = {key: value for key, value in values.items() if preset is None or value != getattr(preset, key)}

    def policy(name: str, kv_budget: float) -> Policy:
        if name == chosen.name:
            return replace(chosen, kv_budget=kv_budget)
        return load_policy(name, kv_budget=kv_budget, **shared)

    return [policy(name, kv_budget) for name in names for kv_budget in kv_budgets]


def neediest(policies: list[Policy]) -> Policy:
    """The policy whose prefill leaves what all of them need: the draft's rows if any reads them, and a window."""
    return min(policies, key=lambda policy: (not policy.reads_draft, -policy.num_observed, policy.kv_budget))
