"""A head for some of the vocabulary: the same logits where it has rows, never a proposal elsewhere, exact decoding."""

import pytest
import torch
from conftest import VOCAB, tiny_model

from specsmallkv import random_model
from specsmallkv.batch import BatchDecoder, Job
from specsmallkv.decode import Decoder
from specsmallkv.linear import linear_layers
from specsmallkv.presets import load_policy
from specsmallkv.sampling import Sampler
from specsmallkv.speculation import accept_sampled, match_vocabulary, propose
from specsmallkv.trimmed_head import (
    ContextTokens,
    context_logits,
    context_tokens,
    frequent_tokens,
    trim_head,
    whole_head,
)

IDS = torch.tensor([3, 5, 40, 41, 95])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_are_the_full_heads_where_it_has_rows_and_minus_infinity_elsewhere(architecture):
    model, prompt = tiny_model(architecture), torch.arange(12)[None]
    full = model(prompt).logits
    trim_head(model, IDS)
    trimmed = model(prompt).logits
    assert trimmed.shape == full.shape
    torch.testing.assert_close(trimmed[..., IDS], full[..., IDS])
    outside = [i for i in range(VOCAB) if i not in IDS.tolist()]
    assert trimmed[..., outside].eq(-torch.inf).all()
    assert match_vocabulary(trimmed, VOCAB + 8).shape[-1] == VOCAB + 8


def test_the_head_can_be_packed_like_any_linear_layer():
    model = tiny_model()
    trim_head(model, IDS)
    assert (model.lm_head, "known", model.lm_head.known) in linear_layers(model)


def test_the_embeddings_keep_every_token():
    model = tiny_model()
    trim_head(model, IDS)
    assert len(model.get_input_embeddings().weight) == VOCAB and len(model.get_output_embeddings().weight) == len(IDS)


@pytest.mark.parametrize("settings", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 3, "temperature": 0.01}])
def test_a_token_without_a_row_is_never_proposed(settings):
    model = tiny_model()
    trim_head(model, IDS)
    logits, generator = model(torch.arange(12)[None]).logits[0, -1], torch.Generator().manual_seed(0)
    sampler = Sampler(**{"temperature": 1.5} | settings)
    assert all(propose(logits, sampler, generator)[0] in IDS.tolist() for _ in range(200))
    assert propose(logits, Sampler(), generator)[0] in IDS.tolist()


def test_sampling_from_a_target_with_more_tokens_stays_exact():
    """Half of the target's mass lies on tokens that the draft cannot propose."""
    generator, runs = torch.Generator().manual_seed(0), 40_000
    target = torch.tensor([0.3, 0.2, 0.25, 0.15, 0.1])
    known = torch.full((5,), -torch.inf).index_copy_(0, torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    counts = torch.zeros(5)
    for _ in range(runs):
        token, distribution = propose(known, Sampler(temperature=1.0), generator)
        accepted, following = accept_sampled([token], [distribution], torch.stack((target, target)), generator)
        counts[token if accepted else following] += 1
    chi_square = ((counts - runs * target) ** 2 / (runs * target)).sum()
    assert chi_square < 18.5, f"chi-square with 4 degrees of freedom, p < 0.001: {chi_square}"


def test_the_most_frequent_tokens_are_chosen_and_special_ones_always():
    text, answers = [[7] * 70, [2] * 40, [9] * 3], [[5, 5, 2]]
    assert frequent_tokens([text], 3, 12, always={11}).tolist() == [2, 7, 11]
    assert frequent_tokens([text, answers], 4, 12, always={11}).tolist() == [2, 5, 7, 11]  # kinds count alike
    assert frequent_tokens([text], 6, 12, always={11}).tolist() == [0, 1, 2, 7, 9, 11]  # then the lowest ids
    assert frequent_tokens([text, []], 3, 12, always=set()).tolist() == [2, 7, 9]


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_tokens_of_the_context_have_the_full_heads_logits_too(architecture):
    source = f"random:{architecture}?layers=2&hidden=64&heads=4&kv_heads=2"
    model, prompt = random_model.build(source, torch.float32), torch.arange(12)[None]
    full = model(prompt).logits[0].detach()
    trim_head(model, IDS, keep_full=True)
    context = context_tokens(model)
    context.follow([5, 7, 7, 50])
    hidden = model.base_model(prompt)[0][0, -1:].detach()
    (logits,) = context_logits(model, hidden, [context], [[5, 7, 7, 50, 9]])
    known = [*IDS.tolist(), 7, 50, 9]
    torch.testing.assert_close(logits[known], full[-1, known])
    assert logits[[i for i in range(len(logits)) if i not in known]].eq(-torch.inf).all()


def test_a_sequence_that_goes_back_loses_what_it_no_longer_holds():
    model = tiny_model()
    trim_head(model, IDS, keep_full=True)
    context = ContextTokens(model.lm_head)
    context.follow([7, 50, 9])
    context.follow([7, 50])
    context.follow([7, 50, len(model.lm_head.full) + 3])  # pads the target's vocabulary
    assert context.ids.tolist() == [7, 50] and context.rows.shape == (2, model.config.hidden_size)
    assert context.nbytes == context.rows.nbytes


def test_a_head_without_the_other_rows_adds_none():
    model = tiny_model()
    assert context_tokens(model) is None and context_tokens(None) is None
    trim_head(model, IDS)
    assert context_tokens(model) is None


@pytest.fixture
def cut_pair():
    target, draft = tiny_model(), tiny_model(layers=1, heads=2, kv_heads=1, seed=1)
    trim_head(draft, IDS, keep_full=True)
    return target, draft


@pytest.mark.parametrize("name", ["full", "specsmallkv"])
def test_drafts_are_of_the_head_or_of_the_sequence_alone_and_in_a_batch(cut_pair, name):
    policy = load_policy(name, kv_budget=0.4, evict_block=16, window_size=8)
    prompts = [list(range(10, 70)), list(range(60, 90)), [3, 5, 77] * 9]
    alone = []
    for prompt in prompts:
        rounds = list(Decoder(*cut_pair, policy, 3).generate(prompt, 24))
        tokens = list(prompt)
        for round_, _ in rounds:
            assert set(round_.drafts) <= {*IDS.tolist(), *tokens}
            tokens += round_.tokens
        alone.append([round_ for round_, _ in rounds])
        assert set().union(*(round_.drafts for round_, _ in rounds)) - set(IDS.tolist()), "the context was of use"
    batch, together = BatchDecoder(Decoder(*cut_pair, policy, 3), 2), {0: [], 1: [], 2: []}
    for row, round_ in batch.generate([Job(prompt, 24) for prompt in prompts]):
        together[row.number].append(round_)
    assert list(together.values()) == alone


def test_a_smaller_vocabulary_of_the_draft_changes_no_text(cut_pair):
    target, _ = cut_pair
    prompt, full = list(range(10, 70)), tiny_model(layers=1, heads=2, kv_heads=1, seed=1)
    policy = load_policy("full")
    texts = [list(Decoder(target, draft, policy, 3).generate(prompt, 24)) for draft in (full, cut_pair[1])]
    ours, theirs = ([token for round_, _ in rounds for token in round_.tokens] for rounds in texts)
    assert ours == theirs


def test_a_sequence_of_the_same_length_with_another_end_is_another_one():
    model = tiny_model()
    trim_head(model, IDS, keep_full=True)
    context = ContextTokens(model.lm_head)
    context.follow([7, 50])
    context.follow([7, 60, 9])
    assert sorted(context.ids.tolist()) == [7, 9, 60]


def test_the_whole_head_is_there_for_those_who_know_no_context():
    full, cut, prompt = tiny_model(), tiny_model(), torch.arange(12)[None]
    assert whole_head(cut) is None
    trim_head(cut, IDS, keep_full=True)
    cut.set_output_embeddings(whole_head(cut))
    torch.testing.assert_close(cut(prompt).logits, full(prompt).logits)


def sampled_rounds(pair, policy, seed):
    decoder = Decoder(*pair, policy, 3, Sampler(temperature=1.0))
    return [round_ for round_, _ in decoder.generate(list(range(10, 70)), 24, seed=seed)]


def test_a_sampled_row_of_a_batch_proposes_from_its_own_context(cut_pair):
    policy = load_policy("snapkv", kv_budget=0.4, evict_block=16, window_size=8)
    jobs = [Job(list(range(10, 70)), 24, seed=seed) for seed in (0, 1)]
    together = {0: [], 1: []}
    for row, round_ in BatchDecoder(Decoder(*cut_pair, policy, 3, Sampler(temperature=1.0)), 2).generate(jobs):
        together[row.number].append(round_)
    assert [together[0], together[1]] == [sampled_rounds(cut_pair, policy, seed) for seed in (0, 1)]


def test_a_set_of_each_query_is_exact_with_a_smaller_vocabulary(cut_pair):
    policy = load_policy("specsmallkv", kv_budget=0.4, evict_block=16, window_size=8, selection="query")
    texts = [list(Decoder(*cut_pair, policy, k).generate(list(range(10, 70)), 24)) for k in (0, 3)]
    ours, theirs = ([token for round_, _ in rounds for token in round_.tokens] for rounds in texts)
    assert ours == theirs
