"""Prefill within the budget: what the target holds while it reads, what stays the same, and what it computes."""

import pytest
import torch
from conftest import policy_of, run_task

from specsmallkv import SpecSmallKV
from specsmallkv.attention import AttentionCall, AttentionRows
from specsmallkv.backends import attention_probabilities, weighted_values
from specsmallkv.branching import first_logits
from specsmallkv.decode import Decoder
from specsmallkv.errors import UserError
from specsmallkv.matching import HeadMap
from specsmallkv.prefill import make_room
from specsmallkv.presets import load_policy
from specsmallkv.tasks.grid import neediest
from specsmallkv.trials import open_trial, prefill_once

SETTINGS = {"evict_block": 16, "window_size": 8}
NAMES = ("streaming_llm", "h2o", "smallkv", "smallkv_paper", "specsmallkv")
NEW = 24


@pytest.fixture(scope="module")
def head_map(target, draft):
    num_draft = draft.config.num_hidden_layers * draft.config.num_attention_heads
    shape = (target.config.num_hidden_layers, target.config.num_attention_heads)
    weights = torch.rand(*shape, num_draft, generator=torch.Generator().manual_seed(7)).square()
    return HeadMap(weights / weights.sum(-1, keepdim=True), torch.full(shape, 0.7))


def run(target, draft, policy, prompt, head_map, num_draft_tokens=3, **options):
    """Tokens and the sequence after the last round."""
    decoder = Decoder(target, draft, policy, num_draft_tokens, head_map=head_map)
    rounds = list(decoder.generate(prompt, NEW, **options))
    return [token for round_, _ in rounds for token in round_.tokens], rounds[-1][1]


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [7, 32, 60])
@pytest.mark.parametrize("name", [*NAMES, "specsmallkv in 4 bits"])
def test_the_target_never_holds_more_than_budget_and_chunk_while_it_reads(
    target, draft, prompt, head_map, name, chunk, monkeypatch
):
    """Counted from tensors after every pass; the buffers that are allocated keep to it as well."""
    policy = policy_of(name, kv_budget=0.3, prefill_chunk=chunk, **SETTINGS)
    held, forward = [], Decoder.forward

    def watched(self, model, cache, tokens, *args, **kwargs):
        logits = forward(self, model, cache, tokens, *args, **kwargs)
        if model is target and cache.seen <= len(prompt):
            held.append((cache.nbytes, cache.allocated_nbytes, len(tokens), cache.full_nbytes / cache.seen))
        return logits

    monkeypatch.setattr(Decoder, "forward", watched)
    _, sequence = run(target, draft, policy, prompt, head_map)
    entry = held[0][-1]
    most = 0.3 * len(prompt) * entry + chunk * entry
    assert sum(tokens for _, _, tokens, _ in held) == len(prompt), "each token is read once"
    assert max(used for used, *_ in held) <= most and max(used for used, *_ in held) > 0.3 * len(prompt) * entry
    assert held[-1][0] > 0.85 * 0.3 * len(prompt) * entry, "and what the budget allows it does hold"
    waiting = max(chunk, SETTINGS["evict_block"] + 4)  # buffers have room for what is generated, too
    assert max(allocated for _, allocated, *_ in held) <= 0.3 * (len(prompt) + NEW) * entry + waiting * entry
    assert sequence.counters.prefill_bytes == max(used for used, *_ in held) < 0.75 * len(prompt) * entry
    for layer in sequence.target.layers:
        assert (layer.positions.diff(dim=-1) > 0).all() and (layer.positions[..., :4] == torch.arange(4)).all()
    stored = sequence.target.full_nbytes * layer.tail_start / layer.seen if policy.residency == "offload" else 0
    cost = policy.fitted(layer.k.shape[3], layer.k.element_size()).critical_cost
    early = stored / 2 if policy.packs else 0  # of so short a text keys are stored as they came, too
    assert sequence.target.host_nbytes == pytest.approx(stored * cost + early)


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_that_holds_the_prompt_and_a_budget_of_one_change_nothing(target, draft, prompt, head_map, name):
    for budget, chunk in ((0.3, len(prompt)), (1.0, 32)):
        plain, sequence = run(target, draft, load_policy(name, kv_budget=budget, **SETTINGS), prompt, head_map)
        policy = load_policy(name, kv_budget=budget, prefill_chunk=chunk, **SETTINGS)
        tokens, other = run(target, draft, policy, prompt, head_map)
        assert tokens == plain and other.counters.prefill_bytes == sequence.counters.prefill_bytes
        for ours, theirs in zip(sequence.target.layers, other.target.layers, strict=True):
            assert torch.equal(ours.positions, theirs.positions) and torch.equal(ours.keys, theirs.keys)
    assert run(target, draft, load_policy("full"), prompt, None)[0] == plain


class Seen:
    """Which keys each prompt token read, per layer: bool (H_kv, N, N), noted while the target reads in chunks."""

    def __init__(self, length):
        self.length, self.masks, self.logits = length, {}, None

    def watch(self, target, monkeypatch):
        forward = Decoder.forward

        def watched(decoder, model, cache, tokens, *args, **kwargs):
            start = cache.seen
            logits = forward(decoder, model, cache, tokens, *args, **kwargs)
            if model is target and start < self.length:
                self.note(cache, start)
                self.logits = logits[-1]
            return logits

        monkeypatch.setattr(Decoder, "forward", watched)

    def note(self, cache, start):
        for index, layer in enumerate(cache.layers):
            mask = self.masks.setdefault(index, torch.zeros(2, self.length, self.length, dtype=torch.bool))
            for position in range(start, layer.seen):
                mask[:, position].scatter_(1, layer.positions[0], layer.positions[0] <= position)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["streaming_llm", "smallkv", "specsmallkv"])
def test_each_token_is_what_one_pass_with_the_same_keys_masked_out_makes_of_it(
    target, draft, prompt, head_map, name, monkeypatch
):
    """The reference reads the prompt at once, a mask in each layer: keys, values and rotary positions are its own."""
    seen = Seen(len(prompt))
    seen.watch(target, monkeypatch)
    policy = load_policy(name, kv_budget=0.3, prefill_chunk=20, **SETTINGS)
    decoder = Decoder(target, draft, policy, 3, head_map=head_map)
    with torch.inference_mode():
        sequence = decoder.start(prompt, NEW)
        logits = decoder.prefill(sequence)
        torch.testing.assert_close(logits, seen.logits)
        held = [(layer.positions, layer.keys, layer.values) for layer in sequence.target.layers]

        def masked(layer, index, query, scaling, call):
            probabilities = attention_probabilities(query, layer.keys, scaling, seen.masks[index].unsqueeze(0))
            return weighted_values(probabilities, layer.values)

        monkeypatch.undo()
        monkeypatch.setattr("specsmallkv.attention.attend", masked)
        full = Decoder(target, None, load_policy("full"), 0)
        reference = full.start(prompt, NEW)
        expected = full.prefill(reference)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert all(mask.sum() < 2 * 150 * 151 / 2 for mask in seen.masks.values()), "something was hidden in every layer"
    for (positions, keys, values), layer in zip(held, reference.target.layers, strict=True):
        index = positions.unsqueeze(-1).expand(*positions.shape, keys.shape[-1])
        torch.testing.assert_close(keys, layer.keys.gather(2, index), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, layer.values.gather(2, index), atol=1e-4, rtol=1e-4)


def test_the_rows_that_choose_are_the_drafts_true_rows_of_what_comes(target, draft, prompt, head_map, monkeypatch):
    """Lookahead: of the next chunk's queries; static: half of the prompt's end, half of all that is still to come."""
    everything = AttentionRows(2, 4, len(prompt), len(prompt), torch.device("cpu"))
    decoder = Decoder(draft, None, load_policy("full"), 0)
    with torch.inference_mode():
        everything.start(0, len(prompt))
        decoder.forward(draft, decoder.start(prompt, 1).target, prompt, AttentionCall(rows=everything))
    rows, asked = everything.values, []

    def noted(sequence, policy, num_tokens, saliency, room):
        asked.append((sequence.target.seen, saliency))
        return make_room(sequence, policy, num_tokens, saliency, room)

    monkeypatch.setattr("specsmallkv.prefill.make_room", noted)
    lookahead = load_policy("specsmallkv", kv_budget=0.3, prefill_chunk=40, **SETTINGS)
    run(target, draft, lookahead, prompt, head_map)
    static = load_policy("smallkv", kv_budget=0.3, prefill_chunk=40, num_foreseen_tokens=0, **SETTINGS)
    run(target, draft, static, prompt, head_map)
    assert [seen for seen, _ in asked] == [40, 80, 120] * 2
    for number, (seen, saliency) in enumerate(asked):
        if number < 3:
            mean = rows[:, seen : seen + 40, :seen].mean(1)
            expected = head_map.saliency(mean, 2, "max")
        else:
            mean = (rows[:, seen:, :seen].mean(1) + rows[:, -32:, :seen].mean(1)) / 2
            expected = head_map.saliency(mean, 2)
        torch.testing.assert_close(saliency, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["smallkv", "h2o"])
def test_speculation_changes_no_token_after_a_prefill_within_the_budget(target, draft, prompt, head_map, name):
    policy = load_policy(name, kv_budget=0.3, prefill_chunk=32, **SETTINGS)
    plain, _ = run(target, draft, policy, prompt, head_map, 0)
    speculated, sequence = run(target, draft, policy, prompt, head_map, 4)
    assert plain == speculated and 0 < sequence.counters.accepted < sequence.counters.drafted
    turned, _ = run(target, draft, policy, prompt, head_map, 4, compress_after=140)
    assert turned != plain and turned == run(target, draft, policy, prompt, head_map, 0, compress_after=140)[0]


@torch.inference_mode()
def test_a_branch_that_reads_for_itself_begins_with_its_own_first_token(target, draft, prompt, head_map):
    """Behind a shared prefill; a branch that copies it begins with the base's."""
    policies = [load_policy("streaming_llm", kv_budget=0.1, prefill_chunk=chunk, **SETTINGS) for chunk in (16, 0)]
    base_decoder = Decoder(target, draft, neediest(policies), 3, head_map=head_map)
    base, shared = base_decoder.begin(prompt, NEW)
    own, copied = (Decoder(target, draft, policy, 3).branch(base) for policy in policies)
    expected = Decoder(target, draft, policies[0], 3).begin(prompt, NEW)[1]
    assert torch.equal(first_logits(own, shared), expected) and not torch.equal(expected, shared)
    assert first_logits(copied, shared) is shared


@pytest.mark.parametrize("name", ["smallkv", "specsmallkv", "streaming_llm"])
@torch.inference_mode()
def test_a_trial_reads_for_itself_and_keeps_what_decoding_keeps(target, draft, prompt, head_map, name):
    class Spec:
        def decoder(self, policy):
            return Decoder(target, draft, policy, 3, head_map=head_map)

    policies = [load_policy(name, kv_budget=0.3, prefill_chunk=32, **SETTINGS), load_policy("snapkv", kv_budget=0.3)]
    assert neediest(policies).prefill_chunk == 0
    base = prefill_once(Spec(), neediest(policies), [*prompt, 1, 2], len(prompt), policies)
    trials = [open_trial(base, policy) for policy in (*policies, policies[0])]
    decoder = Spec().decoder(policies[0])
    sequence = decoder.start(prompt, 2)
    decoder.prefill(sequence)
    decoder.settle(sequence)
    for trial in (trials[0], trials[2]):
        for ours, theirs in zip(trial.sequence.target.layers, sequence.target.layers, strict=True):
            assert torch.equal(ours.positions, theirs.positions) and torch.equal(ours.keys, theirs.keys)
        assert trial.sequence.target.recall_bytes == 0, "what its prefill recalled is no block's"
    assert (sequence.target.recall_bytes > 0) is (name == "specsmallkv")
    assert base.sequence.draft is None or base.sequence.draft.seen == len(prompt)


def test_without_a_map_that_tells_something_it_is_refused_in_one_sentence(target, draft, head_map, monkeypatch):
    policy = load_policy("smallkv", prefill_chunk=32)
    with pytest.raises(UserError, match=r"task=calibrate and set model\.head_map"):
        Decoder(target, draft, policy, 3)
    monkeypatch.setattr("specsmallkv.matching.HeadMap.mean_similarity", 0.12)
    with pytest.raises(UserError, match=r"mean cosine of 0\.12 only"):
        Decoder(target, draft, policy, 3, head_map=head_map)
    Decoder(target, draft, load_policy("h2o", prefill_chunk=32), 3)
    with pytest.raises(UserError, match="snapkv has no field prefill_chunk"):
        load_policy("snapkv", prefill_chunk=32)
    with pytest.raises(UserError, match="is negative"):
        load_policy("smallkv", prefill_chunk=-1)
    with pytest.raises(UserError, match="needs a saved head map"):
        SpecSmallKV.from_pretrained("random:llama?layers=1", "random:llama?layers=1", policy=policy, dtype="float32")


def test_a_run_with_a_calibrated_map_reports_the_peak_of_its_prefill(tmp_path):
    draft = "random:llama?layers=2&hidden=64&heads=4&kv_heads=2&vocab=320&context=32768&seed=0"
    pair = ["+model=tiny-random", f"model.draft='{draft}'", "model.dtype=float32", "quiet=true"]
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(600)))
    small = [f"task.text_file={text}", "task.context_tokens=160", "task.window_size=32", "task.num_windows=2"]
    saved = tmp_path / "map.safetensors"
    run_task(*pair, "task=calibrate", *small, f"task.output={saved}")
    settings = [*pair, f"prompt_file={text}", "chat=false", "max_new_tokens=8", "policy.kv_budget=0.2"]
    plain = run_task(*settings)
    record = run_task(*settings, "policy.prefill_chunk=64", f"model.head_map={saved}")
    entry = plain["target_kv_prefill_bytes"] / plain["prompt_tokens"]
    assert record["target_kv_prefill_bytes"] <= (0.2 * record["prompt_tokens"] + 64) * entry
    assert plain["prompt_tokens"] == record["prompt_tokens"] >= 600 and record["new_tokens"] == 8


def test_the_first_buffer_holds_a_budget_that_rounding_puts_just_below_a_whole_number(target):
    policy = load_policy("streaming_llm", kv_budget=0.29, prefill_chunk=29, window_size=8)
    decoder = Decoder(target, None, policy, 0)
    assert list(decoder.generate([*range(1, 95), *range(1, 7)], 4))
