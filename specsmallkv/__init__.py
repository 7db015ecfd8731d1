"""SpecSmallKV: one draft model that speculates and steers the target's KV cache (SmallKV, arXiv 2508.02751)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .generation import Generation, GenerationSettings
    from .generator import SpecSmallKV
    from .policies import Policy
    from .presets import load_policy
    from .sampling import Sampler

__all__ = ["Generation", "GenerationSettings", "Policy", "Sampler", "SpecSmallKV", "UserError", "load_policy"]
HOMES = {
    "Generation": "generation",
    "GenerationSettings": "generation",
    "Policy": "policies",
    "Sampler": "sampling",
    "SpecSmallKV": "generator",
    "UserError": "errors",
    "load_policy": "presets",
}

try:
    __version__ = version("specsmallkv")
except PackageNotFoundError:  # an uninstalled checkout on the path
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """On demand: torch takes seconds to import, and the command line answers a mistake or Ctrl-C before that."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
