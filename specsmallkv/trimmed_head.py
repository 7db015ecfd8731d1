"""A language-model head for some of the vocabulary: for small models the head is most of what a draft step costs.

Tokens without a row get logit -inf, hence draft probability 0: they are never proposed, and the target may still emit
them, so decoding stays lossless (speculation.py). A head cut down at load time keeps its other rows where no step
reads them, and each sequence adds those of the tokens that it holds: what a frequency rank misses (FR-Spec, arXiv
2502.14856) is mostly names and numbers that the draft copies.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PRIOR_SHARE, PRIOR_RANK = 0.2, 1000  # weight of the prior beside one kind of texts; ids below about so many are alike
IDS_KEY = "head_token_ids"  # beside the weights of a draft whose head is trimmed


class TrimmedHead(nn.Module):
    """weight (S, d): rows of a full head; head_token_ids (S,): whose rows they are.

    full (V, d): that head's weight, if sequences may add their own tokens' rows, else None.
    """

    head_token_ids: Tensor

    def __init__(self, full: nn.Parameter, token_ids: Tensor, keep_full: bool = False):
        super().__init__()
        self.full = full if keep_full else None
        self.known_ids = frozenset(token_ids.tolist()) if keep_full and not token_ids.is_meta else frozenset()
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


class ContextTokens:
    """Tokens that one sequence holds and a trimmed head lacks, and their rows of the full one: (E,) and (E, d)."""

    def __init__(self, head: TrimmedHead):
        assert head.full is not None, "the head keeps no other rows"
        self.head, self.full = head, head.full
        self.added, self.count, self.last = set[int](), 0, -1
        self.ids = head.head_token_ids[:0]
        self.rows = self._rows_of(self.ids)

    def follow(self, tokens: list[int]) -> None:
        """`tokens` are what the sequence holds by now, those of the last call first unless it went back."""
        if len(tokens) < self.count or (self.count and tokens[self.count - 1] != self.last):
            self.added, self.count = set(), 0
            self.ids, self.rows = self.ids[:0], self.rows[:0]
        new = [token for token in dict.fromkeys(tokens[self.count :]) if not self._knows(token)]
        self.count, self.last = len(tokens), tokens[-1]
        if new:
            self.added.update(new)
            ids = torch.tensor(new, device=self.ids.device)
            self.ids, self.rows = torch.cat((self.ids, ids)), torch.cat((self.rows, self._rows_of(ids)))

    def complete(self, logits: Tensor, hidden: Tensor) -> None:
        """Write these tokens' logits among those (V,) of the trimmed head, for the same hidden state (d,)."""
        own = self.rows @ hidden.to(self.rows.dtype)
        logits[self.ids] = own.to(self.full.dtype).to(logits.dtype)  # rounded as the head's own are

    def _knows(self, token: int) -> bool:
        return token >= self.head.vocab_size or token in self.head.known_ids or token in self.added

    def _rows_of(self, ids: Tensor) -> Tensor:
        rows = self.full[ids]
        return rows.float() if rows.device.type == "cpu" else rows  # whose products are many times faster

    @property
    def nbytes(self) -> int:
        """Scratch on the device."""
        return self.rows.nbytes


def context_tokens(model: PreTrainedModel | None) -> ContextTokens | None:
    """For a new sequence; None where the model's head has all rows, or no others, or only shapes (`task=plan`)."""
    head = model.get_output_embeddings() if model is not None else None
    if not isinstance(head, TrimmedHead) or head.full is None or head.full.is_meta:
        return None
    return ContextTokens(head)


def context_logits(
    model: PreTrainedModel, hidden: Tensor, contexts: list[ContextTokens], held: list[list[int]]
) -> Tensor:
    """Float32 logits (n, V) of hidden states (n, d), each of another sequence; held: the tokens of each by now."""
    logits = model.get_output_embeddings()(hidden.to(model.dtype)).float()
    for own, state, context, tokens in zip(logits, hidden, contexts, held, strict=True):
        context.follow(tokens)
        context.complete(own, state)
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma2
    return logits if cap is None else torch.where(logits == -torch.inf, logits, cap * torch.tanh(logits / cap))


def whole_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head that was cut, for those who know no context (transformers' own generation); None: none was."""
    head = model.get_output_embeddings()
    if not isinstance(head, TrimmedHead) or head.full is None:
        return None
    whole = nn.Linear(head.full.shape[1], head.vocab_size, bias=False, device="meta")
    whole.weight = head.full
    return whole


def trim_head(model: PreTrainedModel, token_ids: Tensor, keep_full: bool = False) -> None:
    """Let the model propose `token_ids` (S,) only; keep_full: and those that a sequence holds."""
    model.set_output_embeddings(TrimmedHead(model.get_output_embeddings().weight, token_ids, keep_full))


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
