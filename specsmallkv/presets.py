"""The YAML presets in conf/, the one place for defaults, for callers that do not come through Hydra's command line."""

import importlib
import inspect
import math
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import ListConfig, OmegaConf

from .config import CONFIG_DIR, option
from .errors import UserError
from .policies import Policy

GROUPS = {"policy": "subclass of specsmallkv.Policy", "task": "class with a run(config) method"}


def names(group: str) -> list[str]:
    """Options of a configuration group, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def load_policy(name: str, **overrides: Any) -> Policy:
    """The policy preset `conf/policy/<name>.yaml` with fields replaced.

    Raises UserError for an unknown name or field, or a value that the policy refuses.
    """
    preset = _load("policy", name)
    if unknown := sorted(set(overrides) - set(preset)):
        raise UserError(f"policy={name} has no field {unknown[0]}; it has {', '.join(str(k) for k in preset)}.")
    return build(OmegaConf.merge(preset, overrides), "policy")


def load_model_settings(name: str) -> dict[str, Any]:
    """What `conf/model/<name>.yaml` says of a pair, but for its name. Raises UserError for an unknown name."""
    return {str(key): value for key, value in _load("model", name).items() if key != "name"}


def _load(group: str, name: str) -> Any:
    if name not in names(group):
        raise UserError(f"{group}={name} is unknown; choose one of {', '.join(names(group))}.")
    return option(CONFIG_DIR / group / f"{name}.yaml")


def target_class(node: Any, group: str) -> type | None:
    """The class that `_target_` names, fit for its group; None if it cannot be imported, which Hydra words."""
    path = node.get("_target_")
    if not isinstance(path, str) or "." not in path:
        raise UserError(f"{group}._target_={path} names no class; give it as module.Class.")
    if extra := [key for key in node if str(key).startswith("_") and key != "_target_"]:
        raise UserError(f"{group}.{extra[0]} is Hydra's own and has no use here; leave it out.")
    module, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except Exception:
        return None
    if not isinstance(target, type):
        raise UserError(f"{group}._target_={path} is a {type(target).__name__}, not a class; name a {GROUPS[group]}.")
    fits = issubclass(target, Policy) if group == "policy" else callable(getattr(target, "run", None))
    if not fits:
        raise UserError(f"{group}._target_={path} is no {group}; name a {GROUPS[group]}.")
    if inspect.isabstract(target):
        lacking = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
        raise UserError(f"{group}._target_={path} leaves {lacking} undefined; name a class that defines it.")
    return target


def check_types(target: type | None, node: Any, group: str) -> None:
    """A UserError for the first value whose type is not its field's, where the target is a dataclass."""
    hints = get_type_hints(target) if is_dataclass(target) else {}
    for key, value in node.items():
        kind: Any = hints.get(key)
        optional, setting = type(None) in get_args(kind), f"{group}.{key}={value}"
        if optional:
            kind = next(iter(others)) if len(others := set(get_args(kind)) - {type(None)}) == 1 else Any
        if optional and value is None:
            continue
        if get_origin(kind) is list:
            if not isinstance(value, list | ListConfig):
                raise UserError(f"{setting} is not a list; write [{value}].")
            (kind,) = get_args(kind)
            if strange := [x for x in value if not _is_a(kind, x)]:
                raise UserError(f"{setting}: {strange[0]} is not {KINDS[kind]}; give {KINDS[kind]}{_quoted(kind)}.")
        elif not _is_a(kind, value):
            null = ", or null" if optional else ""
            raise UserError(f"{setting} is not {KINDS[kind]}; give {KINDS[kind]}{_quoted(kind)}{null}.")


def with_infinities(target: type | None, node: Any) -> Any:
    """`inf` and `.inf` as the numbers that they are: a command line and YAML know one of the two each."""
    hints = get_type_hints(target) if is_dataclass(target) else {}
    infinite = {key: math.inf for key, value in node.items() if hints.get(key) is float and value in INFINITE}
    return OmegaConf.merge(node, infinite)


INFINITE = ("inf", ".inf")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _is_a(kind: Any, value: Any) -> bool:
    """Of the kinds above; whatever else a field may hold is its owner's to check."""
    if kind is float:
        return type(value) in (int, float)
    return kind not in KINDS or type(value) is kind


def _quoted(kind: Any) -> str:
    return " in quotes" if kind is str else ""


def build(node: Any, group: str) -> Any:
    """The object that a `_target_` node describes; a UserError of its constructor comes out as it went in."""
    try:
        target = target_class(node, group)
        node = with_infinities(target, node)
        check_types(target, node, group)
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
