"""Marginal values in fewer bits: near the values, exact in their bytes, and never packed twice."""

import copy

import pytest
import torch

from specsmallkv.decode import Decoder
from specsmallkv.packed_values import BITS, choose, entry_cost, pack, unpack, weighted_sum
from specsmallkv.presets import load_policy
from specsmallkv.slots import select
from specsmallkv.tiered_layer import TieredLayer

HEADS, DIM = 2, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values_of(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, HEADS, count, DIM, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_packed_value_is_within_half_a_step_of_the_value(bits, dtype):
    values = values_of(50, dtype)
    low, high = values.float().aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rounding = 2 * (2**bits - 1) * torch.finfo(dtype).eps  # of the scale and the result in their type
    unpacked = unpack(pack(values, bits), bits)
    assert unpacked.dtype == dtype
    assert ((unpacked.float() - values.float()).abs() <= (0.5 + rounding) * step).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("row", [torch.zeros(DIM), torch.full((DIM,), -7.5), torch.linspace(-3e4, 3e4, DIM)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_and_large_vectors_stay_finite(dtype, row, bits):
    unpacked = unpack(pack(row.to(dtype).expand(1, 1, 1, -1), bits), bits)
    torch.testing.assert_close(unpacked[0, 0, 0], row.to(dtype), atol=2.1e3 * (row.abs().max() > 1e4), rtol=1e-2)


@pytest.mark.parametrize("bits", [None, *BITS])
def test_a_weighted_sum_is_that_of_the_unpacked_values(bits):
    stored, weights = pack(values_of(30), bits), torch.rand(1, 3 * HEADS, 5, 30)
    expected = weights.unflatten(1, (HEADS, 3)) @ unpack(stored, bits).unsqueeze(2)
    torch.testing.assert_close(weighted_sum(weights, stored, bits), expected.flatten(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [None, *BITS])
def test_what_stays_marginal_is_not_packed_again(bits):
    """Even where the index mixes new entries and old ones; a second rounding would move them further each time."""
    stored, values = pack(values_of(400, torch.bfloat16, 1), bits), values_of(50, torch.bfloat16)
    index = torch.rand(1, HEADS, 450).topk(300).indices.sort().values
    picked = choose(values, stored, index, bits)
    for part, old, new in zip(picked, stored, pack(values, bits), strict=True):
        both = torch.cat((new, old), dim=2)
        assert torch.equal(part, torch.stack([both[0, head, index[0, head]] for head in range(HEADS)])[None])
    only_old = choose(values[:, :, :0], stored, index.clamp(max=399), bits)
    assert all(
        torch.equal(part, select(old, index.clamp(max=399))) for part, old in zip(only_old, stored, strict=True)
    )
    assert choose(values, stored, index[..., :0], bits)[0].shape[2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, *BITS])
def test_a_layer_holds_the_bytes_that_its_policy_counts_with(bits, dtype):
    layer = TieredLayer(40, marginal_bits=bits)
    layer.update(values_of(40, dtype), values_of(40, dtype, 1))
    first = torch.arange(30).expand(1, HEADS, -1)
    layer.retain(first[..., :10], first[..., 10:], 30)
    cost = entry_cost(DIM, dtype.itemsize, bits)
    assert layer.marginal_nbytes == HEADS * 20 * cost * layer.entry_bytes
    assert layer.nbytes == HEADS * (20 + 20 * cost) * layer.entry_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("bits", [None, *BITS])
def test_a_run_holds_no_more_than_its_budget_and_nearly_all_of_it(target, prompt, bits, share, dtype):
    policy = load_policy("smallkv", kv_budget=0.5, marginal_share=share, marginal_similarity=0.0, marginal_bits=bits)
    model = copy.deepcopy(target).to(dtype)
    decoder = Decoder(model, model, policy, 0)
    sequence, _ = decoder.begin(prompt, 2)
    decoder.settle(sequence)
    cache = sequence.target
    assert all(layer.num_marginal for layer in cache.layers)
    assert 0.95 * 0.5 < cache.nbytes / cache.full_nbytes <= 0.5


def test_four_bits_are_nearer_to_the_full_cache_than_the_models_own_at_equal_bytes(target, prompt):
    """With the target as its own draft, whose odds are right."""

    def told(policy):
        decoder = Decoder(target, target, policy, 0)
        rounds = decoder.generate(prompt, 24)
        return torch.cat([sequence.logits[-1:].clone() for _, sequence in rounds]).log_softmax(-1)

    settings = {"kv_budget": 0.3, "window_size": 8, "evict_block": 8, "marginal_similarity": 0.0}
    full = told(load_policy("full"))
    distance = {
        bits: (full.exp() * (full - told(load_policy("smallkv", marginal_bits=bits, **settings)))).sum(-1).mean()
        for bits in (4, None)
    }
    assert distance[4] < distance[None]
