"""The controller: decisions from given costs and histories, texts that do not depend on it, rounds taken back."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from conftest import run_task, tiny_model

from specsmallkv import controller
from specsmallkv.batch import BatchDecoder, Job
from specsmallkv.controller import (
    FIRST_PAUSE,
    Adaptive,
    Controller,
    Costs,
    CostTable,
    History,
    best_count,
    load_cost_table,
    measure,
    next_count,
)
from specsmallkv.decode import Decoder
from specsmallkv.errors import UserError
from specsmallkv.presets import load_policy

CHEAP = Costs(100, draft=0.1, read=0.0, verify=(1.0, 1.05, 1.1, 1.15, 1.2))
DEAR = Costs(1000, draft=0.5, read=0.2, verify=(1.0, 2.0, 3.0, 4.0, 5.0))
SETTINGS = {"kv_budget": 0.3, "evict_block": 16, "window_size": 8}
NEW = 60


def decode(decoder, prompt, new=NEW):
    rounds = list(decoder.generate(prompt, new))
    return [token for round_, _ in rounds for token in round_.tokens], rounds[1:], rounds[-1][1]


def history_of(*verdicts):
    history = History()
    for drafted, accepted in verdicts:
        history.note(drafted, accepted)
    return history


def test_the_number_of_drafts_is_the_one_with_the_most_tokens_a_second():
    for costs in (CHEAP, DEAR):
        for rate in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            speeds = [sum(rate**i for i in range(k + 1)) / costs.round(k) for k in range(5)]
            count = best_count(costs, rate, 4)
            assert speeds[count] >= max(speeds) / 1.03 and (count == 0 or speeds[count] == max(speeds))
    assert [best_count(CHEAP, rate, 4) for rate in (0.0, 0.2, 0.5, 0.9)] == [0, 1, 2, 4]
    assert best_count(CHEAP, 0.9, 2) == 2 and best_count(CHEAP, 0.9, 99) == 4, "no further than asked or known"
    assert best_count(DEAR, 0.9, 4) == 0
    reading = Costs(100, draft=0.1, read=0.5, verify=(1.0, 1.05, 1.1))
    assert best_count(reading, 0.3, 2) == 1
    assert best_count(reading, 0.3, 2, waits=True) == 0, "a round without drafts reads nothing"


def test_a_sequence_believes_what_its_drafts_met_and_forgets_slowly():
    assert history_of().rate == 0.5
    assert history_of(*[(3, 3)] * 20).rate > 0.95 and history_of(*[(3, 0)] * 20).rate < 0.05
    assert history_of((3, 1)).trials == pytest.approx(2 * 0.95**2 + 0.95 + 1), "the third draft was never judged"
    assert history_of((0, 0)).rate == 0.5
    turned = history_of(*[(3, 0)] * 40, *[(3, 3)] * 10)
    assert turned.rate > 0.7


def test_a_draft_that_never_pays_is_tried_ever_more_rarely():
    history, counts = History(), []
    for _ in range(600):
        counts.append(next_count(CHEAP, history, 4))
        history.note(counts[-1], 0)
    tries = [number for number, count in enumerate(counts) if count]
    assert len(tries) < 12 and counts[tries[-1]] == 1
    pauses = [b - a for a, b in itertools.pairwise(tries) if b - a > 1]
    assert pauses == [FIRST_PAUSE + 1, 2 * FIRST_PAUSE + 1, 4 * FIRST_PAUSE + 1, 8 * FIRST_PAUSE + 1]


def test_a_draft_that_pays_again_is_back_after_the_next_try():
    history = history_of(*[(3, 0)] * 40)
    counts = []
    for _ in range(FIRST_PAUSE + 20):
        counts.append(next_count(CHEAP, history, 4))
        history.note(counts[-1], counts[-1])
    assert counts[0] == 1 and counts[-1] == 4, "accepted, so no pause began"


def test_costs_between_two_lengths_are_interpolated():
    table = CostTable([CHEAP, DEAR])
    middle = table.at(550)
    assert middle.draft == pytest.approx(0.3) and middle.verify[4] == pytest.approx(3.1)
    assert table.at(5).verify == CHEAP.verify and table.at(10**6).verify == DEAR.verify
    assert table.covers(500) and table.covers(7) and table.covers(1900) and not table.covers(2100)


def test_a_saved_table_is_read_from_a_record_or_refused_in_one_sentence(tmp_path):
    path = tmp_path / "record.json"
    for content in ({"cost_table": CostTable([DEAR, CHEAP]).plain()}, CostTable([CHEAP, DEAR]).plain()):
        path.write_text(json.dumps(content))
        assert load_cost_table(str(path)).rows == [CHEAP, DEAR]
    for content in ("{}", "[]", "no json", '[{"context": 1}]', "[3]"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"holds no cost table \(.*\); give the record"):
            load_cost_table(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        load_cost_table(str(tmp_path / "missing.json"))


def test_a_table_of_another_model_or_policy_is_refused_unless_it_is_given_alone(tmp_path):
    path, table = tmp_path / "record.json", CostTable([CHEAP]).plain()
    path.write_text(json.dumps({"model": "a", "policy": "snapkv", "cost_table": table}))
    assert load_cost_table(str(path), {"model": "a", "policy": "snapkv"}).rows == [CHEAP]
    with pytest.raises(UserError, match=r"was measured with policy=snapkv, not full; give the record .* list alone"):
        load_cost_table(str(path), {"model": "a", "policy": "full"})
    path.write_text(json.dumps(table))
    assert load_cost_table(str(path), {"model": "b", "policy": "full"}).rows == [CHEAP]


def test_costs_are_measured_however_often_something_is_evicted(target, draft, prompt):
    """No verify pass sees past an eviction, so there are never as many drafts as are asked for."""
    policy, controller = load_policy("snapkv", **SETTINGS | {"evict_block": 4}), Adaptive()
    decode(Decoder(target, draft, policy, 7, controller=controller), prompt)
    assert [len(row.verify) for row in controller.table.rows] == [4]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["full", "snapkv", "h2o", "smallkv", "smallkv without odds"])
def test_the_controller_changes_no_token_of_a_static_policy(target, draft, prompt, name):
    """Costs under which it drafts much, little, and mostly nothing; a batch decides for each row alone.

    Without odds a draft that is not asked for tokens waits until the next eviction, or until it is.
    """
    name, _, without = name.partition(" without ")
    policy = load_policy(name, **SETTINGS | ({"marginal_share": 0.0} if without else {}))
    plain, _, _ = decode(Decoder(target, draft, policy, 0), prompt)
    drafted = []
    for costs in (CHEAP, Costs(100, 0.2, 0.0, (1.0, 1.2, 1.4, 1.6, 1.8)), DEAR):
        decoder = Decoder(target, draft, policy, 4, controller=Adaptive(table=CostTable([costs])))
        seen = [(round_, sequence, sequence.waits) for round_, sequence in decoder.generate(prompt, NEW)]
        rounds, sequence, waited = [own for own, _, _ in seen], seen[-1][1], sum(waits for _, _, waits in seen)
        assert [token for round_ in rounds for token in round_.tokens] == plain
        assert without or not waited
        drafted.append(sequence.counters.drafted)
        assert sequence.counters.undrafted == sum(not round_.num_drafted for round_ in rounds[1:])
        jobs = [Job(prompt, NEW), Job(prompt[:70], 20)]
        rows = {row.number: row for row, _ in BatchDecoder(decoder, 2).generate(jobs)}
        assert rows[0].sequence.tokens[len(prompt) :] == plain
        assert rows[0].sequence.counters.drafted == drafted[-1], "its neighbour has no say"
    assert drafted[0] > drafted[1] > drafted[2] >= 1 and sequence.counters.undrafted > NEW // 2
    assert (waited > 16 and sequence.counters.catch_ups > 0) == bool(without)


def test_a_saved_table_makes_decisions_repeatable(target, draft, prompt):
    runs = []
    for _ in range(2):
        controller = Adaptive(table=CostTable([CHEAP]))
        policy = load_policy("specsmallkv", **SETTINGS)
        tokens, rounds, _ = decode(Decoder(target, draft, policy, 4, controller=controller), prompt)
        runs.append((tokens, [round_.num_drafted for round_, _ in rounds]))
    assert runs[0] == runs[1] and len(set(runs[0][1])) > 1


@pytest.mark.parametrize("name", ["snapkv", "h2o", "smallkv", "specsmallkv"])
@torch.inference_mode()
def test_measuring_leaves_no_trace(target, draft, prompt, name):
    policy = load_policy(name, **SETTINGS)
    left = []
    for measured in (False, True):
        decoder = Decoder(target, draft, policy, 4)
        sequence, logits = decoder.begin(prompt, NEW)
        decoder.first(sequence, logits, torch.Generator())
        decoder.settle(sequence)
        if measured:
            counters = sequence.counters
            costs = measure(decoder, sequence, 4)
            assert len(costs.verify) == 5 and min(costs.draft, costs.read, *costs.verify) >= 0
            assert sequence.counters is counters and sequence.history == History()
            sequence.decision = None
        rounds = [decoder.round(sequence, torch.Generator(), set()) for _ in range(8)]
        oracle = sequence.evidence.oracle
        sums = oracle._sum.clone() if oracle else torch.zeros(1)
        left.append((rounds, sequence.counters.rounds, sums, sequence.target, sequence.draft.seen))
    (plain, count, sums, target_cache, seen), (other, other_count, other_sums, other_cache, other_seen) = left
    assert plain == other and count == other_count == 8 and seen == other_seen
    torch.testing.assert_close(sums, other_sums)
    for ours, theirs in zip(target_cache.layers, other_cache.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)


def test_an_oracle_that_reads_every_third_round_keeps_its_set_and_tail_terms_in_between(target, draft, prompt):
    """But after each eviction event it reads, so that bytes stay within their bound; nothing else notices."""
    policy = load_policy("specsmallkv", **SETTINGS)
    decoder = Decoder(target, draft, policy, 3, controller=Controller(oracle_every=3))
    held, reads, terms = [], [], None
    for round_, sequence in decoder.generate(prompt, NEW):
        if sequence.decision is None:
            continue
        kept = [layer.kept_positions for layer in sequence.target.layers]
        if held and not sequence.decision.reads:
            assert all(torch.equal(a, b) for a, b in zip(held[-1], kept, strict=True))
            assert [id(layer.tail_term) for layer in sequence.target.layers] == terms
        held.append(kept)
        terms = [id(layer.tail_term) for layer in sequence.target.layers]
        reads.append(sequence.decision.reads)
        entry = sequence.target.full_nbytes / sequence.target.seen
        assert sequence.target.nbytes <= 0.3 * sequence.target.full_nbytes + (16 + 4) * entry
        assert round_.num_drafted <= 3
    assert reads[0] and 0 < sum(reads) < len(reads) / 2
    pauses = "".join("r" if read else "." for read in reads).split("r")
    assert max(map(len, pauses)) == 2
    changed = [i for i, (a, b) in enumerate(itertools.pairwise(held), 1) if not torch.equal(a[0], b[0])]
    assert changed and all(reads[i] for i in changed)


def test_the_oracle_reads_in_every_round_where_its_rows_decide_for_good_or_for_each_query(target, draft, prompt):
    query = load_policy("specsmallkv", selection="query", **SETTINGS)
    for policy in (load_policy("smallkv", **SETTINGS), query):
        plain, _, _ = decode(Decoder(target, draft, policy, 3), prompt)
        decoder = Decoder(target, draft, policy, 3, controller=Controller(oracle_every=4))
        tokens, rounds, _ = decode(decoder, prompt)
        assert tokens == plain and all(sequence.decision.reads for _, sequence in rounds)


def test_the_record_has_the_measured_costs_and_another_run_takes_them(tmp_path):
    settings = ["+model=tiny-random", "model.dtype=float32", "prompt=hello", "max_new_tokens=40", "quiet=true"]
    settings += ["policy=snapkv", "ignore_eos=true"]
    record = run_task(*settings, "speculation=adaptive")
    (row,) = record["cost_table"]
    assert len(row["verify"]) == 8 and row["context"] >= record["prompt_tokens"]
    assert record["phase_seconds"]["measure"] > 0
    assert record["drafted_per_round"] == record["drafted_tokens"] / record["rounds"]
    assert 0 <= record["undrafted_rounds"] <= record["rounds"]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    again = run_task(*settings, "speculation=adaptive", f"speculation.cost_table={path}")
    assert again["cost_table"] == record["cost_table"] and "measure" not in again["phase_seconds"]
    assert again["text"] == record["text"] == run_task(*settings, "speculation=none")["text"]


@pytest.mark.parametrize("name", ["snapkv", "full"])
def test_a_useless_draft_costs_at_most_a_twentieth_of_plain_decoding(target, prompt, name):
    """By the table: steps, passes and, for each try, a pass in which the draft reads what it has not seen."""
    costs = Costs(100, draft=0.25, read=0.0, verify=tuple(1 + 0.05 * extra for extra in range(8)))
    stranger = tiny_model(layers=2, seed=77)
    policy = load_policy(name, kv_budget=0.3)
    decoder = Decoder(target, stranger, policy, 7, controller=Adaptive(table=CostTable([costs])))
    tokens, rounds, sequence = decode(decoder, prompt, 256)
    assert sequence.counters.accepted < 0.2 * sequence.counters.drafted
    spent = sum(costs.round(round_.num_drafted) + costs.draft * (round_.num_drafted > 0) for round_, _ in rounds)
    assert costs.verify[0] * (len(tokens) - 1) / spent >= 0.95


def test_trials_take_how_often_the_oracle_reads_and_measure_nothing(tmp_path):
    text_file = tmp_path / "text.txt"
    text_file.write_text("".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(400)), encoding="utf-8")
    arguments = [
        "task=fidelity",
        f"task.text_file={text_file}",
        "task.kv_budgets=[0.3]",
        "task.context_tokens=100",
        "task.eval_tokens=40",
    ]
    arguments += ["+model=tiny-random", "policy.kv_budget=0.3", "quiet=true", "task.policies=[specsmallkv,oracle]"]
    rows = {}
    for name, every in (("draft", 1), ("adaptive", 1), ("adaptive", 4)):
        settings = [f"speculation={name}", f"speculation.oracle_every={every}", "speculation.num_draft_tokens=3"]
        record = run_task(*arguments, *settings)
        rows[name, every] = {row["policy"]: row for row in record["results"]}
    assert rows["draft", 1]["specsmallkv"]["nll"] == rows["adaptive", 1]["specsmallkv"]["nll"]
    assert rows["adaptive", 4]["specsmallkv"]["recall_bytes"] < rows["draft", 1]["specsmallkv"]["recall_bytes"]
    assert rows["adaptive", 4]["oracle"]["nll"] == rows["draft", 1]["oracle"]["nll"], "the yardstick always looks"


def test_measuring_while_the_draft_waits_loses_none_of_its_rows(target, draft, prompt, monkeypatch):
    """At every twentieth more of the length, most of which lie in a pause."""
    policy = load_policy("smallkv", **SETTINGS | {"marginal_share": 0.0})
    plain, _, _ = decode(Decoder(target, draft, policy, 0), prompt)
    lags, lengths = [], []

    def dear(decoder, sequence, most):
        lags.append(sequence.target.seen - sequence.draft.seen)
        lengths.append(sequence.target.seen)
        return replace(DEAR, context=measure(decoder, sequence, most).context)

    monkeypatch.setattr(controller, "measure", dear)
    monkeypatch.setattr(controller, "SHORT", 1)
    monkeypatch.setattr(controller, "SAME_CONTEXT", 1.05)
    tokens, _, sequence = decode(Decoder(target, draft, policy, 4, controller=Adaptive()), prompt)
    assert tokens == plain and len(lags) > 3 and sequence.counters.catch_ups > 3
    assert max(lags) == 0 and any(seen % 16 for seen in lengths[1:]), "it catches up first, also between evictions"


def test_another_policy_has_costs_of_its_own():
    measured, given = Adaptive(1), Adaptive(1, CostTable([CHEAP]))
    assert measured.anew().table is not measured.table and measured.anew().measures
    assert given.anew() is given
