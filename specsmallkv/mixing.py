"""A head map's weights times the draft's rows. Few of the weights are not zero; on CPUs a sparse product uses that.

The rows are copied into blocks of columns that stay in a core's cache: as a whole they do not, and no time is saved.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 1024  # of a block
DENSE_SHARE = 0.125  # of weights that are not zero, from which products stay dense; at 0.05 sparse ones took a third


def column_blocks(rows: Tensor) -> Sequence[Tensor]:
    """(M, T, N), contiguous or not, as (M, T * N); on CPUs in contiguous blocks of columns."""
    if rows.device.type != "cpu":
        return [rows.flatten(1)]
    return [block.contiguous() for row in rows.unbind(dim=1) for block in row.split(COLUMNS, dim=1)]


class Mixer:
    """Weights (R, M), to be multiplied many times."""

    def __init__(self, weights: Tensor):
        self.weights = weights
        if weights.device.type == "cpu" and weights.count_nonzero() < DENSE_SHARE * weights.numel():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)
                self.weights = weights.to_sparse_csr()

    def __call__(self, blocks: Sequence[Tensor]) -> Tensor:
        """`column_blocks` of rows (M, T, N) to (R, T * N)."""
        parts = [self.weights @ block for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
