"""The observation window: the end of the prompt, whose target queries and draft rows the head map is fitted on."""

from typing import TYPE_CHECKING

from torch import Tensor

from .attention import AttentionCall
from .sequence import Sequence

if TYPE_CHECKING:
    from .decode import Decoder

OBSERVED_CHUNK = 32  # rows of the observation window at a time; bounds scratch, not the result


def observe_target(decoder: "Decoder", sequence: Sequence, window: list[int]) -> Tensor:
    """Feed the window to the target and keep its queries; logits (V,) of the last position."""
    call = AttentionCall(decoder.attention, num_queries=len(window), mass=sequence.evidence.mass)
    logits = decoder.forward(decoder.target, sequence.target, window, call)
    sequence.evidence.observe(call.queries)
    return logits[-1]


def observe_draft(decoder: "Decoder", sequence: Sequence, window: list[int]) -> None:
    """Feed the window to the draft, recording its rows, and fit the head map."""
    assert decoder.draft_model is not None and sequence.draft is not None
    oracle, evidence = sequence.evidence.oracle, sequence.evidence
    if oracle is None:
        decoder.feed(decoder.draft_model, sequence.draft, window)
        return
    for start in range(0, len(window), OBSERVED_CHUNK):
        chunk = window[start : start + OBSERVED_CHUNK]
        end = sequence.draft.seen + len(chunk)
        rows = decoder.new_rows(len(chunk), end)
        rows.start(end - len(chunk), len(chunk))
        decoder.forward(
            decoder.draft_model, sequence.draft, chunk, AttentionCall(decoder.attention, rows=rows), num_logits=0
        )
        queries = {i: x[:, :, start : start + len(chunk)] for i, x in evidence.queries.items()}
        oracle.observe(rows.values, queries, sequence.target, evidence.scaling, decoder.policy.num_sink_tokens)
    oracle.fit(decoder.policy.matching)


def observe_if_needed(decoder: "Decoder", sequence: Sequence) -> None:
    """A prompt too short to evict left no window: read the last tokens once more, now that it matters."""
    if sequence.evidence.observed:
        return
    window = sequence.tokens[: sequence.target.seen][-decoder.policy.num_observed :]
    start = sequence.target.seen - len(window)
    sequence.target.rollback(len(window))
    observe_target(decoder, sequence, window)
    if sequence.draft is not None and sequence.evidence.oracle is not None:
        sequence.draft.rollback(sequence.draft.seen - start)
        observe_draft(decoder, sequence, window)
