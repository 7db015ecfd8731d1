"""SpecSmallKV: one draft model that speculates and steers the target's KV cache (SmallKV, arXiv 2508.02751)."""

from importlib.metadata import PackageNotFoundError, version

from .errors import UserError
from .generator import Generation, GenerationSettings, SpecSmallKV
from .policies import Policy
from .presets import load_policy
from .sampling import Sampler

try:
    __version__ = version("specsmallkv")
except PackageNotFoundError:  # an uninstalled checkout on the path
    __version__ = "0+unknown"

__all__ = ["Generation", "GenerationSettings", "Policy", "Sampler", "SpecSmallKV", "UserError", "load_policy"]
