"""The YAML presets in conf/, the one place for defaults, for callers that do not come through Hydra's command line."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

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
    return build(OmegaConf.merge(preset, overrides))


def build(node: Any) -> Any:
    """The object that a `_target_` node describes; a UserError of its constructor comes out as it went in."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
