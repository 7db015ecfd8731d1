"""A later turn of known tokens: what follows `compress_after`, or the next turn of a conversation.

It is read through the compressed cache, in blocks that are verify passes whose drafts are known to be right.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from .drafting import catch_up
from .sequence import Sequence

if TYPE_CHECKING:
    from .decode import Decoder

TURN_CHUNK = 32  # known tokens that static policies read at a time; bounds the draft's rows, not the result
TURN_BLOCK = 4  # least number of known tokens that share one set; a pass each would cost as much as decoding them


def extend(decoder: "Decoder", sequence: Sequence, tokens: list[int]) -> Tensor:
    """Read further known tokens, at least one, through the compressed cache: logits (V,) of the last one.

    A block of known tokens is a verify pass that accepts everything: the draft reads it first and its rows steer
    the target. Static policies evict at the same lengths, so for them the cuts between blocks change nothing.
    """
    decoder.settle(sequence)
    catch_up(decoder, sequence)
    with sequence.counters.timed("extend"):
        if not decoder.policy.evicts:
            return _extend_full(decoder, sequence, tokens)
        oracle = sequence.evidence.oracle
        own = oracle.block if oracle else None
        if oracle:  # rows of a turn are scratch for that turn alone
            oracle.block = decoder.new_rows(most_at_once(decoder), len(sequence.tokens) + len(tokens))
        while tokens:
            count = decoder.turn_size(sequence)
            logits = _extend_block(decoder, sequence, tokens[:count])
            tokens = tokens[count:]
        if oracle and own:
            oracle.block = own
    return logits


def most_at_once(decoder: "Decoder") -> int:
    """Most known tokens in one pass: as many as share one set, or for static policies a chunk."""
    lookahead = max(decoder.num_draft_tokens + 1, TURN_BLOCK)
    return lookahead if decoder.policy.every_round else min(TURN_CHUNK, decoder.policy.evict_block)


def _extend_full(decoder: "Decoder", sequence: Sequence, tokens: list[int]) -> Tensor:
    sequence.tokens += tokens
    if sequence.draft is not None and decoder.draft_model is not None:
        decoder.feed(decoder.draft_model, sequence.draft, sequence.tokens[sequence.draft.seen :])
    return decoder.feed(decoder.target, sequence.target, tokens)


def _extend_block(decoder: "Decoder", sequence: Sequence, block: list[int]) -> Tensor:
    """One round whose drafts are known to be right; logits (V,) of its last token."""
    sequence.decision = None
    sequence.tokens.append(block[0])
    decoder.read(sequence, block[1:])
    decoder.plan(sequence, block[1:])
    logits = decoder.verify(sequence, block[1:])[-1]
    sequence.tokens += block[1:]
    decoder.rollback(sequence, 0)
    decoder.evict(sequence)
    return logits
