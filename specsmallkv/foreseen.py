"""Foreseen tokens: what the draft would say behind the prompt tells which of its tokens will be looked at.

The idea of arXiv 2506.08373; policies ask for it with `num_foreseen_tokens`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import AttentionCall
from .cache import TieredCache
from .sequence import Sequence

if TYPE_CHECKING:
    from .decode import Decoder


def foresee(decoder: "Decoder", sequence: Sequence) -> None:
    """The draft writes some tokens behind the prompt and forgets them; their rows count as accepted ones.

    They follow from the prompt alone, so that what is kept does not depend on speculation.
    """
    oracle, draft, count = sequence.evidence.oracle, sequence.draft, decoder.policy.num_foreseen_tokens
    if oracle is None or oracle.head_map is None or draft is None or not count:
        return
    foreseen = sequence.evidence.foreseen
    if count not in foreseen:
        foreseen[count] = _foreseen_rows(decoder, draft, sequence, count)
    oracle.add(foreseen[count], count)


def _foreseen_rows(decoder: "Decoder", draft: TieredCache, sequence: Sequence, count: int) -> Tensor:
    """Sum (M, N) of the draft's rows for `count` tokens from the last one it read on."""
    seen, rows = draft.seen, decoder.new_rows(1, draft.seen + count)
    token, held = sequence.tokens[seen - 1], sequence.tokens[:seen]
    total = torch.zeros_like(rows.buffer[:, 0, :seen])
    draft.grow(seen + count)
    draft.rollback(1)
    for _ in range(count):
        rows.start(draft.seen, 1)
        call = AttentionCall(decoder.attention, rows=rows)
        logits = decoder.draft_step(draft, [token], call, sequence.context_tokens, held)
        total += rows.buffer[:, 0, :seen]
        (token,) = decoder.shard.first([int(logits.argmax())])
    draft.rollback(draft.seen - seen)
    return total
