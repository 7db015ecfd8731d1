"""The Python API on the tiny random pair."""

import inspect

import pytest
import torch
from transformers import MinLengthLogitsProcessor

from specsmallkv import SpecSmallKV, UserError, load_policy
from specsmallkv.attention_form import head_dim
from specsmallkv.presets import load_model_settings, names

TARGET = "random:llama?layers=3&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
PROMPT = "The harpooneer said nothing, and looked at the sea. " * 4


@pytest.fixture(scope="module")
def spec():
    return SpecSmallKV.from_pretrained(TARGET, DRAFT, kv_budget=0.3, dtype="float32")


@pytest.fixture(scope="module")
def full():
    return SpecSmallKV.from_pretrained(TARGET, DRAFT, policy="full", dtype="float32")


def test_streamed_pieces_are_the_generated_text(spec):
    stream = spec.stream(PROMPT, max_new_tokens=30, ignore_eos=True)
    assert "".join(stream) == stream.text == spec.generate(PROMPT, max_new_tokens=30, ignore_eos=True).text
    assert len(stream.token_ids) == 30


def test_figures_account_for_every_token_and_byte(spec):
    figures = spec.generate(PROMPT, max_new_tokens=30, ignore_eos=True).figures()
    assert figures["new_tokens"] == 30 and figures["prompt_tokens"] > 100
    assert figures["acceptance_rate"] == figures["accepted_tokens"] / figures["drafted_tokens"]
    assert figures["acceptance_length"] == pytest.approx(29 / figures["rounds"])
    assert figures["target_kv_bytes"] < 0.4 * figures["target_kv_bytes_full"] < figures["target_kv_bytes_full"]
    assert figures["target_kv_host_bytes"] > 0 and figures["recall_bytes"] > 0 and figures["draft_kv_bytes"] > 0


def test_a_stop_string_inside_a_block_ends_the_text(full):
    whole = full.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    stop = next(c for c in whole.text[3:] if whole.text.index(c) > 2)
    cut = full.generate(PROMPT, max_new_tokens=40, ignore_eos=True, stop=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)] and len(cut.token_ids) < 40


def test_an_interrupted_stream_keeps_what_it_has(spec):
    stream = spec.stream(PROMPT, max_new_tokens=30, ignore_eos=True)
    for piece, _ in zip(stream, range(3), strict=False):
        assert isinstance(piece, str)
    assert 1 <= stream.figures()["new_tokens"] < 30


def test_a_generation_runs_once(spec):
    stream = spec.stream(PROMPT, max_new_tokens=4, ignore_eos=True)
    text = "".join(stream)
    with pytest.raises(UserError, match="runs once"):
        list(stream)
    assert stream.text == text and len(stream.token_ids) == 4


@pytest.mark.smoke
def test_custom_generate_equals_transformers_generate_at_budget_one(full):
    ids = torch.tensor([full.encode(PROMPT)])
    model = full.pair.target
    expected = model.generate(ids, max_new_tokens=25, do_sample=False)
    ours = model.generate(ids, max_new_tokens=25, do_sample=False, custom_generate=full.custom_generate)
    assert torch.equal(ours, expected)


@pytest.mark.smoke
def test_custom_generate_obeys_stopping_criteria_inside_a_block(full):
    ids = torch.tensor([full.encode(PROMPT)])
    model = full.pair.target
    options = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    free = model.generate(ids, custom_generate=full.custom_generate, **options)[0, ids.shape[1] :].tolist()
    stop = free[6]
    cut = model.generate(ids, custom_generate=full.custom_generate, **options | {"eos_token_id": stop})
    assert cut[0, ids.shape[1] :].tolist() == free[: free.index(stop) + 1]


@pytest.mark.parametrize("unsupported", [{"num_beams": 2}, {"repetition_penalty": 1.2}])
def test_custom_generate_refuses_what_it_would_ignore(full, unsupported):
    ids = torch.tensor([full.encode(PROMPT)])
    with pytest.raises(UserError, match=next(iter(unsupported))):
        full.pair.target.generate(ids, max_new_tokens=5, custom_generate=full.custom_generate, **unsupported)
    with pytest.raises(UserError, match="MinLengthLogitsProcessor is not supported by this generator; leave it out"):
        processors = [MinLengthLogitsProcessor(3, 0)]
        full.pair.target.generate(ids, logits_processor=processors, custom_generate=full.custom_generate)
    hidden = torch.ones_like(ids)
    hidden[0, :3] = 0
    with pytest.raises(UserError, match="attention_mask hides tokens"):
        options = {"attention_mask": hidden, "max_new_tokens": 5}
        full.pair.target.generate(ids, custom_generate=full.custom_generate, **options)
    with pytest.raises(UserError, match="batch of 2"):
        full.pair.target.generate(ids.repeat(2, 1), max_new_tokens=5, custom_generate=full.custom_generate)


def test_a_generation_that_never_began_has_null_figures(spec):
    begun = spec.generate(PROMPT, max_new_tokens=2).figures()
    never = spec.stream(PROMPT).figures()
    assert set(begun) == set(never) and never["target_kv_bytes"] is None and never["new_tokens"] == 0


@pytest.mark.parametrize(
    "call, problem",
    [
        (lambda spec: spec.generate("x" * 300_000), "exceed the context window"),
        (lambda spec: spec.generate([]), "no tokens"),
        (lambda spec: spec.generate([5, 320]), "Token id 320 is outside the vocabulary of 320"),
        (lambda spec: spec.generate([-1, 5]), "Token id -1 is outside"),
        (lambda spec: spec.generate("x", max_new_tokens=0), "max_new_tokens=0"),
        (lambda spec: SpecSmallKV(spec.pair, spec.policy, -1), "num_draft_tokens=-1"),
        (lambda _: SpecSmallKV.from_pretrained(TARGET, None, num_draft_tokens=0), "draft"),
        (
            lambda _: SpecSmallKV.from_pretrained(TARGET, policy=load_policy("full"), kv_budget=0.1),
            "beside a policy",
        ),
        (lambda spec: SpecSmallKV(spec.pair, spec.policy, attention="flash"), "needs a CUDA device"),
        (lambda _: SpecSmallKV.from_preset("qwen2-8b"), "model=qwen2-8b is unknown; choose one of .*qwen2-7b"),
        (lambda _: SpecSmallKV.from_pretrained(TARGET, DRAFT, linear="pack"), "model.linear='pack'"),
        (lambda _: SpecSmallKV.from_pretrained(TARGET, DRAFT, compile="defualt"), "model.compile='defualt'"),
        (
            lambda spec: SpecSmallKV(spec.pair, load_policy("specsmallkv", selection="query"), attention="flash"),
            "flash takes no mask, which policy.selection=query needs",
        ),
    ],
)
def test_misuse_is_one_sentence_with_its_value(spec, call, problem):
    with pytest.raises(UserError, match=problem):
        call(spec)


def test_a_conversation_that_the_chat_template_refuses_is_one_sentence(spec, monkeypatch):
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}hello"
    monkeypatch.setattr(spec.pair.tokenizer, "chat_template", template)
    with pytest.raises(
        UserError, match=r"chat template refuses the messages \(begin with user\); correct their roles\.$"
    ):
        spec.generate([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("name", ["snapkv", "smallkv", "specsmallkv"])
def test_a_fifth_of_a_long_prompt_is_a_fifth_of_the_bytes(spec, name):
    """4,000 tokens; beside the budget stand only the verify block and what waits for the next eviction."""
    policy = load_policy(name, kv_budget=0.2)
    ids = torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    figures = SpecSmallKV(spec.pair, policy).generate(ids, max_new_tokens=8, ignore_eos=True).figures()
    waiting = (policy.evict_block + 4) / 4000
    assert 0.19 < figures["target_kv_bytes"] / figures["target_kv_bytes_full"] <= 0.2 + waiting
    assert all((layer["marginal"] > 0) is (name == "smallkv") for layer in figures["kept_per_layer"])
    config = spec.pair.target.config
    cost = policy.fitted(head_dim(config), 4).marginal_cost
    held = [layer["critical"] + layer["marginal"] * cost for layer in figures["kept_per_layer"]]
    assert max(held) <= 0.2 * 4008 + 36


def test_no_draft_is_loaded_when_nothing_needs_it():
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, policy="full", num_draft_tokens=0, dtype="float32")
    assert spec.pair.draft is None and spec.generate(PROMPT, max_new_tokens=3).figures()["draft_kv_bytes"] == 0


def test_a_model_preset_is_loaded_by_its_name_with_options_in_the_place_of_its_own():
    preset = load_model_settings("tiny-random")
    spec = SpecSmallKV.from_preset("tiny-random", kv_budget=0.3, dtype="float32", num_draft_tokens=2)
    same = SpecSmallKV.from_pretrained(preset["target"], preset["draft"], kv_budget=0.3, dtype="float32")
    assert (spec.policy.kv_budget, spec.num_draft_tokens, spec.pair.target.dtype) == (0.3, 2, torch.float32)
    assert torch.equal(spec.pair.target.lm_head.weight, same.pair.target.lm_head.weight)


def test_every_model_preset_has_settings_that_the_api_takes():
    known = set(inspect.signature(SpecSmallKV.from_pretrained).parameters)
    assert all(set(load_model_settings(name)) <= known for name in names("model"))


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_single_token_needs_no_draft_pass(draft_tokens):
    spec = SpecSmallKV.from_pretrained(TARGET, DRAFT, num_draft_tokens=draft_tokens, dtype="float32")
    figures = spec.generate(PROMPT, max_new_tokens=1).figures()
    assert figures["new_tokens"] == 1 and figures["draft_kv_bytes"] == 0 and figures["acceptance_rate"] is None
