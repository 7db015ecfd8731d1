r"""Invariant 1 on a real pair, float32 (slow; about 9 GB of memory with Qwen2.5-Coder 1.5B and 0.5B):

    [SPECSMALLKV_TEST_PAIR=TARGET_DIR:DRAFT_DIR] [SPECSMALLKV_TEST_PROMPTS=questions.jsonl] \
        [SPECSMALLKV_TEST_GSM8K=test.jsonl] python -m pytest -m slow tests/test_real_pair.py

Without a pair given, qwen2.5-coder-1.5b and -0.5b are looked for in specsmallkv-pairs of the user's cache directory.
The prompts file has MT-Bench's format ({"turns": [...]} a row); five of its rows are taken. A few questions stand here
for those who have none. The first ten problems of GSM8K are answered as well.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import compose_run

from specsmallkv import SpecSmallKV, load_policy
from specsmallkv.config import ModelConfig
from specsmallkv.models import load_pair

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specsmallkv-pairs"
IN_CACHE = os.pathsep.join(str(CACHE / f"qwen2.5-coder-{size}") for size in ("1.5b", "0.5b"))
TARGET, _, DRAFT = os.environ.get("SPECSMALLKV_TEST_PAIR", IN_CACHE).partition(os.pathsep)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(TARGET).is_dir() and Path(DRAFT).is_dir()),
        reason=f"{TARGET} and {DRAFT or 'the draft'} are not there; set SPECSMALLKV_TEST_PAIR=TARGET_DIR:DRAFT_DIR",
    ),
]
NEW_TOKENS = 64
GSM8K = os.environ.get("SPECSMALLKV_TEST_GSM8K", "null")  # test.jsonl; else the problems of the package
NUM_PROBLEMS, LONGEST = 10, 256
QUESTIONS = [
    "Compose a short travel story about a recent trip to an island.",
    "Describe a bustling marketplace in four sentences.",
    "Write a Python function that merges two sorted lists.",
    "Edit this sentence for grammar: she dont likes going outside when it rain.",
    "What is the central dogma of molecular biology?",
]


def questions():
    if path := os.environ.get("SPECSMALLKV_TEST_PROMPTS"):
        rows = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["turns"][0] for row in rows[:: max(1, len(rows) // 5)]][:5]
    return QUESTIONS


@pytest.fixture(scope="module")
def pair():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    return load_pair(ModelConfig("real", TARGET, DRAFT, "float32", "cpu", "auto"), need_draft=True, quiet=True)


@pytest.fixture(scope="module")
def expected(pair):
    """transformers' own greedy tokens per question, before anything of ours touches its attention."""
    assert pair.target.config._attn_implementation == "sdpa"
    tokenizer, answers = pair.tokenizer, {}
    for question in questions():
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        output = pair.target.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
        answers[question] = output[0, ids.shape[1] :].tolist()
    return answers


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_budget_one_equals_transformers_generate_on_a_real_pair(expected, solved, pair, num_draft_tokens):
    """One policy stands for all: at budget 1 none of them evicts (tests/test_decode.py runs each)."""
    spec = SpecSmallKV(pair, load_policy("specsmallkv", kv_budget=1.0), num_draft_tokens)
    assert len(expected) == 5
    for question, tokens in expected.items():
        generation = spec.generate(question, max_new_tokens=NEW_TOKENS)
        assert generation.token_ids == tokens, question
        assert bool(generation.figures()["drafted_tokens"]) == bool(num_draft_tokens)


@pytest.fixture(scope="module")
def problems():
    """GSM8K's first problems, each behind its worked examples, as `task=gsm8k` asks them."""
    config, task = compose_run("task=gsm8k", f"task.data_path={GSM8K}", f"task.num_examples={NUM_PROBLEMS}")
    return task.read(config)


@pytest.fixture(scope="module")
def solved(pair, expected, problems):
    """transformers' greedy answers, before anything of ours touches its attention."""
    answers, tokenizer = [], pair.tokenizer
    for problem in problems:
        ids = tokenizer(problem.context + problem.question, return_tensors="pt").input_ids
        options = {"stop_strings": list(problem.stop), "tokenizer": tokenizer, "repetition_penalty": 1.0}
        output = pair.target.generate(ids, max_new_tokens=LONGEST, do_sample=False, **options)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append(text.split(problem.stop[0])[0])
    return answers


def test_the_full_cache_answers_gsm8k_as_transformers_generate_does(solved, problems, pair):
    spec, answers = SpecSmallKV(pair, load_policy("full"), num_draft_tokens=0), []
    for problem in problems:
        prompt = problem.context + problem.question
        answers.append(spec.generate(prompt, max_new_tokens=LONGEST, stop=problem.stop, chat=False).text)
    assert answers == solved and len(solved) == NUM_PROBLEMS
