"""The target's own last attention beside what the draft predicts."""

import pytest
import torch
from conftest import policy_of, run_task

from specsmallkv import drafting, load_policy
from specsmallkv.backends import attention_probabilities
from specsmallkv.controller import dry_round
from specsmallkv.decode import Decoder
from specsmallkv.own_attention import LastQueries, blended
from specsmallkv.recall import AHEAD_SHARE
from specsmallkv.tiered_layer import TieredLayer

HEADS, GROUP, DIM, SCALING = 2, 2, 8, 0.35


@pytest.fixture
def layer():
    """10 kept of 40 tokens and a tail of 8, the last 4 of which a verify pass brought."""
    torch.manual_seed(0)
    layer = TieredLayer(64, 32, "offload")
    layer.update(*torch.randn(2, 1, HEADS, 44, DIM))
    kept = torch.stack([torch.randperm(40)[:10].sort().values for _ in range(HEADS)]).unsqueeze(0)
    layer.retain(kept, kept[..., :0], 40, room=4)
    layer.update(*torch.randn(2, 1, HEADS, 4, DIM))
    return layer


@pytest.mark.parametrize("accepted", [1, 3, 4])
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_only_queries_that_were_not_rolled_back_count(layer, accepted, reduction):
    queries = torch.randn(1, HEADS * GROUP, 4, DIM)
    last = LastQueries({0: queries}, layer.seen - 4)
    layer.rollback(4 - accepted)
    rows = attention_probabilities(queries[:, :, :accepted], layer.keys, SCALING)[0].mean(1).view(HEADS, GROUP, -1)
    expected = rows.amax(1) if reduction == "max" else rows.mean(1)
    assert torch.allclose(last.saliency(0, layer, SCALING, reduction), expected)


def test_a_share_goes_to_what_was_attended_and_the_rest_is_the_drafts(layer):
    last, predicted = LastQueries({0: torch.randn(1, HEADS * GROUP, 4, DIM)}, layer.seen - 4), torch.rand(1, HEADS, 48)
    mixed = blended(predicted, last, [layer], 0.25, SCALING, "max")[0]
    own = torch.zeros(HEADS, 48).scatter(1, layer.positions[0], last.saliency(0, layer, SCALING, "max"))
    assert torch.allclose(mixed, 0.75 * predicted[0] + 0.25 * own)
    evicted = [i for i in range(40) if i not in layer.kept_positions[0, 0]]
    assert torch.equal(mixed[0, evicted], 0.75 * predicted[0, 0, evicted]), "it knows nothing of what was not there"


def test_a_pass_of_which_nothing_is_left_decides_nothing(layer):
    predicted, last = torch.rand(1, HEADS, 48), LastQueries({0: torch.randn(1, 4, 4, DIM)}, layer.seen - 4)
    layer.rollback(4)
    for none in (last, LastQueries()):
        assert torch.equal(blended(predicted, none, [layer], 0.25, SCALING, "max"), predicted)


def new_a_round(target, draft, prompt, share, name="specsmallkv"):
    """Share of new entries, a mean over all rounds but the first, whose set is all new."""
    decoder = Decoder(target, draft, policy_of(name, kv_budget=0.25, own_share=share), 3)
    *_, (_, sequence) = decoder.generate(prompt, 24)
    new = sequence.counters.new_entries[1:]
    return sum(new) / len(new)


@pytest.mark.parametrize("name", ["specsmallkv", "specsmallkv in 8 bits"])
def test_a_larger_share_recalls_less(target, draft, prompt, drafts_are_believed, name):
    new = [new_a_round(target, draft, prompt, share, name) for share in (0.0, 0.5, 0.9)]
    assert new[0] > new[1] > new[2]


def test_a_share_of_zero_keeps_no_queries_and_one_set_a_query_never_does(target, draft, prompt, drafts_are_believed):
    cases = ({}, False), ({"own_share": 0.3, "selection": "query"}, False), ({"own_share": 0.3}, True)
    for options, asked in cases:
        decoder = Decoder(target, draft, load_policy("specsmallkv", kv_budget=0.25, **options), 3)
        *_, (_, sequence) = decoder.generate(prompt, 8)
        assert (sequence.evidence.last is not None) is asked
        if asked:
            shapes = {tuple(x.shape[:2]) for x in sequence.evidence.last.queries.values()}
            assert shapes == {(1, target.config.num_attention_heads)}
            assert sequence.held()["scratch_bytes"] > sequence.evidence.last.nbytes > 0


def test_the_queries_that_are_kept_count_as_scratch_planned_and_run(tmp_path):
    tiny = ["+model=tiny-random", "policy.kv_budget=0.3", "max_new_tokens=40", "ignore_eos=true", "chat=false"]
    text = "One two three, said the cat to the dog. " * 8
    shares, scratch = ("policy.own_share=0", "policy.own_share=0.3"), {}
    for task in ([f"prompt='{text}'"], ["task=plan", f"task.context_tokens={len(text)}"]):
        runs = [run_task(*tiny, "quiet=true", share, *task, f"run_dir={tmp_path}") for share in shares]
        scratch[task[0]] = runs[1]["scratch_bytes"] - runs[0]["scratch_bytes"]
    ran, planned = scratch.values()
    assert planned == 4 * ran > 0, "planned are those of a whole block, and the last pass had room for one query"


@torch.inference_mode()
def test_measuring_what_a_round_costs_leaves_the_last_queries_alone(target, draft, prompt):
    decoder = Decoder(target, draft, load_policy("specsmallkv", kv_budget=0.25, own_share=0.3), 3)
    *_, (_, sequence) = decoder.generate(prompt, 8)
    sequence.limit += 8
    last = sequence.evidence.last
    dry_round(decoder, sequence, 2)
    assert last.queries and sequence.evidence.last is last


def test_where_recall_begins_early_a_share_sends_less_ahead(target, draft, prompt, monkeypatch):
    asked = []
    monkeypatch.setattr(drafting, "recall_ahead", lambda layers, saliency, share: asked.append(share))
    for share in (0.0, 0.4):
        decoder = Decoder(target, draft, load_policy("specsmallkv", kv_budget=0.25, own_share=share), 3)
        for _, sequence in decoder.generate(prompt, 8):
            for layer in sequence.target.layers:
                layer.shares_memory = False
    assert set(asked) == {AHEAD_SHARE, 0.6 * AHEAD_SHARE}
