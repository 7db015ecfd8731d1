"""What a drafting step reads: the draft's whole cache or a view of it, with or without its rows for the oracle.

A round's drafting is `begin`, then for each step `step_call` and behind the first one `view_rest`; where `lacks_rows`
says so, one more pass over `unread`. `decode.py` and `batch.py` run the steps. A draft that waited has `catch_up`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import AttentionCall, AttentionRows
from .draft_view import DraftView, is_viewed
from .oracle import AttentionOracle
from .passes import PREFILL_CHUNK
from .prefill import summed_rows
from .recall import AHEAD_SHARE, recall_ahead
from .trimmed_head import context_logits

if TYPE_CHECKING:
    from .decode import Decoder
    from .sequence import Sequence


def begin(decoder: "Decoder", sequence: "Sequence") -> int:
    """How many drafts this round takes."""
    if sequence.decision is not None and sequence.decision.catches_up:
        catch_up(decoder, sequence)
    count, oracle = _num_drafts(decoder, sequence), sequence.reading
    sequence.reread = False
    if oracle is not None:
        oracle.block.start(sequence.target.seen, count + 1, known=False)
        if oracle.num_rows > 1:
            _begin_view(decoder, sequence, oracle, count)
    elif _has_view(decoder, sequence, count - 1):
        sequence.last_row = sequence.last_row or _last_row(decoder, sequence)
        sequence.last_row.start(len(sequence.tokens) - 1, 1)
    return count


def _num_drafts(decoder: "Decoder", sequence: "Sequence") -> int:
    """Drafts are cut at the token limit and at the next eviction event (a verify pass must not see past it)."""
    wanted = decoder.num_draft_tokens if sequence.decision is None else sequence.decision.num_draft_tokens
    count = min(wanted, sequence.limit - len(sequence.tokens) - 1)
    if decoder.policy.evicts:
        block, seen = decoder.policy.evict_block, sequence.target.seen
        count = min(count, block - seen % block - 1)
    return count


def step_call(decoder: "Decoder", sequence: "Sequence", num_tokens: int) -> AttentionCall:
    """How a drafting step over so many tokens attends; what it has to read for that is counted."""
    oracle, view, draft = sequence.reading, sequence.view, sequence.draft
    assert draft is not None
    if view is not None and view.start is not None:
        sequence.counters.see_draft(view.shown_nbytes, num_tokens)
        return AttentionCall(decoder.attention, view=view)
    sequence.counters.see_draft(draft.held_nbytes, num_tokens)
    if oracle is not None and draft.seen >= sequence.target.seen + oracle.num_rows:
        return AttentionCall(decoder.attention)
    return AttentionCall(decoder.attention, rows=oracle.block if oracle else sequence.watched_row)


def step_group(
    decoder: "Decoder", sequences: list["Sequence"], tokens: list[list[int]], logits: str = "last"
) -> list[Tensor]:
    """One pass of the draft over what each of several sequences has pending: logits (V,) behind the last token.

    logits: "none" where the rows alone are wanted.
    """
    caches = [sequence.draft for sequence in sequences if sequence.draft is not None]
    calls = [step_call(decoder, *pair) for pair in zip(sequences, map(len, tokens), strict=True)]
    contexts = [sequence.context_tokens for sequence in sequences if sequence.context_tokens]
    if logits == "none" or not contexts:
        return [own[-1] for own in decoder.forward_group(decoder.draft_model, caches, tokens, calls, logits)]
    assert decoder.draft_model is not None
    hidden = [own[-1] for own in decoder.forward_group(decoder.draft_model, caches, tokens, calls, "none")]
    held = [sequence.tokens for sequence in sequences]
    return list(context_logits(decoder.draft_model, torch.stack(hidden), contexts, held))


def lacks_rows(sequence: "Sequence", count: int) -> bool:
    """Whether the draft reads the block once more, since rows are wanted that none of `count` steps recorded."""
    oracle = sequence.reading
    return oracle is not None and (oracle.num_rows > count or (sequence.in_view and oracle.num_rows > 1))


def unread(sequence: "Sequence", drafts: list[int]) -> list[int]:
    """What the draft has yet to read of a block with its whole cache: the last draft, or what a view showed it."""
    assert sequence.draft is not None and sequence.reading is not None
    sequence.close_view()
    sequence.reread = True
    end = len(sequence.tokens) - 1 + sequence.reading.num_rows
    return (sequence.tokens + drafts)[sequence.draft.seen : end]


def send_ahead(decoder: "Decoder", sequence: "Sequence") -> None:
    """Between a block's first row and the others: what that row asks for leaves the host store already."""
    oracle, layers = sequence.reading, sequence.target.layers
    crosses = any(layer.shares_memory is False for layer in layers) and not sequence.in_view
    if crosses and decoder.policy.every_round and oracle is not None and oracle.trusted:
        own = decoder.policy.own_share if decoder.policy.reads_last else 0.0
        share = AHEAD_SHARE * (1 - own)  # the more the last pass decides, the less is new
        recall_ahead(layers, oracle.first_saliency(sequence.target.seen, decoder.policy.group_reduction), share)


def _begin_view(decoder: "Decoder", sequence: "Sequence", oracle: AttentionOracle, count: int) -> None:
    """With rows of the last block all steps can use a view, unless the draft has fallen behind."""
    draft = sequence.draft
    if draft is not None and _has_view(decoder, sequence, count) and len(sequence.tokens) - draft.seen <= 2:
        _open_view(decoder, sequence, oracle.attended())


def view_rest(decoder: "Decoder", sequence: "Sequence", count: int) -> None:
    """A first step that read the whole cache says by its row what the others see of it."""
    rows = sequence.reading.block if sequence.reading else sequence.watched_row
    if rows is not None and not sequence.in_view and _has_view(decoder, sequence, count - 1):
        _open_view(decoder, sequence, rows.values[:, 0])


def _has_view(decoder: "Decoder", sequence: "Sequence", steps: int) -> bool:
    """Whether a view is worth it for so many steps; for the rows of drafting steps it costs one pass more."""
    size, draft = sequence.decision.view_size if sequence.decision else 0, sequence.draft
    adds_pass = sequence.reading is not None and decoder.policy.lookahead == "drafted"
    if draft is None or steps - adds_pass < 1 or len(draft.budgeted) < len(draft.layers):
        return False
    return is_viewed(size, draft.seen, adds_pass)


def _open_view(decoder: "Decoder", sequence: "Sequence", rows: Tensor) -> None:
    assert sequence.decision is not None and sequence.draft is not None
    if sequence.view is None:
        sequence.view = DraftView(sequence.draft, sequence.decision.view_size, decoder.num_draft_tokens + 2)
    sequence.view.open(rows)


def _last_row(decoder: "Decoder", sequence: "Sequence") -> AttentionRows:
    oracle = sequence.evidence.oracle
    assert sequence.draft is not None
    return oracle.block if oracle else decoder.new_rows(1, sequence.draft.layers[0].capacity)


def catch_up(decoder: "Decoder", sequence: "Sequence") -> None:
    """The draft reads, in one pass, the committed tokens it waited with; their rows count as accepted ones."""
    draft, oracle = sequence.draft, sequence.evidence.oracle
    if draft is None or oracle is None or decoder.policy.every_round:
        return
    missed = sequence.tokens[draft.seen : sequence.target.seen]
    for start in range(0, len(missed), PREFILL_CHUNK):
        chunk = missed[start : start + PREFILL_CHUNK]
        sequence.counters.catch_ups += 1
        sequence.counters.see_draft(draft.held_nbytes, len(chunk))
        oracle.add(summed_rows(decoder, draft, chunk), len(chunk))
