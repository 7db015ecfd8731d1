"""The target's own last attention, blended into what the draft predicts (after Dustin, arXiv 2606.24957).

It knows the resident tokens only, and not the coming ones' queries. But what one verify block needed the next often
needs too, so entries stay that the draft's rows alone would swap out and in again.
"""

from dataclasses import dataclass, field

from torch import Tensor

from .backends import attention_probabilities
from .matching import over_groups
from .tiered_layer import TieredLayer


@dataclass
class LastQueries:
    """What the last verify pass asked: per layer under the budget its queries (1, H_q, q, D), the first at `start`."""

    queries: dict[int, Tensor] = field(default_factory=dict)
    start: int = 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.queries.values())

    def remain(self, seen: int) -> bool:
        """Whether any was not rolled back, of a sequence of `seen` tokens."""
        return bool(self.queries) and seen > self.start

    def saliency(self, index: int, layer: TieredLayer, scaling: float, reduction: str) -> Tensor:
        """(H_kv, num_slots): mean over those that were not rolled back, of layer `index`."""
        queries = self.queries[index][:, :, : layer.seen - self.start]
        rows = attention_probabilities(queries, layer.keys, scaling).mean(dim=2)
        return over_groups(rows, layer.k.shape[1], reduction)[0]


def blended(
    saliency: Tensor, last: LastQueries, layers: list[TieredLayer], share: float, scaling: float, reduction: str
) -> Tensor:
    """(1 - share) times the draft's `saliency` (L, H_kv, N) plus share times the target's own, 0 if not resident."""
    if not last.remain(layers[0].seen):
        return saliency
    mixed = saliency * (1 - share)
    for index in last.queries:
        layer, own = layers[index], last.saliency(index, layers[index], scaling, reduction)
        mixed[index].scatter_add_(1, layer.positions[0].to(mixed.device), own.to(mixed.device) * share)
    return mixed
