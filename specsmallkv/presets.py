"""The YAML presets in conf/, the one place for defaults, for callers that do not come through Hydra's command line."""

import importlib
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import ListConfig, OmegaConf

from .config import CONFIG_DIR
from .errors import UserError
from .policies import Policy


def names(group: str) -> list[str]:
    """Options of a configuration group, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def load_policy(name: str, **overrides: Any) -> Policy:
    """The policy preset `conf/policy/<name>.yaml` with fields replaced.

    Raises UserError for an unknown name or field, or a value that the policy refuses.
    """
    if name not in names("policy"):
        raise UserError(f"policy={name} is unknown; choose one of {', '.join(names('policy'))}.")
    preset = OmegaConf.load(CONFIG_DIR / "policy" / f"{name}.yaml")
    if unknown := sorted(set(overrides) - set(preset)):
        raise UserError(f"policy={name} has no field {unknown[0]}; it has {', '.join(str(k) for k in preset)}.")
    return build(OmegaConf.merge(preset, overrides), "policy")


def check_types(node: Any, group: str) -> None:
    """A UserError for the first value whose type is not its field's, where `_target_` is a dataclass."""
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    try:
        module, _, name = node["_target_"].rpartition(".")
        target = getattr(importlib.import_module(module), name)
    except Exception:
        return  # instantiation words this better
    hints = get_type_hints(target) if is_dataclass(target) else {}
    for key, value in node.items():
        kind = hints.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        if kind in kinds and type(value) is not kind:
            raise UserError(f"{group}.{key}={value} is not {kinds[kind]}; give {kinds[kind]}.")
        if str(kind).startswith("list") and (isinstance(value, str) or not isinstance(value, list | ListConfig)):
            raise UserError(f"{group}.{key}={value} is not a list; write [{value}].")


def build(node: Any, group: str) -> Any:
    """The object that a `_target_` node describes; a UserError of its constructor comes out as it went in."""
    try:
        check_types(node, group)
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
