"""A language-model head for some of the vocabulary: for small models the head is most of what a draft step costs.

Tokens without a row get logit -inf, hence draft probability 0: they are never proposed, and the target may still emit
them, so decoding stays lossless (speculation.py).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PRIOR_SHARE, PRIOR_RANK = 0.2, 1000  # weight of the prior beside one kind of texts; ids below about so many are alike
IDS_KEY = "head_token_ids"  # beside the weights of a draft whose head is trimmed


class TrimmedHead(nn.Module):
    """weight (S, d): rows of a full head; head_token_ids (S,): whose rows they are."""

    head_token_ids: Tensor

    def __init__(self, full: Tensor, token_ids: Tensor):
        super().__init__()
        self.vocab_size = len(full)
        self.register_buffer(IDS_KEY, token_ids.to(full.device, torch.long), persistent=False)
        self.known = nn.Linear(
            full.shape[1], len(token_ids), bias=False, device="meta"
        )  # a layer, so that it can be packed
        self.known.weight = nn.Parameter(full.detach()[self.head_token_ids].clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.known.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., vocab_size)"""
        known = self.known(hidden)
        logits = known.new_full((*known.shape[:-1], self.vocab_size), -torch.inf)
        return logits.index_copy_(-1, self.head_token_ids, known)


def trim_head(model: PreTrainedModel, token_ids: Tensor) -> None:
    """Let the model propose `token_ids` (S,) only."""
    model.set_output_embeddings(TrimmedHead(model.get_output_embeddings().weight, token_ids))


def frequent_tokens(kinds: list[list[list[int]]], count: int, vocab_size: int, always: set[int]) -> Tensor:
    """(count,) sorted ids: `always`, then the most frequent ones of several kinds of texts, which weigh alike.

    BPE numbers its tokens in the order in which it merged them, the common ones first: a prior that falls with the id
    ranks what the texts hold rarely or never.
    """
    prior = 1 / (torch.arange(vocab_size, dtype=torch.double) + PRIOR_RANK)
    share = PRIOR_SHARE * prior / prior.sum()
    for texts in kinds:
        seen = torch.zeros(vocab_size, dtype=torch.double)
        for ids in texts:
            seen += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab_size)
        share += seen / seen.sum().clamp_min(1)
    share[list(always)] = torch.inf
    return share.argsort(descending=True, stable=True)[:count].sort().values
