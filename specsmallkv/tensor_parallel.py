"""A target whose heads several processes share, started by torchrun, with the whole draft in each of them.

A process holds, of every layer, some KV heads and the query heads of their groups (transformers' tensor parallel
plan). Rows, head map, tiers and plans are those of its own heads, so nothing of a cache ever travels. Logits come out
alike in all processes; tokens are the first one's, and whether the draft is trusted follows from the mean of all.

    torchrun --nproc-per-node 2 -m specsmallkv.run +model=qwen2-72b model.device=tensor_parallel
"""

import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from .errors import UserError
from .matching import HeadMap

if TYPE_CHECKING:
    from .config import RunConfig
    from .policies import Policy

DEVICE = "tensor_parallel"  # the value of model.device


@dataclass(frozen=True)
class Shard:
    """This process's part of the target: the rank-th of `size`."""

    rank: int = 0
    size: int = 1

    def heads(self, count: int) -> int:
        """Of `count` heads of the whole target, how many are here."""
        return count // self.size

    def own(self, head_map: HeadMap | None) -> HeadMap | None:
        """A saved map's part for the query heads that are here."""
        if head_map is None or self.size == 1:
            return head_map
        parts: dict[str, Tensor] = {}
        for item in fields(head_map):
            value = getattr(head_map, item.name)
            if isinstance(value, Tensor):
                parts[item.name] = value.chunk(self.size, dim=1)[self.rank].contiguous()
        return replace(head_map, **parts)  # type: ignore[arg-type]

    def mean(self, value: float) -> float:
        """Mean of all processes' values."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total) / self.size

    def check(self, policy: "Policy", controller: Any) -> None:
        """UserError for a policy or controller that decides by what only one process sees."""
        if policy.reads_target:
            self.check_alone(f"policy={policy.name}")
        if controller is not None and controller.measures:
            self.check_alone("speculation=adaptive")

    def check_alone(self, what: str) -> None:
        if self.size > 1:
            raise UserError(f"{what} does not work with model.device={DEVICE}; leave it out, or use one process.")

    def first(self, numbers: list[int]) -> list[int]:
        """The first process's numbers; all have as many."""
        if self.size == 1 or not numbers:
            return numbers
        told = torch.tensor(numbers, device=_device())
        dist.broadcast(told, 0)
        return told.tolist()


def shard_of(model: Any) -> Shard:
    """Which part of the model this process holds; all of it unless it was split."""
    return getattr(model, "specsmallkv_shard", Shard())


def mark(model: Any) -> None:
    """Note on a model that was just loaded with a tensor parallel plan which part of it is here."""
    model.specsmallkv_shard = Shard(dist.get_rank(), dist.get_world_size())


def plan() -> dict[str, Any]:
    """Arguments of `from_pretrained`. Raises UserError if this transformers splits models in another way."""
    try:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except TypeError:
        raise UserError(
            f"model.device={DEVICE} needs transformers 5.18 or newer, not {transformers.__version__}; upgrade it, or "
            "use model.device=auto."
        ) from None


def whole(weight: Tensor) -> Tensor:
    """A weight that may be split, as one tensor; all processes have to ask."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local(weight: Tensor) -> Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def check_heads(num_kv_heads: int, source: str) -> None:
    """UserError if the KV heads cannot be shared out evenly."""
    if num_kv_heads % num_processes():
        raise UserError(
            f"{source} has {num_kv_heads} KV heads, which {num_processes()} processes cannot share evenly; start as "
            "many processes as divide it."
        )


def num_processes() -> int:
    """As torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The one of this process. Raises UserError if there is no other process, or no GPU for this one."""
    if num_processes() < 2:
        raise UserError(
            f"model.device={DEVICE} splits the target over processes, and there is one; start "
            "`torchrun --nproc-per-node 2 -m specsmallkv.run ...`, or use model.device=auto."
        )
    count = torch.cuda.device_count()
    if count and _local_rank() >= count:
        raise UserError(
            f"torchrun started more processes on this machine than its {count} GPUs; start one for each GPU at most."
        )
    return _device()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _device() -> torch.device:
    return torch.device("cuda", _local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def check_run(config: "RunConfig", task: str, is_sweep: bool) -> None:
    """UserError for what several processes cannot do together, or several started by mistake."""
    device = config.model.device
    if device != DEVICE:
        if num_processes() > 1:
            raise UserError(
                f"torchrun started {num_processes()} processes that would all do the same with model.device={device}; "
                f"use model.device={DEVICE}, or start one."
            )
        return
    for refused, what, remedy in (
        (task != "generate", f"task={task}", "task=generate"),
        (is_sweep, "A sweep (-m)", "a run for each point"),
        (config.report or config.trace, "report=true or trace=true", "a run in one process"),
    ):
        if refused:
            raise UserError(f"{what} does not work with model.device={DEVICE}; use {remedy}.")


def finish() -> None:
    """Leave the other processes in peace."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
