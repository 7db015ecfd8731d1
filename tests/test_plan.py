"""task=plan: what it says without weights is what a run then counts from its tensors."""

import pytest
import torch
from conftest import run_task, tiny_model

from specsmallkv import UserError, random_model, sources
from specsmallkv.linear import pack_linears
from specsmallkv.tasks.plan import weight_bytes
from specsmallkv.weights import loaded_bytes

KEYS = (
    *("target_weight_bytes", "draft_weight_bytes", "target_kv_bytes", "target_kv_bytes_full"),
    *("target_kv_host_bytes", "draft_kv_bytes", "scratch_bytes", "kv_budget_effective"),
)
TINY = (
    "+model=tiny-random",
    "model.target='random:qwen3?layers=3&hidden=64&heads=4&kv_heads=2&vocab=320&context=4096'",
    *("ignore_eos=true", "quiet=true", "chat=false"),
)
TEXT = "One two three, said the cat to the dog. " * 15


LENGTH = len(TEXT)


def planned(*overrides, context=LENGTH):
    return run_task(*TINY, "task=plan", f"task.context_tokens={context}", *overrides)


@pytest.mark.parametrize("speculation", ["draft", "none"])
@pytest.mark.parametrize(
    "policy",
    [
        *("full", "streaming_llm", "snapkv", "pyramidkv", "h2o", "smallkv", "smallkv_paper", "specsmallkv"),
        *(f"specsmallkv policy.key_bits={bits} policy.value_bits={bits}" for bits in (4, 8)),
    ],
)
def test_planned_bytes_are_within_five_percent_of_a_run(tmp_path, policy, speculation):
    name, *bits = policy.split()
    asked = [f"policy={name}", f"speculation={speculation}", "max_new_tokens=70", *bits]
    asked.append(f"policy.kv_budget={0.2 if bits else 0.3}")
    run = run_task(*TINY, *asked, f"prompt='{TEXT}'", f"run_dir={tmp_path}")
    plan = planned(*asked)
    assert run["prompt_tokens"] == plan["prompt_tokens"] == LENGTH
    for key in KEYS:
        assert plan[key] == pytest.approx(run[key], rel=0.05), key


def test_planned_host_bytes_of_a_short_prompt_in_few_bits(tmp_path):
    """Its keys are stored as they came, too."""
    asked = ["policy.key_bits=8", "policy.value_bits=8", "policy.kv_budget=0.3", "max_new_tokens=10"]
    run = run_task(*TINY, *asked, f"prompt='{TEXT[:160]}'", f"run_dir={tmp_path}")
    plan = planned(*asked, context=run["prompt_tokens"])
    assert plan["target_kv_host_bytes"] == pytest.approx(run["target_kv_host_bytes"], rel=0.05)


def test_planned_bytes_of_a_target_with_sliding_windows(tmp_path):
    """Half of its layers are outside of the budget, on both sides; their own bytes are told as at most."""
    model = "model.target='random:gemma2?layers=4&hidden=64&heads=4&kv_heads=2&vocab=320&context=4096&window=64'"
    asked = [model, "policy.kv_budget=0.3", "max_new_tokens=70"]
    run, plan = run_task(*TINY, *asked, f"prompt='{TEXT}'", f"run_dir={tmp_path}"), planned(*asked)
    for key in KEYS:
        assert plan[key] == pytest.approx(run[key], rel=0.05), key
    assert 0.5 * plan["target_kv_window_bytes"] < run["target_kv_window_bytes"] <= plan["target_kv_window_bytes"]


@pytest.mark.parametrize("new_tokens", [1, 5, 33])
def test_planned_bytes_hold_for_answers_of_any_length(tmp_path, new_tokens):
    """Also for one that ends before anything could be evicted again, or before the first verify pass."""
    asked = ["policy.kv_budget=0.2", f"max_new_tokens={new_tokens}"]
    run, plan = run_task(*TINY, *asked, f"prompt='{TEXT}'", f"run_dir={tmp_path}"), planned(*asked)
    for key in ("target_kv_bytes", "target_kv_bytes_full", "draft_kv_bytes") if new_tokens > 1 else ():
        assert plan[key] == pytest.approx(run[key], rel=0.05), key
    assert plan["target_kv_bytes"] > 0


def test_a_batch_has_the_bytes_of_its_rows_and_weights_once(tmp_path):
    alone, batch = planned(), planned("batch_size=4")
    for key in ("target_kv_bytes", "draft_kv_bytes", "scratch_bytes", "target_kv_host_bytes"):
        assert batch[key] == 4 * alone[key]
    assert batch["target_weight_bytes"] == alone["target_weight_bytes"]
    assert batch["break_even_context_tokens"] < alone["break_even_context_tokens"]


FORMS = [("torch", "bfloat16"), ("packed", "bfloat16"), ("blocked", "float32")]


@pytest.mark.parametrize(("linear", "dtype"), FORMS)
def test_weights_are_counted_as_loaded_in_every_form(linear, dtype, tmp_path):
    asked = [f"model.dtype={dtype}", f"model.linear={linear}", "max_new_tokens=2"]
    run = run_task(*TINY, *asked, "prompt=hello", f"run_dir={tmp_path}")
    plan = planned(*asked)
    assert (plan["dtype"], plan["linear"]) == (dtype, linear)
    for key in ("target_weight_bytes", "draft_weight_bytes"):
        assert plan[key] == run[key]


@pytest.mark.parametrize(("linear", "dtype"), FORMS)
def test_a_smaller_vocabulary_of_the_draft_is_counted_as_loaded(linear, dtype, tmp_path):
    asked = [f"model.dtype={dtype}", f"model.linear={linear}", "max_new_tokens=2", "model.draft_vocab_size=100"]
    run = run_task(*TINY, *asked, "prompt=hello", f"run_dir={tmp_path}")
    assert planned(*asked)["draft_weight_bytes"] == run["draft_weight_bytes"]
    assert run["draft_weight_bytes"] != planned(*asked[:3])["draft_weight_bytes"]


@pytest.mark.parametrize(("form", "dtype"), [("packed", torch.bfloat16), ("blocked", torch.float32)])
def test_a_packed_head_is_counted_beside_the_embedding_that_it_shares(form, dtype):
    model = tiny_model().to(dtype)
    planned, unpacked = (weight_bytes(model, dtype, name) for name in (form, "torch"))
    assert unpacked == loaded_bytes(model) < planned
    pack_linears(model, form)
    assert planned == loaded_bytes(model)


def test_the_pair_breaks_even_where_it_is_said_to():
    at = planned("policy.kv_budget=0.1")["break_even_context_tokens"]
    before, there = (planned("policy.kv_budget=0.1", context=context) for context in (at - 1, at))
    assert before["device_bytes"] > before["device_bytes_full"]
    assert there["device_bytes"] <= there["device_bytes_full"]
    assert planned("policy=full")["break_even_context_tokens"] is None


def test_no_weight_is_made_and_no_file_but_the_configuration_fetched(monkeypatch, tmp_path):
    directory = tmp_path / "checkpoint"
    random_model.build("random:llama?context=4096").save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    asked = []
    monkeypatch.setattr(sources, "snapshot_download", lambda name, **options: asked.append(options) or directory)
    monkeypatch.setattr(random_model, "build", None)
    plan = planned("model.target=some/model")
    assert plan["target_weight_bytes"] > 0 and [x["allow_patterns"] for x in asked] == [["config.json"]]


def test_a_draft_of_random_weights_is_planned_as_any_other():
    source = "random:qwen3?layers=2&hidden=64&heads=4&kv_heads=2&vocab=320&context=4096"
    plans = [planned(f"model.draft='{prefix}{source}'") for prefix in ("", "untrained:")]
    assert all(plans[0][key] == plans[1][key] for key in KEYS)


def test_what_no_run_could_read_is_refused():
    with pytest.raises(UserError, match="context window of 4096 tokens"):
        planned(context=4090)
    with pytest.raises(UserError, match=r"task\.context_tokens=0"):
        planned(context=0)
