"""A second device without the hardware: tensors that say they lie on another device and live in the CPU's memory.

As with a real one, an operation whose tensors lie on different devices fails; only `.to`, `copy_` and numbers (tensors
without dimensions) cross over. So a model whose layers are spread can be run on any machine.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

ATEN = torch.ops.aten
CROSSING = (ATEN._to_copy.default, ATEN.copy_.default)
AWAY = torch.device("ipu", 1)


class Away(torch.Tensor):
    """inner: the same tensor on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Away":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @property
    def device(self) -> torch.device:  # the real one must be a device that torch's own guards know
        return AWAY

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Within it, `ipu:1` exists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    away = {isinstance(x, Away) for x in tensors if x.dim() or isinstance(x, Away)}
    if func not in CROSSING and len(away) > 1:
        raise RuntimeError(f"{func} mixes devices: {[tuple(x.shape) for x in tensors]}")
    goes_away = isinstance(args[0], Away) if func is ATEN.copy_.default else True in away
    if kwargs.get("device") is not None:
        goes_away = torch.device(kwargs["device"]) == AWAY
        kwargs = {**kwargs, "device": "cpu"}
    known = {id(x.inner): x for x in tensors if isinstance(x, Away)}
    out = func(*inner(args), **inner(kwargs))
    if not goes_away:
        return out
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else Away(x), out)


def inner(tree: Any) -> Any:
    return tree_map_only(Away, lambda x: x.inner, tree)
