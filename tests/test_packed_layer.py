"""Critical tokens in few bits: near what they were, read as if unpacked, never rounded twice, exact in their bytes."""

import pytest
import torch
from test_cache import DIM, HEADS, append, choose

from specsmallkv.attention import read_tiers
from specsmallkv.attention_form import Scaling
from specsmallkv.backends import FOLD_LIMIT, attention_with_sinks
from specsmallkv.decode import Decoder
from specsmallkv.packed_keys import ChannelScale, channel_scale, key_products, pack_keys, unpack_keys
from specsmallkv.packed_layer import SETTLED, PackedLayer
from specsmallkv.packed_values import BITS
from specsmallkv.presets import load_policy
from specsmallkv.slots import select
from specsmallkv.tail_term import TailTerm
from specsmallkv.tiered_layer import TieredLayer

DTYPES = [torch.float32, torch.bfloat16]
NONE = choose(9, 0, 0)


def keys_of(count, seed=0, large=1.0):
    """Keys whose first channel is `large` times the others and far from zero."""
    keys = torch.randn(1, HEADS, count, DIM, generator=torch.Generator().manual_seed(seed))
    keys[..., 0] = large * (keys[..., 0] + 3)
    return keys


PAIRS = [(4, 4), (8, 8), (8, 4), (None, 4), (8, None)]  # bits of keys and of values


def packed_layer(bits, dtype=torch.float32, sinks=2):
    """40 tokens: 12 kept, each head's own, and 4 in the tail; the first two have keys like no other."""
    options = dict(zip(("key_bits", "value_bits"), bits, strict=True))
    layer, keys = PackedLayer(64, 8, "offload", num_sink_tokens=sinks, **options), keys_of(40)
    keys[:, :, :2] *= 50
    layer.update(keys.to(dtype), keys_of(40, 1).to(dtype))
    critical = torch.cat((torch.arange(2).expand(1, HEADS, -1), 2 + choose(34, 10, 2)), dim=2)
    layer.retain(critical, NONE, 36, room=4)
    return layer


@pytest.mark.parametrize("bits", BITS)
def test_one_large_channel_costs_the_others_no_precision(bits):
    """Each channel is within half a step of its own spread's scale, however large another is."""
    errors = []
    for large in (1.0, 100.0):
        keys = keys_of(200, large=large)
        channels = channel_scale(keys)
        unpacked = unpack_keys(pack_keys(keys, channels, bits), channels, bits)
        errors.append((unpacked - keys)[..., 1:].abs().mean().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    plain = ChannelScale(torch.zeros(1), torch.ones(1))
    assert (unpack_keys(pack_keys(keys, plain, bits), plain, bits) - keys)[..., 1:].abs().mean() > 5 * errors[1]


def test_a_channel_that_was_constant_at_first_may_change_later():
    keys = keys_of(30)
    keys[..., 2] = 5.0
    channels = channel_scale(keys)
    later = keys_of(1, seed=4)
    unpacked = unpack_keys(pack_keys(later, channels, 8), channels, 8)
    assert unpacked.isfinite().all() and channel_scale(keys[:, :, :1]).spread.eq(1).all()


@pytest.mark.parametrize("first", [2, 3, 8])
def test_a_few_tokens_do_not_spoil_the_scale_of_all_that_follow(first):
    keys = torch.randn(1, HEADS, 500, 64, generator=torch.Generator().manual_seed(5))
    errors = []
    for count in (first, 500):
        channels = channel_scale(keys[:, :, :count])
        errors.append((unpack_keys(pack_keys(keys, channels, 8), channels, 8) - keys).square().mean().sqrt())
    assert errors[0] < 4 * errors[1]


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_short_first_turn_does_not_set_the_scale_of_a_long_chat(shares_memory):
    """Its tokens tell little of a large channel that turns slowly, as keys after RoPE do."""
    keys, errors = keys_of(700), []
    keys[..., 0] = 300 * torch.cos(torch.arange(700) / 100)
    for first, step in ((700, 1), (14, 30)):
        layer = PackedLayer(720, 64, "offload", key_bits=8, value_bits=8, num_sink_tokens=2)
        layer.shares_memory = shares_memory
        for start, end in zip([0, *range(first, 700, step)], range(first, 701, step), strict=False):
            layer.update(keys[:, :, start:end], keys[:, :, start:end])
            host = (end - 4) * HEADS * layer.entry_bytes
            layer.retain(choose(end - 4, 8, end), NONE, end - 4, room=step)
            assert (layer.host_nbytes > host) is (end - 4 < SETTLED) and layer.channels.spread.dtype == keys.dtype
            assert torch.equal(layer.keys[:, :, :8], select(layer.everything()[0], layer.kept_positions))
        end = layer.tail_start
        errors.append((layer.everything()[0][:, :, :end] - keys[:, :, :end])[..., 1:].square().mean().sqrt())
    assert end > 600 and errors[1] < 1.5 * errors[0] < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_products_with_packed_keys_are_those_with_unpacked_ones(bits, dtype):
    keys, query = keys_of(50, large=30.0).to(dtype), torch.randn(1, 3 * HEADS, 5, DIM)
    channels = channel_scale(keys)
    stored = pack_keys(keys, channels, bits)
    unpacked = unpack_keys((stored[0], stored[1].float()), channels, bits)
    expected = query.unflatten(1, (HEADS, 3)).flatten(2, 3) @ unpacked.transpose(2, 3)
    torch.testing.assert_close(key_products(query, stored, channels, bits), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", PAIRS)
def test_attention_over_codes_is_attention_over_what_they_stand_for(bits, masked, softcap):
    layer, query, scaling = packed_layer(bits), torch.randn(1, 3 * HEADS, 4, DIM), Scaling(DIM**-0.5, softcap)
    mask = torch.rand(1, HEADS, 4, layer.num_slots) < 0.7 if masked else None
    if masked:
        mask[..., -1] = True
    expected, on_sinks = attention_with_sinks(query, layer.keys, layer.values, scaling, mask, 2)
    layer.tail_term = TailTerm(torch.rand(1, 3 * HEADS, 1, 2), torch.randn(1, 3 * HEADS, 2, DIM), 2)
    with_term = read_tiers(layer, query, scaling, mask, "sdpa")
    torch.testing.assert_close(with_term, layer.tail_term.add(expected, on_sinks), atol=1e-4, rtol=1e-4)
    layer.tail_term = None
    torch.testing.assert_close(read_tiers(layer, query, scaling, mask, "sdpa"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", PAIRS)
def test_keys_of_sinks_are_exact_wherever_a_padded_set_has_them(bits):
    layer = packed_layer(bits)
    exact = layer.everything()[0][:, :, :2]
    assert torch.equal(layer.keys[:, :, :2], exact) and torch.equal(exact, 50 * keys_of(40)[:, :, :2])
    padded = torch.tensor([[0, 1, 5, 9], [0, 0, 0, 1]]).unsqueeze(0)  # as the union of several queries' sets
    layer.retain(padded, NONE, 36, row_mask=torch.ones(1, HEADS, 4, 4, dtype=torch.bool))
    assert torch.equal(layer.keys[0, 1, :4], exact[0, 1, [0, 0, 0, 1]])
    query, mask = torch.randn(1, HEADS, 4, DIM), torch.ones(1, HEADS, 4, 8, dtype=torch.bool)
    scaling = 0.02  # so that a sink's weight is neither 0 nor 1
    expected, _ = attention_with_sinks(query, layer.keys, layer.values, scaling, mask, 2)
    torch.testing.assert_close(read_tiers(layer, query, scaling, mask, "sdpa"), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(packed_layer(bits, sinks=0).keys[:, :, :2], exact) is (bits[0] is None)


def test_a_long_block_reads_the_same():
    layer = packed_layer((4, 4))
    query = torch.randn(1, 3 * HEADS, FOLD_LIMIT + 1, DIM)
    mask = torch.ones(1, HEADS, FOLD_LIMIT + 1, layer.num_slots, dtype=torch.bool)
    long = read_tiers(layer, query, DIM**-0.5, mask, "sdpa")
    short = read_tiers(layer, query[:, :, :4], DIM**-0.5, mask[:, :, :4], "sdpa")
    torch.testing.assert_close(long[:, :, :4], short, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shares_memory", [True, False])
@pytest.mark.parametrize(("bits", "values"), [(4, 4), (8, 8), (8, None)])
def test_a_token_is_packed_once_and_comes_back_as_it_went(bits, values, shares_memory):
    """However often it is recalled, or stays: its codes are those of the keys and values as they came."""
    layer, plain = PackedLayer(64, 8, "offload", key_bits=bits, value_bits=values), TieredLayer(64, 32, "offload")
    layer.shares_memory = plain.shares_memory = shares_memory
    for step, count in enumerate((24, 4, 4, 1, 7)):
        for own in (layer, plain):
            torch.manual_seed(step)
            append(own, count)
            own.retain(choose(own.seen - 4, 8, step), NONE, own.seen - 4, room=8)
        assert torch.equal(layer.positions, plain.positions) and layer.num_new == plain.num_new
        kept = layer.kept_positions
        once = unpack_keys(pack_keys(plain.keys[:, :, :8], layer.channels, bits), layer.channels, bits)
        assert torch.equal(layer.keys[:, :, :8], once)
        assert torch.equal(layer.stored_values(kept), layer.values[:, :, :8])
        assert torch.equal(layer.keys[:, :, 8:], plain.keys[:, :, 8:]), "the tail is as it came"
        older_k = layer.everything()[0]
        assert torch.equal(older_k.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, DIM)), once)
        rows = torch.rand(1, HEADS, 3, 8)
        torch.testing.assert_close(layer.pooled(rows, kept), rows @ layer.values[:, :, :8])
        torch.testing.assert_close(layer.kept_value_sum(), layer.values[:, :, :8].sum(dim=2))
    assert 0 < layer.recall_bytes < 0.9 * plain.recall_bytes


@pytest.mark.parametrize("bits", PAIRS)
def test_sums_of_older_and_of_kept_values_are_of_what_their_codes_stand_for(bits):
    """So that one less the other is the sum of what was evicted, without the rounding of what was kept."""
    layer = packed_layer(bits)
    for count in (36, 39):
        layer.retain(choose(count, 12, 3), NONE, count)
        older = layer.everything()[1][:, :, :count].sum(dim=2)
        torch.testing.assert_close(layer.older_value_sum, older, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(layer.kept_value_sum(), layer.values[:, :, :12].sum(dim=2), atol=1e-4, rtol=1e-5)


def test_a_cache_from_which_nothing_left_is_not_packed():
    layer = PackedLayer(64, 8, "offload", key_bits=4, value_bits=4)
    keys = keys_of(20)
    layer.update(keys, keys)
    assert torch.equal(layer.keys, keys) and layer.keys.data_ptr() == layer.k.data_ptr()
    layer.rollback(5)
    assert torch.equal(layer.everything()[0], keys[:, :, :15]) and not layer.host_nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", PAIRS)
def test_bytes_are_those_that_the_policy_counts_with(bits, dtype):
    layer = packed_layer(bits, dtype)
    policy = load_policy("specsmallkv", num_sink_tokens=2, key_bits=bits[0], value_bits=bits[1])
    fitted = policy.fitted(DIM, dtype.itemsize)
    cost, extra = fitted.critical_cost, fitted.packing_overhead
    assert extra == (bits[0] is not None) * (2 / 2 + 1)
    assert layer.nbytes == HEADS * (12 * cost + 4 + extra) * layer.entry_bytes
    early = HEADS * 36 * layer.entry_bytes / 2 * (bits[0] is not None)  # keys as they came, while there are few
    assert layer.host_nbytes - early == HEADS * 36 * cost * layer.entry_bytes == HEADS * 36 * layer.stored_bytes
    assert layer.allocated_nbytes == HEADS * (12 * cost + 8 + extra) * layer.entry_bytes


def test_a_later_turn_finds_room():
    layer = packed_layer((8, 8))
    before = layer.keys
    layer.grow(100, 12)
    append(layer, 8)
    assert torch.equal(layer.keys[:, :, :16], before) and layer.k.shape[2] >= 12
    layer.retain(choose(44, 12, 3), NONE, 44)
    assert layer.store[0].shape[2] == 100 and layer.num_slots == 16


def test_the_same_bytes_are_nearer_to_the_full_cache(target, prompt):
    """In 8 bits, with the target as its own draft, which knows what to recall."""

    def told(policy):
        rounds = Decoder(target, target, policy, 0).generate(prompt, 24)
        logits, bytes_held = [], 0.0
        for _, sequence in rounds:
            logits.append(sequence.logits[-1:].clone())
            bytes_held = sequence.target.nbytes / sequence.target.full_nbytes
        return torch.cat(logits).log_softmax(-1), bytes_held

    settings = {"kv_budget": 0.3, "evict_block": 8, "window_size": 8, "tail_factor": 0.0}
    full, _ = told(load_policy("full"))
    results = [told(load_policy("specsmallkv", key_bits=own, value_bits=own, **settings)) for own in (8, None)]
    (packed, held), (plain, without) = results
    assert held <= without
    distances = [(full.exp() * (full - own)).sum(-1).mean() for own in (packed, plain)]
    assert distances[0] < distances[1]


@pytest.mark.parametrize("bits", BITS)
def test_float16_is_packed_as_finely_as_float32(bits):
    exact, errors = (keys_of(40), keys_of(40, 1)), []
    for dtype in (torch.float32, torch.float16):
        unpacked = packed_layer((bits, bits), dtype).everything()
        pairs = zip(unpacked, exact, strict=True)
        errors.append([(own.float() - true)[:, :, 2:].square().mean().sqrt() for own, true in pairs])
    assert all(half < 1.05 * full for full, half in zip(*errors, strict=True))


def test_a_budget_that_holds_every_token_packed_keeps_them_all_within_its_bytes(target, draft, prompt):
    policy = load_policy("specsmallkv", key_bits=4, value_bits=4, kv_budget=0.5, evict_block=8)
    with pytest.warns(UserWarning, match=r"kv_budget=0.5 is more .*key_bits=4 .*, 0.38 of the full cache"):
        decoder = Decoder(target, draft, policy, 3)
    for index, (_, sequence) in enumerate(decoder.generate(prompt, 24)):
        if not index:
            continue
        layer = sequence.target.layers[0]
        assert layer.num_slots == layer.seen
        assert sequence.target.nbytes <= 0.5 * sequence.target.full_nbytes
        assert layer.tail_term is None
