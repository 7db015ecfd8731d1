"""How fast this machine could be: bytes over its copy bandwidth, operations over its matrix rate, both measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..linear import PackedLinear
from .throughput_systems import Run, synchronize

COPIED, ROWS, TIMES = 2**27, 256, 5  # bytes, rows of the product, tries of which the best counts


@dataclass
class Machine:
    """Bytes a second (read and written both count) and operations a second (an addition and a product are two)."""

    copy_bytes_per_second: float
    matmul_operations_per_second: float


@torch.inference_mode()
def measure_machine(model: PreTrainedModel) -> Machine:
    """Of the model's device, at present load; the product is that of its largest layer but for the head."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=model.device)
    copy = torch.empty_like(source)
    layer: Any = max(linear_modules(model.base_model), key=lambda x: x.in_features * x.out_features)
    rows = torch.ones(ROWS, layer.in_features, dtype=model.dtype, device=model.device)
    operations = 2 * ROWS * layer.in_features * layer.out_features
    return Machine(
        2 * COPIED / best_time(lambda: copy.copy_(source), model.device),
        operations / best_time(lambda: layer(rows), model.device),
    )


def best_time(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(TIMES):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def linear_modules(model: nn.Module) -> list[Any]:
    return [x for x in model.modules() if isinstance(x, nn.Linear | PackedLinear)]


def linear_size(model: nn.Module | None) -> tuple[int, int]:
    """Weights of the linear layers and their bytes, all of which a pass reads."""
    if model is None:
        return 0, 0
    counts = [
        (x.in_features * x.out_features, x.read_nbytes if isinstance(x, PackedLinear) else x.weight.nbytes)
        for x in linear_modules(model)
    ]
    return sum(count for count, _ in counts), sum(nbytes for _, nbytes in counts)


def roofline(machine: Machine, run: Run, target: PreTrainedModel, draft: PreTrainedModel | None) -> dict[str, float]:
    """What a repeat moved and computed per token, the speed that allows, and the share of it that was reached."""
    (count, nbytes), (draft_count, draft_bytes) = linear_size(target), linear_size(draft)
    head_count, head_bytes = linear_size(draft.get_output_embeddings() if draft is not None else None)
    moved = run.passes * nbytes + run.target_kv_read + run.steps * draft_bytes - run.headless * head_bytes
    computed = 2 * (run.rows * count + run.draft_rows * (draft_count - head_count) + run.draft_logits * head_count)
    computed += attended(target, run.target_kv_attended)
    computed += 0 if draft is None else attended(draft, run.draft_kv_attended)
    tokens = run.num_tokens
    least = max(
        (moved + run.draft_kv_read) / machine.copy_bytes_per_second, computed / machine.matmul_operations_per_second
    )
    return {
        "bytes_per_token": (moved + run.draft_kv_read) / tokens,
        "operations_per_token": computed / tokens,
        "roofline_tokens_per_second": tokens / least,
        "roofline_share": least / run.seconds,
    }


def attended(model: PreTrainedModel, kv_bytes: int) -> int:
    """Operations of one query per head over so many bytes of K and V."""
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    return 2 * group * kv_bytes // model.dtype.itemsize
