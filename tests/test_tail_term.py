"""The tail term stands in for what was evicted, and rows of a block count by their chance."""

import pytest
import torch
from pretend_device import AWAY, CROSSING, SecondDevice

from specsmallkv.attention import AttentionCall, AttentionRows, attend
from specsmallkv.backends import attention_probabilities, reference_attention
from specsmallkv.slots import value_sum
from specsmallkv.tail_term import tail_terms
from specsmallkv.tiered_layer import TieredLayer

H_Q, H_KV, DIM, N, SINKS, WINDOW, Q = 4, 2, 8, 60, 2, 5, 1


@pytest.fixture
def block():
    """A compressed layer with its verify block appended, the block's queries, and K and V of everything."""
    generator = torch.Generator().manual_seed(0)
    layer = TieredLayer(2 * N, resident_capacity=40, residency="offload")
    k, v = (torch.randn(1, H_KV, N, DIM, generator=generator) for _ in range(2))
    layer.update(k[:, :, : N - Q], v[:, :, : N - Q])
    tail_start = N - Q - WINDOW
    chosen = [[0, 1, *range(5 + h, 25 + h, 2)] for h in range(H_KV)]
    layer.retain(torch.tensor([chosen]), torch.empty(1, H_KV, 0, dtype=torch.long), tail_start)
    query = torch.randn(1, H_Q, Q, DIM, generator=generator)
    return layer, query, k, v


def true_rows(query, k):
    return attention_probabilities(query, k, DIM**-0.5)[0]


def term_of(layer, row, factor, pool, **limit):
    """From one row (H_q, N), which ranks too."""
    saliency = row.unflatten(0, (H_KV, -1)).mean(1)
    (term,) = tail_terms(row[None], saliency[None], [layer], SINKS, torch.full((1, H_Q), factor), pool, **limit)
    return term


def read(layer, query, k, v, factor=1.0, pool=1.0):
    """Attention over the layer once the block's own K and V are there, with this tail term."""
    layer.tail_term = term_of(layer, true_rows(query, k).mean(1), factor, pool)
    layer.update(k[:, :, N - Q :], v[:, :, N - Q :])
    return attend(layer, 0, query, DIM**-0.5, AttentionCall("reference"))


def test_true_rows_with_all_evicted_values_pooled_are_full_attention(block):
    layer, query, k, v = block
    full = reference_attention(query, k, v, DIM**-0.5)
    torch.testing.assert_close(read(layer, query, k, v, factor=1.0, pool=100.0), full, atol=1e-5, rtol=1e-5)


def test_odds_are_cut_to_their_limit_in_proportion(block):
    layer, query, k, _ = block
    row = true_rows(query, k).mean(1)
    free = term_of(layer, row, 3.0, 0.5).odds
    total = free.sum(-1, keepdim=True)
    limit = total.median().item()
    cut = term_of(layer, row, 3.0, 0.5, limit=limit).odds
    assert total.min() < limit < total.max()
    torch.testing.assert_close(cut, torch.where(total > limit, free * limit / total, free))
    assert term_of(layer, torch.zeros_like(row), 3.0, 0.5, limit=limit).odds.eq(0).all()


@pytest.mark.parametrize("pool", [0.0, 0.5])
def test_equal_values_in_the_far_remainder_lose_nothing_by_their_mean(block, pool):
    layer, query, k, v = block
    evicted = torch.ones(H_KV, layer.tail_start, dtype=torch.bool).scatter(1, layer.kept_positions[0], False)
    saliency = true_rows(query, k).unflatten(0, (H_KV, -1)).mean((1, 2))[:, : layer.tail_start]
    near = saliency.masked_fill(~evicted, -1).topk(int(pool * layer.num_kept), dim=-1).indices
    far = evicted.scatter(1, near, False)
    for values in (v, layer.store[1]):
        values[0, :, : layer.tail_start][far] = 0.5
    layer.older_value_sum = layer.store[1][:, :, : layer.tail_start].sum(dim=2)
    full = reference_attention(query, k, v, DIM**-0.5)
    torch.testing.assert_close(read(layer, query, k, v, factor=1.0, pool=pool), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 6, 7])
def test_a_sum_of_values_in_parts_is_the_sum(length, monkeypatch):
    monkeypatch.setattr("specsmallkv.slots.SUMMED", 3)
    values = torch.randn(1, H_KV, length, DIM).bfloat16()
    torch.testing.assert_close(value_sum(values), values.float().sum(dim=2))


def test_the_sum_of_stored_values_follows_the_window(block):
    layer, _, _, v = block
    for tail_start in (layer.tail_start, layer.tail_start + 3):
        layer.retain(torch.tensor([[[0, 1], [0, 1]]]), torch.empty(1, H_KV, 0, dtype=torch.long), tail_start)
        torch.testing.assert_close(layer.older_value_sum, v[:, :, :tail_start].sum(dim=2))


def test_nothing_evicted_needs_no_tail_term(block):
    layer, query, k, _ = block
    everything = torch.arange(layer.tail_start).expand(1, H_KV, -1)
    layer.retain(everything, torch.empty(1, H_KV, 0, dtype=torch.long), layer.tail_start)
    assert term_of(layer, true_rows(query, k).mean(1), 1.0, 1.0) is None


class Bus(SecondDevice):
    """Counts the numbers that cross it."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in CROSSING:
            self.moved += args[0].numel()
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_values_are_pooled_where_they_lie_and_only_the_pooled_ones_cross_the_bus(block):
    layer, query, k, _ = block
    row = true_rows(query, k).mean(1)
    expected = term_of(layer, row, 0.5, 3.0)
    saliency = row.unflatten(0, (H_KV, -1)).mean(1)
    with Bus() as bus:
        for name in ("k", "v", "kept_positions", "older_value_sum"):
            setattr(layer, name, getattr(layer, name).to(AWAY))
        away = (row[None].to(AWAY), saliency[None].to(AWAY))
        bus.moved = 0
        (term,) = tail_terms(*away, [layer], SINKS, torch.full((1, H_Q), 0.5).to(AWAY), 3.0)
        pooled = 3 * layer.num_kept
        assert bus.moved < H_KV * pooled * DIM, "fewer than the values that are pooled"
        torch.testing.assert_close(term.values.to("cpu"), expected.values)
        torch.testing.assert_close(term.odds.to("cpu"), expected.odds)


def test_a_new_set_forgets_the_old_tail_term(block):
    layer, query, k, v = block
    read(layer, query, k, v, factor=1.0, pool=1.0)
    layer.rollback(Q)
    layer.retain(torch.tensor([[[0, 1], [0, 1]]]), torch.empty(1, H_KV, 0, dtype=torch.long), layer.tail_start)
    assert layer.tail_term is None


def test_all_queries_of_a_block_take_the_same_odds_weighed_by_their_own_mass_beside_the_sinks(block):
    layer, query, k, _ = block
    term = term_of(layer, true_rows(query, k).mean(1), 0.5, 1.0)
    on_sinks, output = torch.rand(1, H_Q, 3, 1), torch.randn(1, H_Q, 3, DIM)
    together = term.add(output, on_sinks)
    for i in range(3):
        alone = term.add(output[:, :, i : i + 1], on_sinks[:, :, i : i + 1])
        torch.testing.assert_close(together[:, :, i : i + 1], alone)
    odds = term.odds[0, :, 0] * (1 - on_sinks[0, :, 1])
    expected = output[0, :, 1] + (odds[..., None] * term.values[0]).sum(1)
    torch.testing.assert_close(together[0, :, 1], expected / (1 + odds.sum(-1, keepdim=True)))


def test_layers_together_have_the_terms_that_each_has_alone():
    """Layers that keep different tokens, with heads that are believed by different shares."""
    generator, layers = torch.Generator().manual_seed(1), []
    for number in range(3):
        layer = TieredLayer(2 * N, resident_capacity=40, residency="offload")
        layer.update(*(torch.randn(1, H_KV, N, DIM, generator=generator) for _ in "kv"))
        chosen = [[0, 1, *range(5 + number + head, 25 + head, 3)][:8] for head in range(H_KV)]
        layer.retain(torch.tensor([chosen]), torch.empty(1, H_KV, 0, dtype=torch.long), N - WINDOW)
        layers.append(layer)
    rows = torch.rand(3, H_Q, N, generator=generator).softmax(-1)
    saliency, factor = torch.rand(3, H_KV, N, generator=generator), torch.rand(3, H_Q, generator=generator)
    together = tail_terms(rows, saliency, layers, SINKS, factor, 1.5)
    for i, term in enumerate(together):
        one = slice(i, i + 1)
        (alone,) = tail_terms(rows[one], saliency[one], layers[one], SINKS, factor[one], 1.5)
        torch.testing.assert_close(term.odds, alone.odds)
        torch.testing.assert_close(term.values, alone.values)


def test_rows_count_by_the_chance_that_the_draft_gives_them():
    rows = AttentionRows(1, 1, 3, 4, torch.device("cpu"))
    rows.start(1, 3)
    rows.buffer[0] = torch.eye(3, 4)
    for probability in (0.5, 0.2):
        rows.expect(probability)
    assert rows.mean(by_chance=True, num_rows=3)[0].tolist() == pytest.approx([1 / 1.6, 0.5 / 1.6, 0.1 / 1.6, 0])
    assert rows.mean(by_chance=False, num_rows=3)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    rows.start(1, 3)  # known tokens: nobody says how likely they are
    rows.buffer[0] = torch.eye(3, 4)
    assert torch.equal(rows.mean(by_chance=True, num_rows=3), rows.mean(by_chance=False, num_rows=3))


def test_heads_that_are_not_believed_read_what_is_kept_alone(block):
    layer, query, k, v = block
    plain = read(layer, query, k, v, factor=0.0)
    layer.tail_term = None
    expected = attend(layer, 0, query, DIM**-0.5, AttentionCall("reference"))
    torch.testing.assert_close(plain, expected, atol=1e-6, rtol=1e-6)
