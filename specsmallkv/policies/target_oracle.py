"""For analysis: a policy that looks at the very attention which the others are to foresee."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..tiered_layer import Candidates, TieredLayer
from .base import Policy
from .evidence import Evidence


@dataclass(kw_only=True)
class Oracle(Policy):
    """Chooses by the target's own attention of the coming verify block: what a choice can reach, at twice the work.

    removed_from: share of the candidates, the most attended first, behind which removal begins; 1 removes the least
    attended, less asks what the tokens of a middle rank are worth (paper: Fig. 2, marginal tokens).
    """

    residency: str = "offload"
    removed_from: float = 1.0
    reads_target = True
    every_round = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.removed_from <= 1:
            raise UserError(f"policy.removed_from={self.removed_from} is outside [0, 1]; 1 removes the least.")

    def score(self, index: int, layer: TieredLayer, candidates: Candidates, evidence: Evidence) -> Tensor:
        assert evidence.saliency is not None, "saliency is filled before planning"
        attended = evidence.saliency[index].unsqueeze(0).gather(-1, candidates.positions)
        if self.removed_from == 1:
            return attended
        count = attended.shape[-1]
        rank = attended.argsort(dim=-1, descending=True).argsort(dim=-1)  # 0 is the most attended
        return torch.where(rank < self.removed_from * count, 2 * count - rank, rank).float()
