"""The tail term stands in for what was evicted, and rows of a block count by their chance."""

import pytest
import torch

from specsmallkv.attention import AttentionCall, AttentionRows, attend, attention_probabilities, reference_attention
from specsmallkv.cache import TieredLayer
from specsmallkv.tail_term import tail_term

H_Q, H_KV, DIM, N, SINKS, WINDOW, Q = 4, 2, 8, 60, 2, 5, 3


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


def read(layer, query, k, v, factor=1.0, pool=1.0):
    """Attention over the layer once the block's own K and V are there, with this tail term."""
    saliency = true_rows(query, k).unflatten(0, (H_KV, -1)).mean((1, 2))
    layer.tail_term = tail_term(true_rows(query, k), saliency, layer, SINKS, torch.full((H_Q,), factor), pool)
    layer.update(k[:, :, N - Q :], v[:, :, N - Q :])
    return attend(layer, 0, query, DIM**-0.5, AttentionCall("reference"))


def test_true_rows_with_all_evicted_values_pooled_are_full_attention(block):
    layer, query, k, v = block
    full = reference_attention(query, k, v, DIM**-0.5)
    torch.testing.assert_close(read(layer, query, k, v, factor=1.0, pool=100.0), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", [0.0, 0.5])
def test_equal_values_in_the_far_remainder_lose_nothing_by_their_mean(block, pool):
    layer, query, k, v = block
    evicted = torch.ones(H_KV, layer.tail_start, dtype=torch.bool).scatter(1, layer.kept_positions[0], False)
    saliency = true_rows(query, k).unflatten(0, (H_KV, -1)).mean((1, 2))[:, : layer.tail_start]
    near = saliency.masked_fill(~evicted, -1).topk(int(pool * layer.num_kept), dim=-1).indices
    far = evicted.scatter(1, near, False)
    for values in (v, layer.store_v):
        values[0, :, : layer.tail_start][far] = 0.5
    layer.older_value_sum = layer.store_v[:, :, : layer.tail_start].sum(dim=2)
    full = reference_attention(query, k, v, DIM**-0.5)
    torch.testing.assert_close(read(layer, query, k, v, factor=1.0, pool=pool), full, atol=1e-5, rtol=1e-5)


def test_the_sum_of_stored_values_follows_the_window(block):
    layer, _, _, v = block
    for tail_start in (layer.tail_start, layer.tail_start + 3):
        layer.retain(torch.tensor([[[0, 1], [0, 1]]]), torch.empty(1, H_KV, 0, dtype=torch.long), tail_start)
        torch.testing.assert_close(layer.older_value_sum, v[:, :, :tail_start].sum(dim=2))


def test_nothing_evicted_needs_no_tail_term(block):
    layer, query, k, _ = block
    everything = torch.arange(layer.tail_start).expand(1, H_KV, -1)
    layer.retain(everything, torch.empty(1, H_KV, 0, dtype=torch.long), layer.tail_start)
    assert tail_term(true_rows(query, k), torch.rand(H_KV, N), layer, SINKS, torch.ones(H_Q), 1.0) is None


def test_a_new_set_forgets_the_old_tail_term(block):
    layer, query, k, v = block
    read(layer, query, k, v, factor=1.0, pool=1.0)
    layer.rollback(Q)
    layer.retain(torch.tensor([[[0, 1], [0, 1]]]), torch.empty(1, H_KV, 0, dtype=torch.long), layer.tail_start)
    assert layer.tail_term is None


def test_rows_count_by_the_chance_that_the_draft_gives_them():
    rows = AttentionRows(1, 1, 3, 4, torch.device("cpu"))
    rows.start(1, 3)
    rows.buffer[0] = torch.eye(3, 4)
    for probability in (0.5, 0.2):
        rows.expect(probability)
    assert rows.mean(by_chance=True)[0].tolist() == pytest.approx([1 / 1.6, 0.5 / 1.6, 0.1 / 1.6, 0])
    assert rows.mean(by_chance=False)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    rows.start(1, 3)  # known tokens: nobody says how likely they are
    rows.buffer[0] = torch.eye(3, 4)
    assert torch.equal(rows.mean(by_chance=True), rows.mean(by_chance=False))


def test_heads_that_are_not_believed_read_what_is_kept_alone(block):
    layer, query, k, v = block
    plain = read(layer, query, k, v, factor=0.0)
    layer.tail_term = None
    expected = attend(layer, 0, query, DIM**-0.5, AttentionCall("reference"))
    torch.testing.assert_close(plain, expected, atol=1e-6, rtol=1e-6)
