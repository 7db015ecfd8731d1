"""A target shared by two processes (gloo, CPU): the same text as one process gives, and refusals."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from transformers.distributed import DistributedConfig

from specsmallkv import UserError, tensor_parallel
from specsmallkv.controller import Adaptive, Controller
from specsmallkv.matching import HeadMap
from specsmallkv.presets import load_policy
from specsmallkv.tensor_parallel import Shard, check_heads, check_run
from specsmallkv.tokenizer import byte_tokenizer

NEW, VOCAB = 40, 320


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a target of three layers, and a draft: its first two."""
    folder = tmp_path_factory.mktemp("pair")
    target, draft = (tiny_model(layers=n, vocab=VOCAB, seed=1) for n in (3, 2))
    draft.load_state_dict({k: v for k, v in target.state_dict().items() if k in draft.state_dict()})
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def arguments(pair, *overrides):
    models = [f"model.target={pair / 'target'}", f"model.draft={pair / 'draft'}", "model.dtype=float32"]
    settings = [f"max_new_tokens={NEW}", "ignore_eos=true", "chat=false", "prompt=" + "The sea was calm. " * 12]
    return ["-m", "specsmallkv.run", *models, *settings, *overrides]


def run(command, where):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=where, env=environment, timeout=300)


def split(pair, where, *overrides):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # a free port
    return run([*torchrun, *arguments(pair, "model.device=tensor_parallel", *overrides)], where)


# Sampled text may part where rounding moves a probability over the drawn number; this seed's does not.
SAMPLED = ["temperature=0.8", "seed=5"]


GREEDY = [pytest.param(name, [], marks=pytest.mark.slow) for name in ("smallkv", "specsmallkv")]


@pytest.mark.skipif(not hasattr(DistributedConfig, "tp_plan"), reason="transformers before 5.18")
@pytest.mark.parametrize("policy, options", [("specsmallkv", SAMPLED), *GREEDY])
def test_two_processes_write_what_one_does_and_hold_half_of_the_cache_each(pair, tmp_path, policy, options):
    chosen = [f"policy={policy}", "policy.kv_budget=0.4", *options]
    together = split(pair, tmp_path, *chosen, "run_dir=split")
    assert together.returncode == 0, together.stderr
    alone = run([sys.executable, *arguments(pair, *chosen, "run_dir=alone", "model.device=cpu")], tmp_path)
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("split", "alone")]
    assert records[0]["text"] == records[1]["text"] and records[0]["new_tokens"] == NEW
    assert records[0]["accepted_tokens"] == records[1]["accepted_tokens"] > 0
    assert records[0]["recall_bytes"] > 0 or policy == "smallkv"  # the draft is asked
    assert 2 * records[0]["target_kv_bytes"] == records[1]["target_kv_bytes"]
    assert together.stdout.count('"schema_version"') == 1 == alone.stdout.count('"schema_version"')
    assert not list((tmp_path / "outputs").iterdir())  # Hydra's own is gone, the second process left nothing


def test_a_saved_map_is_cut_by_query_heads():
    weights = torch.rand(2, 4, 6)
    halves = [Shard(rank, 2).own(HeadMap(weights, weights.sum(-1), weights[..., 0])) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.weights for half in halves], 1), weights)
    assert torch.equal(torch.cat([half.history_weights for half in halves], 1), weights[..., 0])
    assert halves[0].draft_similarity is None and Shard().own(None) is None


def test_one_process_is_refused_and_so_are_heads_that_cannot_be_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="there is one; start `torchrun"):
        tensor_parallel.local_device()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="has 2 KV heads, which 3 processes cannot share evenly"):
        check_heads(2, "a model")
    check_heads(6, "a model")


def config(device, *, report=False, trace=False):
    return SimpleNamespace(model=SimpleNamespace(device=device), report=report, trace=trace)


@pytest.mark.parametrize(
    "asked, task, is_sweep, problem",
    [
        (config("cpu"), "generate", False, "2 processes that would all do the same with model.device=cpu"),
        (config("tensor_parallel"), "fidelity", False, "task=fidelity does not work"),
        (config("tensor_parallel"), "generate", True, "A sweep"),
        (config("tensor_parallel", report=True), "generate", False, "report=true or trace=true does not work"),
        (config("tensor_parallel", trace=True), "generate", False, "report=true or trace=true does not work"),
    ],
)
def test_runs_that_processes_cannot_share_are_refused(asked, task, is_sweep, problem, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=problem):
        check_run(asked, task, is_sweep)
    check_run(config("tensor_parallel"), "generate", False)


@pytest.mark.parametrize(
    "policy, controller, problem",
    [
        ("oracle", None, "policy=oracle does not work"),
        ("full", Adaptive(), "speculation=adaptive does not work"),
    ],
)
def test_what_only_one_process_would_see_decides_nothing_in_several(policy, controller, problem):
    with pytest.raises(UserError, match=problem):
        Shard(0, 2).check(load_policy(policy), controller)
    Shard(0, 1).check(load_policy(policy), controller)
    Shard(0, 2).check(load_policy("smallkv"), Controller(oracle_every=2))
    with pytest.raises(UserError, match="A batch of 4 does not work"):
        Shard(0, 2).check_alone("A batch of 4")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="more processes on this machine than its 1 GPUs"):
        tensor_parallel.local_device()
