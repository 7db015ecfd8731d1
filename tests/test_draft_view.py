"""Two-speed drafting: steps read a view, and nothing but acceptance may notice."""

from dataclasses import replace

import pytest
import torch
from conftest import run_task
from test_decode import decode, transformers_greedy
from test_plan import LENGTH, TEXT, TINY, planned

from specsmallkv.attention import AttentionCall, attend
from specsmallkv.backends import attention_probabilities, weighted_values
from specsmallkv.batch import BatchDecoder, Job
from specsmallkv.cache import TieredCache
from specsmallkv.controller import Controller, Costs, CostTable, measure
from specsmallkv.decode import Decoder
from specsmallkv.draft_view import DraftView, is_viewed, most_attended
from specsmallkv.passes import full_cache
from specsmallkv.presets import load_policy
from specsmallkv.sampling import Sampler

SIZE = 16
SETTINGS = {"kv_budget": 0.3, "evict_block": 16, "window_size": 8}


def policy_of(name, **options):
    observed = {"observation_size": 32} if name.endswith("smallkv") else {}
    return load_policy(name, **({} if name == "full" else SETTINGS | observed | options))


def viewed(**options):
    return Controller(view_size=SIZE, **options)


def filled_cache(length=40, layers=2, room=8):
    cache, generator = TieredCache(layers, length + room), torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.update(*(torch.randn(1, 2, length, 8, generator=generator) for _ in "kv"))
    return cache


def test_a_view_has_the_sinks_the_newest_and_what_any_head_of_a_group_attends_most():
    rows = torch.zeros(8, 100)  # 2 layers of 4 heads, 2 for each KV head
    rows[1, 50], rows[2, 60], rows[5, 70] = 0.5, 0.4, 0.3
    chosen = most_attended(rows, 2, 2, 90, SIZE)
    assert chosen.shape == (2, 2, SIZE)
    always = {0, 1, 2, 3, 88, 89}
    for (layer, head), top in {(0, 0): 50, (0, 1): 60, (1, 0): 70}.items():
        assert always | {top} <= set(chosen[layer, head].tolist())
        assert chosen[layer, head].diff().min() > 0
    assert chosen.max() < 90


def test_rows_may_end_before_the_cache_or_behind_it():
    for length in (80, 100):
        chosen = most_attended(torch.rand(8, length), 2, 2, 90, SIZE)
        assert chosen.max() == 89 and chosen.diff(dim=-1).min() > 0


def test_attention_through_a_view_is_attention_over_its_tokens_and_all_that_follow():
    cache, rows = filled_cache(), torch.rand(8, 40)
    view = DraftView(cache, SIZE, room=8)
    view.open(rows)
    layer, query = cache.layers[1], torch.randn(1, 4, 3, 8)
    layer.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    out = attend(layer, 1, query, 0.3, AttentionCall("reference", view=view))
    chosen = most_attended(rows, 2, 2, 40, SIZE)[1]
    index = torch.cat((chosen, torch.arange(40, 43).expand(2, -1)), dim=1)[None, :, :, None].expand(-1, -1, -1, 8)
    keys, values = layer.keys.gather(2, index), layer.values.gather(2, index)
    torch.testing.assert_close(out, weighted_values(attention_probabilities(query, keys, 0.3), values))


def test_closing_a_view_drops_what_was_computed_through_it():
    cache = filled_cache()
    view = DraftView(cache, SIZE, room=8)
    view.open(torch.rand(8, 40))
    for layer in cache.layers:
        layer.update(torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8))
    view.close()
    view.close()
    assert cache.seen == 40 and view.start is None


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("name", ["full", "snapkv", "smallkv"])
def test_greedy_text_of_a_static_policy_does_not_notice(target, draft, prompt, name, drafts):
    plain, _ = decode(target, draft, policy_of(name), 0, prompt)
    tokens, sequence = decode(target, draft, policy_of(name), drafts, prompt, controller=viewed())
    assert tokens == plain
    assert (sequence.view is not None) == (drafts > 1 or name == "smallkv")
    if name == "full":
        assert tokens == transformers_greedy(target, prompt)


def test_text_of_a_set_for_each_query_does_not_notice(target, draft, prompt):
    policy = policy_of("specsmallkv", selection="query", tail_factor=0.0)
    plain, _ = decode(target, draft, policy, 0, prompt)
    tokens, sequence = decode(target, draft, policy, 3, prompt, controller=viewed())
    assert tokens == plain and sequence.view is not None


def exact_rounds(decoder, prompt):
    """Rounds with a view there, after each of which the draft's cache is what one pass over its tokens gives."""
    opened = 0
    for _, sequence in decoder.generate(prompt, 40):
        opened += sequence.view is not None
        assert not sequence.in_view
        if sequence.draft.seen < len(prompt):
            continue
        exact = full_cache(decoder.draft_model, len(sequence.tokens))
        decoder.feed(decoder.draft_model, exact, sequence.tokens[: sequence.draft.seen])
        for ours, theirs in zip(sequence.draft.layers, exact.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
    return opened


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["full", "snapkv", "smallkv", "specsmallkv"])
def test_after_each_round_the_drafts_cache_is_as_exact_as_without_a_view(target, draft, prompt, name, every):
    decoder = Decoder(target, draft, policy_of(name), 3, controller=viewed(oracle_every=every))
    assert exact_rounds(decoder, prompt)


def test_the_oracle_reads_rows_of_full_attention(target, draft, prompt):
    """Given the same drafts, the rows of a round with a view are those of a round without."""
    decoder = Decoder(target, draft, policy_of("specsmallkv"), 3, controller=viewed())
    sequence, logits = decoder.begin(prompt, 40)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        decoder.first(sequence, logits, generator)
        decoder.settle(sequence)
        for _ in range(2):
            decoder.round(sequence, generator, set())
        decoder.decide(sequence)
        drafts, _ = decoder.draft(sequence, generator)
        rows = sequence.evidence.oracle.block.values.clone()
        assert sequence.view is not None and rows.shape[1] == len(drafts) + 1
        sequence.draft.rollback(sequence.draft.seen - sequence.target.seen)
        decoder.read(sequence, drafts)
    torch.testing.assert_close(rows, sequence.evidence.oracle.block.values, atol=1e-5, rtol=1e-4)


def test_a_sampled_draft_carries_the_distribution_that_its_view_gave(target, draft, prompt):
    """Not the one that the pass over the whole cache would give, or rejection sampling would be biased."""
    decoder = Decoder(target, draft, policy_of("specsmallkv"), 3, Sampler(1.0), controller=viewed())
    sequence, logits = decoder.begin(prompt, 40)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        decoder.first(sequence, logits, generator)
        decoder.settle(sequence)
        decoder.decide(sequence)
        seen = []
        forward = decoder.forward

        def watched(model, cache, tokens, call, num_logits=1):
            out = forward(model, cache, tokens, call, num_logits)
            if call.view is not None:
                seen.append(out[-1].softmax(-1))
            return out

        decoder.forward = watched
        drafts, probabilities = decoder.draft(sequence, generator)
    assert len(seen) == len(drafts) == 3
    for own, distribution in zip(seen, probabilities, strict=True):
        torch.testing.assert_close(own, distribution)


def test_short_contexts_have_no_view(target, draft, prompt):
    assert not is_viewed(16, 127) and is_viewed(16, 128) and not is_viewed(0, 10**6)
    for controller in (Controller(view_size=0), Controller(view_size=32)):
        _, sequence = decode(target, draft, policy_of("specsmallkv"), 3, prompt[:100], controller=controller)
        assert sequence.view is None


def test_scratch_of_a_view_is_in_the_record_and_in_the_plan(tmp_path):
    drafted = [
        "policy=specsmallkv",
        "policy.lookahead=drafted",
    ]  # whose view begins at 32 x 24 tokens only, more than LENGTH
    first = ["policy=specsmallkv", "policy.lookahead=first"]
    cases = {
        "snapkv": (["policy=snapkv"], True),
        "block": (["policy=specsmallkv"], True),
        "drafted": ([*drafted, "speculation.draft_view_size=24"], False),
        "in rounds that do not read": (
            [*drafted, "speculation.oracle_every=2", "speculation.draft_view_size=24"],
            True,
        ),
        "first": (first, True),
        "first, one draft": ([*first, "speculation.num_draft_tokens=1"], False),
    }
    for name, (settings, opens) in cases.items():
        asked = ["policy.kv_budget=0.3", "max_new_tokens=40", *settings]
        asked += [] if any("view_size" in x for x in settings) else ["speculation.draft_view_size=16"]
        run = run_task(*TINY, *asked, f"prompt='{TEXT}'", f"run_dir={tmp_path}")
        without = run_task(*TINY, *asked[:-1], f"prompt='{TEXT}'", f"run_dir={tmp_path}")  # a view of 512: too short
        assert run["prompt_tokens"] == LENGTH and (run["scratch_bytes"] > without["scratch_bytes"]) == opens, name
        assert planned(*asked)["scratch_bytes"] == pytest.approx(run["scratch_bytes"], rel=0.05), name


@pytest.mark.parametrize("name", ["snapkv", "specsmallkv"])
def test_a_row_of_a_batch_has_the_view_of_its_prompt_alone(target, draft, prompt, name):
    """Rows with and without a view share a pass: one of the prompts is too short for one."""
    jobs = [Job(prompt[:length], 30, seed=number) for number, length in enumerate((150, 60, 140))]
    decoder = Decoder(target, draft, policy_of(name), 3, controller=viewed())
    rows = {row.number: row for row, _ in BatchDecoder(decoder, 3).generate(jobs)}
    for number, job in enumerate(jobs):
        alone = [sequence for _, sequence in decoder.generate(job.prompt, job.max_new_tokens, seed=job.seed)][-1]
        ours = rows[number].sequence
        assert ours.tokens == alone.tokens and ours.counters.accepted == alone.counters.accepted
        assert (ours.view is None) == (alone.view is None) == (number == 1)


@pytest.mark.parametrize(("name", "every"), [("full", 1), ("snapkv", 1), ("specsmallkv", 1), ("specsmallkv", 3)])
def test_a_later_turn_that_outgrows_the_first_ones_room_has_its_view_too(target, draft, prompt, name, every):
    decoder = Decoder(target, draft, policy_of(name), 3, controller=viewed(oracle_every=every))
    *_, (_, first) = decoder.generate(prompt, 12)
    again = [*first.tokens, *prompt[:90]]
    tokens = [token for round_, _ in decoder.generate(again, 40, continues=first) for token in round_.tokens]
    assert len(tokens) == 40 and first.view is not None
    if name != "specsmallkv":  # whose sets follow the blocks
        plain = Decoder(target, draft, policy_of(name), 3)
        *_, (_, other) = plain.generate(prompt, 12)
        expected = plain.generate(again, 40, continues=other)
        assert tokens == [token for round_, _ in expected for token in round_.tokens]


@pytest.mark.parametrize("name", ["full", "smallkv", "specsmallkv"])
def test_measured_rounds_leave_no_trace_in_the_next_view(target, draft, prompt, name):
    left = []
    for measures in (False, True):
        decoder = Decoder(target, draft, policy_of(name), 3, controller=viewed())
        sequence, logits = decoder.begin(prompt, 60)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            decoder.first(sequence, logits, generator)
            decoder.settle(sequence)
            decoder.round(sequence, generator, set())
            if measures:
                assert measure(decoder, sequence, 3).first >= 0
            rounds = [decoder.round(sequence, generator, set()) for _ in range(6)]
        left.append((rounds, sequence.draft.seen, sequence.counters.draft_rows))
    assert left[0] == left[1]


def test_a_first_step_that_reads_all_is_priced_apart():
    """Else one draft would look as cheap as the mean of three, and win where it loses."""
    costs = Costs(8192, draft=1.0, read=0.0, verify=(5.0, 5.0, 5.0, 5.0), first=3.0)
    assert [costs.round(count) for count in range(4)] == [5.0, 9.0, 10.0, 11.0]
    table = CostTable([costs, replace(costs, context=16384, first=5.0)])
    assert table.at(12288).first == 4.0


def test_what_steps_read_is_counted_as_they_see_it(target, draft, prompt):
    """Three steps through a view and one over the whole block; K and V of 2 heads of 8 in float32, 2 layers."""
    decoder = Decoder(target, draft, policy_of("specsmallkv"), 3, controller=viewed())
    sequence, logits = decoder.begin(prompt, 40)
    with torch.inference_mode():
        decoder.first(sequence, logits, torch.Generator())
        decoder.settle(sequence)
        decoder.decide(sequence)
        decoder.draft(sequence, torch.Generator())
    entry, seen, counters = 2 * 2 * 8 * 4 * 2, len(prompt), sequence.counters
    shown = [SIZE + step for step in range(3)]
    assert counters.draft_kv_read == entry * (sum(shown) + seen)
    assert counters.draft_kv_attended == entry * (sum(shown) + 4 * seen)
    assert counters.draft_rows == 3 + 4
