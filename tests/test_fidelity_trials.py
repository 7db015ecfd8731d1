"""A trial of task=fidelity begins where decoding of the same prompt begins, and all trials share their passes."""

import itertools

import pytest
import torch

from specsmallkv import SpecSmallKV, load_policy
from specsmallkv.controller import Controller
from specsmallkv.decode import Decoder
from specsmallkv.oracle import LOOKAHEADS
from specsmallkv.tasks.fidelity_results import mean
from specsmallkv.tasks.grid import neediest
from specsmallkv.trials import Block, advance, open_trial, prefill_once, read_on

TARGET = "random:llama?layers=3&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
NAMES = ("streaming_llm", "snapkv", "pyramidkv", "h2o", "smallkv")


@pytest.fixture(scope="module")
def trials():
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    text = torch.randint(1, 320, (260,), generator=torch.Generator().manual_seed(0)).tolist()
    policies = [load_policy(name, kv_budget=0.3) for name in NAMES]
    with torch.inference_mode():
        base = prefill_once(spec, policies[-1], text, 240, policies)  # h2o needs what the base's policy does not
        return spec, text[:240], {policy.name: open_trial(base, policy) for policy in policies}


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_keeps_the_tokens_that_decoding_keeps(trials, name):
    spec, prompt, opened = trials
    decoder = Decoder(spec.pair.target, spec.pair.draft, opened[name].policy, 3)
    with torch.inference_mode():
        sequence = decoder.start(prompt, 20)
        sequence.tokens.append(int(decoder.prefill(sequence).argmax()))
        decoder.settle(sequence)
    assert_same_tokens(opened[name].sequence, sequence)
    assert all(layer.num_slots < 240 for layer in sequence.target.layers)


def assert_same_tokens(one, other):
    for ours, theirs in zip(one.target.layers, other.target.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.marginal_positions, theirs.marginal_positions)
        assert ours.k.shape == theirs.k.shape


@pytest.mark.parametrize("name", ["snapkv", "smallkv", "smallkv_paper"])
@pytest.mark.parametrize(
    "options", [{"window_size": 9}, {"num_sink_tokens": 1}, {"window_size": 9, "num_sink_tokens": 0}]
)
@torch.inference_mode()
def test_a_trial_with_a_narrower_window_or_other_sinks_than_its_neighbours_is_still_its_own(name, options):
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    text = torch.randint(1, 320, (260,), generator=torch.Generator().manual_seed(0)).tolist()
    policies = [load_policy(name, kv_budget=0.3, **options), load_policy("smallkv", kv_budget=0.4)]
    policies.append(load_policy("specsmallkv", kv_budget=0.4, observation_size=70))
    base = prefill_once(spec, neediest(policies), text, 240, policies)
    opened = [open_trial(base, policy) for policy in (*policies, policies[0])]  # none leaves a trace in the base
    for trial in opened:
        decoder = Decoder(spec.pair.target, spec.pair.draft, trial.policy, 3)
        sequence = decoder.start(text[:240], 20)
        sequence.tokens.append(int(decoder.prefill(sequence).argmax()))
        decoder.settle(sequence)
        assert_same_tokens(trial.sequence, sequence)
        assert trial.policy.every_round or trial.sequence.target.layers[0].num_slots < 240
        own, theirs = trial.sequence.evidence, sequence.evidence
        assert {i: x.shape for i, x in own.frozen.items()} == {i: x.shape for i, x in theirs.frozen.items()}
        if own.oracle:
            assert own.oracle.block is base.sequence.evidence.oracle.block
            assert own.oracle._fit.num_rows == theirs.oracle._fit.num_rows
            torch.testing.assert_close(
                own.oracle.head_map.weights, theirs.oracle.head_map.weights, atol=1e-3, rtol=1e-3
            )


@torch.inference_mode()
def test_the_full_cache_in_bfloat16_is_at_distance_zero_from_itself_in_every_block():
    """Its trial and the reference are rows of the same passes, so that rounding is no distance."""
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="bfloat16")
    text = torch.randint(1, 320, (160,), generator=torch.Generator().manual_seed(1)).tolist()
    policies = [load_policy(name, kv_budget=0.4, evict_block=8) for name in ("snapkv", "full", "oracle")]
    base = prefill_once(spec, policies[0], text, 120, policies)
    trials = [open_trial(base, policy) for policy in (load_policy("full"), *policies)]
    position = 120
    for count in (4, 4, 2, 1, 3, 2):  # scored of a block of up to 4; the rest is rolled back
        drafts = text[position + 1 : position + min(4, 8 - position % 8)]
        advance(base, trials, text, Block(position, drafts, count, proposed=True, measure=True))
        position += count
    reference, snapkv, full, oracle = trials
    assert reference.scores.kl == full.scores.kl == [0.0] * 16
    assert 0 < mean(oracle.scores.kl) < mean(snapkv.scores.kl)
    assert mean(full.recall[-1]) == pytest.approx(1) and mean(snapkv.recall[-1]) < mean(oracle.recall[-1]) < 1


@torch.inference_mode()
def test_gold_blocks_are_the_text_and_drafted_ones_the_drafts_cut_where_any_policy_evicts():
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    text = torch.randint(1, 320, (160,), generator=torch.Generator().manual_seed(1)).tolist()
    policies = [load_policy("smallkv", kv_budget=0.4), load_policy("snapkv", kv_budget=0.4, evict_block=6)]
    base = prefill_once(spec, policies[0], text, 120, policies)
    assert base.draft(text, 120, gold=True) == text[121:124]
    base.rewind(120)
    drafted = base.draft(text, 120, gold=False)
    assert drafted != text[121:124] and len(drafted) == 3
    chances = base.sequence.evidence.oracle.block.chances
    assert len(chances) == 4 and all(a > b for a, b in itertools.pairwise(chances)), "of each row to come to be"
    base.rewind(120)
    assert base.draft(text, 120, gold=False) == drafted, "a rewound draft has forgotten the block"
    base.rewind(123)
    assert len(base.draft(text, 123, gold=True)) == 2, "snapkv evicts at 126"


@pytest.mark.parametrize("name", ["specsmallkv", "drafted", "first", "query", "smallkv", "oracle"])
@torch.inference_mode()
def test_a_trial_scores_what_decoding_verifies_though_it_reads_no_rejected_draft(name):
    variants = {"query": {"selection": "query"}} | {kind: {"lookahead": kind} for kind in ("drafted", "first")}
    policy = load_policy("specsmallkv", **variants[name]) if name in variants else load_policy(name)
    policy.kv_budget = 0.3
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    text = torch.randint(1, 320, (260,), generator=torch.Generator().manual_seed(0)).tolist()
    base = prefill_once(spec, policy, text, 240, [policy])
    full, trial, scored = open_trial(base, load_policy("full")), open_trial(base, policy), []
    trial.score = lambda logits, *rest: scored.append(logits)
    drafts = base.draft(text, 240, gold=False)
    block = Block(240, drafts, 2, proposed=True, measure=True)  # as if the first draft were the text
    advance(base, [full, trial], text, block)

    decoder = Decoder(spec.pair.target, spec.pair.draft, policy, 3)
    sequence = decoder.start(text[:240], 20)
    decoder.prefill(sequence)
    decoder.settle(sequence)
    sequence.tokens.append(text[240])
    assert decoder.draft(sequence, torch.Generator())[0] == drafts
    decoder.plan(sequence, drafts)
    verified = decoder.verify(sequence, drafts)
    assert len(drafts) == 3 and scored[0].shape[0] == 2
    torch.testing.assert_close(scored[0], verified[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("others", [["smallkv"], ["specsmallkv", "snapkv"]])
@torch.inference_mode()
def test_a_trial_asks_its_own_last_queries_whatever_policy_the_base_has(others):
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    text = torch.randint(1, 320, (270,), generator=torch.Generator().manual_seed(0)).tolist()
    own, read = load_policy("specsmallkv", kv_budget=0.3, own_share=0.6), []
    for policies in ([own], [*(load_policy(name, kv_budget=0.3) for name in others), own]):
        base = prefill_once(spec, policies[0], text, 240, policies)
        trials = read_on(base, policies, text, True)
        read.append(trials[-1].sequence.counters.new_entries)
        assert [trial.sequence.evidence.last is not None for trial in trials] == [policy is own for policy in policies]
    assert len(read[0]) > 4 and read[0] == read[1]
    without = [load_policy("specsmallkv", kv_budget=0.3)]
    base = prefill_once(spec, without[0], text, 240, without)
    (trial,) = read_on(base, without, text, True)
    assert sum(read[0]) < sum(trial.sequence.counters.new_entries)


@torch.inference_mode()
def test_trials_that_share_a_block_of_rows_read_what_each_looks_ahead_to():
    """Also of gold blocks, whose rows all come in one pass."""
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    text = torch.randint(1, 320, (260,), generator=torch.Generator().manual_seed(0)).tolist()
    policies = [load_policy("specsmallkv", kv_budget=0.3, lookahead=kind) for kind in LOOKAHEADS]
    base = prefill_once(spec, policies[0], text, 240, policies)
    for gold in (False, True):
        trials = [open_trial(base, policy) for policy in (load_policy("full"), *policies)]
        drafts = base.draft(text, 240, gold)
        assert len(drafts) == 3
        assert [trial.sequence.evidence.oracle.num_rows for trial in trials[1:]] == [4, 3, 1]
        advance(base, trials, text, Block(240, drafts, 2, proposed=not gold, measure=False))
        kept = [trial.sequence.target.layers[0].kept_positions for trial in trials[1:]]
        assert not torch.equal(kept[0], kept[2]) and not torch.equal(kept[1], kept[2])
        assert [trial.sequence.evidence.oracle._count for trial in trials[1:]] == [34.0, 34.0, 33.0]
        base.rewind(240)


@pytest.mark.parametrize("controller", [None, Controller(view_size=512)])
@torch.inference_mode()
def test_rows_of_a_trial_without_speculation_count_though_a_decoders_draft_would_wait(controller, monkeypatch):
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32", num_draft_tokens=0)
    policy = load_policy("smallkv", kv_budget=0.3, marginal_share=0.0, evict_block=8)
    monkeypatch.setattr(spec, "controller", controller)
    text = torch.randint(1, 320, (260,), generator=torch.Generator().manual_seed(0)).tolist()
    base = prefill_once(spec, policy, text, 240, [policy])
    (trial,) = read_on(base, [policy], text, gold=True)

    decoder = spec.decoder(policy=policy)
    sequence = decoder.start(text[:240], 20)
    decoder.prefill(sequence)
    decoder.settle(sequence)
    for end in range(241, 257):
        sequence.tokens = text[:end]
        decoder.decide(sequence)
        assert decoder.draft(sequence, torch.Generator())[0] == []
        decoder.plan(sequence, [])
        decoder.verify(sequence, [])
        decoder.rollback(sequence, 0)
        decoder.evict(sequence)
    ours, theirs = trial.sequence.evidence.oracle, sequence.evidence.oracle
    assert sequence.counters.catch_ups == 2 and trial.sequence.evicted_at == sequence.evicted_at == 256
    assert ours._count - (len(text) - 1 - 256) == theirs._count
    for a, b in zip(trial.sequence.target.layers, sequence.target.layers, strict=True):
        assert torch.equal(a.kept_positions, b.kept_positions)


@torch.inference_mode()
def test_drafts_through_a_view_leave_the_rows_and_the_cache_that_the_whole_cache_leaves(monkeypatch):
    """As in decoding: a view may change what is drafted, not what the draft attends of it."""
    monkeypatch.setattr("specsmallkv.draft_view.PAYS_FROM", 1)
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    spec.controller = Controller(view_size=12)
    text = torch.randint(1, 320, (260,), generator=torch.Generator().manual_seed(0)).tolist()
    base = prefill_once(spec, load_policy("specsmallkv", kv_budget=0.3), text, 240, [load_policy("specsmallkv")])
    trial, full = open_trial(base, load_policy("specsmallkv", kv_budget=0.3)), open_trial(base, load_policy("full"))
    seen, opened, read = [], [], base.decoder.forward
    for position in (240, 241):
        opened.clear()
        monkeypatch.setattr(base.decoder, "forward", lambda *a, **k: opened.append(a[3].view) or read(*a, **k))
        drafts = base.draft(text, position, gold=False)
        monkeypatch.setattr(base.decoder, "forward", read)
        assert len(drafts) == 3 and [view is not None for view in opened] == [True] * 3 + [False]
        rows, chances = base.sequence.evidence.oracle.block.values.clone(), base.sequence.evidence.oracle.block.chances
        keys = base.sequence.draft.layers[0].keys.clone()
        seen.append(base.attended)
        advance(base, [full, trial], text, Block(position, drafts, 1, True, False))
        base.rewind(position)
        again = base.draft([*text[: position + 1], *drafts, 0, 0], position, gold=True)
        assert again == drafts and len(chances) == 4
        torch.testing.assert_close(rows, base.sequence.evidence.oracle.block.values)
        torch.testing.assert_close(keys, base.sequence.draft.layers[0].keys)
        base.rewind(position + 1)
    assert seen[0] is None and seen[1] is not None  # the prompt's window, then the last block, say what a view shows
