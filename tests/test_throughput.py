"""task=throughput on tiny random models: every system decodes the same text, and the record says how."""

import sys

import pytest
import torch
from conftest import run_task

from specsmallkv.errors import UserError
from specsmallkv.linear import can_pack
from specsmallkv.oracle import LOOKAHEADS
from specsmallkv.sequence import Round
from specsmallkv.tasks import roofline, throughput, throughput_systems
from specsmallkv.tasks.throughput import ThroughputTask, over_prompts, per_position, with_ratios
from specsmallkv.tasks.throughput_systems import OwnSystem
from specsmallkv.tokenizer import byte_tokenizer

STOCK = ["transformers", "static", "assisted", "prompt_lookup"]
OURS = ["full", "full+draft", "snapkv", "snapkv+draft", "specsmallkv+draft"]
CONTEXT, NEW, REPEATS = 150, 12, 2


def run(tmp_path, *overrides):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(3000)), encoding="utf-8")
    settings = [
        "+model=tiny-random",
        "model.draft='random:llama?layers=2&hidden=64&heads=4&kv_heads=2&vocab=320&context=32768&seed=0'",
        "model.dtype=float32",
        "task=throughput",
        f"task.text_file={text}",
        f"task.context_tokens={CONTEXT}",
        f"max_new_tokens={NEW}",
        f"task.repeats={REPEATS}",
        "task.warmup_tokens=2",
        "policy.kv_budget=0.3",
        "quiet=true",
    ]
    return run_task(*settings, *overrides)


@pytest.fixture(scope="module", autouse=True)
def little_is_copied():
    """Its speed is only looked at for being there; 2 x 128 MiB a run take longer than the tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "COPIED", 2**20)
        yield


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run(tmp_path_factory.mktemp("throughput"), f"task.systems=[{','.join(STOCK + OURS)}]")


def row(record, name):
    return next(row for row in record["systems"] if row["name"] == name)


@pytest.mark.parametrize("name", [*STOCK, "full+draft"])
def test_systems_with_the_full_cache_decode_one_text(name, record):
    """Also on transformers' side: its caches were filled by hand, and its first assisted pass was cut."""
    assert row(record, name)["token_ids"] == row(record, "full")["token_ids"]
    assert row(record, name)["tokens_as_full"] == NEW + 1


def test_transformers_reads_tokens_of_the_paddings_id_as_text(tmp_path):
    """Left to itself it masks them, and with a mask it takes another way through its attention."""
    text, padding = tmp_path / "padded.txt", "\0"
    assert byte_tokenizer()(padding)["input_ids"] == [0]
    text.write_text((padding * 3 + "abcdefg") * CONTEXT, encoding="utf-8")
    record = run(tmp_path, f"task.text_file={text}", f"task.systems=[{','.join(STOCK)},full]")
    assert all(own["token_ids"] == row(record, "full")["token_ids"] for own in record["systems"])


def test_a_prompt_that_is_read_in_chunks_has_a_time_to_first_token_of_its_own(tmp_path):
    record = run(tmp_path, 'task.systems=[full,h2o,"h2o:prefill_chunk=16"]')
    seconds = {own["name"]: own["ttft_seconds"] for own in record["systems"]}
    assert seconds["full"] == seconds["h2o"]
    assert 0 < seconds["h2o:prefill_chunk=16"] != seconds["full"]


def test_speculation_changes_no_token_of_a_static_policy(record):
    assert row(record, "snapkv")["token_ids"] == row(record, "snapkv+draft")["token_ids"]


def test_a_draft_that_is_the_target_is_accepted_in_every_system(record):
    """The draft's cache, too, is the prompt's: with a wrong one assisted generation would reject."""
    assert row(record, "full+draft")["acceptance_rate"] == 1
    assert row(record, "full+draft")["acceptance_per_position"] == [1, 1, 1]
    assert row(record, "full+draft")["acceptance_length"] == NEW / 3  # blocks of 4, cut by nothing
    assert row(record, "assisted")["acceptance_length"] >= NEW / 3
    assert row(record, "transformers")["acceptance_length"] == row(record, "full")["acceptance_length"] == 1


def test_every_row_has_speed_ratios_and_bytes(record):
    assert [row["name"] for row in record["systems"]] == STOCK + OURS
    for own in record["systems"]:
        assert own["repeats"] == REPEATS and own["new_tokens"] == NEW
        assert 0 < own["tokens_per_second_min"] <= own["tokens_per_second"] <= own["tokens_per_second_max"]
        assert own["tokens_per_cpu_second"] > 0 and own["roofline_share"] > 0
        for base in ("transformers", "assisted", "full"):
            expected = own["tokens_per_second"] / row(record, base)["tokens_per_second"]
            assert own[f"ratio_to_{base}"] == pytest.approx(expected) and own[f"cpu_ratio_to_{base}"] > 0
    assert row(record, "full")["ratio_to_full"] == 1
    assert record["machine"]["copy_bytes_per_second"] > 0 and record["threads"] >= 1


def test_bytes_follow_from_the_models_sizes(record):
    entry = 2 * 2 * 16 * 4 * 2  # K and V of 2 heads of 16 in float32, 2 layers
    full, lookahead = row(record, "full"), row(record, "specsmallkv+draft")
    expected = sum((CONTEXT + 1 + i) * entry for i in range(NEW)) / NEW
    assert full["kv_bytes_read_per_token"] == pytest.approx(expected)
    assert row(record, "transformers")["kv_bytes_read_per_token"] == pytest.approx(expected)
    assert lookahead["target_kv_bytes"] < 0.7 * lookahead["target_kv_bytes_full"]
    assert lookahead["kv_bytes_read_per_token"] < full["kv_bytes_read_per_token"] / 2
    assert full["draft_weight_bytes"] == full["draft_kv_bytes"] == 0 < lookahead["draft_kv_bytes"]
    assert set(lookahead["phase_ms"]) >= {"draft", "plan", "verify", "evict"}
    assert 0 == full["recall_ms"] < lookahead["recall_ms"] <= lookahead["phase_ms"]["plan"]
    drafted = lookahead["draft_step_ms"] * row(record, "specsmallkv+draft")["num_draft_tokens"]
    assert full["draft_step_ms"] is None and 0 < lookahead["phase_ms"]["draft"] <= drafted * 1.001


def test_a_draft_that_waits_for_an_eviction_counts_with_its_bytes(tmp_path):
    """160 tokens and 12 new ones: no eviction comes, so it reads the prompt and nothing else."""
    name = "smallkv:marginal_share=0"
    rows = run(tmp_path, f"task.systems=['{name}',snapkv]", "task.context_tokens=160", "task.repeats=1")
    waiting, without = row(rows, name), row(rows, "snapkv")
    assert waiting["draft_kv_bytes"] > 0 < waiting["draft_weight_bytes"]
    assert without["draft_kv_bytes"] == without["draft_weight_bytes"] == 0


def test_the_runs_own_system_stands_at_the_top(record):
    own = row(record, "specsmallkv+draft")
    assert record["tokens_per_second"] == own["tokens_per_second"] and record["text"] == own["text"]
    assert (record["policy"], record["kv_budget"], record["prompt_tokens"]) == ("specsmallkv", 0.3, CONTEXT)


def test_assisted_generation_drafts_with_the_whole_vocabulary_where_ours_is_cut(tmp_path):
    rows = run(tmp_path, "task.systems=[assisted,full+draft]", "model.draft_vocab_size=40", "task.repeats=1")
    assert row(rows, "assisted")["acceptance_length"] >= NEW / 3  # all accepted, as with the draft that is the target
    assert row(rows, "full+draft")["acceptance_rate"] < 1
    assert row(rows, "full+draft")["token_ids"] == row(rows, "assisted")["token_ids"]


def test_several_passages_are_measured_one_by_one_and_reported_as_medians(tmp_path):
    record = run(tmp_path, "task.systems=[full,snapkv]", "task.num_prompts=3", "task.repeats=1")
    assert record["num_prompts"] == len(record["by_prompt"]) == 3 and record["prompt_tokens"] == CONTEXT
    first, second, _ = (rows[0]["token_ids"] for rows in record["by_prompt"])
    assert first != second, "each has a text of its own"
    for index, own in enumerate(record["systems"]):
        for key in ("tokens_per_second", "ratio_to_full", "kv_bytes_read_per_token"):
            assert own[key] == sorted(rows[index][key] for rows in record["by_prompt"])[1]
        assert own["tokens_per_second_min"] == min(rows[index]["tokens_per_second"] for rows in record["by_prompt"])
        assert "token_ids" not in own and own["phase_ms"]["verify"] > 0


def test_costs_are_measured_before_anything_is_timed(tmp_path, monkeypatch):
    """Also where the warm-up is too short for as many drafts."""
    known, decode = [], OwnSystem.run

    def noted(self, num_tokens):
        known.append(self.lacks_costs)
        return decode(self, num_tokens)

    monkeypatch.setattr(OwnSystem, "run", noted)
    record = run(tmp_path, "task.systems=[full+adaptive]", "speculation=adaptive")
    assert known == [True, True] + [False] * REPEATS
    assert "measure" not in record["systems"][0]["phase_ms"]


def test_ctrl_c_while_a_later_prompt_is_read_keeps_the_prompts_before(tmp_path, monkeypatch):
    read, calls = ThroughputTask._read, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return read(self, *args)

    monkeypatch.setattr(ThroughputTask, "_read", interrupted)
    record = run(tmp_path, "task.systems=[full]", "task.num_prompts=4", "task.repeats=1")
    assert record["interrupted"] and record["num_prompts"] == 2 == len(record["by_prompt"])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "task.systems=[full]", "task.num_prompts=4", "task.repeats=1")


def test_only_the_last_repeats_caches_are_kept(tmp_path, monkeypatch):
    held, row_of = [], ThroughputTask._row

    def noted(self, own, *args):
        held.append([len(run.sequences) for run in own.runs])
        return row_of(self, own, *args)

    monkeypatch.setattr(ThroughputTask, "_row", noted)
    run(tmp_path, "task.systems=[full]")
    assert held == [[0] * (REPEATS - 1) + [1]]


def test_transformers_systems_say_how_many_drafts_they_were_given(record):
    drafts = {name: row(record, name)["num_draft_tokens"] for name in STOCK}
    given = {"transformers": 0, "static": 0, "assisted": 4, "prompt_lookup": 10}
    assert drafts == {name: given[name] for name in drafts}


def test_all_rows_of_a_prompts_file_are_prompts_and_num_prompts_takes_the_first(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{c * 40}"}}\n' for c in "abc"), encoding="utf-8")
    settings = ["task.text_file=null", f"prompts_file={prompts}", "task.systems=[full]", "task.repeats=1"]
    assert run(tmp_path, *settings)["num_prompts"] == 3
    assert run(tmp_path, *settings, "task.num_prompts=1")["num_prompts"] == 1


def test_weights_are_of_the_type_that_any_other_task_would_choose(tmp_path, monkeypatch):
    """Loading them unpacked for transformers must not turn `auto` into float32."""
    monkeypatch.setattr("specsmallkv.models.computes_in_bfloat16", lambda device: False)
    monkeypatch.setattr("specsmallkv.linear.has_arithmetic", lambda dtype: False)
    record = run(tmp_path, "model.dtype=auto", "task.systems=[full]", "task.repeats=1")
    packs = can_pack(torch.bfloat16, torch.device("cpu"))
    assert (record["dtype"], record["linear"]) == (("bfloat16", "packed") if packs else ("float32", "torch"))


def test_transformers_systems_run_on_plain_layers_beside_blocked_ones(tmp_path, monkeypatch):
    seen, original = [], throughput_systems.stock_generate

    def watched(model, ids, **options):
        seen.append({type(layer) for layer in model.modules() if hasattr(layer, "out_features")})
        return original(model, ids, **options)

    monkeypatch.setattr(throughput_systems, "stock_generate", watched)
    record = run(tmp_path, "model.linear=blocked", "task.systems=[transformers,full]", "task.repeats=1")
    assert record["linear"] == "blocked" and seen and all(kinds == {torch.nn.Linear} for kinds in seen)
    assert row(record, "transformers")["token_ids"] == row(record, "full")["token_ids"]


BATCHED = ["transformers", "static", "full", "full+draft", "snapkv", "smallkv", "specsmallkv+draft"]


def test_prompts_of_a_batch_are_decoded_together_as_each_is_alone(tmp_path):
    systems = f"task.systems=[{','.join(BATCHED)}]"
    alone = run(tmp_path, systems, "task.num_prompts=3", "task.repeats=1")
    batch = run(tmp_path, systems, "batch_size=3", "task.repeats=1")
    assert batch["num_prompts"] == batch["batch_size"] == 3 and "by_prompt" not in batch
    for index, own in enumerate(batch["systems"]):
        each = [rows[index] for rows in alone["by_prompt"]]
        assert own["new_tokens"] == 3 * NEW
        assert own["token_ids"] == [row["token_ids"][0] for row in each], own["name"]
        assert own["target_kv_bytes_full"] == sum(row["target_kv_bytes_full"] for row in each)
        assert own["draft_kv_bytes"] == sum(row["draft_kv_bytes"] for row in each)
        assert own["kv_bytes_read_per_token"] == pytest.approx(sum(row["kv_bytes_read_per_token"] for row in each) / 3)
        assert own["operations_per_token"] == pytest.approx(sum(row["operations_per_token"] for row in each) / 3)
        assert own["bytes_per_token"] < sum(row["bytes_per_token"] for row in each) / 3  # weights are shared
    assert row(batch, "transformers")["token_ids"] == row(batch, "full")["token_ids"]
    assert row(batch, "full+draft")["acceptance_length"] == NEW / 3


def test_passes_of_the_draft_are_counted_whether_they_record_rows_or_catch_up(tmp_path, monkeypatch):
    """An eviction event comes at 160 of the 150 + 12 tokens."""
    seen, original = {}, throughput.roofline

    def watched(machine, run, *models):
        drafted = sum(own.num_drafted for own in run.rounds)
        seen[len(seen)] = (run.steps, run.headless, len(run.rounds), drafted)
        return original(machine, run, *models)

    monkeypatch.setattr(throughput, "roofline", watched)
    systems = ["smallkv:marginal_share=0", *(f"specsmallkv:lookahead={kind}+draft" for kind in LOOKAHEADS)]
    run(tmp_path, f"task.systems=[{','.join(map(repr, systems))}]", "policy.evict_block=16", "task.repeats=1")
    assert seen[0][:2] == (1, 1)
    for number, kind in enumerate(LOOKAHEADS, start=1):
        steps, headless, rounds, drafted = seen[number]
        assert drafted > 5 and steps == drafted + headless, kind
        assert headless == rounds if kind == "block" else headless < rounds / 2, "only where nothing is drafted"


def test_two_batches_are_two_measurements(tmp_path):
    record = run(tmp_path, "task.systems=[full]", "batch_size=2", "task.num_prompts=4", "task.repeats=1")
    assert len(record["by_prompt"]) == 2 and record["num_prompts"] == 4


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("task.num_prompts=3", "task.systems=[full]"), "batch_size=2 does not divide the 3 prompts"),
        (("task.systems=[full,assisted]",), "task.systems=assisted decodes one prompt at a time"),
        (("task.text_file=null", "task.systems=[transformers]"), "prompts of one length, not of 39 to 49 tokens"),
    ],
)
def test_what_no_batch_can_be_is_refused(tmp_path, overrides, problem):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"a" * n}"}}\n' for n in (20, 30)), encoding="utf-8")
    rows = [f"prompts_file={prompts}"] if "task.text_file=null" in overrides else []
    with pytest.raises(UserError, match=problem):
        run(tmp_path, "batch_size=2", *overrides, *rows)


def test_figures_over_prompts_keep_what_all_share_and_leave_out_what_is_no_number():
    rows = [[{"name": "a", "x": x, "x_min": x, "text": str(x), "ms": {"draft": x}, "none": None}] for x in (3, 1, 2)]
    assert over_prompts(rows) == [{"name": "a", "x": 2, "x_min": 1, "ms": {"draft": 2}, "none": None}]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("task.systems=[]", "empty"),
        ("task.systems=[full,full]", "names one twice"),
        ("task.systems=[nope]", "policy=nope is unknown"),
        ("task.repeats=0", "task.repeats=0 is too small"),
        ("task.num_prompts=0", "task.num_prompts=0 is too small"),
        ("task.num_prompts=99", "lower task.context_tokens or task.num_prompts"),
        ("temperature=0.5", "temperature=0.5: task=throughput decodes greedily; leave it out"),
        ("max_new_tokens=1", "max_new_tokens=1 is too few for task=throughput; give 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(override, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        run(tmp_path, override)


def test_acceptance_per_position_counts_only_rounds_that_drafted_so_far():
    rounds = [Round([1], 3, 0), Round([1, 2, 3], 3, 2), Round([1, 2], 1, 1)]
    assert per_position(rounds) == [2 / 3, 1 / 2, 0]


def test_tokens_as_full_stops_at_the_first_difference():
    speed = {"tokens_per_second": 1.0, "tokens_per_cpu_second": 1.0}
    texts = {"full": [[1, 2, 3], [4]], "x": [[1, 2, 3], [5]], "y": [[1, 5, 3], [4]]}
    rows = with_ratios([speed | {"name": name, "token_ids": tokens} for name, tokens in texts.items()])
    assert [row["tokens_as_full"] for row in rows] == [1, 0, 1]
    assert "tokens_as_full" not in with_ratios([speed | {"name": "x", "token_ids": [[1]]}])[0], (
        "nothing to compare with"
    )


def test_operations_and_bytes_of_a_linear_layer_are_counted():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)).bfloat16()
    assert roofline.linear_size(layer) == (40, 80)


@pytest.mark.peers
def test_kvpress_decodes_what_our_snapkv_decodes_as_long_as_ours_evicts_nothing_new(tmp_path):
    """Alone and as a batch; ours keeps sinks and evicts again at a later length, so both are told not to."""
    pytest.importorskip("kvpress")
    settings = ["policy=snapkv", "policy.num_sink_tokens=0", "policy.evict_block=1000", "task.repeats=1"]
    systems = "task.systems=[transformers,full,snapkv,kvpress]"
    for batch in (1, 2):
        record = run(tmp_path, *settings, systems, f"batch_size={batch}", "policy.window_size=16")
        ours, theirs = row(record, "snapkv"), row(record, "kvpress")
        assert theirs["token_ids"] == ours["token_ids"] != row(record, "full")["token_ids"]
        assert theirs["kv_bytes_read_per_token"] == pytest.approx(ours["kv_bytes_read_per_token"], rel=0.1)
        assert theirs["ratio_to_transformers"] > 0 and theirs["acceptance_length"] == 1


def test_kvpress_is_refused_with_its_remedy_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(UserError, match=r"task.systems=kvpress needs the package kvpress.*peers"):
        run(tmp_path, "task.systems=[full,kvpress]")
