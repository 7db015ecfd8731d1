"""Several policies at several budgets in one run: the grid that `task.policies` and `task.kv_budgets` span.

An entry of `task.policies` is a preset's name, or a variant of it: `smallkv:marginal_share=0,compensation=none`. The
entry's text is then the policy's name in the record.
"""

from dataclasses import fields, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ..errors import UserError
from ..policies import Policy
from ..presets import build, load_policy, names

SHARED_FIELDS = ("num_sink_tokens", "window_size", "evict_block")


def policy_grid(chosen: Policy, entries: list[str], kv_budgets: list[float]) -> list[Policy]:
    """Every entry at every budget, none twice: the full cache has one budget.

    Entries of the run's own policy keep its settings, others are their preset's; what the user changed of
    SHARED_FIELDS applies to all.
    """
    shared, policies = changed(chosen), {}
    for entry in entries:
        for kv_budget in kv_budgets:
            policy = _policy(chosen, entry, shared, kv_budget)
            policies[policy.name, policy.kv_budget] = policy
    return list(policies.values())


def changed(chosen: Policy) -> dict[str, Any]:
    """Those of SHARED_FIELDS that differ from the policy's preset, or for a policy without one from its class."""
    preset = load_policy(chosen.name) if chosen.name in names("policy") else type(chosen)
    return {key: getattr(chosen, key) for key in SHARED_FIELDS if getattr(chosen, key) != getattr(preset, key)}


def _policy(chosen: Policy, entry: str, shared: dict[str, Any], kv_budget: float) -> Policy:
    name, own = parse_entry(entry)
    if name != chosen.name:
        policy = load_policy(name, **shared | own, kv_budget=kv_budget)
    elif own:
        policy = variant(chosen, own | {"kv_budget": kv_budget})
    else:
        policy = replace(chosen, kv_budget=kv_budget)
    return replace(policy, name=entry) if own else policy


def variant(policy: Policy, overrides: dict[str, Any]) -> Policy:
    """The policy with other values; a UserError for a field that it does not have, or a value that it refuses."""
    settings = {item.name: getattr(policy, item.name) for item in fields(policy)}
    if unknown := sorted(set(overrides) - set(settings)):
        raise UserError(f"policy={policy.name} has no field {unknown[0]}; it has {', '.join(settings)}.")
    kind = type(policy)
    node = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings, **overrides}
    return build(OmegaConf.create(node), "policy")


def parse_entry(entry: str) -> tuple[str, dict[str, Any]]:
    """An entry's preset and overrides; values are YAML."""
    name, _, text = entry.partition(":")
    settings = text.split(",") if text else []
    remedy = "write it as NAME:KEY=VALUE,KEY=VALUE, e.g. smallkv:marginal_share=0"
    if any(not setting.partition("=")[0].strip() or "=" not in setting for setting in settings):
        raise UserError(f"task.policies={entry} is not a policy with settings; {remedy}.")
    try:
        own: Any = OmegaConf.to_container(OmegaConf.from_dotlist([s.strip() for s in settings]), resolve=True)
    except (OmegaConfBaseException, YAMLError):
        raise UserError(f"task.policies={entry} has a value that is not YAML; {remedy}.") from None
    if fixed := sorted({"kv_budget", "name", "_target_"} & set(own)):
        raise UserError(f"task.policies={entry} sets {fixed[0]}; leave it out, budgets are those of task.kv_budgets.")
    return name, own


def neediest(policies: list[Policy]) -> Policy:
    """A policy whose prefill leaves what all need: the draft's rows if any reads them, and the widest window."""
    policy = min(policies, key=lambda policy: (not policy.reads_draft, policy.kv_budget, -policy.num_observed))
    field = "observation_size" if hasattr(policy, "observation_size") else "window_size"
    widest: dict[str, Any] = {field: max(policy.num_observed for policy in policies)}
    if policy.prefill_chunk:  # those that evict while they read read for themselves
        widest["prefill_chunk"] = 0
    return replace(policy, **widest)
