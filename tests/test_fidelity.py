"""task=fidelity from its settings to the record: texts, rows, variants of policies, means and ratios."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import run_task

from specsmallkv.errors import UserError
from specsmallkv.metrics import bootstrap_interval
from specsmallkv.policies import SnapKV
from specsmallkv.presets import load_policy
from specsmallkv.tasks.grid import parse_entry, policy_grid

SETTINGS = [
    "+model=tiny-random",
    "model.dtype=float32",
    "task=fidelity",
    "task.context_tokens=160",
    "task.eval_tokens=24",
    "task.kv_budgets=[0.4]",
    "quiet=true",
]


def content(step):
    return "".join(chr(97 + (step * i * i + i // 5) % 26) for i in range(3000))


def fidelity(*overrides):
    """The record of task=fidelity on the tiny random pair."""
    return run_task(*SETTINGS, *overrides)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, step in (("a.txt", 7), ("b.txt", 11)):
        (folder / name).write_text(content(step), encoding="utf-8")
    rows = [{"context": content(7)[:900], "n": 1}, {"context": content(7)[900:], "n": 2}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def record(files):
    """Two texts, both kinds of rows, a variant, and snapkv at the same total."""
    return fidelity(
        f"task.text_files=[{files}/a.txt,{files}/b.txt]",
        'task.policies=[full,snapkv,"smallkv:marginal_share=0,compensation=none",specsmallkv,oracle]',
        "task.kv_budgets=[0.3,0.4]",
        "task.rows=both",
        "task.matched_total=true",
        "policy.kv_budget=0.4",
    )


def find(record, **wanted):
    found = [row for row in record["results"] if wanted.items() <= row.items()]
    assert len(found) == 1, found
    return found[0]


def test_every_text_kind_of_rows_policy_and_budget_has_one_row_and_the_texts_their_mean(record):
    names = ["snapkv", "smallkv:marginal_share=0,compensation=none", "specsmallkv", "oracle"]
    grid = [(name, budget) for name in names for budget in (0.3, 0.4)]
    for text in ("a.txt", "b.txt", "mean"):
        for rows in ("drafted", "gold"):
            found = [row for row in record["results"] if (row["text"], row["rows"]) == (text, rows)]
            measured = [(r["policy"], r["kv_budget"]) for r in found if r["policy"] != "snapkv@total"]
            assert measured == [("full", 1.0), *grid], "the full cache has one budget"
    row = find(record, text="mean", rows="gold", policy="oracle", kv_budget=0.3)
    parts = [find(record, text=t, rows="gold", policy="oracle", kv_budget=0.3) for t in ("a.txt", "b.txt")]
    for key in ("kl_mean", "top1_agreement", "attention_recall", "kv_share_mean"):
        assert row[key] == pytest.approx((parts[0][key] + parts[1][key]) / 2)
    assert row["scored_tokens"] == sum(part["scored_tokens"] for part in parts) == 48
    assert parts[0]["kl_mean"] != parts[1]["kl_mean"]


def test_ratios_are_those_of_mean_kl_and_lie_in_their_intervals(record):
    for text in ("a.txt", "mean"):
        ours = find(record, text=text, rows="drafted", policy="specsmallkv", kv_budget=0.3)
        for rival in ("snapkv", "oracle"):
            other = find(record, text=text, rows="drafted", policy=rival, kv_budget=0.3)
            assert ours[f"kl_ratio_to_{rival}"] == pytest.approx(ours["kl_mean"] / other["kl_mean"])
            low, high = ours[f"kl_ratio_to_{rival}_interval"]
            assert low < ours[f"kl_ratio_to_{rival}"] < high
            assert other[f"kl_ratio_to_{rival}_interval"] == (1, 1)
        first = find(record, text="a.txt", rows="drafted", policy="specsmallkv", kv_budget=0.3)
        assert text == "a.txt" or low != first[f"kl_ratio_to_{rival}_interval"][0], "of the positions of all texts"
        assert ours["top1_minus_oracle"] == pytest.approx(ours["top1_agreement"] - other["top1_agreement"])


def test_the_full_cache_is_at_no_distance(record):
    row = find(record, text="mean", rows="drafted", policy="full")
    assert row["kl_mean"] == 0 and row["top1_agreement"] == row["kv_share_mean"] == row["total_share_mean"] == 1


def test_means_lie_in_their_intervals_and_of_the_full_caches_kl_there_is_nothing_to_vary(record):
    for row in record["results"]:
        for key in ("kl_mean", "top1_agreement", *(["draft_agreement"] if row["rows"] == "drafted" else [])):
            low, high = row[f"{key}_interval"]
            assert low - 1e-9 <= row[key] <= high + 1e-9
    assert find(record, text="mean", rows="drafted", policy="full")["kl_mean_interval"] == (0, 0)


def test_recall_is_told_per_round_and_per_token_with_intervals_and_of_who_recalls_alone(record):
    for row in record["results"]:
        keys = ("new_per_round_interval", "recalled_per_token", "recalled_per_token_interval")
        assert [key in row for key in keys] == 3 * [row["recall_bytes"] > 0]
        if row["recall_bytes"]:
            for key in ("new_per_round", "recalled_per_token"):
                assert row[f"{key}_interval"][0] < row[key] < row[f"{key}_interval"][1]
            if row["text"] != "mean":  # the cache grows by some tokens over the blocks
                whole = row["recall_bytes"] / row["scored_tokens"] / row["target_kv_bytes_full"]
                assert row["recalled_per_token"] == pytest.approx(whole, rel=0.2)
    assert any(row["recall_bytes"] for row in record["results"])


def test_drafts_are_judged_by_each_policys_own_greedy_tokens_and_only_where_the_draft_proposed_them(record, files):
    assert all(("draft_agreement" in row) == (row["rows"] == "drafted") for row in record["results"])
    options = [f"task.text_file={files}/a.txt", "task.eval_tokens=40", 'model.draft="${model.target}"']
    twins = fidelity(*options, "task.policies=[full,snapkv,specsmallkv]", "task.kv_budgets=[0.3]")
    rates = {row["policy"]: row["draft_agreement"] for row in twins["results"]}
    assert rates["full"] == 1 > rates["specsmallkv"] and rates["snapkv"] < 1, "the draft is the target"
    static = fidelity(*options, "task.policies=[snapkv]")
    assert "draft_agreement" not in static["results"][0], "nobody drafts for static policies"


def test_what_is_looked_at_over_decoding_is_what_the_means_are_made_of(record):
    row = find(record, text="a.txt", rows="drafted", policy="snapkv", kv_budget=0.3)
    decoded, jaccard, recall = zip(*row["over_decoding"], strict=True)
    assert decoded[0] == 0 and list(decoded) == sorted(set(decoded)) and decoded[-1] < 24
    assert sum(recall) / len(recall) == pytest.approx(row["attention_recall"])
    assert sum(jaccard) / len(jaccard) == pytest.approx(row["jaccard"])
    both = find(record, text="mean", rows="drafted", policy="snapkv", kv_budget=0.3)["over_decoding"]
    assert len(both) > len(decoded) and set(map(tuple, row["over_decoding"])) < set(map(tuple, both))


def test_snapkv_at_the_same_total_holds_what_specsmallkv_holds_with_the_draft(record):
    for budget in (0.3, 0.4):
        ours = find(record, text="a.txt", rows="gold", policy="specsmallkv", kv_budget=budget)
        snapkv = find(record, text="a.txt", rows="gold", policy="snapkv", kv_budget=budget)
        total = find(record, text="a.txt", rows="gold", policy="snapkv@total", matched_budget=budget)
        assert ours["total_share_mean"] > ours["kv_share_mean"] + 0.2
        assert snapkv["total_share_mean"] == snapkv["kv_share_mean"] == pytest.approx(ours["kv_share_mean"], abs=0.02)
        # tokens that wait for the next eviction, many of so few, lie outside of the smaller budget
        assert total["total_share_mean"] == pytest.approx(ours["total_share_mean"], abs=0.05)
        assert total["kl_ratio_to_snapkv"] == pytest.approx(total["kl_mean"] / snapkv["kl_mean"])


def test_static_policies_do_not_care_whose_rows_cut_the_blocks_but_lookahead_does(record):
    def kl(rows, policy):
        return find(record, text="a.txt", rows=rows, policy=policy, kv_budget=0.4)["kl_mean"]

    assert kl("drafted", "snapkv") == pytest.approx(kl("gold", "snapkv"), rel=1e-4)
    assert kl("drafted", "oracle") != pytest.approx(kl("gold", "oracle"), rel=1e-4)


def test_gold_rows_after_drafted_ones_and_a_text_after_another_are_as_if_alone(record, files):
    alone = fidelity(f"task.text_file={files}/b.txt", "task.policies=[smallkv,specsmallkv,oracle]", "task.rows=gold")
    for policy in ("specsmallkv", "oracle"):
        ours = find(record, text="b.txt", rows="gold", policy=policy, kv_budget=0.4)
        assert find(alone, policy=policy)["kl_mean"] == pytest.approx(ours["kl_mean"], rel=1e-4)
    assert {row["text"] for row in alone["results"]} == {"b.txt"}, "one text needs no mean"


def test_the_top_of_the_record_is_the_runs_own_policy_at_its_budget(record):
    row = find(record, text="mean", rows="drafted", policy="specsmallkv", kv_budget=0.4)
    assert (record["policy"], record["kv_budget"], record["text"], record["rows"]) == (
        "specsmallkv",
        0.4,
        None,
        "both",
    )
    for key in ("kl_mean", "target_kv_bytes", "kept_per_layer", "recall_bytes"):
        assert record[key] == row[key]
    assert record["draft_kv_bytes"] > 0 and record["interrupted"] is False


def test_a_variant_is_measured_with_its_own_settings(record, files):
    text = f"task.text_file={files}/a.txt"
    options = ["policy=smallkv", "policy.marginal_share=0", "policy.compensation=none", "task.policies=[smallkv]"]
    chosen = fidelity(text, *options)["results"][0]
    ours = find(
        record, text="a.txt", rows="drafted", policy="smallkv:marginal_share=0,compensation=none", kv_budget=0.4
    )
    other = fidelity(text, "task.policies=[smallkv]")["results"][0]
    assert ours["kl_mean"] == pytest.approx(chosen["kl_mean"], rel=1e-4) != pytest.approx(other["kl_mean"], rel=1e-2)


def test_rows_of_a_jsonl_file_are_joined_by_blank_lines(files):
    joined = files / "joined.txt"
    joined.write_text(content(7)[:900] + "\n\n" + content(7)[900:], encoding="utf-8")
    options = ["task.policies=[snapkv]", "task.offset=800"]
    one = fidelity(f"task.text_file={files}/rows.jsonl", "task.text_field=context", *options)["results"][0]
    other = fidelity(f"task.text_file={joined}", *options)["results"][0]
    assert one["nll"] == other["nll"] and one["text"] == "rows.jsonl"


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["task.text_file={0}/a.txt", "task.text_files=[{0}/b.txt]"], "are given together; keep one"),
        (["task.text_files=[{0}/a.txt,{0}/a.txt]"], "names a file twice"),
        (["task.text_file={0}/none.txt"], "task.text_file={0}/none.txt does not exist"),
        (["task.text_files=[{0}/none.txt]"], "task.text_files={0}/none.txt does not exist"),
        (["task.text_file={0}/rows.jsonl"], "has no text in text; set task.text_field (its fields are context, n)"),
        ([], "needs a text; set task.text_file=FILE"),
        (["task.text_file={0}/a.txt", "task.rows=silver"], "choose one of drafted, gold, both"),
        (["task.text_file={0}/a.txt", "task.offset=2990"], "the text a.txt has 10 tokens from character"),
        (
            ["task.text_file={0}/a.txt", "task.policies=[h2o]", "task.matched_total=true"],
            "compares with snapkv; add it",
        ),
        (["task.text_file={0}/a.txt", 'task.policies=["snapkv:window_size=170"]'], "leaves nothing to evict"),
    ],
)
def test_a_mistake_is_one_sentence(files, overrides, says):
    with pytest.raises(UserError) as error:
        fidelity(*(override.format(files) for override in overrides))
    assert says.format(files) in str(error.value)


def test_matched_total_without_a_draft_is_refused(files):
    options = ["model.draft=null", "speculation=none", "policy=snapkv", "task.policies=[snapkv]"]
    with pytest.raises(UserError, match="needs a draft"):
        fidelity(f"task.text_file={files}/a.txt", "task.matched_total=true", *options)


# --- the grid of policies ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Narrow(SnapKV):
    """A policy outside of conf/ with a default of its own."""

    window_size: int = 8


def test_a_preset_brings_its_own_settings_and_only_what_the_user_changed_applies_to_all():
    own, snapkv = policy_grid(Narrow(name="narrow"), ["narrow", "snapkv"], [0.1])
    assert (own.window_size, snapkv.window_size) == (8, 32)
    own, snapkv = policy_grid(Narrow(name="narrow", window_size=16, evict_block=8), ["narrow", "snapkv"], [0.1])
    assert [(p.window_size, p.evict_block, p.kv_budget) for p in (own, snapkv)] == [(16, 8, 0.1)] * 2
    changed = load_policy("specsmallkv", num_sink_tokens=7, window_size=9, kv_budget=0.5)
    (h2o,) = policy_grid(changed, ["h2o:window_size=5"], [0.1])
    assert (h2o.num_sink_tokens, h2o.window_size, h2o.kv_budget) == (7, 5, 0.1), "an entry's own settings come last"


def test_an_entry_of_the_runs_own_policy_begins_with_its_settings():
    chosen = load_policy("smallkv", marginal_share=0.25)
    plain, variant, other = policy_grid(chosen, ["smallkv", "smallkv:compensation=raw", "smallkv_paper"], [0.1])
    assert (plain.marginal_share, plain.name) == (0.25, "smallkv")
    assert (variant.marginal_share, variant.compensation) == (0.25, "raw")
    assert variant.name == "smallkv:compensation=raw" and other.marginal_share == 0.5


def test_values_of_an_entry_are_yaml():
    text = "smallkv:marginal_share=0.5, compensation=none,window_size=3,flag=true"
    own = {"marginal_share": 0.5, "compensation": "none", "window_size": 3, "flag": True}
    assert parse_entry(text) == ("smallkv", own) and parse_entry("full") == ("full", {})


@pytest.mark.parametrize(
    "entry, says",
    [
        ("nothing:window_size=1", "policy=nothing is unknown"),
        ("snapkv:windows=1", "policy=snapkv has no field windows"),
        ("specsmallkv:windows=1", "policy=specsmallkv has no field windows"),
        ("snapkv:window_size=wide", "policy.window_size=wide is not a whole number"),
        ("specsmallkv:window_size=wide", "policy.window_size=wide is not a whole number"),
        ("snapkv:kernel_size=2", "policy.kernel_size=2 is not a positive odd number"),
        ("snapkv:window_size", "is not a policy with settings; write it as NAME:KEY=VALUE"),
        ("snapkv:=3", "is not a policy with settings; write it as NAME:KEY=VALUE"),
        ("snapkv:window_size=[", "has a value that is not YAML"),
        ("snapkv:window_size=${x}", "has a value that is not YAML"),
        ("snapkv:kv_budget=0.1", "sets kv_budget; leave it out"),
    ],
)
def test_a_wrong_entry_is_one_sentence(entry, says):
    with pytest.raises(UserError) as error:
        policy_grid(load_policy("specsmallkv"), [entry], [0.1])
    assert says in str(error.value)


# --- the interval --------------------------------------------------------------------------------------------------


def test_the_interval_pairs_positions_and_gives_each_text_the_same_weight():
    generator = torch.Generator().manual_seed(0)
    others = [torch.rand(n, generator=generator).tolist() for n in (200, 20)]
    low, high = bootstrap_interval([[2 * x for x in text] for text in others], others)
    assert low == pytest.approx(2) and high == pytest.approx(2), "a constant ratio has no spread"
    low, high = bootstrap_interval([[4.0] * 200, [1.0] * 20], [[1.0] * 200, [1.0] * 20])
    assert low == high == pytest.approx(2.5), "(4 + 1) / (1 + 1), however many positions a text has"


def test_the_interval_narrows_with_the_number_of_positions():
    generator = torch.Generator().manual_seed(1)
    widths = []
    for count in (40, 4000):
        ours, others = (torch.rand(count, generator=generator).tolist() for _ in range(2))
        low, high = bootstrap_interval([ours], [others])
        assert low < 1 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
