"""Which of the draft's rows of a verify block are read (`policy.lookahead`), and when they are not read at all."""

import pytest
import torch
from test_batch import assert_independent
from test_decode import begin, decode
from test_draft_view import SIZE, exact_rounds, policy_of, viewed

from specsmallkv import UserError, matching
from specsmallkv.controller import Controller, CostTable, measure
from specsmallkv.decode import Decoder
from specsmallkv.draft_view import is_viewed
from specsmallkv.oracle import LOOKAHEADS, rows_ahead


def begun(target, draft, prompt, lookahead, controller=None, drafts=3, rounds=2, **options):
    """A decoder and a sequence some rounds behind its prompt."""
    policy = policy_of("specsmallkv", lookahead=lookahead, **options)
    decoder = Decoder(target, draft, policy, drafts, controller=controller)
    sequence, generator = begin(decoder, prompt, 60)[0], torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(rounds):
            decoder.decide(sequence)
            decoder.round(sequence, generator, set())
    return decoder, sequence, generator


def passes_of_the_draft(decoder):
    """Tokens of each pass to come, and whether it records rows."""
    passes, forward = [], decoder.forward

    def watched(model, cache, tokens, call, num_logits=1):
        if model is decoder.draft_model:
            passes.append((len(tokens), call.rows is not None, call.view is not None))
        return forward(model, cache, tokens, call, num_logits)

    decoder.forward = watched
    return passes


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_only_the_last_drafts_row_takes_a_step_of_its_own(target, draft, prompt, lookahead, drafts):
    decoder, sequence, generator = begun(target, draft, prompt, lookahead, drafts=drafts)
    passes = passes_of_the_draft(decoder)
    with torch.inference_mode():
        decoder.draft(sequence, generator)
    steps = drafts + 1 if lookahead == "block" else max(drafts, 1)
    assert len(passes) == steps
    assert sum(recorded for _, recorded, _ in passes) == rows_ahead(lookahead, drafts + 1)


def test_a_policys_limit_bounds_the_weight_of_what_is_evicted(target, draft, prompt):
    largest = {}
    for limit in (0.01, torch.inf):
        _, sequence, _ = begun(target, draft, prompt, "block", tail_limit=limit)
        terms = [layer.tail_term for layer in sequence.target.layers if layer.tail_term is not None]
        largest[limit] = max(term.odds.sum(-1).max().item() for term in terms)
    assert largest[0.01] == pytest.approx(0.01) and largest[torch.inf] > 0.02


@pytest.mark.parametrize("lookahead", ["drafted", "first"])
def test_rows_that_were_not_read_have_no_say(target, draft, prompt, lookahead):
    kept = []
    for poison in (0.0, torch.nan):
        decoder, sequence, generator = begun(target, draft, prompt, lookahead)
        with torch.inference_mode():
            drafts, _ = decoder.draft(sequence, generator)
            sequence.evidence.oracle.block.buffer[:, rows_ahead(lookahead, len(drafts) + 1) :] = poison
            decoder.plan(sequence, drafts)
            logits = decoder.verify(sequence, drafts)
            decoder.conclude(sequence, drafts, len(drafts), 1, set())
        assert logits.isfinite().all() and sequence.evidence.oracle._sum.isfinite().all()
        kept.append([layer.kept_positions for layer in sequence.target.layers])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_the_first_rows_set_is_that_of_a_block_without_drafts(target, draft, prompt):
    kept = []
    for lookahead, count in (("first", 3), ("block", 0)):
        decoder, sequence, generator = begun(target, draft, prompt, lookahead, rounds=0)
        decoder.num_draft_tokens = count
        with torch.inference_mode():
            drafts, _ = decoder.draft(sequence, generator)
            decoder.plan(sequence, drafts)
        assert len(drafts) == count
        kept.append([layer.kept_positions for layer in sequence.target.layers])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_rows_of_drafting_steps_count_by_their_chances(target, draft, prompt):
    decoder, sequence, generator = begun(target, draft, prompt, "drafted")
    with torch.inference_mode():
        decoder.draft(sequence, generator)
        oracle = sequence.evidence.oracle
        assert len(oracle.block.chances) == 4
        oracle.block.chances = [1.0, 0.5, 0.1, 0.05]
        saliency = oracle.lookahead_saliency(sequence.target.seen, True, "max")
        chances = torch.tensor(oracle.block.chances[:3])
        mean = (oracle.block.values[:, :3] * (chances / chances.sum())[:, None]).sum(dim=1)
    torch.testing.assert_close(oracle.recent_rows, mean)
    torch.testing.assert_close(saliency, oracle.saliency(mean[:, : sequence.target.seen], "max"))


@pytest.mark.parametrize("at_once", [matching.AT_ONCE, 1])
def test_predictions_that_were_kept_are_given_once_and_are_those_of_the_block(
    target, draft, prompt, monkeypatch, at_once
):
    decoder, sequence, generator = begun(target, draft, prompt, "block")
    monkeypatch.setattr(matching, "AT_ONCE", at_once)
    oracle, seen = sequence.evidence.oracle, sequence.target.seen
    with torch.inference_mode():
        decoder.draft(sequence, generator)
        oracle.lookahead_saliency(seen, True, "max", keep=True)
        kept, anew = (torch.cat(list(oracle.mean_predictions())) for _ in range(2))
        assert torch.equal(kept, anew)
        oracle.lookahead_saliency(seen, True, "max", keep=True)  # and nobody asks
        saliency = oracle.lookahead_saliency(seen, False, "max")
        torch.testing.assert_close(saliency, oracle.saliency(oracle.recent_rows[:, :seen], "max"))


def test_known_tokens_are_read_in_one_pass_and_all_their_rows_count(target, draft, prompt):
    for lookahead in LOOKAHEADS:
        decoder, sequence, _ = begun(target, draft, prompt, lookahead, rounds=0)
        with torch.inference_mode():
            decoder.read(sequence, [1, 2, 3])
        assert sequence.evidence.oracle.num_rows == 4


def test_a_set_for_each_query_needs_a_row_for_each():
    for lookahead in ("drafted", "first"):
        with pytest.raises(UserError, match=f"policy.lookahead={lookahead}.*policy.lookahead=block"):
            policy_of("specsmallkv", selection="query", lookahead=lookahead)
    with pytest.raises(UserError, match=r"policy\.lookahead=last is unknown"):
        policy_of("specsmallkv", lookahead="last")


def test_with_a_view_the_first_row_is_the_one_whole_read_and_drafted_rows_leave_the_last_draft_out(
    target, draft, prompt, monkeypatch
):
    expected = {
        "first": [(True, False), (False, True), (False, True)],
        "drafted": [(False, True), (False, True), (False, True), (True, False)],
    }
    monkeypatch.setattr("specsmallkv.draft_view.ONE_PASS_MORE", 1)
    for lookahead, kinds in expected.items():
        decoder, sequence, generator = begun(target, draft, prompt, lookahead, viewed())
        passes, unread = passes_of_the_draft(decoder), len(sequence.tokens) - sequence.draft.seen
        with torch.inference_mode():
            decoder.decide(sequence)
            drafts, _ = decoder.draft(sequence, generator)
        assert len(drafts) == 3 and [kind[1:] for kind in passes] == kinds
        assert lookahead == "first" or passes[-1][0] == unread + 2


@pytest.mark.parametrize("first_step", ["sees a view", "reads all"])
def test_drafted_rows_of_a_round_with_a_view_are_those_of_full_attention(
    target, draft, prompt, monkeypatch, first_step
):
    """Also where a view begins after the first step only, as in a draft that had fallen behind."""
    monkeypatch.setattr("specsmallkv.draft_view.ONE_PASS_MORE", 1)
    if first_step == "reads all":
        monkeypatch.setattr("specsmallkv.drafting._begin_view", lambda *_: None)
    decoder, sequence, generator = begun(target, draft, prompt, "drafted", viewed())
    with torch.inference_mode():
        decoder.decide(sequence)
        drafts, _ = decoder.draft(sequence, generator)
        assert sequence.view is not None and sequence.reread
        rows = sequence.evidence.oracle.rows.clone()
        sequence.draft.rollback(sequence.draft.seen - sequence.target.seen)
        decoder.read(sequence, drafts)
    assert rows.shape[1] == len(drafts) == 3
    everything = sequence.evidence.oracle.block.values[:, :3]
    torch.testing.assert_close(rows, everything, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("lookahead", "drafts", "opens"),
    [("block", 1, True), ("drafted", 3, False), ("first", 1, False), ("first", 2, True)],
)
def test_rows_of_drafting_steps_use_a_view_on_longer_caches_only(target, draft, prompt, lookahead, drafts, opens):
    assert is_viewed(16, 128) and not is_viewed(16, 511, True) and is_viewed(16, 512, True)
    _, sequence, _ = begun(target, draft, prompt, lookahead, viewed(), drafts)
    assert len(prompt) < 512 and (sequence.view is not None) == opens


@pytest.mark.parametrize(("drafts", "opens"), [(2, False), (3, True)])
def test_a_view_that_costs_a_pass_has_to_save_one(target, draft, prompt, monkeypatch, drafts, opens):
    """Behind a first step that read all, two drafts leave one step for the view."""
    monkeypatch.setattr("specsmallkv.draft_view.ONE_PASS_MORE", 1)
    monkeypatch.setattr("specsmallkv.drafting._begin_view", lambda *_: None)
    _, sequence, _ = begun(target, draft, prompt, "drafted", viewed(), drafts)
    assert (sequence.view is not None) == opens


def test_a_branch_looks_ahead_as_its_own_policy_does(target, draft, prompt):
    first, block = (Decoder(target, draft, policy_of("specsmallkv", lookahead=kind), 3) for kind in ("first", "block"))
    with torch.inference_mode():
        base = block.start(prompt, 20)
        block.prefill(base)
        block.prefill_draft(base)
        assert first.branch(base).evidence.oracle.lookahead == "first"


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_after_each_round_the_drafts_cache_is_as_exact_as_without_a_view(
    target, draft, prompt, monkeypatch, lookahead
):
    monkeypatch.setattr("specsmallkv.draft_view.ONE_PASS_MORE", 1)
    policy = policy_of("specsmallkv", lookahead=lookahead)
    assert exact_rounds(Decoder(target, draft, policy, 3, controller=viewed()), prompt) > 10


@pytest.mark.parametrize("view_size", [0, SIZE])
@pytest.mark.parametrize("lookahead", ["drafted", "first"])
def test_a_row_of_a_batch_equals_its_prompt_alone(target, draft, monkeypatch, lookahead, view_size):
    monkeypatch.setattr("specsmallkv.draft_view.ONE_PASS_MORE", 1)
    policy = policy_of("specsmallkv", lookahead=lookahead)
    assert_independent(target, draft, policy, 2, controller=Controller(view_size=view_size))


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_rounds_price_has_no_step_that_it_does_not_take(target, draft, prompt, monkeypatch, lookahead):
    """A step takes a second here, a plan and a pass of the target none."""
    decoder, sequence, _ = begun(target, draft, prompt, lookahead)

    def priced(decoder, sequence, count):
        return {"draft": float(count + 1 if lookahead == "block" else max(count, 1)), "plan": 0.0, "verify": 0.0}

    monkeypatch.setattr("specsmallkv.controller.dry_round", priced)
    costs = measure(decoder, sequence, 3)
    assert [costs.round(count) for count in (1, 2, 3)] == [priced(None, None, count)["draft"] for count in (1, 2, 3)]


# --- a draft that waits ---------------------------------------------------------------------------------------------


def without_odds(**options):
    return policy_of("smallkv", compensation="none", marginal_share=0.0, **options)


def reading_at_every_step(monkeypatch):
    monkeypatch.setattr(Decoder, "reads_later", lambda *_: False)


@pytest.mark.parametrize("length", [10, 150])
def test_a_draft_that_waited_has_counted_what_it_would_have_counted_step_by_step(
    target, draft, prompt, monkeypatch, length
):
    policy, kept = without_odds(), []
    for waits in (True, False):
        if not waits:
            reading_at_every_step(monkeypatch)
        tokens, sequence = decode(target, draft, policy, 0, prompt[:length])
        oracle, seen = sequence.evidence.oracle, sequence.evicted_at
        kept.append((tokens, [layer.positions[:, :, : layer.num_kept] for layer in sequence.target.layers]))
        if waits:
            sums, waiting, passes = oracle._sum[:, :seen].clone(), sequence.draft.seen, sequence.counters.draft_rows
            assert waiting == sequence.evicted_at > length
        else:
            assert sequence.draft.seen == sequence.target.seen > waiting
            assert passes < sequence.counters.draft_rows
    assert kept[0][0] == kept[1][0]
    assert all(torch.equal(a, b) for a, b in zip(kept[0][1], kept[1][1], strict=True))
    assert sums.isfinite().all() and sums.sum() > 0


def test_sums_at_an_eviction_are_those_of_single_steps(target, draft, prompt, monkeypatch):
    seen = []
    for waits in (True, False):
        if not waits:
            reading_at_every_step(monkeypatch)
        decoder = Decoder(target, draft, without_odds(), 0)
        for _, sequence in decoder.generate(prompt, 60):
            oracle = sequence.evidence.oracle
            if sequence.target.seen == 160:  # an eviction has just been: both have read all
                seen.append((oracle._sum[:, :160].clone(), oracle._count, sequence.draft.seen))
    assert seen[0][1:] == seen[1][1:] and seen[0][2] == 160
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-6, rtol=1e-4)


def test_between_evictions_a_waiting_draft_runs_no_pass(target, draft, prompt):
    decoder = Decoder(target, draft, without_odds(), 0)
    passes = passes_of_the_draft(decoder)
    *_, (_, sequence) = decoder.generate(prompt[:96], 50)
    decoded = [count for count, *_ in passes if count == 16]
    assert len(decoded) == 3 and sequence.evicted_at == 144, "three blocks of 16 tokens"
    assert sum(count == 1 for count, *_ in passes) == 32, "the foreseen tokens, and none of the text's"


def test_it_reads_at_every_step_where_its_rows_weigh_values_or_it_drafts(target, draft, prompt):
    for policy, drafts in ((policy_of("smallkv", marginal_similarity=0.0), 0), (without_odds(), 2)):
        decoder = Decoder(target, draft, policy, drafts)
        for _, sequence in decoder.generate(prompt, 30):
            assert not sequence.settled or sequence.draft.seen >= sequence.target.seen - 1
            assert not decoder.reads_later(sequence)


@pytest.mark.parametrize("controller", [None, Controller()])
def test_a_later_turn_finds_a_draft_that_has_read_all(target, draft, prompt, monkeypatch, controller):
    texts, counts = [], []
    for waits in (True, False):
        if not waits:
            reading_at_every_step(monkeypatch)
        decoder = Decoder(target, draft, without_odds(), 0, controller=controller)
        *_, (_, first) = decoder.generate(prompt, 25)
        assert (first.draft.seen < first.target.seen) == waits
        with torch.inference_mode():
            sequence = decoder.resume(first, [*first.tokens, *prompt[:40]], 40)
            decoder.extend(sequence, prompt[:3])
        assert sequence.draft.seen == sequence.target.seen
        counts.append((sequence.evidence.oracle._count, float(sequence.evidence.oracle._sum.sum())))
        again = [*sequence.tokens, *prompt[:40]]
        rounds = decoder.generate(again, 40, continues=sequence)
        texts.append([token for round_, _ in rounds for token in round_.tokens])
    assert texts[0] == texts[1] and counts[0] == pytest.approx(counts[1])


def test_rows_of_a_batch_whose_drafts_wait_equal_their_prompts_alone(target, draft):
    assert_independent(target, draft, without_odds(), 0)


@pytest.mark.parametrize(("lookahead", "adds"), [("block", 1.5), ("drafted", 0.5), ("first", 0.5)])
def test_reading_is_priced_at_the_plan_alone_where_its_row_is_a_drafting_steps(
    target, draft, prompt, monkeypatch, lookahead, adds
):
    decoder, sequence, _ = begun(target, draft, prompt, lookahead)

    def priced(decoder, sequence, count):
        return {"draft": float(count + 1 if lookahead == "block" else max(count, 1)), "plan": 0.5, "verify": 1.0}

    monkeypatch.setattr("specsmallkv.controller.dry_round", priced)
    costs = measure(decoder, sequence, 3)
    assert costs.reading(2) == adds and costs.reading(0) == 1.5
    assert costs.round(3) == priced(None, None, 3)["draft"] + 0.5 + 1.0
    assert CostTable([costs]).at(5).reading(2) == adds
