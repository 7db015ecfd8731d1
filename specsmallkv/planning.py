"""Plans: a verify block's critical set in every layer, what is recalled for it, and what evicted tokens still add.

`plan` comes before each verify pass, `retain` also where a static policy evicts. Policies choose, caches move memory.
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import AttentionCall, AttentionRows
from .matching import marginal_weights
from .oracle import AttentionOracle
from .own_attention import blended
from .policies import Evidence, Plan, Policy
from .sequence import Sequence, next_tokens
from .slots import Found, look_up
from .tail_term import BELIEVED_SIMILARITY, tail_terms
from .tiered_layer import TieredLayer

if TYPE_CHECKING:
    from .decode import Decoder


def plan(decoder: "Decoder", sequence: Sequence, drafts: list[int], looked: Tensor | None = None) -> None:
    """Lookahead policies choose (and recall) the set for this verify block; marginal weights are set for all.

    In a round in which the oracle does not read all stays as it is.

    looked: what `look` gives, if somebody looked already.
    """
    policy, oracle = decoder.policy, sequence.evidence.oracle
    if sequence.decision is not None and not sequence.decision.reads:
        return  # the last set stays, with its tail terms
    if policy.every_round and policy.due(sequence.evicted_at):
        if policy.reads_target and looked is None:
            looked = look(decoder, [sequence], [drafts])[0]
        sequence.evidence.saliency = saliency_ahead(policy, sequence, looked)
        retain(decoder, sequence)
        if policy.tail_factor and oracle is not None and policy.selection == "block":
            _set_tail_terms(policy, sequence, oracle)
    if policy.compensation != "none" and oracle is not None and oracle.head_map is not None:
        _set_marginal_weights(policy, sequence, oracle)


def look(decoder: "Decoder", sequences: list[Sequence], drafts: list[list[int]]) -> list[Tensor]:
    """The target's true attention of the coming blocks, from every key: saliency (L, H_kv, N). Analysis only."""
    blocks, config = next_tokens(sequences, drafts), decoder.target.config
    num_layers, num_heads, size = config.num_hidden_layers, config.num_attention_heads, len(blocks[0])
    seen = [sequence.target.seen for sequence in sequences]
    rows = [AttentionRows(num_layers, num_heads, size, start + size, decoder.device) for start in seen]
    for own, start in zip(rows, seen, strict=True):
        own.start(start, size)
    calls = [AttentionCall(decoder.attention, rows=own, everything=True) for own in rows]
    decoder.forward_group(decoder.target, [sequence.target for sequence in sequences], blocks, calls, logits="none")
    for sequence in sequences:
        sequence.target.rollback(size)
    means = [own.values.mean(1) for own in rows]
    return [x.view(num_layers, config.num_key_value_heads, -1, x.shape[1]).mean(2) for x in means]


def saliency_ahead(policy: Policy, sequence: Sequence, looked: Tensor | None) -> Tensor | None:
    """Of the coming verify block, as `Evidence.saliency`: by the target's attention if it looked, else the draft's."""
    oracle = sequence.evidence.oracle
    if looked is not None:
        return looked[..., : sequence.target.seen]
    if oracle is None:
        return sequence.evidence.saliency
    if policy.selection == "query":
        return oracle.row_saliencies(sequence.evicted_at, policy.group_reduction)
    evidence, reduction = sequence.evidence, policy.group_reduction
    keep = policy.tail_factor > 0  # for the tail terms
    saliency = oracle.lookahead_saliency(sequence.target.seen, policy.weigh_rows, reduction, keep)
    if evidence.last is None or not oracle.trusted:
        return saliency
    layers, share = sequence.target.layers, policy.own_share
    return blended(saliency, evidence.last, layers, share, evidence.scaling, reduction)


def retain(decoder: "Decoder", sequence: Sequence, room: int = 0) -> None:
    """Plan every layer and make the plans so. room: as `TieredLayer.retain`'s; 0: what one verify block needs."""
    policy, layers = decoder.policy, dict(enumerate(sequence.target.layers))
    budgeted = {index: layer for index, layer in layers.items() if layer.window is None}
    plans: list[tuple[list[TieredLayer], list[Plan]]] = []
    for (device, _), own in alike(budgeted).items():
        evidence = evidence_on(device, sequence.evidence)
        plans.append((list(own.values()), policy.plan_layers(own, evidence, sequence.evicted_at)))
    start = time.perf_counter()
    for layer in layers.values():
        if layer.window is not None:
            layer.slide(decoder.num_waiting)
    for members, chosen in plans:
        retain_alike(members, chosen, room)
    sequence.counters.recall_seconds += time.perf_counter() - start
    kept = sum(layer.kept_positions.numel() for layer in budgeted.values())
    sequence.counters.new_entries.append(sum(layer.num_new for layer in budgeted.values()) / max(kept, 1))


def retain_alike(layers: list[TieredLayer], plans: list[Plan], room: int) -> None:
    """`TieredLayer.retain` of layers that hold as many tokens; if their sets are equally large, looked up at once."""
    critical, found = [plan.critical for plan in plans], list[Found | None]([None] * len(plans))
    if layers[0].residency == "offload" and len({positions.shape for positions in critical}) == 1:
        found = [*look_up(layers, critical, any(plan.row_mask is not None for plan in plans))]
    for layer, own, there in zip(layers, plans, found, strict=True):
        layer.retain(*own, room=room, found=there)


def alike(layers: dict[int, TieredLayer]) -> dict[tuple[torch.device, int], dict[int, TieredLayer]]:
    """Layers by device and number of kept tokens; those of one group are worked on together."""
    groups: dict[tuple[torch.device, int], dict[int, TieredLayer]] = {}
    for index, layer in layers.items():
        groups.setdefault((layer.k.device, layer.num_kept), {})[index] = layer
    return groups


def evidence_on(device: torch.device, evidence: Evidence) -> Evidence:
    """For the layers on this device: the saliency lies on the draft's."""
    if evidence.saliency is None or evidence.saliency.device == device:
        return evidence
    return replace(evidence, saliency=evidence.saliency.to(device))


def _set_tail_terms(policy: Policy, sequence: Sequence, oracle: AttentionOracle) -> None:
    """Of the layers with a head that is believed; `retain` left the others without a term."""
    believed, saliency, first = oracle.believed_heads(BELIEVED_SIMILARITY), sequence.evidence.saliency, 0
    assert saliency is not None, "planned before"
    concerned = believed.any(dim=1).tolist()
    for predicted in oracle.mean_predictions():
        last = first + len(predicted)
        layers = dict(enumerate(sequence.target.layers[first:last]))
        layers = {i: layer for i, layer in layers.items() if concerned[first + i] and layer.window is None}
        for (device, _), own in alike(layers).items():
            parts = predicted, saliency[first:last], believed[first:last]
            rows, ranks, trust = (_of(x, list(own)).to(device) for x in parts)
            factor, members = policy.tail_factor * trust, list(own.values())
            terms = tail_terms(
                rows, ranks, members, policy.num_sink_tokens, factor, policy.tail_pool, policy.tail_limit
            )
            for layer, term in zip(own.values(), terms, strict=True):
                layer.tail_term = term
        first = last


def _of(values: Tensor, layers: list[int]) -> Tensor:
    """Of these layers only; not copied if there are no others."""
    return values if len(layers) == len(values) else values[layers]


def _set_marginal_weights(policy: Policy, sequence: Sequence, oracle: AttentionOracle) -> None:
    layers = sequence.target.layers
    if not any(layer.num_marginal for layer in layers):
        return
    for layer, predicted in zip(layers, oracle.predictions(), strict=True):
        if layer.num_marginal:
            places = layer.kept_positions, layer.marginal_positions, layer.tail_start
            layer.marginal_weights = marginal_weights(predicted.to(layer.k.device), *places, policy.compensation)
