"""Sliding windows (Mistral, Gemma2) and capped scores (Gemma2): exact beside layers under a budget."""

import pytest
import torch
from conftest import policy_of, run_task

from specsmallkv import SpecSmallKV, UserError, random_model
from specsmallkv.attention_form import Scaling, layer_windows
from specsmallkv.backends import attention_probabilities, check_model
from specsmallkv.decode import Decoder
from specsmallkv.presets import load_policy
from specsmallkv.tiered_layer import TieredLayer

NEW, WINDOW = 40, 24
SIZES = "hidden=32&heads=4&kv_heads=2&vocab=320&seed=3"
STATIC = ("streaming_llm", "snapkv", "pyramidkv", "h2o", "smallkv")


def build(family, layers=4, window=WINDOW):
    model = random_model.build(f"random:{family}?layers={layers}&window={window}&{SIZES}").eval()
    model.generation_config.eos_token_id = None
    return model


def small(target):
    """The target's first two layers: some of its drafts pass, some do not."""
    model = build(target.config.model_type, 2, target.config.sliding_window or 0)
    names = model.state_dict().keys()
    model.load_state_dict({name: weight for name, weight in target.state_dict().items() if name in names})
    return model


@pytest.fixture(scope="module")
def gemma():
    return build("gemma2")


@pytest.fixture(scope="module")
def gemma_draft(gemma):
    return small(gemma)


@pytest.fixture(scope="module")
def text():
    return torch.randint(1, 250, (130,), generator=torch.Generator().manual_seed(5)).tolist()


def expected(model, prompt):
    """By transformers; its eager attention is the one that caps scores."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    model.set_attn_implementation(before)
    return output[0, len(prompt) :].tolist()


def decode(target, draft, policy, drafts, prompt):
    rounds = list(Decoder(target, draft, policy, drafts).generate(prompt, NEW))
    return [token for round_, _ in rounds for token in round_.tokens], rounds[-1][1]


@pytest.mark.smoke
@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_budget_one_equals_transformers_generate(family, window, text):
    """Invariant 1, with prompts shorter and longer than the window, speculation on and off."""
    target = build(family, window=window)
    draft = small(target)
    for prompt in (text[:9], text):
        wanted = expected(target, prompt)
        assert len(set(wanted)) > 5
        for name, drafts in (("full", 0), ("full", 3), ("specsmallkv", 3)):
            tokens, sequence = decode(target, draft, load_policy(name, kv_budget=1.0), drafts, prompt)
            assert tokens == wanted, (name, drafts, len(prompt))
    assert 0 < sequence.counters.accepted < sequence.counters.drafted


@pytest.mark.parametrize("name", STATIC)
def test_speculation_changes_no_token_beside_windows(gemma, gemma_draft, text, name):
    """Invariant 2; the layers under the budget are compressed, the others hold a window and what waits."""
    policy = load_policy(name, kv_budget=0.3, evict_block=16, window_size=8)
    plain, _ = decode(gemma, gemma_draft, policy, 0, text)
    tokens, sequence = decode(gemma, gemma_draft, policy, 3, text)
    assert plain == tokens and plain != expected(gemma, text)
    for layer, window in zip(sequence.target.layers, layer_windows(gemma.config), strict=True):
        assert layer.window == window
        if window is None:
            assert layer.num_kept > 0 and layer.num_slots < 0.6 * layer.seen
        else:
            assert layer.num_kept == 0 and window <= layer.num_slots + 4 and layer.num_slots < window + 2 * 20


@pytest.mark.parametrize("name", ["snapkv", "specsmallkv", "specsmallkv in 4 bits", "oracle"])
def test_what_a_window_layer_drops_no_query_could_have_read(gemma, gemma_draft, text, name, monkeypatch):
    policy = policy_of(name, kv_budget=0.3, evict_block=16, window_size=8)
    tokens, sequence = decode(gemma, gemma_draft, policy, 3, text)
    monkeypatch.setattr(TieredLayer, "slide", lambda self, room: None)
    kept, everything = decode(gemma, gemma_draft, policy, 3, text)
    assert tokens == kept
    assert sequence.target.window_nbytes < 0.5 * everything.target.window_nbytes


def test_windows_are_outside_of_the_budget_on_both_sides(gemma, gemma_draft, text):
    policy = load_policy("snapkv", kv_budget=0.3, evict_block=16, window_size=8)
    _, sequence = decode(gemma, gemma_draft, policy, 3, text)
    entry = sequence.target.layers[1].entry_bytes * 2
    assert sequence.target.full_nbytes == 2 * entry * sequence.target.seen
    assert sequence.target.nbytes == entry * sum(sequence.target.layers[index].num_slots for index in (1, 3))
    held = sequence.held()
    assert held["target_kv_window_bytes"] == entry * sum(sequence.target.layers[index].num_slots for index in (0, 2))
    assert held["draft_kv_bytes"] == 2 * entry * sequence.draft.seen
    assert [layer.get("window") for layer in sequence.target.kept_per_layer()] == [WINDOW, None, WINDOW, None]


def test_budgets_of_unequal_layers_average_over_those_that_share_it(gemma, text):
    policy = load_policy("pyramidkv", kv_budget=0.4, evict_block=16, window_size=8)
    _, sequence = decode(gemma, None, policy, 0, text)
    first, second = (sequence.target.layers[index].num_slots for index in (1, 3))
    waiting = sequence.target.seen - sequence.evicted_at
    assert first > second
    assert first + second - 2 * waiting == pytest.approx(2 * 0.4 * sequence.evicted_at, abs=2)


def test_a_row_of_a_batch_equals_its_prompt_alone(gemma, gemma_draft, text):
    spec = SpecSmallKV.from_pretrained(
        f"random:gemma2?layers=4&window={WINDOW}&{SIZES}",
        f"random:gemma2?layers=2&window={WINDOW}&{SIZES}",
        policy="snapkv",
        kv_budget=0.3,
        dtype="float32",
    )
    prompts = [text, text[:50], text[30:]]
    settings = {"max_new_tokens": 20, "ignore_eos": True}
    batch = spec.generate_batch(prompts, batch_size=2, **settings)
    assert [x.token_ids for x in batch] == [spec.generate(prompt, **settings).token_ids for prompt in prompts]


def test_capped_scores_are_those_of_the_formula():
    query, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8)
    scores = 3 * torch.tanh(query @ keys.repeat_interleave(2, 1).transpose(2, 3) * 2.5 / 3)
    scores = scores.masked_fill(~torch.ones(3, 9, dtype=torch.bool).tril(6), -torch.inf)
    torch.testing.assert_close(attention_probabilities(query, keys, Scaling(2.5, 3.0)), scores.softmax(-1))


def test_a_policy_that_could_compress_nothing_is_refused(text):
    target = build("mistral")
    with pytest.raises(UserError, match="all 4 layers of the target see a sliding window of 24 tokens"):
        Decoder(target, target, load_policy("specsmallkv"), 3)
    Decoder(target, target, load_policy("specsmallkv", kv_budget=1.0), 3)
    Decoder(build("mistral", window=8192), target, load_policy("specsmallkv"), 3)  # as long as any text


def test_what_cannot_read_windows_is_refused(gemma, tmp_path):
    with pytest.raises(UserError, match=r"model\.attention=flash does not support sliding windows"):
        check_model("flash", gemma.config)
    source = f"model.target='random:gemma2?window={WINDOW}'"
    distilled = f"distill task.text_files=[{__file__}] task.output_dir={tmp_path}"
    for task in ("generate report=true prompt=x", "throughput", distilled):
        with pytest.raises(UserError, match="sliding windows"):
            run_task("+model=tiny-random", source, f"run_dir={tmp_path}", *f"task={task}".split(), "quiet=true")


def test_windows_and_prefill_within_the_budget_are_refused_together(gemma, gemma_draft):
    policy = load_policy("h2o", kv_budget=0.3, prefill_chunk=32)
    with pytest.raises(UserError, match=r"policy.prefill_chunk=32 does not support sliding windows"):
        Decoder(gemma, gemma_draft, policy, 3)


def test_a_batch_whose_every_layer_has_a_window_reports_its_bytes():
    spec = SpecSmallKV.from_pretrained("random:mistral?window=16", policy="full", num_draft_tokens=0, dtype="float32")
    generations = list(spec.generate_batch(["a" * 30, "b" * 20], batch_size=2, max_new_tokens=4, chat=False))
    assert [len(generation.token_ids) for generation in generations] == [4, 4]
