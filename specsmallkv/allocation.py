"""Caches and scratch of one sequence: how large they are, for a prompt and for the longer one of a later turn."""

from typing import TYPE_CHECKING, Any

from .attention import AttentionMass
from .attention_form import attention_scaling
from .cache import TieredCache
from .errors import UserError
from .matching import Prior
from .oracle import AttentionOracle
from .own_attention import LastQueries
from .passes import full_cache
from .policies import Evidence, Policy
from .sequence import Counters, Sequence
from .trimmed_head import context_tokens

if TYPE_CHECKING:
    from .decode import Decoder


def start(decoder: "Decoder", prompt: list[int], max_new_tokens: int) -> Sequence:
    """Caches and scratch for one sequence."""
    limit, num_layers = len(prompt) + max_new_tokens, decoder.target.config.num_hidden_layers
    room, resident = _room(decoder, limit, max_new_tokens)
    policy = decoder.policy
    kind: dict[str, Any] = {"residency": policy.residency, "marginal_bits": policy.marginal_bits}
    if policy.packs and policy.evicts:
        bits = {"key_bits": policy.key_bits, "value_bits": policy.value_bits}
        kind |= bits | {"num_sink_tokens": policy.num_sink_tokens}
    target = TieredCache(num_layers, limit + room, resident, decoder.windows, **kind)
    draft = full_cache(decoder.draft_model, limit + room) if decoder.draft_model else None
    evidence = Evidence(
        attention_scaling(decoder.target.config), decoder.budgeted, _oracle(decoder, room, limit + room)
    )
    evidence.mass = AttentionMass(limit + room) if decoder.policy.reads_mass else None
    evidence.last = LastQueries() if decoder.policy.reads_last else None
    context = context_tokens(decoder.draft_model)
    return Sequence(list(prompt), limit, target, draft, evidence, len(prompt), context_tokens=context)


def resume(decoder: "Decoder", sequence: Sequence, prompt: list[int], max_new_tokens: int) -> Sequence:
    """A sequence at rest, with room for a longer prompt that begins with its tokens; counters start anew."""
    limit = len(prompt) + max_new_tokens
    room, resident = _room(decoder, limit, max_new_tokens)
    sequence.target.grow(limit + room, resident)
    if sequence.draft is not None:
        sequence.draft.grow(limit + room)
    if sequence.evidence.oracle is not None:
        sequence.evidence.oracle.grow(decoder.new_rows(room, sequence.target.layers[0].capacity))
    if sequence.evidence.mass is not None:
        sequence.evidence.mass.grow(limit + room)
    for layer in sequence.target.layers:
        layer.recall_bytes = 0
    sequence.tokens, sequence.last_row = sequence.tokens[: sequence.target.seen], None
    sequence.limit, sequence.counters = limit, Counters()
    return sequence


def _room(decoder: "Decoder", limit: int, max_new_tokens: int) -> tuple[int, list[int] | None]:
    """Tokens of one verify block, and each layer's resident slots once the cache is compressed (None: never)."""
    room = min(decoder.num_draft_tokens, max_new_tokens) + 1
    if not decoder.policy.evicts:
        return room, None
    places = {layer: place for place, layer in enumerate(decoder.budgeted)}
    sizes = [
        decoder.policy.num_slots(limit, places[index], len(places)) if window is None else window + decoder.num_waiting
        for index, window in enumerate(decoder.windows)
    ]
    return room, [min(count + decoder.num_waiting, limit + room) for count in sizes]


def _oracle(decoder: "Decoder", num_rows: int, capacity: int) -> AttentionOracle | None:
    if not decoder.policy.reads_draft:
        return None
    rows = decoder.new_rows(num_rows, capacity)
    saved = decoder.head_map
    prior = Prior(saved, decoder.policy.map_rows) if saved is not None and decoder.policy.map_rows else None
    num_heads = decoder.shard.heads(decoder.target.config.num_key_value_heads)
    return AttentionOracle(rows, num_heads, prior, decoder.policy.lookahead, decoder.shard)


def check_budget(policy: Policy, windows: list[int | None]) -> None:
    """UserError where a policy would compress nothing, since the model keeps a sliding window in every layer."""
    if policy.evicts and all(windows):
        raise UserError(
            f"policy={policy.name} with kv_budget={policy.kv_budget} compresses nothing: all {len(windows)} layers of "
            f"the target see a sliding window of {windows[0]} tokens, which stays exact; use policy=full."
        )
