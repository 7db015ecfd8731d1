"""From logits to the distribution that is sampled: temperature, top-k, top-p, in transformers' order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Sampler:
    """temperature 0 is greedy; top_k 0 and top_p 1 are off. The draft is warped by the same rules as the target.

    Raises UserError for values outside their range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} is not allowed; give 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not a probability; give a number above 0 and up to 1 (off).")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is negative; give 0 (off) or a positive count.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Warped float32 distribution over the last dimension of `logits` (..., V); not for greedy."""
        # float64 and a maximum of 0: a temperature near 0 then tends to greedy instead of overflowing
        logits = logits.double()
        logits = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).float()
        if 0 < self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(dim=-1) - ordered >= self.top_p  # the most probable one always stays
            probabilities = probabilities.masked_fill(outside.scatter(-1, index, outside), 0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """One token id from a distribution (V,)."""
    return int(torch.multinomial(probabilities, 1, generator=generator))
