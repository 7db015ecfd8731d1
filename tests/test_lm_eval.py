"""lm-evaluation-harness on our generator: its own HFLM's answers at budget 1, compression below, one sentence each."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from specsmallkv import SpecSmallKV, UserError, random_model
from specsmallkv.config import ModelConfig, RunConfig, SpeculationConfig
from specsmallkv.presets import load_policy
from specsmallkv.tasks.lm_eval import LMEvalTask

TARGET = "random:llama?layers=3&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1&context=512"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1&context=512"
LONG = "The quick brown fox jumps over the lazy dog, and then it rests below the old oak. " * 3
PAIRS = [  # context and continuation
    ("", "Nothing stands before this"),
    ("Q", " one token of context"),
    ("Question: who is it? Answer: ", "the fox"),  # its space moves to the continuation
    (LONG + "Who jumps?", " fox"),
    (LONG + "Who jumps?", " the lazy dog, which is longer"),
    (LONG * 3, " a context that does not fit"),
]
WRITTEN = [  # context and generation arguments
    ("Q: who are you?\nA:", {"until": ["\n"], "max_gen_toks": 24}),
    (LONG, {"until": "e", "max_gen_toks": 40, "do_sample": False, "temperature": 0.0}),
    (LONG * 3, {"until": [], "max_gen_toks": 12}),
]


def config(run_dir, policy="specsmallkv", kv_budget=0.3, new_tokens=64, **changes):
    settings = {"temperature": 0.0} | changes
    return RunConfig(
        model=ModelConfig("tiny", TARGET, DRAFT, "float32", "cpu", "auto"),
        policy=load_policy(policy, kv_budget=kv_budget),
        speculation=SpeculationConfig("draft"),
        task=None,
        max_new_tokens=new_tokens,
        quiet=True,
        run_dir=str(run_dir),
        **settings,
    )


def task(**changes):
    settings = {
        "name": "lm_eval",
        "tasks": ["choices"],
        "include_path": None,
        "num_examples": None,
        "num_fewshot": None,
        "rows": "drafted",
        "confirm_run_unsafe_code": False,
        "policies": [],
        "kv_budgets": [],
        "max_new_tokens": 64,
    }
    return LMEvalTask(**settings | changes)


def requests(*arguments):
    return [SimpleNamespace(args=own) for own in arguments]


# Without the extra


def test_a_missing_extra_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'specsmallkv\[eval\]'\.$"):
        task().run(config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": []}, "task.tasks names no task"),
        ({"rows": "silver"}, "task.rows=silver"),
        ({"num_examples": 0}, "task.num_examples=0"),
        ({"num_fewshot": -1}, "task.num_fewshot=-1"),
        ({"include_path": "/no/such/folder"}, "task.include_path=/no/such/folder"),
    ],
)
def test_a_value_that_cannot_be_is_refused(changes, told):
    with pytest.raises(UserError, match=told):
        task(**changes)


# With it


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval", reason="needs the extra eval")


@pytest.fixture
def lm(harness):
    """Makes our model: one policy at a budget."""
    from specsmallkv.tasks.lm_eval_model import Answers, PolicyLM

    def make(policy="specsmallkv", kv_budget=1.0, gold=False, others=(), drafts=3, new_tokens=64):
        chosen = load_policy(policy, kv_budget=kv_budget)
        spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, policy=chosen, num_draft_tokens=drafts, dtype="float32")
        policies = [chosen, *(load_policy(name, kv_budget=kv_budget) for name in others)]
        settings = config("unused", policy, kv_budget, new_tokens)
        return PolicyLM(Answers(spec, policies, settings, gold, lambda _: None), 0)

    return make


@pytest.fixture
def reference(harness):
    from lm_eval.models.huggingface import HFLM

    from specsmallkv.tokenizer import byte_tokenizer

    model = random_model.build(TARGET).eval()
    return HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1, max_length=512, device="cpu")


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("gold", [False, True])
def test_likelihoods_at_budget_one_are_the_harness_own(lm, reference, drafts, gold):
    ours = lm(drafts=drafts, gold=gold).loglikelihood(requests(*PAIRS))
    theirs = reference.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=2e-4)


def test_a_greedy_continuation_is_told_as_such(lm, reference):
    """Otherwise equality of two lists of `false` would prove nothing."""
    contexts = [LONG[:length] for length in range(60, 160) if LONG[length - 1] != " "]
    said = reference.generate_until(requests(*((x, {"max_gen_toks": 1, "until": []}) for x in contexts)), True)
    greedy = [(context, next_) for context, next_ in zip(contexts, said, strict=True) if next_ and next_.isascii()]
    pairs = requests(*greedy[:6], *((context, "#") for context in contexts[:3]))
    theirs = [greedy for _, greedy in reference.loglikelihood(pairs, disable_tqdm=True)]
    assert [greedy for _, greedy in lm().loglikelihood(pairs)] == theirs
    assert any(theirs) and not all(theirs)


def test_rolling_likelihoods_at_budget_one_are_the_harness_own(lm, reference):
    """The longer text takes several windows of the model's 512 tokens."""
    texts = requests(("Short.",), (LONG * 3,))
    theirs = reference.loglikelihood_rolling(texts, disable_tqdm=True)
    assert lm().loglikelihood_rolling(texts) == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("drafts", [0, 3])
def test_texts_at_budget_one_are_the_harness_own(lm, reference, drafts):
    ours = lm(drafts=drafts).generate_until(requests(*WRITTEN))
    assert ours == reference.generate_until(requests(*WRITTEN), disable_tqdm=True)
    assert "" not in ours


def test_a_text_ends_before_its_first_stop_string_as_in_the_harness(lm, reference):
    (whole,) = reference.generate_until(requests((LONG, {"max_gen_toks": 40, "until": []})), disable_tqdm=True)
    stopped = requests((LONG, {"max_gen_toks": 40, "until": ["never there", whole[12:14]]}))
    (theirs,) = reference.generate_until(stopped, disable_tqdm=True)
    assert lm().generate_until(stopped) == [theirs] and theirs == whole[: whole.index(whole[12:14])]


@pytest.mark.parametrize("policy", ["snapkv", "smallkv", "specsmallkv", "h2o", "oracle"])
def test_every_scored_token_is_read_from_the_compressed_cache(lm, policy):
    """Already the single token of a multiple-choice answer; a text read from its first token on evicts on its way."""
    model, full = lm(policy, 0.15), lm("full")
    choice = requests((LONG + "Who jumps?", " "))
    assert model.loglikelihood(choice)[0][0] != pytest.approx(full.loglikelihood(choice)[0][0], abs=1e-3)
    text = requests((LONG,))
    assert model.loglikelihood_rolling(text)[0] != pytest.approx(full.loglikelihood_rolling(text)[0], abs=1e-2)
    held = model.answers.readings[0].held()
    assert held["kv_budget_effective"] < 0.6
    assert all(layer["critical"] < layer["total"] for layer in held["kept_per_layer"])


@pytest.mark.parametrize("policy", ["snapkv", "smallkv", "specsmallkv"])
def test_policies_side_by_side_answer_as_each_alone(lm, policy):
    """They share prompts and the draft's rows; a long prompt, a short one, and one that is first compressed late."""
    pairs = requests((LONG, " fox and dog"), ("Q", " " + LONG[:150]))
    together = lm(policy, 0.3, gold=True, others=["streaming_llm", "full"])
    alone = lm(policy, 0.3, gold=True).loglikelihood(pairs)
    assert [x for x, _ in together.loglikelihood(pairs)] == pytest.approx([x for x, _ in alone], abs=1e-3)
    written = requests((LONG, {"max_gen_toks": 12, "until": []}))
    assert together.generate_until(written) == lm(policy, 0.3).generate_until(written)


def test_a_request_that_is_cut_counts_once_whatever_the_number_of_policies(lm):
    from specsmallkv.tasks.lm_eval_model import PolicyLM

    first = lm("snapkv", kv_budget=0.5, others=["full"])
    too_long = requests(("long " * 120, " yes"))
    for number in range(2):
        PolicyLM(first.answers, number).loglikelihood(too_long)
    assert first.answers.truncated == 1


def test_a_policy_reads_a_short_context_as_a_generation_would(lm):
    """The head map of a context too short to compress is fitted when the first eviction is due."""
    model = lm("specsmallkv", 0.2, gold=True)
    (ours,) = model.loglikelihood(requests(("Q", LONG[:120])))
    decoder, ids = model.answers.spec.decoder(), model.tok_encode("Q" + LONG[:120])
    sequence = decoder.start(ids[:1], len(ids))
    decoder.prefill(sequence)
    decoder.settle(sequence)
    first = decoder.extend(sequence, ids[1:-1]).log_softmax(-1)[ids[-1]]
    assert ours[0] < float(first) and sequence.target.kept_per_layer()[0]["critical"] < len(ids)
    held = model.answers.readings[0].held()["kept_per_layer"]
    assert [x["critical"] for x in held] == pytest.approx(
        [x["critical"] for x in sequence.target.kept_per_layer()], abs=8
    )


def test_repeats_of_a_sampled_request_differ_and_come_again_with_the_seed(lm):
    arguments = {"max_gen_toks": 16, "until": [], "do_sample": True, "temperature": 1.0}
    again = requests((LONG, arguments), (LONG, arguments))
    texts = lm().generate_until(again)
    assert texts[0] != texts[1]
    assert lm().generate_until(again) == texts


def test_what_the_generator_would_ignore_is_refused(lm):
    with pytest.raises(UserError, match="num_beams=4"):
        lm().generate_until(requests((LONG, {"max_gen_toks": 4, "num_beams": 4})))
    with pytest.raises(UserError, match="600 new tokens"):
        lm(new_tokens=900).generate_until(requests((LONG, {"max_gen_toks": 600})))


# Whole tasks


@pytest.fixture
def folder(tmp_path):
    """Two tasks on local data, in a group, and one whose data are nowhere."""
    docs = [
        {"question": f"{LONG}{who}?", "choices": [" fox", " dog", " oak"], "answer": number % 3, "reply": " a"}
        for number, who in enumerate(("Who jumps", "Who rests", "What is old", "What is lazy"))
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choices = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    replies = {
        "task": "replies",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{reply}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    texts = {
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    lost = choices | {"task": "lost", "dataset_path": "nobody/has-this", "test_split": "test"}
    group = {"group": "both", "task": ["choices", "replies"], "aggregate_metric_list": [{"metric": "acc"}]}
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for own in (choices | local, replies | local, texts | local):
        (tasks / f"{own['task']}.yaml").write_text(yaml.safe_dump(own))
    (tasks / "lost.yaml").write_text(yaml.safe_dump(lost))
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    return tasks


def test_a_record_has_every_metric_of_every_task_and_policy(harness, folder, tmp_path, capsys):
    asked = {"tasks": ["choices", "replies", "texts"], "include_path": str(folder), "num_examples": 3}
    record = task(**asked, policies=["full", "specsmallkv"], kv_budgets=[0.2]).run(config(tmp_path, kv_budget=0.2))
    rows = {(row["policy"], row["name"]): row for row in record["results"]}
    assert list(rows) == [(policy, name) for policy in ("full", "specsmallkv") for name in asked["tasks"]]
    for (policy, name), row in rows.items():
        metric = {"choices": "acc", "replies": "exact_match", "texts": "byte_perplexity"}[name]
        assert row["n"] == 3 and row["kv_budget"] == (1.0 if policy == "full" else 0.2)
        assert row[metric] >= 0 and f"{metric}_stderr" in row
        assert (row["kv_budget_effective"] < 0.5) == (policy == "specsmallkv")
        assert row["likelihood_requests"] == 3 * 3 + 3 and row["generated_texts"] == 3
    assert record["policy"] == "specsmallkv" and record["kv_budget"] == 0.2 and record["name"] == "choices"
    samples = [*map(json.loads, Path(record["examples_file"]).read_text().splitlines())]
    assert len(samples) == 2 * 3 * 3 and {sample["policy"] for sample in samples} == {"full", "specsmallkv"}
    assert capsys.readouterr().out == ""


def test_scores_of_a_task_are_those_of_the_harness_own_model(harness, folder, tmp_path, reference):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = harness.simple_evaluate(model=reference, tasks=["both"], task_manager=manager)
    record = task(tasks=["both"], include_path=str(folder)).run(config(tmp_path, kv_budget=1.0))
    rows = {row["name"]: row for row in record["results"]}
    for name, metric in (("choices", "acc"), ("replies", "exact_match"), ("both", "acc")):
        assert rows[name][metric] == theirs["results"].get(name, theirs.get("groups", {}).get(name))[f"{metric},none"]
    assert 0 < rows["choices"]["acc"] < 1


@pytest.mark.parametrize(
    ("name", "told"),
    [("choice", "task.tasks=choice is no task.*near: choices"), ("lost", "task.tasks=lost cannot be loaded")],
)
def test_an_unknown_task_and_missing_data_are_one_sentence(harness, folder, tmp_path, monkeypatch, name, told):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=told) as caught:
        task(tasks=[name], include_path=str(folder)).run(config(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_command_line_ends_with_the_record(harness, folder, tmp_path):
    arguments = ["+model=tiny-random", "task=lm_eval", "task.tasks=[choices]", f"task.include_path={folder}"]
    command = [sys.executable, "-m", "specsmallkv.run", *arguments, "quiet=true", f"run_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["task"] == "lm_eval" and record["n"] == 4 and 0 <= record["acc"] <= 1


def test_the_documented_task_over_a_file_of_the_package_runs_offline(harness, tmp_path, monkeypatch):
    """The command as docs/benchmarks.md has it, from the root of a clone."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = Path(__file__).resolve().parents[1]
    lines = (root / "docs" / "benchmarks.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("python") and "docs/lm_eval" in line]
    command = [sys.executable, *shlex.split(line)[1:], "+model=tiny-random", "max_new_tokens=8", f"run_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["name"], record["n"], record["generated_texts"]) == ("gsm8k_sample", 5, 5)
    assert 0 <= record["exact_match,last-number"] <= 1
    samples = [*map(json.loads, Path(record["examples_file"]).read_text().splitlines())]
    assert [sample["target"] for sample in samples] == ["18", "3", "70000", "540", "20"]
    assert all("Question: " in str(sample["arguments"]) for sample in samples)
