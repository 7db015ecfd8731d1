"""Prefill within the budget: the target's cache never grows beyond budget and one chunk, not even while it reads.

The draft reads the whole prompt first. So before the target reads a chunk it is known what is to come: what the
chunk's own queries will look at (lookahead policies recall it for them, the rest waits in host memory), or what the
whole rest of the prompt and the tokens foreseen behind it will (static policies drop the others for good). The target
never sees all keys at once, so its head map is a saved one. The budget is the whole prompt's from the first chunk on:
nothing goes before it is full. While the prompt is read all of it is spent on tokens with K and V.
"""

from copy import copy
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import AttentionCall, AttentionMass, AttentionRows
from .cache import TieredCache
from .errors import UserError
from .matching import HeadMap
from .oracle import AttentionOracle, is_trusted
from .policies import Policy

if TYPE_CHECKING:
    from .decode import Decoder
    from .sequence import Sequence

INTERVAL = 32  # rows of the prompt's end that count as the first interval, as after a prefill that sees all
END_SHARE = 0.5  # of a static score: those rows and the foreseen ones; the others are all the rest of the prompt's


def check_prefill(policy: Policy, head_map: HeadMap | None) -> None:
    """UserError if the policy is to evict while the prompt is read and has nothing to tell it what."""
    if not policy.prefill_chunk or not policy.reads_draft:
        return
    told = (
        f"policy.prefill_chunk={policy.prefill_chunk} lets {policy.name} evict before the target has read the prompt"
    )
    if head_map is None:
        raise UserError(f"{told}, which needs a saved head map; make one with task=calibrate and set model.head_map.")
    if not is_trusted(head_map.mean_similarity):
        raise UserError(
            f"{told}, but model.head_map predicts its heads with a mean cosine of "
            f"{head_map.mean_similarity:.2f} only; use a better draft, or leave policy.prefill_chunk out."
        )


def in_chunks(policy: Policy, num_tokens: int) -> bool:
    """Whether a prompt of that length is read within the budget: a shorter one than a chunk is read as ever."""
    return 0 < policy.prefill_chunk < num_tokens and policy.due(num_tokens)


def read_within_budget(decoder: "Decoder", sequence: "Sequence") -> Tensor:
    """Both models read the prompt, the target evicting before each chunk but the first; logits (V,) of its last token.

    With a policy that reads the draft the sequence is settled afterwards: nothing of the prompt is left to do.
    """
    policy, prompt, oracle = decoder.policy, sequence.tokens, sequence.evidence.oracle
    chunks = [prompt[start : start + policy.prefill_chunk] for start in range(0, len(prompt), policy.prefill_chunk)]
    reserve(sequence, policy, len(prompt))
    ahead: list[Tensor] = []
    if oracle is not None:
        with sequence.counters.timed("prefill_draft"):
            ahead = read_ahead(decoder, sequence, chunks)
            decoder.foresee(sequence)
            sequence.evidence.foreseen.clear()  # as in `Decoder.settle`
    logits = torch.empty(0)
    for number, chunk in enumerate(chunks):
        if number:
            make_room(sequence, policy, len(prompt), wanted(policy, oracle, ahead, number, chunks), len(chunk))
        call = AttentionCall(decoder.attention, mass=sequence.evidence.mass, num_queries=policy.num_observed)
        logits = decoder.forward(decoder.target, sequence.target, chunk, call)[-1]
        sequence.evidence.observe(call.queries)
        sequence.counters.see_prefill(sequence.target)
    if oracle is not None:
        decoder.evict(sequence, after_prefill=True)
        sequence.settled = True
    return logits


def branch_within_budget(decoder: "Decoder", base: "Sequence") -> "Sequence":
    """`Decoder.branch` where the target has to read the prompt itself; the draft's cache and rows are the base's."""
    sequence = decoder.start(base.tokens, base.limit - len(base.tokens))
    sequence.logits = read_within_budget(decoder, sequence).unsqueeze(0)
    if base.draft is not None and decoder.draft_model is not None:
        sequence.draft = base.draft
    if sequence.evidence.oracle is not None and base.evidence.oracle is not None:
        sequence.evidence.oracle.block = base.evidence.oracle.block
    if not sequence.settled:
        decoder.evict(sequence, after_prefill=True)
        sequence.settled = True
    return sequence


def while_reading(policy: Policy, num_read: int, num_tokens: int) -> Policy:
    """The policy after `num_read` tokens of a prompt: the whole prompt's budget, critical tokens, one set a chunk."""
    own: dict[str, Any] = {
        "kv_budget": min(1.0, policy.kv_budget * num_tokens / num_read),
        "marginal_share": 0.0,
        "selection": "block",
    }
    names = {item.name for item in fields(policy)}
    reading = copy(policy)  # `replace` would lose what it is fitted to
    for key in own.keys() & names:
        setattr(reading, key, own[key])
    return reading


def reserve(sequence: "Sequence", policy: Policy, num_tokens: int) -> None:
    """The first buffer of each layer has room for the budget and a chunk, not for the prompt."""
    num_layers = len(sequence.target.layers)
    for index, layer in enumerate(sequence.target.layers):
        resident = while_reading(policy, num_tokens, num_tokens).plain_tiers(num_tokens, index, num_layers).critical
        layer.first_capacity = min(layer.capacity, resident + policy.prefill_chunk)


def read_ahead(decoder: "Decoder", sequence: "Sequence", chunks: list[list[int]]) -> list[Tensor]:
    """The draft reads the prompt: for each chunk the sum (M, N) of its queries' rows, N the tokens up to its end.

    The rows of the prompt's end become the oracle's first interval.
    """
    model, draft, oracle = decoder.draft_model, sequence.draft, sequence.evidence.oracle
    assert model is not None and draft is not None and oracle is not None and decoder.head_map is not None
    sums = [summed_rows(decoder, draft, chunk) for chunk in chunks]
    end, config = sequence.tokens[-INTERVAL:], model.config
    draft.rollback(len(end))
    length = draft.seen + len(end)
    rows = AttentionRows(config.num_hidden_layers, config.num_attention_heads, len(end), length, model.device)
    rows.start(draft.seen, len(end))
    decoder.forward(model, draft, end, AttentionCall(decoder.attention, rows=rows), num_logits=0)
    oracle.adopt(decoder.head_map, getattr(decoder.policy, "matching", "mixture"), rows.values)
    return sums


def summed_rows(decoder: "Decoder", draft: TieredCache, tokens: list[int]) -> Tensor:
    """The draft reads tokens in one pass: the sum (M, N) of their rows, which never exist all at once."""
    mass = AttentionMass(draft.seen + len(tokens), per_query_head=True)
    decoder.forward(decoder.draft_model, draft, tokens, AttentionCall(decoder.attention, mass=mass), num_logits=0)
    return torch.cat([mass.sums[index] for index in range(len(draft.layers))], dim=1)[0]


def wanted(
    policy: Policy, oracle: AttentionOracle | None, ahead: list[Tensor], number: int, chunks: list[list[int]]
) -> Tensor | None:
    """Saliency (L, H_kv, n) of the n tokens read, for chunk `number` (lookahead) or for all that comes (static)."""
    if oracle is None:
        return None
    read = sum(map(len, chunks[:number]))
    if policy.every_round:
        return oracle.saliency(ahead[number][:, :read] / len(chunks[number]), policy.group_reduction)
    following = torch.stack([rows[:, :read] for rows in ahead[number:]]).sum(dim=0)
    following /= sum(map(len, chunks[number:]))
    return oracle.interval_saliency(read).lerp(oracle.saliency(following), 1 - END_SHARE)


def make_room(sequence: "Sequence", policy: Policy, num_tokens: int, saliency: Tensor | None, room: int) -> None:
    """Evict what is above the budget of a prompt of `num_tokens`, before `room` more of them are read."""
    seen = sequence.target.seen
    reading = while_reading(policy, seen, num_tokens)
    if not reading.due(seen):
        return
    for index, layer in enumerate(sequence.target.layers):
        own = None if saliency is None else saliency.to(layer.k.device)
        layer.retain(*reading.plan(index, layer, replace(sequence.evidence, saliency=own)), room=room)
