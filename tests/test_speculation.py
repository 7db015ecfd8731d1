"""Acceptance is exact: greedy by match, sampled by distribution."""

import pytest
import torch

from specsmallkv.errors import UserError
from specsmallkv.sampling import Sampler
from specsmallkv.speculation import accept_greedy, accept_sampled, match_vocabulary, propose

VOCAB = 5


def one_hot_logits(tokens):
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float()


@pytest.mark.parametrize(
    "drafts, choices, accepted, following",
    [([1, 2, 3], [1, 2, 3, 4], 3, 4), ([1, 2, 3], [1, 0, 3, 4], 1, 0), ([1], [2, 3], 0, 2), ([], [2], 0, 2)],
)
def test_greedy_accepts_the_longest_matching_prefix_and_adds_one_token(drafts, choices, accepted, following):
    assert accept_greedy(drafts, one_hot_logits(choices)) == (accepted, following)


def distribution(seed, sharpness=1.5):
    return (sharpness * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("q_seed", [1, 2])
def test_sampled_acceptance_leaves_the_target_distribution_exact(q_seed):
    """Exact enumeration over drafts and coins: P(emit x) = q(x) min(1, p/q) + P(reject) residual(x) = p(x)."""
    p, q = distribution(0), distribution(q_seed)
    generator, runs = torch.Generator().manual_seed(0), 40_000
    counts = torch.zeros(VOCAB)
    target = torch.stack((p, distribution(9)))
    for draft in torch.multinomial(q, runs, replacement=True, generator=generator).tolist():
        accepted, following = accept_sampled([draft], [q], target, generator)
        counts[draft if accepted else following] += 1
    chi_square = ((counts - runs * p) ** 2 / (runs * p)).sum()
    assert chi_square < 18.5, f"chi-square with 4 degrees of freedom, p < 0.001: {chi_square}"


def test_a_draft_equal_to_the_target_is_always_accepted():
    p, generator = distribution(0), torch.Generator().manual_seed(0)
    for _ in range(200):
        token = int(torch.multinomial(p, 1, generator=generator))
        assert accept_sampled([token], [p], torch.stack((p, p)), generator)[0] == 1


def test_a_draft_the_target_excludes_is_never_emitted():
    p, q = torch.tensor([0.0, 0.5, 0.5, 0, 0]), torch.tensor([1.0, 0, 0, 0, 0])
    for seed in range(50):
        accepted, following = accept_sampled([0], [q], torch.stack((p, p)), torch.Generator().manual_seed(seed))
        assert accepted == 0 and following in (1, 2)


def test_padding_ids_of_the_larger_vocabulary_are_never_drafted():
    logits = match_vocabulary(torch.zeros(3), VOCAB)
    assert logits.shape == (VOCAB,) and logits[3:].eq(-torch.inf).all()
    token, probabilities = propose(logits, Sampler(1.0), torch.Generator().manual_seed(0))
    assert token < 3 and probabilities[3:].sum() == 0
    assert match_vocabulary(torch.zeros(8), VOCAB).shape == (VOCAB,)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0.3}])
def test_warping_equals_transformers(settings):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(settings.get("temperature", 0.7))(None, logits)
    if "top_k" in settings:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    ours = Sampler(**{"temperature": 0.7} | settings).probabilities(logits)
    torch.testing.assert_close(ours, expected.softmax(-1))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}])
def test_impossible_sampling_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampler(**bad)
