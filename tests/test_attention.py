"""Attention over tiers against the plainest possible formula, in float32."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from specsmallkv import backends
from specsmallkv.attention import AttentionCall, AttentionMass, AttentionRows, attend, use_tiered_attention
from specsmallkv.backends import BACKENDS, FOLD_LIMIT, attention_probabilities, choose_backend
from specsmallkv.cache import TieredCache
from specsmallkv.errors import UserError
from specsmallkv.matching import marginal_weights
from specsmallkv.tiered_layer import TieredLayer

H_Q, H_KV, DIM, SCALE = 6, 2, 8, 8**-0.5


def textbook(query, keys, values):
    """One query and one head at a time; query i of q sees the first n - q + i + 1 keys."""
    q, n, group = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    out = torch.zeros_like(query)
    for h in range(query.shape[1]):
        for i in range(q):
            end = n - q + i + 1
            k, v = keys[0, h // group, :end], values[0, h // group, :end]
            out[0, h, i] = (query[0, h, i] @ k.T * SCALE).softmax(-1) @ v
    return out


def random_qkv(q, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, h, length, DIM, generator=generator) for h, length in ((H_Q, q), (H_KV, n), (H_KV, n))]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("q, n", [(1, 9), (4, 9), (9, 9), (FOLD_LIMIT + 6, FOLD_LIMIT + 6), (FOLD_LIMIT + 6, 90)])
def test_backends_equal_the_textbook(backend, q, n):
    query, keys, values = random_qkv(q, n)
    out = BACKENDS[backend](query, keys, values, SCALE)
    torch.testing.assert_close(out, textbook(query, keys, values), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("q, n", [(1, 9), (4, 90), (90, 90)])
def test_flash_attention_equals_sdpa(q, n):
    pytest.importorskip("flash_attn")
    query, keys, values = (x.cuda().to(torch.bfloat16) for x in random_qkv(q, n))
    out = BACKENDS["flash"](query, keys, values, SCALE)
    torch.testing.assert_close(out, BACKENDS["sdpa"](query, keys, values, SCALE), atol=2e-2, rtol=2e-2)


def test_scores_are_the_same_inside_inference_mode_and_then_outside_it():
    """bf16 keys are widened into a buffer of the thread; where that is made must not bind who uses it next."""
    query, keys, _ = (x.bfloat16() for x in random_qkv(2, 9))

    def scores():
        return attention_probabilities(query, keys.clone().requires_grad_(), SCALE).detach()

    def inside_then_outside():  # in a thread of its own, which has no buffer yet
        with torch.inference_mode():
            inside = scores().clone()
        assert torch.equal(inside, scores())
        assert not attention_probabilities(query, keys, SCALE).requires_grad  # nor keeps the last call's graph alive
        with torch.inference_mode():
            assert torch.equal(inside, scores())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(inside_then_outside).result()


@pytest.mark.parametrize("n", [backends.LONG - 1, backends.LONG])
@pytest.mark.parametrize("arithmetic", [True, False])
def test_many_16_bit_values_are_multiplied_as_they_are_where_the_cpu_can(monkeypatch, n, arithmetic):
    generator, widened = torch.Generator().manual_seed(0), []
    weights = torch.rand(1, H_Q, 3, n, generator=generator).softmax(-1)
    values = torch.randn(1, H_KV, n, DIM, generator=generator).bfloat16()
    exact = (weights.double().view(1, H_KV, -1, n) @ values.double()).view(1, H_Q, 3, DIM)

    def noted(rows, stored, original=backends.widened):
        widened.append(stored)
        return original(rows, stored)

    monkeypatch.setattr(backends, "has_arithmetic", lambda _: arithmetic)
    monkeypatch.setattr(backends, "widened", noted)
    out = backends.weighted_values(weights, values)
    assert out.dtype == values.dtype and bool(widened) == (not arithmetic or n < backends.LONG)
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-2)


def filled_layer(keys, values):
    layer = TieredLayer(keys.shape[2])
    layer.update(keys, values)
    return layer


def test_rows_are_the_attention_probabilities_and_zero_beyond_the_query():
    query, keys, values = random_qkv(3, 12)
    rows = AttentionRows(num_layers=2, num_heads=H_Q, num_rows=3, length=20, device=keys.device)
    rows.buffer.fill_(7)  # stale content of an earlier round
    rows.start(9, 3)
    attend(filled_layer(keys, values), 1, query, SCALE, AttentionCall("reference", rows=rows))
    recorded = rows.values[H_Q:]
    assert recorded.shape == (H_Q, 3, 12)
    torch.testing.assert_close(recorded.sum(-1), torch.ones(H_Q, 3))
    assert recorded[:, 0, 10:].eq(0).all() and recorded[:, 1, 11:].eq(0).all()
    torch.testing.assert_close(recorded, attention_probabilities(query, keys, SCALE)[0])


@pytest.mark.parametrize("written_out", [8, 4])  # the queries that are not recorded take the same way, or their own
def test_recording_changes_no_output_and_records_only_the_rows_asked_for(written_out, monkeypatch):
    monkeypatch.setattr("specsmallkv.attention.WRITTEN_OUT", written_out)
    query, keys, values = random_qkv(5, 12)
    plain = attend(filled_layer(keys, values), 0, query, SCALE, AttentionCall())
    for first in (7, 10):  # all five queries, or the last two
        rows = AttentionRows(1, H_Q, 12 - first, 12, keys.device)
        rows.start(first, 12 - first)
        out = attend(filled_layer(keys, values), 0, query, SCALE, AttentionCall(rows=rows))
        torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)
        alone = attention_probabilities(query, keys, SCALE)[0, :, first - 12 :]
        torch.testing.assert_close(rows.values, alone)


def recorded_last(layer, query):
    """Output and row of the last query, where it alone is recorded."""
    rows = AttentionRows(1, H_Q, 1, layer.seen, query.device)
    rows.start(layer.seen - 1, 1)
    return attend(layer, 0, query, SCALE, AttentionCall(rows=rows)), rows.values


def test_recording_some_rows_takes_nothing_from_what_marginal_tokens_add():
    query, keys, values = random_qkv(3, 12)
    layer = filled_layer(keys, values)
    layer.retain(torch.tensor([[[0, 1], [0, 2]]]), torch.tensor([[[3], [4]]]), 8)
    layer.marginal_weights = torch.full((1, H_Q, 3, 1), 0.2)
    plain = attend(layer, 0, query, SCALE, AttentionCall())
    torch.testing.assert_close(recorded_last(layer, query)[0], plain, atol=1e-6, rtol=1e-5)


def test_recording_some_rows_keeps_to_a_sliding_window():
    query, keys, values = random_qkv(3, 12)
    layer = TieredLayer(12, window=5)
    layer.update(keys, values)
    plain = attend(layer, 0, query, SCALE, AttentionCall())
    out, row = recorded_last(layer, query)
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)
    assert row[..., :7].eq(0).all() and row[..., 7:].gt(0).all()


def test_the_last_queries_are_kept_across_chunks():
    query, keys, values = random_qkv(8, 8)
    layer, call = TieredLayer(8), AttentionCall(num_queries=5)
    for part in (slice(0, 6), slice(6, 8)):
        layer.update(keys[:, :, part], values[:, :, part])
        attend(layer, 0, query[:, :, part], SCALE, call)
    assert torch.equal(call.queries[0], query[:, :, 3:])


def columns(query, keys):
    """Attention received by each key, mean over the group: (1, H_kv, n)."""
    return attention_probabilities(query, keys, SCALE).sum(2).unflatten(1, (H_KV, -1)).mean(2)


@pytest.mark.parametrize("block", [1, H_Q * 12 * 5, 2**20])
def test_mass_is_the_column_sum_of_all_queries_however_they_are_cut(block, monkeypatch):
    monkeypatch.setattr("specsmallkv.attention.MASS_BLOCK", block)
    query, keys, values = random_qkv(12, 12)
    layer, call = TieredLayer(20), AttentionCall(mass=AttentionMass(20))
    for part in (slice(0, 7), slice(7, 12)):
        layer.update(keys[:, :, part], values[:, :, part])
        attend(layer, 0, query[:, :, part], SCALE, call)
    torch.testing.assert_close(call.mass.sums[0][..., :12], columns(query, keys))
    assert call.mass.sums[0][..., 12:].eq(0).all()


def test_mass_counts_a_query_once_and_never_a_rejected_one():
    query, keys, values = random_qkv(12, 12)
    layer, mass = TieredLayer(20), AttentionMass(20)
    layer.update(keys[:, :, :8], values[:, :, :8])
    attend(layer, 0, query[:, :, :8], SCALE, AttentionCall(mass=mass))
    layer.rollback(3)  # a window that is read again
    layer.update(keys[:, :, 5:8], values[:, :, 5:8])
    attend(layer, 0, query[:, :, 5:8], SCALE, AttentionCall(mass=mass))
    torch.testing.assert_close(mass.sums[0][..., :8], columns(query[:, :, :8], keys[:, :, :8]))
    for first, last in ((8, 11), (10, 12)):  # two passes, the last token of each is rejected
        layer.update(keys[:, :, first:last], values[:, :, first:last])
        mass.pending = {0: query[:, :, first:last]}
        layer.rollback(1)
        mass.commit([layer])
    assert layer.seen == 11
    mass.count([layer], SCALE)
    mass.count([layer], SCALE)
    torch.testing.assert_close(mass.sums[0][..., :11], columns(query[:, :, :11], keys[:, :, :11]))


def test_mass_of_evicted_tokens_stands_still_and_the_others_grow_where_they_belong():
    query, keys, values = random_qkv(3, 12)
    layer, mass = filled_layer(keys[:, :, :9], values[:, :, :9]), AttentionMass(12)
    layer.capacity = 12
    kept = torch.tensor([[[0, 2, 4], [1, 2, 5]]])
    layer.retain(kept, kept[..., :0], 6)
    layer.update(keys[:, :, 9:], values[:, :, 9:])
    mass._counted[0], mass.pending = 9, {0: query}
    mass.sums[0] = torch.zeros(1, H_KV, 12)
    mass.commit([layer])
    mass.count([layer], SCALE)
    assert (mass.sums[0] > 0).sum(-1).eq(9).all() and mass.sums[0].gather(2, layer.positions).gt(0).all()
    torch.testing.assert_close(mass.sums[0].gather(2, layer.positions), columns(query, layer.keys))


@pytest.mark.parametrize("q", [1, 4])
def test_compensation_by_the_true_attention_with_nothing_evicted_is_full_attention(q):
    """Invariant 3: every older token is critical or marginal and the oracle is right, so nothing is lost."""
    n, window = 40, 6
    query, keys, values = random_qkv(q, n)
    layer = TieredLayer(n)
    layer.update(keys[:, :, : n - q], values[:, :, : n - q])
    older = n - q - window
    split = torch.rand(1, H_KV, older, generator=torch.Generator().manual_seed(5)).argsort(-1)
    critical, marginal = split[..., :10].sort(-1).values, split[..., 10:].sort(-1).values
    layer.retain(critical, marginal, older)
    layer.update(keys[:, :, n - q :], values[:, :, n - q :])
    true_rows = attention_probabilities(query, keys, SCALE)[0]
    layer.marginal_weights = marginal_weights(
        true_rows, layer.kept_positions, layer.marginal_positions, layer.tail_start, "renormalised"
    )
    out = attend(layer, 0, query, SCALE, AttentionCall("reference"))
    torch.testing.assert_close(out, textbook(query, keys, values), atol=1e-5, rtol=1e-5)
    layer.marginal_weights = None
    plain = attend(layer, 0, query, SCALE, AttentionCall("reference"))
    assert (plain - textbook(query, keys, values)).abs().max() > 1e-2, "without it much is lost"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_over_the_tiered_cache_equal_transformers_own(architecture):
    model, ids = (
        tiny_model(architecture),
        torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(0)),
    )
    with torch.inference_mode():
        expected = model(ids).logits
        use_tiered_attention(model)
        cache = TieredCache(model.config.num_hidden_layers, 40)
        chunks = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 25), (25, 36), (36, 37), (37, 40))]
        torch.testing.assert_close(torch.cat(chunks, 1), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)  # any other cache still works


def test_a_backend_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"needs the package triton; pip install 'specsmallkv\[triton\]'"):
        choose_backend("triton", torch.device("cpu"))


@pytest.mark.parametrize(
    "requested, problem",
    [("flash", "needs a CUDA device"), ("triton", "or set TRITON_INTERPRET=1"), ("nope", "is unknown")],
)
def test_a_backend_that_cannot_run_is_refused_with_the_remedy(requested, problem, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=problem):
        choose_backend(requested, torch.device("cpu"))
