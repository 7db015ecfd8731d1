"""The head map recovers relations that are really there."""

import math
from itertools import chain

import pytest
import torch

from specsmallkv.matching import HeadMap, HeadMapFit, Prior, marginal_weights, nonnegative_least_squares

M, W, N, SINKS = 12, 8, 50, 4


def random_rows(heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(heads, W, N, generator=generator)).softmax(-1)


def fit(draft, layers, method):
    return sums(draft, layers).solve(method)


def sums(draft, layers):
    fit = HeadMapFit(SINKS, len(layers))
    fit.add_draft(draft)
    for index, rows in enumerate(layers):
        fit.add_layer(index, rows)
    return fit


@pytest.mark.parametrize("method", ["one_hot", "mixture"])
def test_identical_heads_in_another_order_are_recovered(method):
    draft = random_rows(M)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    head_map = fit(draft, [draft[order][:6], draft[order][6:]], method)
    assert head_map.weights.shape == (2, 6, M)
    assert torch.equal(head_map.weights.argmax(-1).flatten(), order)
    torch.testing.assert_close(head_map.similarity, torch.ones(2, 6), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head_map.predict(0, draft), draft[order][:6], atol=1e-3, rtol=1e-3)


def test_a_mixture_recovers_mixed_heads_better_than_one_head_can():
    draft = random_rows(M)
    true = torch.zeros(6, M)
    for h in range(6):
        true[h, [h, h + 3, h + 6]] = torch.tensor([0.5, 0.3, 0.2])
    target = torch.einsum("hm,mtn->htn", true, draft)
    mixture, one_hot = fit(draft, [target], "mixture"), fit(draft, [target], "one_hot")
    torch.testing.assert_close(mixture.weights[0], true, atol=1e-3, rtol=1e-3)
    assert (mixture.similarity > one_hot.similarity + 0.05).all()


def test_longer_and_longer_rows_leave_no_copies_of_the_weights_behind():
    head_map = fit(random_rows(M), [random_rows(6, seed=9)] * 3, "mixture")
    for length in range(1, 40):
        list(head_map.predictions(torch.rand(M, 1, length)))
    assert len(head_map._mixers) == 1


@pytest.mark.parametrize("method", ["one_hot", "mixture"])
def test_predictions_are_distributions(method):
    head_map = fit(random_rows(M), [random_rows(6, seed=9)], method)
    predicted = head_map.predict(0, random_rows(M, seed=2))
    assert (head_map.weights >= 0).all() and (predicted >= 0).all()
    torch.testing.assert_close(predicted.sum(-1), torch.ones(6, W))


def test_sinks_do_not_decide_the_match():
    draft, target = random_rows(M), random_rows(M)[:1]
    draft[3, :, 0], target[0, :, 0] = (
        50.0,
        50.0,
    )  # head 3 shares only the sink with the target's head, a copy of head 0
    assert fit(draft, [target], "one_hot").weights[0, 0].argmax() == 0


def test_group_saliency_is_the_mean_prediction_of_the_group():
    head_map = fit(random_rows(M), [random_rows(6, seed=4), random_rows(6, seed=5)], "mixture")
    rows = random_rows(M, seed=6)
    saliency = head_map.saliency(rows.mean(1), num_kv_heads=2)
    expected = torch.stack([head_map.predict(layer, rows).mean(1).view(2, 3, N).mean(1) for layer in range(2)])
    torch.testing.assert_close(saliency, expected)


@pytest.mark.parametrize("at_once", [1, 2 * 6 * 4 * N, 2**22])
def test_layers_that_share_a_product_predict_what_each_predicts_alone(at_once, monkeypatch):
    """History included, which two heads follow."""
    monkeypatch.setattr("specsmallkv.matching.AT_ONCE", at_once)
    own = torch.zeros(3, 6)
    own[0, 2], own[2, 5] = 1.0, 0.3
    head_map = HeadMap(torch.rand(3, 6, M).softmax(-1), torch.ones(3, 6), own)
    rows, history = random_rows(M, seed=6)[:, :4], torch.rand(3, 6, N - 2)
    predictions = list(chain.from_iterable(head_map.predictions(rows, history)))
    assert len(predictions) == 3
    for layer, predicted in enumerate(predictions):
        torch.testing.assert_close(predicted, head_map.predict(layer, rows, history[layer]))


def test_nonnegative_least_squares_meets_the_optimality_conditions():
    generator = torch.Generator().manual_seed(0)
    design, wanted = torch.randn(7, 30, 5, generator=generator), torch.randn(7, 30, 1, generator=generator)
    gram, correlation = design.mT @ design, (design.mT @ wanted).squeeze(-1)
    weights = nonnegative_least_squares(gram, correlation)
    gradient = (gram @ weights.unsqueeze(-1)).squeeze(-1) - correlation
    assert (weights >= 0).all() and (weights == 0).any() and (weights > 0).any()
    assert (gradient > -1e-3).all() and (gradient * weights).abs().max() < 1e-3


def test_a_head_that_nothing_resembles_still_gets_a_distribution():
    draft = random_rows(M)
    draft[..., SINKS:] = 0
    weights = fit(draft, [random_rows(6, seed=1)], "mixture").weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6))


def test_marginal_weights_are_probabilities_within_the_kept_and_marginal_tokens():
    predicted = random_rows(6)[:, :3]
    kept, marginal = torch.tensor([[[0, 5], [1, 7]]]), torch.tensor([[[2, 9, 11], [3, 4, 30]]])
    weights = marginal_weights(predicted, kept, marginal, 44, "renormalised")
    assert weights.shape == (1, 6, 3, 3)
    head, query = 4, 2  # second KV head
    among = predicted[head, query][[3, 4, 30, 1, 7, *range(44, N)]]
    torch.testing.assert_close(weights[0, head, query], predicted[head, query][[3, 4, 30]] / among.sum())
    raw = marginal_weights(predicted, kept, marginal, 44, "raw")
    torch.testing.assert_close(raw[0, head, query], predicted[head, query][[3, 4, 30]])


def test_head_map_predicts_with_the_weights_of_its_layer():
    weights = torch.eye(4).view(2, 2, 4)
    rows = torch.rand(4, 2, 3)
    assert torch.equal(HeadMap(weights, torch.ones(2, 2)).predict(1, rows), rows[2:])


def test_a_fit_over_chunks_of_the_window_is_the_fit_over_all_of_it():
    draft, layers = random_rows(M), [random_rows(6, seed=1), random_rows(6, seed=2)]
    chunked = HeadMapFit(SINKS, len(layers))
    for rows in (slice(0, 3), slice(3, W)):
        chunked.add_draft(draft[:, rows])
        for index, layer in enumerate(layers):
            chunked.add_layer(index, layer[:, rows])
    whole = fit(draft, layers, "mixture")
    torch.testing.assert_close(chunked.solve("mixture").weights, whole.weights, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(chunked.solve("mixture").similarity, whole.similarity, atol=1e-4, rtol=1e-4)


def test_a_group_keeps_what_one_of_its_heads_needs_under_max():
    weights = torch.eye(4).unsqueeze(0)  # each of four heads follows its own draft head
    head_map = HeadMap(weights, torch.ones(1, 4))
    rows = torch.eye(4, 6)
    largest, mean = (head_map.saliency(rows, 2, reduction) for reduction in ("max", "mean"))
    assert largest.tolist() == [[[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]]
    assert torch.equal(mean, largest / 2)


def test_a_head_that_the_draft_cannot_tell_falls_back_on_its_own_history(monkeypatch):
    monkeypatch.setattr("specsmallkv.matching.HISTORY_MARGIN", 0.05)
    draft, history = random_rows(M), random_rows(2, seed=3)[:, 0]
    target = torch.stack((history[:1].expand(W, -1), draft[3]))  # one head repeats itself, one follows the draft
    fit = HeadMapFit(SINKS, 1)
    fit.add_draft(draft)
    fit.add_layer(0, target, history)
    head_map = fit.solve("mixture")
    assert head_map.history_weights is not None
    assert head_map.history_weights.tolist() == [[1, 0]]
    torch.testing.assert_close(head_map.predict(0, draft, history), target, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(head_map.similarity, torch.ones(1, 2), atol=1e-3, rtol=0)
    assert fit.solve("one_hot").history_weights is None, "the paper's matching knows the draft alone"


def test_fits_of_several_texts_merge_into_the_fit_of_all_their_rows():
    texts = [(random_rows(M, seed=i), [random_rows(6, seed=10 + i), random_rows(6, seed=20 + i)]) for i in range(3)]
    merged, together = HeadMapFit(SINKS, 2), HeadMapFit(SINKS, 2)
    for draft, layers in texts:
        merged.merge(sums(draft, layers))
        together.add_draft(draft)
        for index, rows in enumerate(layers):
            together.add_layer(index, rows)
    assert merged.num_rows == 3 * W
    ours, theirs = merged.solve("mixture"), together.solve("mixture")
    torch.testing.assert_close(ours.weights, theirs.weights, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.similarity, theirs.similarity, atol=1e-3, rtol=0)


def test_a_saved_map_counts_as_so_many_rows_of_the_window():
    fit, saved = (
        sums(random_rows(M), [random_rows(6, seed=9)]),
        HeadMap(torch.eye(6, M)[None], torch.full((1, 6), 0.3)),
    )
    alone, own = fit.solve("mixture", Prior(saved, math.inf)), fit.solve("mixture")
    assert torch.equal(alone.weights, saved.weights) and torch.equal(alone.similarity, saved.similarity)
    half = fit.solve("mixture", Prior(saved, W))
    torch.testing.assert_close(half.weights, (own.weights + saved.weights) / 2)
    mostly = fit.solve("mixture", Prior(saved, 9 * W))
    torch.testing.assert_close(mostly.weights, 0.1 * own.weights + 0.9 * saved.weights)
    torch.testing.assert_close(mostly.similarity, 0.1 * fit.similarity_of(mostly.weights) + 0.9 * saved.similarity)


def test_one_hot_stays_one_hot_beside_a_saved_mixture():
    fit, saved = (
        sums(random_rows(M), [random_rows(6, seed=9)]),
        HeadMap(torch.full((1, 6, M), 1 / M), torch.ones(1, 6)),
    )
    weights = fit.solve("one_hot", Prior(saved, W)).weights
    assert torch.equal(weights, fit.solve("one_hot").weights)
