"""task=retrieval on a tiny random pair: examples, their border, and rows that equal runs of their own."""

import gzip
import json

import pytest

from specsmallkv import SpecSmallKV, UserError
from specsmallkv.config import ModelConfig, RunConfig, SpeculationConfig
from specsmallkv.presets import load_policy
from specsmallkv.tasks.generate import load_generator
from specsmallkv.tasks.retrieval import RetrievalTask
from specsmallkv.tasks.retrieval_data import ListExample, make_examples, read_examples
from specsmallkv.tasks.systems import System

TARGET = "random:llama?layers=3&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
KEYS = [f"{i:08x}-0000-4000-8000-000000000000" for i in range(4)]
LINES_ROW = {"prompt": "Remember.\nline a: <5>\nline b: <7>\n\nNow tell me line b. ", "expected_number": 7}
KV_ROW = {"ordered_kv_records": [[KEYS[0], KEYS[1]], [KEYS[2], KEYS[3]]], "key": KEYS[2], "value": KEYS[3]}


def task(**changes):
    settings = {"kind": "lines", "data_path": None, "num_items": 8, "num_examples": 2, "seed": 5}
    settings |= {"query_aware": False, "policies": [], "kv_budgets": []}
    settings |= {"baselines": ["full", "draft"], "max_new_tokens": 16} | changes
    return RetrievalTask(name="retrieval", **settings)


def config(run_dir, policy="specsmallkv", speculation="draft", draft=DRAFT):
    return RunConfig(
        model=ModelConfig("tiny", TARGET, draft, "float32", "cpu", "auto"),
        policy=load_policy(policy, **{} if policy == "full" else {"kv_budget": 0.3}),
        speculation=SpeculationConfig(speculation),
        task=None,
        max_new_tokens=16,
        ignore_eos=True,
        quiet=True,
        run_dir=str(run_dir),
    )


def rows_of(record):
    return [json.loads(line) for line in open(record["examples_file"], encoding="utf-8")]


# Examples


@pytest.mark.parametrize("kind", ["lines", "kv"])
@pytest.mark.parametrize("num_items", [1, 300])
def test_a_made_example_asks_for_one_of_its_items(kind, num_items):
    for example in make_examples(kind, num_items, 5, seed=1):
        assert example.context.count(example.expected) >= 1 and example.expected not in example.question
        assert example.asked in example.question and example.context.count(example.asked) == 1
        assert example.context.count(": ") >= num_items
        line = next(line for line in example.context.splitlines() if example.asked in line)
        assert example.find_answer(line) == example.expected


def test_made_examples_depend_on_seed_and_index_alone():
    assert make_examples("lines", 9, 3, 1) == make_examples("lines", 9, 7, 1)[:3]
    assert len({example.expected for example in make_examples("kv", 9, 7, 1)}) == 7
    assert make_examples("lines", 9, 3, 1) != make_examples("lines", 9, 3, 2)


@pytest.mark.parametrize(("kind", "row"), [("lines", LINES_ROW), ("kv", KV_ROW)])
def test_benchmark_files_are_read_plain_and_packed(tmp_path, kind, row):
    text = (json.dumps(row) + "\n") * 3
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (read_examples(kind, str(tmp_path / name), 2) for name in ("a.jsonl", "a.jsonl.gz"))
    assert plain == packed and len(plain) == 2
    assert plain[0].expected == str(row.get("expected_number", row.get("value")))
    assert plain[0].expected in plain[0].context and plain[0].expected not in plain[0].question
    if kind == "lines":
        assert plain[0].context + plain[0].question == row["prompt"].strip()


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        ("kv", json.dumps(LINES_ROW), "line 1 is no row of task.kind=kv"),
        ("lines", json.dumps(KV_ROW), "line 1 is no row of task.kind=lines"),
        ("lines", json.dumps(LINES_ROW) + "\n\n" + json.dumps(LINES_ROW | {"prompt": "x"}), "line 3 is no row"),
        ("kv", json.dumps(KV_ROW | {"value": "7"}), "is no row of task.kind=kv"),
        ("kv", "[", "is not JSON"),
    ],
)
def test_a_row_of_another_format_is_refused_with_its_line(tmp_path, kind, content, problem):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=problem):
        read_examples(kind, str(tmp_path / "a.jsonl"), 9)
    (tmp_path / "b.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"b.gz cannot be read"):
        read_examples(kind, str(tmp_path / "b.gz"), 9)


def test_the_last_number_or_value_is_the_answer():
    lines = ListExample(kind="lines", context="", question="", expected="7")
    kv = ListExample(kind="kv", context="", question="", expected=KEYS[1], asked=KEYS[0])
    assert lines.find_answer("line 3 holds <0007>.") == "7" and lines.find_answer("none") is None
    assert lines.find_answer("17") == "17"
    assert kv.find_answer(f"{KEYS[1].upper()} belongs to {KEYS[0]}") == KEYS[1]
    assert kv.find_answer(KEYS[0]) is None and kv.find_answer(KEYS[1][:-1]) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "words"}, "task.kind=words is unknown"),
        ({"num_items": 0}, "task.num_items=0"),
        ({"num_examples": 0}, "task.num_examples=0"),
        ({"seed": "x"}, "task.seed=x"),
    ],
)
def test_impossible_settings_are_refused(changes, problem):
    with pytest.raises(UserError, match=problem):
        task(**changes)


@pytest.mark.parametrize("chat", [None, False])
def test_the_border_before_the_question_changes_no_id(chat):
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")
    odd = ListExample(kind="lines", context="naïve 🙂\n", question="  What?\n", expected="1")
    for example in (*make_examples("kv", 5, 2, 0), odd):
        ids, border = spec.encode_parts(example.context, example.question, chat)
        assert ids == spec.encode(example.context + example.question, chat)
        before, after = (spec.pair.tokenizer.decode(part) for part in (ids[:border], ids[border:]))
        assert before.rstrip().endswith(example.context.rstrip()) and after.startswith(example.question.strip())


# The task


@pytest.mark.parametrize("speculation, query_aware", [("draft", False), ("draft", True), ("none", False)])
def test_every_row_equals_a_run_of_its_own(tmp_path, query_aware, speculation):
    """One prefill serves all policies, and the draft alone; none sees what another left behind."""
    names, budgets = ["snapkv", "smallkv", "specsmallkv"], [0.2, 0.4]
    settings = config(tmp_path, speculation=speculation)
    record = task(policies=names, kv_budgets=budgets, query_aware=query_aware).run(settings)
    spec, rows = load_generator(config(tmp_path, speculation=speculation), need_draft=True), rows_of(record)
    assert [(r["policy"], r["kv_budget"]) for r in record["results"]] == [
        *((name, budget) for name in names for budget in budgets),
        ("full", 1.0),
        ("draft", 1.0),
    ]
    assert len(rows) == 2 * 8
    for row in rows:
        example = make_examples("lines", 8, 2, 5)[row["example"]]
        ids, border = spec.encode_parts(example.context, example.question)
        drafts = spec.num_draft_tokens
        if row["policy"] == "draft":
            alone = SpecSmallKV.from_pretrained(DRAFT, policy="full", num_draft_tokens=0, dtype="float32")
        else:
            options = {} if row["policy"] == "full" else {"kv_budget": row["kv_budget"]}
            alone = SpecSmallKV(spec.pair, load_policy(row["policy"], **options), drafts)
        options = {} if query_aware else {"compress_after": border}
        expected = alone.generate(ids, max_new_tokens=16, ignore_eos=True, **options)
        assert row["text"] == expected.text, row
        assert row["compress_after"] == (len(ids) if query_aware else border)
        assert row["prompt_tokens"] == len(ids) and row["new_tokens"] == 16


def test_correct_answers_are_counted_per_system_and_the_runs_own_policy_stands_at_the_top(tmp_path):
    made = task(num_examples=6, policies=["snapkv", "specsmallkv"], kv_budgets=[0.3]).run(config(tmp_path))
    file = tmp_path / "rows.jsonl"
    texts = {row["example"]: row for row in rows_of(made) if row["policy"] == "full"}
    answered = sum(row["answer"] is not None for row in texts.values())
    assert answered > 1, "another seed of the examples, please: the random model says too few numbers"
    wrong = next(index for index, row in texts.items() if row["answer"] is not None)
    with file.open("w") as out:
        for index, example in enumerate(make_examples("lines", 8, 6, 5)):
            said = 123456 if index == wrong else texts[index]["answer"] or 123456
            out.write(json.dumps({"prompt": example.context + example.question, "expected_number": said}) + "\n")
    record = task(data_path=str(file), num_examples=9, policies=["snapkv", "specsmallkv"]).run(config(tmp_path))
    full = next(row for row in record["results"] if row["policy"] == "full")
    assert (full["correct"], full["answered"], full["total"]) == (answered - 1, answered, 6)
    assert full["accuracy"] == (answered - 1) / 6
    assert record["policy"] == "specsmallkv" and record["kv_budget"] == 0.3
    own = record["results"][1]
    for key in ("accuracy", "correct", "answered", "total"):
        assert record[key] == own[key]
    rows = [row for row in rows_of(record) if row["policy"] == "specsmallkv"]
    assert own["correct"] == sum(row["correct"] for row in rows)
    assert 0 < own["kv_budget_effective"] < 0.5 and own["kept_per_layer"][0]["critical"] < 250


def test_without_a_draft_the_static_policies_still_run(tmp_path):
    record = task(num_examples=1).run(config(tmp_path, "snapkv", "none", draft=None))
    assert [row["policy"] for row in record["results"]] == ["snapkv", "full"]


def test_a_draft_with_a_cut_vocabulary_is_no_baseline(tmp_path):
    run = config(tmp_path)
    run.model.draft_vocab_size = 100
    with pytest.raises(UserError, match=r"task.baselines=draft .*model.draft_vocab_size"):
        task(num_examples=1).run(run)
    assert task(num_examples=1, baselines=["full"]).run(run)["results"]


def test_ctrl_c_keeps_the_answers_there_are(tmp_path, monkeypatch):
    asked = []

    def answer(self, *args, own=System.answer):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(self.name)
        return own(self, *args)

    monkeypatch.setattr("specsmallkv.tasks.systems.System.answer", answer)
    record = task().run(config(tmp_path))
    assert record["interrupted"] and [row["total"] for row in record["results"]] == [2, 1, 1]
    assert len(rows_of(record)) == 4


def test_a_prompt_beyond_the_window_is_refused_before_any_is_read(tmp_path):
    with pytest.raises(UserError, match="context window"):
        task(num_items=9_000).run(config(tmp_path))
