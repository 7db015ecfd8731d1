"""Which 16-bit types a CPU multiplies; others torch multiplies several times more slowly."""

from functools import cache
from typing import Any

import torch


@cache
def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether oneDNN accepts such matrices here and, as far as torch tells of it, an x86 has instructions for them."""
    if dtype.itemsize > 2:
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    accepts = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    if accepts is not None and not accepts():
        return False
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told.get("architecture") != "x86_64" or bool(told.get(f"avx512_{name}") or told.get(f"amx_{name}"))
