"""The benchmarks on a tiny random pair: rows, prompts, what is made, and answers that equal runs of their own."""

import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from specsmallkv import SpecSmallKV, UserError
from specsmallkv.benchmarks import conversations, longbench, ruler
from specsmallkv.benchmarks.data import SAMPLES
from specsmallkv.benchmarks.ruler_make import common_words, frequent_words, variable_tracking
from specsmallkv.config import CONFIG_DIR, ModelConfig, RunConfig, SpeculationConfig
from specsmallkv.decode import Decoder
from specsmallkv.presets import build, load_policy
from specsmallkv.sampling import Sampler
from specsmallkv.tasks.generate import load_generator
from specsmallkv.tasks.systems import later_text, make_systems, next_prompt, read_once

TARGET = "random:llama?layers=3&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1&context=16384"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1&context=16384"
SMALL = {  # two examples each
    "gsm8k": {"num_examples": 2},
    "bbh": {"num_examples": 1, "tasks": ["sports_understanding", "object_counting"], "query_aware": False},
    "longbench": {"num_examples": 1, "tasks": ["multifieldqa_en", "trec"]},
    "ruler": {
        "num_examples": 1,
        "tasks": ["niah_multikey_1", "vt"],
        "length": 2400,
        "policies": ["h2o", "specsmallkv"],
    },
    "humaneval": {"num_examples": 2},
    "mbpp": {"num_examples": 2, "query_aware": False},
    "mt_bench": {"num_examples": 1, "categories": ["stem", "humanities"]},
    "spec_bench": {"num_examples": 2, "categories": ["qa"], "baselines": ["full", "autoregressive"]},
}


def task_of(name, **changes):
    return build(OmegaConf.merge(OmegaConf.load(CONFIG_DIR / "task" / f"{name}.yaml"), changes), "task")


def config(run_dir, policy="specsmallkv", new_tokens=10):
    return RunConfig(
        model=ModelConfig("tiny", TARGET, DRAFT, "float32", "cpu", "auto"),
        policy=load_policy(policy, **{} if policy == "full" else {"kv_budget": 0.3}),
        speculation=SpeculationConfig("draft"),
        task=None,
        max_new_tokens=new_tokens,
        ignore_eos=True,
        quiet=True,
        run_dir=str(run_dir),
    )


def rows_of(record):
    return [*map(json.loads, Path(record["examples_file"]).read_text(encoding="utf-8").splitlines())]


@pytest.fixture(scope="module")
def spec():
    return SpecSmallKV.from_pretrained(TARGET, DRAFT, dtype="float32")


# Answers


@pytest.mark.parametrize("name", SMALL)
def test_every_answer_equals_a_run_of_its_own(tmp_path, name):
    """Of two examples, both policies and the full cache; a second turn equals a continued generation."""
    task = task_of(name, **{"baselines": ["full"], "policies": ["snapkv", "specsmallkv"]} | SMALL[name])
    settings = config(tmp_path)
    record = task.run(settings)
    shared = load_generator(settings)
    examples = task.fit(task.read(settings), shared, settings)
    rows = [row for row in rows_of(record) if row["policy"] != "autoregressive"]
    assert len(rows) == 6 and len(examples) == 2
    for row in rows:
        example, budget = examples[row["example"]], {"kv_budget": 0.3} if row["policy"] != "full" else {}
        alone = SpecSmallKV(shared.pair, load_policy(row["policy"], **budget), 3)
        ids, border = shared.encode_parts(example.context, example.question, example.chat, example.prefix)
        hidden = {} if getattr(task, "query_aware", True) else {"compress_after": border}
        answer = alone.generate(ids, max_new_tokens=10, ignore_eos=True, stop=example.stop, **hidden)
        texts = [answer.text]
        for turn in example.turns:
            said = shared.pair.tokenizer(f"<|im_end|>\n<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n")
            ids = answer.prompt_ids + answer.token_ids + said["input_ids"]
            answer = alone.generate(ids, continues=answer, max_new_tokens=10, ignore_eos=True)
            texts.append(answer.text)
        assert row["text"] == "\n\n".join(texts), (row["policy"], row["example"])
        assert (row["group"], row["expected"]) == (example.group, example.expected)
    assert [row["total"] for row in record["results"]] == [2] * len(record["results"])
    assert record["policy"] == "specsmallkv" and record["kv_budget_effective"] < 0.5
    check_own_keys(name, record)


def test_a_beginning_that_two_prompts_share_is_read_once(spec, monkeypatch):
    """Up to the observation window, which every prompt reads for itself; what is fitted on it is the same."""
    policy, fed = load_policy("specsmallkv", kv_budget=0.3, observation_size=16), []
    systems = list(make_systems(spec, [policy], [], Sampler()))
    first = [5 + i * i % 200 for i in range(200)]
    second = first[:150] + [7 + i % 11 for i in range(60)]
    earlier = read_once(spec, systems, policy, first, len(first), 8)
    feed = Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda *args: fed.append(len(args[3])) or feed(*args))
    shared = read_once(spec, systems, policy, second, len(second), 8, earlier)
    alone = read_once(spec, systems, policy, second, len(second), 8)
    assert fed == [210 - 150 - 16] * 2 + [210 - 16] * 2
    torch.testing.assert_close(shared.logits, alone.logits, atol=1e-4, rtol=1e-4)
    maps = (reading.sequence.evidence.oracle.head_map.weights for reading in (shared, alone))
    torch.testing.assert_close(*maps, atol=1e-3, rtol=1e-3)
    for ours, theirs in zip(shared.sequence.draft.layers, alone.sequence.draft.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_a_next_turn_begins_behind_the_last_answer_whether_it_ended_by_itself_or_not(spec):
    """An end-of-sequence token is read with the template's text, any other last token stays."""
    end, tokenizer = min(spec.pair.eos_token_ids), spec.pair.tokenizer
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "So"},
        {"role": "user", "content": "?"},
    ]
    before, text = spec.render(talk[:1])[0], spec.render(talk)[0]
    said = tokenizer(before + "So", add_special_tokens=False)["input_ids"]
    for tokens in (said, [*said, end]):
        ids = next_prompt(spec, SimpleNamespace(tokens=tokens), later_text(spec, talk, None))
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert later_text(spec, talk, False) == "\n\n?\n\n"


def test_a_template_that_rewrites_answers_changes_nothing_of_what_follows_them(spec, monkeypatch):
    def render(messages, chat):
        short = [
            m["content"].rpartition("</think>")[2] if m["role"] == "assistant" else m["content"] for m in messages
        ]
        return "|".join(short) + "|", None

    monkeypatch.setattr(spec, "render", render)
    talk = [("user", "Is 4 even?"), ("assistant", "<think>well</think>4"), ("user", "And 5?")]
    talk = [{"role": role, "content": content} for role, content in talk]
    assert later_text(spec, talk, None) == "|And 5?|"


def check_own_keys(name, record):
    """What each benchmark adds to the record."""
    first = record["results"][0]
    assert (
        set(first["groups"]) == {row["group"] for row in rows_of(record)}
        if name not in ("gsm8k", "humaneval", "mbpp")
        else "groups" not in first
    )
    judged = name not in ("humaneval", "mbpp", "mt_bench", "spec_bench")
    assert (record["accuracy"] is not None) == judged == (record["accuracy_interval"] is not None)
    if name == "spec_bench":
        assert first["groups"]["qa"]["speedup"] > 0 and 0 <= first["groups"]["qa"]["acceptance_rate"] <= 1
        assert first["groups"]["qa"]["acceptance_length"] >= 1
    if name == "mt_bench":
        files = [[*map(json.loads, Path(file).read_text().splitlines())] for file in record["answer_files"]]
        assert [len(file) for file in files] == [2, 2, 2]
        (row, _), questions = files[0], (SAMPLES / "mt_bench.jsonl").read_text()
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert f'"question_id": {row["question_id"]}' in questions and row["model_id"] == "tiny-snapkv-0.3"
        assert [(c["index"], len(c["turns"])) for c in row["choices"]] == [(0, 2)]
        assert len({row["answer_id"] for file in files for row in file}) == 6


def test_a_policy_that_keeps_everything_agrees_with_the_full_cache_and_a_small_budget_does_not(tmp_path):
    task = task_of("mt_bench", policies=["snapkv"], kv_budgets=[1.0, 0.05], num_examples=1, categories=["math"])
    kept, small, full = task.run(config(tmp_path, new_tokens=24))["results"]
    assert (kept["same_text"], kept["same_prefix"], kept["rouge_l_to_full"]) == (1, 1, 1)
    assert small["same_text"] < 1 and small["same_prefix"] < 1
    low, high = small["same_prefix_interval"]
    assert kept["same_prefix_interval"] == (1, 1) and low <= small["same_prefix"] <= high
    assert "same_text" not in full


def test_scores_are_counted_and_compared_with_the_full_cache(tmp_path):
    """A file whose right answers are what the full cache says, but for one."""
    made = task_of("gsm8k", policies=["full"], num_examples=4).run(config(tmp_path / "a", new_tokens=24))
    said = {row["example"]: row["answer"] for row in rows_of(made)}
    answered = [index for index, answer in said.items() if answer is not None]
    assert len(answered) > 1, "another seed of the model, please: it says too few numbers"
    rows = [json.loads(line) for line in (SAMPLES / "gsm8k.jsonl").read_text().splitlines()[:4]]
    for index, row in enumerate(rows):
        row["answer"] = f"#### {said[index] if index in answered[1:] else 123456}"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = task_of("gsm8k", data_path=str(path), baselines=["full"])
    record = task.run(config(tmp_path / "b", new_tokens=24))
    own, full = record["results"]
    assert (full["correct"], full["answered"], full["total"]) == (len(answered) - 1, len(answered), 4)
    assert full["accuracy"] == full["correct"] / 4 and full["accuracy_interval"][0] < full["accuracy"]
    assert own["accuracy_minus_full"] == pytest.approx(own["accuracy"] - full["accuracy"])
    assert full["mean_new_tokens"] == full["new_tokens"] / 4 and full["finished"] <= 4
    assert record["accuracy"] == own["accuracy"]


def test_perplexity_of_the_full_cache_is_that_of_a_forward_pass(tmp_path, spec):
    task = task_of("perplexity", policies=["full", "snapkv"], context_tokens=96, eval_tokens=20, num_examples=2)
    record = task.run(config(tmp_path, "snapkv"))
    full, small = record["results"]
    ids = spec.pair.tokenizer((SAMPLES / "text.txt").read_text())["input_ids"]
    windows = torch.tensor(ids[: 2 * 117]).view(2, 117)
    model = SpecSmallKV.from_pretrained(TARGET, None, policy="full", num_draft_tokens=0, dtype="float32").pair.target
    with torch.inference_mode():
        scores = model(input_ids=windows, attn_implementation="sdpa").logits.log_softmax(-1)[:, 95:-1]
    nll = -scores.gather(2, windows[:, 96:, None]).squeeze(2)
    assert (full["windows"], full["scored_tokens"]) == (2, 2 * 20)
    assert full["nll"] == pytest.approx(float(nll[:, 1:].mean()), rel=1e-4)
    assert full["perplexity"] == pytest.approx(full["perplexity_full"]) and full["top1_agreement"] == 1
    assert small["kv_budget_effective"] < 0.6 and small["nll"] != full["nll"]
    assert record["policy"] == "snapkv" and record["perplexity"] == small["perplexity"]


# Prompts


def test_gsm8k_asks_after_eight_worked_examples(tmp_path):
    first, second = task_of("gsm8k", num_examples=2).read(config(tmp_path))
    assert first.context.count("\nA: ") == 8 and first.context.count("The answer is") == 8
    assert first.question.startswith("Q: Janet") and first.question.endswith("?\nA:")
    assert (first.expected, second.expected, first.chat, first.stop) == ("18", "3", False, ("Q:",))
    assert first.judge("so she makes $18.00 a day.").score == 1 and first.judge("18 - 2").score == 0
    assert first.judge("").answer is None and first.judge("").score == 0


def test_bbh_asks_every_task_after_its_own_prompt(tmp_path):
    examples = task_of("bbh", num_examples=2).read(config(tmp_path))
    assert len({e.group for e in examples}) * 2 == len(examples) == 12
    for example in examples:
        assert example.context.count("Let's think step by step.") == 3 and "canary" not in example.context
        assert example.question.endswith("\nA: Let's think step by step.")
        assert example.judge(f"Well. So the answer is {example.expected}.").score == 1
        assert example.judge("").score == example.judge("I do not know").score == 0
    dates = next(e for e in examples if e.group == "date_understanding")
    assert dates.judge(f"So the answer is {dates.expected} 01/01/2020.").score == 1


def test_longbench_fills_the_published_prompts_of_all_english_tasks(tmp_path):
    examples = task_of("longbench", num_examples=1).read(config(tmp_path))
    published = json.loads((SAMPLES / "longbench" / "tasks.json").read_text())
    assert [e.group for e in examples] == list(longbench.NAMES) == list(published)
    for example in examples:
        row = json.loads((SAMPLES / "longbench" / f"{example.group}.jsonl").read_text().splitlines()[0])
        task = published[example.group]
        assert example.context + example.question == task["prompt"].format(**row)
        assert example.max_new_tokens == task["max_new_tokens"] and example.context.endswith(row["context"])
        assert example.judge(row["answers"][0]).score == pytest.approx(1)
        assert example.judge("").score == 0 and example.judge("").answer is None
    assert {e.group for e in examples if e.chat is False} == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


def test_longbench_takes_the_best_of_several_references(tmp_path):
    example = task_of("longbench", num_examples=1, tasks=["narrativeqa"]).read(config(tmp_path))[0]
    assert len(example.expected) == 2 and {example.judge(answer).score for answer in example.expected} == {1.0}


def test_a_long_prompt_loses_its_middle_and_keeps_its_question(tmp_path, spec):
    example = task_of("longbench", num_examples=1, tasks=["hotpotqa"]).read(config(tmp_path))[0]
    cut = longbench.without_middle(example, spec.pair.tokenizer, 1001)
    text, whole = cut.context + cut.question, example.context + example.question
    assert len(spec.pair.tokenizer(text)["input_ids"]) <= 1000  # two halves of 500
    assert text == whole[:500] + whole[-500:]
    assert cut.question == example.question.lstrip("\n")
    assert longbench.without_middle(example, spec.pair.tokenizer, 10_000) is example
    with pytest.raises(UserError, match=r"hotpotqa would be cut to 100 tokens.*task.max_length"):
        longbench.without_middle(example, spec.pair.tokenizer, 100)


def test_longbench_reads_one_file_and_answers_that_are_text(tmp_path):
    row = {
        "input": "",
        "context": "News.",
        "answers": "['A [b], \\'c\\'.']",
        "dataset": "multi_news",
        "all_classes": None,
    }
    (tmp_path / "some.jsonl").write_text(json.dumps(row))
    (example,) = task_of("longbench", data_path=str(tmp_path / "some.jsonl")).read(config(tmp_path))
    assert (example.group, example.expected) == ("multi_news", ["A [b], 'c'."])
    with pytest.raises(UserError, match="has no rows of trec"):
        task_of("longbench", data_path=str(tmp_path / "some.jsonl"), tasks=["trec"]).read(config(tmp_path))


HOTPOT = {  # a row as its authors publish it
    "_id": "5a",
    "question": "Who built it?",
    "answer": "Orrin Vale",
    "supporting_facts": [["Bridge", 0]],
    "context": [["Bridge", ["It was built by Vale.", " It has nine arches."]], ["Vale", ["An engineer."]]],
    "type": "bridge",
    "level": "hard",
}
MEETING = {
    "topic_list": [],
    "general_query_list": [{"query": "Summarize the meeting.", "answer": "A sign was agreed on."}],
    "specific_query_list": [
        {"query": "What of the clock?", "answer": "It stays.", "relevant_text_span": [["0", "1"]]}
    ],
    "meeting_transcripts": [{"speaker": "Chair", "content": "The clock ?"}, {"speaker": "Tom", "content": "A sign ."}],
}


def test_hotpotqas_own_rows_are_asked_with_longbenchs_prompt(tmp_path):
    (tmp_path / "hotpot_dev.json").write_text(json.dumps([HOTPOT]))
    (example,) = task_of("longbench", data_path=str(tmp_path / "hotpot_dev.json")).read(config(tmp_path))
    prompt = json.loads((SAMPLES / "longbench" / "tasks.json").read_text())["hotpotqa"]["prompt"]
    context = "Passage 1:\nBridge\nIt was built by Vale. It has nine arches.\n\nPassage 2:\nVale\nAn engineer."
    assert example.context + example.question == prompt.format(context=context, input="Who built it?")
    assert (example.group, example.expected, example.max_new_tokens) == ("hotpotqa", ["Orrin Vale"], 32)
    assert example.judge("It was Orrin Vale.").score == pytest.approx(2 / 3)


def test_each_query_of_a_qmsum_meeting_is_asked_with_longbenchs_prompt(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(MEETING) + "\n" + json.dumps(MEETING))
    task = task_of("longbench", data_path=str(tmp_path / "test.jsonl"), tasks=["qmsum"], num_examples=3)
    first, second, third = task.read(config(tmp_path))
    prompt = json.loads((SAMPLES / "longbench" / "tasks.json").read_text())["qmsum"]["prompt"]
    context = "Chair: The clock ?\nTom: A sign ."
    assert first.context + first.question == prompt.format(context=context, input="Summarize the meeting.")
    assert second.context + second.question == prompt.format(context=context, input="What of the clock?")
    assert [e.expected for e in (first, second, third)] == [["A sign was agreed on."], ["It stays."], first.expected]
    assert {e.group for e in (first, second, third)} == {"qmsum"} and second.judge("It stays.").score > 0.99
    with pytest.raises(UserError, match="has no rows of hotpotqa"):
        task_of("longbench", data_path=str(tmp_path / "test.jsonl"), tasks=["hotpotqa"]).read(config(tmp_path))


# RULER


@pytest.mark.parametrize("name", ruler.NAMES)
def test_a_puzzle_holds_all_its_answers_and_fits_its_length(tmp_path, spec, name):
    task, settings = task_of("ruler", tasks=[name], num_examples=2, length=2500), config(tmp_path, new_tokens=50)
    examples = task.fit(task.read(settings), spec, settings)
    for example in examples:
        ids, border = spec.encode_parts(example.context, example.question, None, example.prefix)
        assert 2200 < len(ids) + min(50, example.max_new_tokens) <= 2500 and border < len(ids)
        assert all(output in example.context for output in example.expected)
        assert not any(output in example.question + example.prefix for output in example.expected)
        assert example.judge(", ".join(example.expected)).score == 1 and example.judge("").score == 0
    assert examples[0] != examples[1]
    again = task_of("ruler", tasks=[name], num_examples=1, length=2500)
    assert again.fit(again.read(settings), spec, settings) == examples[:1]


@pytest.mark.parametrize(
    ("name", "answers", "needles", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_multikey_1", 1, 4, 1),
        ("niah_multivalue", 4, 4, 1),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles_are_as_many_as_the_benchmark_hides(name, answers, needles, asked):
    essay = ["Some", "words.", "And", "more", "of", "them."] * 50
    made = ruler.NEEDLES[name].make(300, random.Random(1), essay)
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", made.context)
    assert (len(made.outputs), len(found)) == (answers, needles)
    keys = {key for key, value in found if value in made.outputs}
    assert len(keys) == asked and all(key in made.question and key in made.prefix for key in keys)
    singular = "A special magic number is hidden", "What is the special magic number for"
    assert (singular[0] in made.context, singular[1] in made.question) == ((answers == 1,) * 2)


def test_a_chain_of_variables_can_be_followed_to_all_its_names():
    made = variable_tracking(60, random.Random(2), [])
    value = re.search(r"assigned the value (\d+) in", made.question)[1]
    links = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", made.context))
    reached = [name for name, source in links.items() if source == value]
    for _ in range(4):  # each variable is the source of exactly one other
        (following,) = [name for name, source in links.items() if source == reached[-1]]
        reached.append(following)
    assert reached == made.outputs and len(links) == 5
    assert f"5 variables are assigned the value {value}" in made.prefix


def test_the_words_asked_for_are_the_most_frequent_ones():
    made = common_words(60, random.Random(3), [], length=2000)
    listed = re.findall(r"\d+\. (\S+)", made.context.rpartition("Memorize")[2])
    counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
    assert {word for _, word in counts[:10]} == set(made.outputs) and counts[9][0] > counts[10][0]
    made = frequent_words(400, random.Random(3), [], length=4000)
    words = made.context.partition("coded words. ")[2].split()
    counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
    assert counts[0][1] == "..." and [word for _, word in counts[1:4]] == made.outputs
    assert counts[3][0] > counts[4][0]


def test_a_file_of_rulers_own_is_read_with_its_prefix_apart(tmp_path):
    text = "A special magic uuid is hidden.\nOne is: x-1.\nWhat is the special magic uuid for k mentioned?"
    old = {"input": f"{text} The special magic uuid for k mentioned is", "outputs": ["x-1"]}
    new = {"input": text, "outputs": ["x-1"], "answer_prefix": " The special magic uuid for k mentioned is"}
    (tmp_path / "niah_multikey_3.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(new))
    a, b = task_of("ruler", data_path=str(tmp_path / "niah_multikey_3.jsonl")).read(config(tmp_path))
    assert a == b and a.group == "niah_multikey_3" and a.max_new_tokens == 128
    assert a.question == "What is the special magic uuid for k mentioned?" and a.prefix == new["answer_prefix"]


def test_questions_of_rulers_own_files_want_one_of_their_answers_and_a_directory_names_the_task(tmp_path):
    row = {"input": "Some text.\nQuestion: Who?", "outputs": ["Ann", "Ann B.", "A."], "answer_prefix": " Answer:"}
    for name, score in (("qa_1", 1), ("cwe", 1 / 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "validation.jsonl").write_text(json.dumps(row))
        [puzzle] = task_of("ruler", data_path=str(tmp_path / name / "validation.jsonl")).read(config(tmp_path))
        assert puzzle.group == name and puzzle.judge("It was Ann").score == pytest.approx(score)


# The hub

PROBLEM = {"question": "What is 1 + 1?", "answer": "Two.\n#### 2"}
TALK = {"question_id": 81, "category": "qa", "turns": ["Who?"]}
HUB_ROWS = {  # further settings, a row in the hub's fields, what is asked for: repository, configuration, split, file
    "gsm8k": ({}, PROBLEM, [("openai/gsm8k", "main", "test", None)]),
    "bbh": (
        {"tasks": ["snarks", "navigate"]},
        {"input": "Is it?", "target": "(A)"},
        [("SaylorTwift/bbh", "snarks", "test", None), ("SaylorTwift/bbh", "navigate", "test", None)],
    ),
    "humaneval": (
        {},
        {"task_id": "HumanEval/0", "prompt": "def f():", "test": "", "entry_point": "f"},
        [("openai/openai_humaneval", None, "test", None)],
    ),
    "mbpp": (
        {},
        {"task_id": 11, "prompt": "Add.", "test_list": ["assert add"], "test_imports": []},
        [("google-research-datasets/mbpp", "sanitized", "test", None)],
    ),
    "mt_bench": (
        {},
        {"prompt_id": 81, "category": "stem", "prompt": ["Why?", "And?"]},
        [("HuggingFaceH4/mt_bench_prompts", None, "train", None)],
    ),
    "spec_bench": (
        {"num_examples": 9},
        TALK,
        [
            ("RedHatAI/speculator_benchmarks", None, "train", f"{name}.jsonl")
            for name in ("question", "translation", "summarization", "qa", "math_reasoning", "rag")
        ],
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_hubs_rows_are_read_from_where_the_documentation_says(tmp_path, monkeypatch, name):
    """A stand-in for the library that keeps what it is asked for; one row each."""
    changes, row, sources = HUB_ROWS[name]
    asked = []

    def load_dataset(repository, configuration=None, *, split, streaming, data_files):
        asked.append((repository, configuration, split, data_files))
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    examples = task_of(name, data_path="hub", **changes).read(config(tmp_path))
    assert asked == sources and len(examples) == len(sources)
    values = (row[key] for key in ("question", "input", "prompt", "turns") if key in row)
    first = next(value if isinstance(value, str) else value[0] for value in values)
    assert all(first in example.question for example in examples)
    table = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert all(repository in table for repository, *_ in sources)


def test_every_published_task_of_bbh_can_be_read_from_the_hub_with_its_own_prompt(tmp_path, monkeypatch):
    stand_in = SimpleNamespace(load_dataset=lambda *args, **options: [{"input": "Is it?", "target": "(A)"}] * 2)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    examples = task_of("bbh", data_path="hub", num_examples=1).read(config(tmp_path))
    assert len({e.group for e in examples}) == len(examples) == 27
    assert len({e.context for e in examples}) == 23  # tasks of one family differ in the number of objects alone
    assert all("canary" not in e.context and e.context.count("Let's think step by step.") == 3 for e in examples)


@pytest.mark.peers
def test_the_real_library_reads_one_file_of_a_repository(tmp_path, monkeypatch):
    """A directory takes the hub's place."""
    pytest.importorskip("datasets")
    for name in conversations.SPEC_BENCH_FILES:
        row = TALK | {"category": "writing" if name == "question" else name, "turns": [f"Ask {name}."]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    sources = [source._replace(repository=str(tmp_path)) for source in conversations.HUB_SOURCES["spec_bench"]]
    monkeypatch.setitem(conversations.HUB_SOURCES, "spec_bench", sources)
    examples = task_of("spec_bench", data_path="hub").read(config(tmp_path))
    assert [e.group for e in examples] == list(conversations.SPEC_BENCH)
    assert [e.question for e in examples] == [f"Ask {name}." for name in conversations.SPEC_BENCH_FILES]


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "gsm8k",
            '{"question": "a", "answer": "#### 1"}\n{"question": 3}',
            "line 2 has no field question of type str",
        ),
        ("gsm8k", "[", "line 1 is not JSON"),
        ("longbench", '{"context": "", "input": "", "dataset": "trec", "answers": ["a"]}', "no field all_classes"),
        ("longbench", '{"context": "", "input": "", "dataset": "lcc", "answers": "["}', "answers that are no list"),
        ("longbench", json.dumps(HOTPOT | {"context": [["a", "b"]]}), r"no list of \[title, sentences\]"),
        ("longbench", json.dumps(HOTPOT | {"answer": 3}), "no field answer of type str"),
        ("longbench", json.dumps(MEETING | {"meeting_transcripts": ["a"]}), "no field speaker of type str"),
        ("longbench", json.dumps(MEETING | {"general_query_list": [{"query": "a"}]}), "no field answer of type str"),
        ("ruler", '{"input": "one line", "outputs": ["a"]}', "an input without a question in its last line"),
        ("ruler", '{"input": "a\\nb", "outputs": [1]}', "outputs that are no list of texts"),
        ("mt_bench", '{"question_id": 1, "category": "stem", "turns": []}', "turns that are no list of texts"),
        ("mt_bench", '{"question_id": 1, "category": "law", "turns": ["a"]}', "of the category law"),
        ("spec_bench", '{"category": "qa", "turns": ["a"]}', "no field question_id of type int or str"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_row(tmp_path, name, content, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^task\.data_path={re.escape(str(path))} line \d .*{problem}|{problem}"):
        task_of(name, data_path=str(path)).read(config(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("gsm8k", {"num_examples": 0}, "task.num_examples=0"),
        ("gsm8k", {"baselines": ["all"]}, "task.baselines names all"),
        ("bbh", {"tasks": ["nope"]}, "task.tasks names nope"),
        ("bbh", {"data_path": "."}, "cot-prompts"),
        ("longbench", {"tasks": ["lsht"]}, "task.tasks names lsht"),
        ("longbench", {"max_length": 1}, "task.max_length=1"),
        ("ruler", {"length": 0}, "task.length=0"),
        ("ruler", {"data_path": "hub"}, "task.data_path=hub has no rows for this task"),
        ("ruler", {"seed": "x"}, "task.seed=x"),
        ("mt_bench", {"categories": ["qa"]}, "task.categories names qa"),
        ("perplexity", {"rows": "both"}, "task.rows=both"),
        ("perplexity", {"context_tokens": 9}, "task.context_tokens=9"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, name, changes, problem):
    with pytest.raises(UserError, match=problem):
        task_of(name, **changes).read(config(tmp_path))


def test_a_length_below_the_shortest_puzzle_is_refused(tmp_path, spec):
    task = task_of("ruler", tasks=["vt"], length=300)
    with pytest.raises(UserError, match=r"task.length=300 is too small for vt; give at least \d+"):
        task.fit(task.read(config(tmp_path)), spec, config(tmp_path))


def test_the_hub_without_its_library_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"task.data_path=hub needs the datasets library.*specsmallkv\[eval\]"):
        task_of("gsm8k", data_path="hub").read(config(tmp_path))


def test_the_samples_are_small():
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 250_000
