"""Policies: which tokens of the target's cache stay critical, become marginal, or go.

To add one: a class with `score`, a YAML in conf/policy, a row in tests/test_policies.py. These names are public: the
`_target_` of a preset is `specsmallkv.policies.NAME`, whichever file the class lies in, and saved records hold it.
"""

from .base import Plan, Policy, TierSizes
from .draft import DraftPolicy, SmallKV
from .evidence import Evidence
from .lookahead import Lookahead
from .static import H2O, FullCache, PyramidKV, SnapKV, StreamingLLM
from .target_oracle import Oracle

__all__ = [
    "H2O",
    "DraftPolicy",
    "Evidence",
    "FullCache",
    "Lookahead",
    "Oracle",
    "Plan",
    "Policy",
    "PyramidKV",
    "SmallKV",
    "SnapKV",
    "StreamingLLM",
    "TierSizes",
]
