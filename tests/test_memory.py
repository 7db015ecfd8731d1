"""Resident memory is flat over a long text and over many prompts; nothing waits for the garbage collector."""

import gc
import weakref

import pytest
import torch

from specsmallkv import SpecSmallKV
from specsmallkv.memory import PROC
from specsmallkv.presets import load_policy

TARGET = "random:llama?layers=2&hidden=64&heads=4&kv_heads=2&vocab=320&context=32768&seed=0"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&context=32768&seed=1"
POLICIES = ("specsmallkv", "smallkv")
FLAT = 6 * 2**20  # the host store and the draft's cache take 1 MiB for 1,500 tokens; kept logits would take 8
PROMPT = list(range(1, 150))


def spec_of(name):
    policy = load_policy(name, kv_budget=0.3)
    return SpecSmallKV.from_pretrained(TARGET, DRAFT, policy=policy, dtype="float32")


def resident_bytes():
    """Pages of the process that lie in memory now; Linux only."""
    if not (PROC / "statm").exists():
        pytest.skip("resident memory is read from /proc")
    gc.collect()
    return int((PROC / "statm").read_text().split()[1]) * 4096


def num_tensors():
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("name", [*POLICIES, "h2o"])
def test_caches_are_freed_with_their_generation_and_not_by_the_garbage_collector(name):
    """Those of a stream that was left half way, and of a batch, too."""
    spec, caches = spec_of(name), []
    gc.collect()
    gc.disable()
    try:
        generation = spec.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        half = iter(spec.stream(PROMPT, max_new_tokens=12, ignore_eos=True))
        next(half)
        caches += [weakref.ref(generation.sequence.target), weakref.ref(generation.sequence.evidence)]
        before = num_tensors()
        del generation, half
        assert [ref() for ref in caches] == [None, None]
        after = num_tensors()
        spec.generate_batch([PROMPT, PROMPT[:90], PROMPT[:60]], batch_size=2, max_new_tokens=12)
        assert num_tensors() == after < before
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_resident_memory_is_flat_over_two_thousand_tokens(name):
    spec, marks = spec_of(name), {}
    generation = spec.stream(PROMPT, max_new_tokens=2000, ignore_eos=True)
    for _ in generation:
        mark = len(generation.token_ids) // 500
        if mark and mark not in marks:
            marks[mark] = resident_bytes(), num_tensors()
    assert len(generation.token_ids) == 2000 and sorted(marks) == [1, 2, 3, 4]
    assert marks[4][0] - marks[1][0] < FLAT, marks
    assert abs(marks[4][1] - marks[1][1]) <= 8, "no tensor is kept round by round"


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_resident_memory_is_flat_over_fifty_prompts_in_a_row(name):
    """Of different lengths, so that no buffer fits by chance."""
    spec, marks = spec_of(name), []
    for number in range(50):
        prompt = [1 + (7 * i + number) % 300 for i in range(200 + 37 * number % 300)]
        spec.generate(prompt, max_new_tokens=16, ignore_eos=True)
        marks.append((resident_bytes(), num_tensors()))
    assert max(used for used, _ in marks[40:]) - max(used for used, _ in marks[5:15]) < FLAT, marks
    assert marks[-1][1] == marks[10][1]
