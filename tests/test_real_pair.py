r"""Invariant 1 on a real pair, float32 (slow). Name local directories of a target and a draft:

    SPECSMALLKV_TEST_TARGET=DIR SPECSMALLKV_TEST_DRAFT=DIR [SPECSMALLKV_TEST_PROMPTS=questions.jsonl] \
        python -m pytest -m slow tests/test_real_pair.py

The prompts file has MT-Bench's format ({"turns": [...]} a row); a few questions stand here for those who have none.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specsmallkv import SpecSmallKV

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SPECSMALLKV_TEST_TARGET" not in os.environ, reason="SPECSMALLKV_TEST_TARGET is not set"),
]
QUESTIONS = [
    "Compose a short travel story about a recent trip to an island.",
    "Describe a bustling marketplace in four sentences.",
    "Write a Python function that merges two sorted lists.",
    "Edit this sentence for grammar: she dont likes going outside when it rain.",
    "What is the central dogma of molecular biology?",
]


def questions():
    if path := os.environ.get("SPECSMALLKV_TEST_PROMPTS"):
        return [json.loads(line)["turns"][0] for line in Path(path).read_text().splitlines()[::16]][:5]
    return QUESTIONS


@pytest.fixture(scope="module")
def expected():
    """transformers' own greedy tokens, from a model that never saw our attention."""
    torch.set_num_threads(os.cpu_count() or 1)
    target = os.environ["SPECSMALLKV_TEST_TARGET"]
    spec = SpecSmallKV.from_pretrained(target, policy="full", num_draft_tokens=0, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    answers = []
    for question in questions():
        ids = torch.tensor([spec.encode(question)])
        output = model.generate(ids, max_new_tokens=64, do_sample=False, repetition_penalty=1.0)
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize("policy", ["full", "specsmallkv", "smallkv"])
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_budget_one_equals_transformers_generate_on_a_real_pair(expected, policy, num_draft_tokens):
    spec = SpecSmallKV.from_pretrained(
        os.environ["SPECSMALLKV_TEST_TARGET"],
        os.environ["SPECSMALLKV_TEST_DRAFT"],
        policy=policy,
        kv_budget=1.0,
        num_draft_tokens=num_draft_tokens,
        dtype="float32",
    )
    for question, tokens in zip(questions(), expected, strict=True):
        assert spec.generate(question, max_new_tokens=64).token_ids == tokens, question
