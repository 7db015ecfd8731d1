"""The tiered cache against a plain list of everything that was ever appended."""

import pytest
import torch

from specsmallkv.cache import TieredCache
from specsmallkv.planning import alike, retain_alike
from specsmallkv.policies import Plan
from specsmallkv.tiered_layer import TieredLayer

HEADS, DIM = 2, 4


def tokens(start, count):
    """K and V whose numbers name their position, head and kind."""
    base = torch.arange(start, start + count, dtype=torch.float32).view(1, 1, count, 1)
    head = torch.arange(HEADS).view(1, HEADS, 1, 1) * 1000
    k = (base + head).expand(1, HEADS, count, DIM).clone()
    return k, k + 0.5


def append(layer, count):
    layer.update(*tokens(layer.seen, count))


def choose(num, count, seed):
    """Sorted random indices (1, HEADS, count) below num, another set per head."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, HEADS, num, generator=generator).topk(count).indices.sort().values


def assert_contents_match_positions(layer):
    """Every resident entry is the token that its position says, in ascending order."""
    positions, heads = layer.positions, torch.arange(HEADS).view(1, HEADS, 1) * 1000
    assert torch.equal(layer.keys[..., 0], (positions + heads).float())
    assert torch.equal(layer.values[..., 0], positions + heads + 0.5)
    assert torch.equal(layer.marginal_v[..., 0], layer.marginal_positions + heads + 0.5)
    assert (positions.diff(dim=-1) > 0).all() and (layer.marginal_positions.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("residency", ["drop", "offload"])
def test_entries_keep_their_logical_positions_through_many_evictions(residency):
    layer = TieredLayer(capacity=64, resident_capacity=40, residency=residency)
    append(layer, 30)
    for step in range(4):
        tail_start = layer.seen - 5
        candidates = layer.candidates(tail_start)
        critical = choose(candidates.num_with_keys, 10, step)
        free = torch.ones(1, HEADS, candidates.positions.shape[2]).scatter(2, critical, 0)
        marginal = free.topk(4).indices
        marginal = marginal.gather(2, candidates.positions.gather(2, marginal).argsort(-1))
        layer.retain(critical, marginal, tail_start)
        assert (layer.num_kept, layer.num_marginal, layer.num_slots) == (10, 4, 15)
        append(layer, 6)
        layer.rollback(2)
        assert layer.get_seq_length() == layer.seen == 30 + 4 * (step + 1)
        assert_contents_match_positions(layer)


def test_rollback_leaves_what_a_cache_that_never_saw_the_tokens_holds():
    seen, unseen = (TieredLayer(32) for _ in range(2))
    append(seen, 12), append(unseen, 12)
    append(seen, 5)
    seen.rollback(5)
    append(seen, 3), append(unseen, 3)
    assert seen.seen == unseen.seen
    assert torch.equal(seen.keys, unseen.keys) and torch.equal(seen.values, unseen.values)


def test_rollback_never_reaches_evicted_tokens():
    layer = TieredLayer(32)
    append(layer, 20)
    layer.retain(choose(16, 4, 0), choose(16, 0, 0), 16)
    with pytest.raises(AssertionError, match="cannot roll back"):
        layer.rollback(5)


@pytest.mark.parametrize("crop_to, expected", [(-3, 9), (0, 12), (7, 7)])
def test_crop_accepts_the_calls_of_both_transformers_lines(crop_to, expected):
    layer = TieredLayer(32)
    append(layer, 12)
    layer.crop(crop_to)
    assert layer.seen == expected


def test_offload_recalls_any_token_and_drop_only_what_it_kept():
    for residency, available in (("offload", 20), ("drop", 6)):
        layer = TieredLayer(48, 24, residency)
        append(layer, 24)
        layer.retain(choose(20, 6, 1), choose(20, 0, 1), 20)
        assert layer.candidates(20).num_with_keys == available


def test_recall_over_a_bus_moves_only_the_difference_and_gives_the_same_cache():
    layers = [TieredLayer(64, 32, "offload") for _ in range(2)]
    layers[1].shares_memory = False
    for step in range(3):
        for layer in layers:
            append(layer, 24 if step == 0 else 4)
            layer.retain(choose(layer.seen - 4, 8, step), choose(9, 0, 0), layer.seen - 4)
    assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)
    assert_contents_match_positions(layers[1])
    assert 0 < layers[1].recall_bytes < 2 * 2 * HEADS * 8 * DIM * 4 * 2
    assert layers[0].recall_bytes == layers[1].recall_bytes


def test_recall_bytes_count_exactly_the_entries_that_were_absent():
    layer = TieredLayer(64, 32, "offload")
    append(layer, 24)
    first = torch.arange(8).expand(1, HEADS, 8)
    layer.retain(first, first[..., :0], 20)
    assert layer.recall_bytes == 0, "the first set was already on the device"
    layer.retain(first + 2, first[..., :0], 20)
    assert layer.num_new == 2 * HEADS and layer.recall_bytes == 2 * HEADS * 2 * DIM * 4


def test_bytes_are_those_of_the_tensors_in_use():
    layer = TieredLayer(64, 40, "offload")
    append(layer, 30)
    assert layer.nbytes == layer.full_nbytes == 2 * HEADS * 30 * DIM * 4
    layer.retain(choose(26, 6, 0), choose(26, 8, 1), 26)
    assert layer.nbytes == 2 * HEADS * 10 * DIM * 4 + HEADS * 8 * DIM * 4
    assert layer.host_nbytes == 2 * HEADS * 26 * DIM * 4
    assert layer.allocated_nbytes == 2 * HEADS * 40 * DIM * 4 + HEADS * 8 * DIM * 4


def test_drop_frees_the_prompt_sized_buffer():
    layer = TieredLayer(1000, 50, "drop")
    append(layer, 900)
    before = layer.allocated_nbytes
    layer.retain(choose(896, 40, 0), choose(896, 0, 0), 896)
    assert layer.allocated_nbytes == before * 50 // 1000 and layer.host_nbytes == 0


def test_a_cache_reports_kept_of_total_for_every_layer():
    cache = TieredCache(2, 32)
    for index, layer in enumerate(cache.layers):
        append(layer, 20)
        layer.retain(choose(16, 3 + index, 0), choose(16, 2, 0), 16)
    assert cache.kept_per_layer() == [
        {"critical": 7, "marginal": 2, "total": 20},
        {"critical": 8, "marginal": 2, "total": 20},
    ]
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)


@pytest.mark.parametrize("bus", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 9, 8)])
def test_layers_retained_together_are_what_each_is_alone(bus, sizes):
    alone, together = ([TieredLayer(64, 40, residency="offload") for _ in sizes] for _ in range(2))
    for layer in alone + together:
        layer.shares_memory = False if bus else None
        append(layer, 30)
    for step in range(4):
        start = alone[0].seen - 5
        plans = [Plan(choose(start, n, 10 * step + i), choose(start, 0, 0), start) for i, n in enumerate(sizes)]
        for layer, own in zip(alone, plans, strict=True):
            layer.retain(*own)
        for members in alike(dict(enumerate(together))).values():
            retain_alike(list(members.values()), [plans[i] for i in members], 0)
        for one, other in zip(alone, together, strict=True):
            assert_contents_match_positions(other)
            assert torch.equal(one.positions, other.positions)
            assert (one.num_new, one.recall_bytes) == (other.num_new, other.recall_bytes)
            append(one, 3), append(other, 3)
    assert all(layer.num_new for layer in together)


@pytest.mark.parametrize("residency", ["drop", "offload"])
def test_a_tail_that_keeps_its_place_moves_with_the_buffer(residency):
    layer = TieredLayer(64, 40, residency=residency)
    append(layer, 20)
    everything = torch.arange(15).expand(1, HEADS, -1)
    for _ in range(2):  # into another buffer, then within it
        layer.retain(everything, everything[..., :0], 15)
        assert layer.num_slots == 20 and layer.k.shape[2] == 40
        assert_contents_match_positions(layer)
