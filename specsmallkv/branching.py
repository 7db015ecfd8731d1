"""Several sequences behind one prompt: the models read it once, each policy compresses a copy of its own."""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from .observation import observe_draft
from .oracle import AttentionOracle
from .prefill import branch_within_budget, in_chunks
from .sequence import Sequence

if TYPE_CHECKING:
    from .decode import Decoder


def branch(decoder: "Decoder", base: Sequence) -> Sequence:
    """Another sequence after the prompt that `base` has read, compressed by this decoder's policy.

    The target's cache is a copy; the draft's cache, its rows and the fit are the base's own. The draft's cache
    must be rolled back to the prompt before another branch uses it. The base's observation window must be as wide
    as this policy's; if it is wider, or has other sinks, the draft reads its end again for a fit of its own.
    """
    if in_chunks(decoder.policy, len(base.tokens)):
        return branch_within_budget(decoder, base)
    sequence = decoder.start(base.tokens, base.limit - len(base.tokens))
    base.target.copy_to(sequence.target)
    sequence.counters.see_prefill(sequence.target)
    own, oracle = sequence.evidence.oracle, base.evidence.oracle
    window = min(decoder.policy.num_observed, base.target.seen)
    sequence.evidence = base.evidence.fork(decoder.policy.reads_mass, decoder.policy.reads_last)
    queries = base.evidence.queries if decoder.policy.due(base.target.seen) else {}  # else read at the first eviction
    sequence.evidence.queries = {index: x[:, :, -window:] for index, x in queries.items()}
    sequence.evidence.observed = bool(queries)
    if queries and own is not None and oracle is not None and oracle.head_map is not None:
        if queries[0].shape[2] == window and oracle.num_sinks == decoder.policy.num_sink_tokens:
            own = oracle.share(decoder.policy.matching, own.prior, decoder.policy.lookahead)
        else:
            own.block = oracle.block
            _observe_end(decoder, base, own, sequence.evidence.queries)
    sequence.evidence.oracle = own
    sequence.draft, sequence.settled = base.draft if decoder.draft_model else None, True
    decoder.foresee(sequence)
    decoder.evict(sequence, after_prefill=True)
    return sequence


def first_logits(branched: Sequence, shared: Tensor) -> Tensor:
    """(V,) of the prompt's last token: a branch that read the prompt itself has its own, else those of the base."""
    return shared if branched.logits is None else branched.logits[-1]


def _observe_end(decoder: "Decoder", base: Sequence, oracle: AttentionOracle, queries: dict[int, Tensor]) -> None:
    """Fit a branch's oracle on the end of the base's window: as many tokens as there are queries."""
    assert base.draft is not None
    window = base.tokens[: base.target.seen][-queries[0].shape[2] :]
    base.draft.rollback(len(window))
    evidence = replace(base.evidence, oracle=oracle, queries=queries)
    observe_draft(decoder, replace(base, evidence=evidence), window)
