"""Which drafted tokens the target accepts: greedy match, or rejection sampling that leaves its distribution exact.

Rejection sampling after Leviathan et al. (arXiv 2211.17192): a draft d is accepted with probability
min(1, p(d) / q(d)); the first rejection is replaced by a draw from max(p - q, 0), renormalised.
Tensors of one sequence: logits (k + 1, V), draft distributions k x (V,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import Sampler, draw


def match_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Draft logits (..., V_d) in the target's vocabulary: padding ids get zero probability, extra ids are cut."""
    missing = vocab_size - logits.shape[-1]
    return F.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[..., :vocab_size]


def propose(logits: Tensor, sampler: Sampler, generator: torch.Generator) -> tuple[int, Tensor | None]:
    """One token from logits (V,) and the distribution it was drawn from (None if greedy)."""
    if sampler.greedy:
        return int(logits.argmax()), None
    probabilities = sampler.probabilities(logits)
    return draw(probabilities, generator), probabilities


def accept(
    drafts: list[int],
    draft_probabilities: list[Tensor | None],
    logits: Tensor,
    sampler: Sampler,
    generator: torch.Generator,
) -> tuple[int, int]:
    """Number of accepted drafts and the token that follows them (correction, or bonus if all were accepted)."""
    if sampler.greedy:
        return accept_greedy(drafts, logits)
    return accept_sampled(drafts, draft_probabilities, sampler.probabilities(logits), generator)


def accept_greedy(drafts: list[int], logits: Tensor) -> tuple[int, int]:
    choices = logits.argmax(dim=-1).tolist()
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return accepted, choices[accepted]


def accept_sampled(
    drafts: list[int], draft_probabilities: list[Tensor | None], target: Tensor, generator: torch.Generator
) -> tuple[int, int]:
    """target: (k + 1, V) warped distributions of the verify pass."""
    for i, (token, q) in enumerate(zip(drafts, draft_probabilities, strict=True)):
        assert q is not None, "a sampled draft carries its distribution"
        p, coin = target[i], torch.rand((), generator=generator, device=target.device)
        if coin * q[token] >= p[token]:
            residual = (p - q).clamp_(min=0)
            return i, draw(residual if residual.sum() > 0 else p, generator)
    return len(drafts), draw(target[len(drafts)], generator)
