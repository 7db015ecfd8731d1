"""The largest of many scores. On CPUs numpy selects with vector instructions, torch one row per thread.

numpy finds the least of them by their values alone, which is faster than moving positions along; a scan
for what is not below it gives positions in order. Where scores are equal there that may be too many.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# From so many on torch should be as fast: one takes 4.9 ms for 401 of 4,088 scores in 90 rows, numpy 1.4.
TORCH_THREADS = 4


def largest(scores: Tensor, count: int) -> Tensor:
    """(..., count) indices of the largest scores (..., n), sorted by index; n >= count."""
    on_cpu = scores.device.type == "cpu" and scores.dtype == torch.float32
    if not count or not on_cpu or torch.get_num_threads() >= TORCH_THREADS:
        return scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    rows = scores.detach().numpy().reshape(-1, scores.shape[-1])
    return torch.from_numpy(_largest(rows, count).reshape(*scores.shape[:-1], count))


def _largest(rows: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    rest = rows.shape[1] - count
    least = np.partition(rows, rest, axis=1)[:, rest : rest + 1]
    places = np.flatnonzero(~(rows < least))  # of what is no number, too: it ranks highest
    if len(places) == len(rows) * count:  # every row has at least as many, so none has more
        return places.reshape(-1, count) - np.arange(0, rows.size, rows.shape[1])[:, None]
    return np.sort(np.argpartition(rows, rest, axis=1)[:, rest:], axis=1)
