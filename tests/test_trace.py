"""The trace and the page of a run: what they say is what happened, and watching changes nothing."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch

from specsmallkv import SpecSmallKV
from specsmallkv.models import ModelPair
from specsmallkv.page import assemble, run_page, words
from specsmallkv.presets import load_policy
from specsmallkv.tokenizer import byte_tokenizer
from specsmallkv.trace import Trace, is_power, spread_heads, true_row

SETTINGS = {"kv_budget": 0.3, "evict_block": 16, "window_size": 8}


@pytest.fixture(scope="module")
def pair(target, draft):
    tokenizer = byte_tokenizer()
    return ModelPair(target, draft, tokenizer, "random weights", "random weights")


def watched(pair, prompt, path=None, policy="specsmallkv", drafts=3, max_new_tokens=40, **parameters):
    """A finished generation and its trace. parameters: the policy's."""
    spec = SpecSmallKV(pair, load_policy(policy, **SETTINGS | parameters), drafts)
    generation = spec.stream(prompt, max_new_tokens=max_new_tokens)
    generation.observer = trace = Trace(spec, path, detailed=True)
    for _ in generation:
        pass
    return generation, trace


@pytest.mark.parametrize("policy", ["specsmallkv", "smallkv", "snapkv", "full"])
def test_watching_changes_nothing(pair, prompt, policy):
    """Not even the looks at the target's attention, which run the target between two rounds."""
    plain = SpecSmallKV(pair, load_policy(policy, **SETTINGS), 3).generate(prompt, max_new_tokens=40)
    generation, _ = watched(pair, prompt, policy=policy)
    changing = ("seconds", "ttft_seconds", "tokens_per_second", "decode_tokens_per_second", "phase_seconds")
    ours, theirs = ({k: v for k, v in g.figures().items() if k not in changing} for g in (generation, plain))
    ours.pop("peak_memory_bytes"), theirs.pop("peak_memory_bytes")
    assert generation.token_ids == plain.token_ids
    assert ours == theirs


def test_the_trace_adds_up_to_the_record(pair, prompt, tmp_path):
    generation, trace = watched(pair, prompt, tmp_path / "trace.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    figures = generation.figures()
    assert rows == json.loads(json.dumps(trace.rows))
    assert [token for row in rows for token in row["tokens"]] == generation.token_ids
    assert [row["position"] for row in rows] == [
        len(prompt) + sum(len(row["tokens"]) for row in rows[:i]) for i in range(len(rows))
    ]
    assert sum(len(row["drafts"]) for row in rows) == figures["drafted_tokens"]
    assert sum(row["accepted"] for row in rows) == figures["accepted_tokens"]
    assert sum(row["recall_bytes"] for row in rows) == figures["recall_bytes"] > 0
    assert max(row["target_kv_bytes"] for row in rows[1:]) <= figures["target_kv_bytes"]
    for phase, seconds in figures["phase_seconds"].items():
        assert sum(row["ms"].get(phase, 0) for row in rows) == pytest.approx(1000 * seconds, abs=0.1), phase


def test_new_entries_are_what_the_cache_recalled(pair, prompt):
    """Derived from two sets, while the cache counts what it moves."""
    generation, trace = watched(pair, prompt)
    layer = generation.sequence.target.layers[0]
    for row in trace.rows:
        entries = sum(row["new"]) * layer.kept_positions.shape[1]
        assert row["recall_bytes"] == round(entries) * layer.entry_bytes


def test_probabilities_are_the_models_own(pair, prompt):
    """The target's, for the emitted token, against a plain pass over the text at budget 1."""
    spec = SpecSmallKV(pair, load_policy("full"), 3)
    generation = spec.stream(prompt, max_new_tokens=20, temperature=0.7, seed=3)
    generation.observer = trace = Trace(spec, None, detailed=True)
    for _ in generation:
        pass
    ids = torch.tensor([prompt + generation.token_ids])
    with torch.inference_mode():
        true = pair.target(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
    given = [p for row in trace.rows for p in row["probabilities"]]
    assert given == pytest.approx(true.gather(1, ids[0, len(prompt) :, None]).squeeze(1).tolist(), abs=1e-4)
    assert [best[0][0] for best in trace.alternatives] == true.argmax(-1).tolist()


def test_draft_probabilities_belong_to_judged_drafts(pair, prompt):
    _, trace = watched(pair, prompt)
    for row in trace.rows[1:]:
        judged = min(row["accepted"] + 1, len(row["drafts"]))
        assert len(row["draft_probabilities"]) == len(row["target_probabilities"]) == judged
        assert all(0 < p <= 1 for p in row["draft_probabilities"])


def test_the_compared_attention_is_the_targets_over_every_token(pair, prompt):
    """Of a query that the trace looked at: rows that a plain pass over the whole text gives."""
    spec = SpecSmallKV(pair, load_policy("specsmallkv", **SETTINGS), 3)
    *_, (_, sequence) = spec.decoder(None).generate(prompt, 12)
    with torch.inference_mode():
        row = true_row(spec.decoder(None), sequence)
    assert row.shape[2] == sequence.target.seen + 1 == len(sequence.tokens)
    assert np.allclose(row.sum(-1), 1, atol=1e-5)
    pair.target.set_attn_implementation("eager")
    with torch.inference_mode():
        first = pair.target(torch.tensor([sequence.tokens]), output_attentions=True).attentions[0][0, :, -1]
    assert np.allclose(row[0], first.numpy(), atol=1e-4)  # the first layer's input does not depend on what was evicted


def test_what_is_gone_for_good_has_no_row(pair, prompt):
    """The target's attention where keys were dropped: what a plain pass gives, over those that are held."""
    spec = SpecSmallKV(pair, load_policy("smallkv", **SETTINGS), 3)
    *_, (_, sequence) = spec.decoder(None).generate(prompt, 12)
    with torch.inference_mode():
        row = true_row(spec.decoder(None), sequence)
    held, layer = np.zeros((2, len(sequence.tokens)), dtype=bool), sequence.target.layers[0]
    held[:, layer.tail_start :] = True
    for head, positions in enumerate(layer.kept_positions[0].tolist()):
        held[head, positions] = True
    held = held.repeat(2, axis=0)  # (H_q, N)
    assert 0.2 < held.mean() < 0.6
    assert ((row[0] > 0) == held).all()
    pair.target.set_attn_implementation("eager")
    with torch.inference_mode():
        first = pair.target(torch.tensor([sequence.tokens]), output_attentions=True).attentions[0][0, :, -1].numpy()
    known = first * held
    assert np.allclose(row[0], known / known.sum(-1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize(
    "policy, own, rounds",
    [
        ("specsmallkv", {}, [1, 4, 16]),
        ("smallkv", {"marginal_bits": None}, [1, 4, 16]),
        ("smallkv", {}, [1, 16]),  # another text, whose fourth round ends at an eviction
    ],
)
def test_samples_hold_what_the_device_held(pair, prompt, policy, own, rounds):
    _, trace = watched(pair, prompt, policy=policy, **own)
    assert [sample.round for sample in trace.samples] == rounds[: len(trace.samples)]
    assert len(trace.samples) > 1
    for sample in trace.samples:
        assert sample.everything == (policy == "specsmallkv" or sample.round == 1)  # at first nothing was evicted
        for _, _, target, predicted, kept, marginal in sample.rows:
            assert len(target) == len(predicted) == len(kept) == len(marginal) == sample.position + 1
            assert target.sum() == pytest.approx(1, abs=1e-4)
            assert 0.2 < kept.mean() < 0.6
            assert sample.everything or not target[~kept].any()
            assert marginal.any() == (policy == "smallkv") and not (marginal & kept).any()


def test_evictions_between_a_look_and_the_next_one_leave_no_sample(pair, prompt):
    """A static policy's sets are then no more those of the pass that was looked at."""
    _, trace = watched(pair, prompt[:143], policy="smallkv")  # of 16 x 9: round 1 ends at an eviction
    assert trace.sets[1].seen == 144
    assert [sample.round for sample in trace.samples] == [4, 16][: len(trace.samples)]


def test_heads_are_spread_from_best_to_worst():
    similarity = np.arange(12.0).reshape(3, 4)
    assert spread_heads(similarity, 3) == [(2, 3), (1, 1), (0, 0)]
    assert len(spread_heads(similarity, 50)) == 12
    assert [n for n in range(1, 70) if is_power(n, 4)] == [1, 4, 16, 64]


# The page


RECORD = {
    "model": "tiny",
    "policy": "specsmallkv",
    "kv_budget": 0.3,
    "num_draft_tokens": 3,
    "dtype": "float32",
    "device": "cpu",
    "config": {"prompt": "</script><script>alert(1)</script>"},
}


@pytest.fixture(scope="module")
def page(pair, prompt):
    generation, trace = watched(pair, prompt)
    return run_page(RECORD | generation.figures(), trace, prompt), trace


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_page_loads_nothing_and_its_data_cannot_end_the_script(page):
    text, _ = page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,")|@import|url\(""", text)
    assert text.count("</script>") == 2
    assert embedded(text)["record"]["config"]["prompt"] == "</script><script>alert(1)</script>"


def test_the_map_unpacks_to_the_sets(page):
    text, trace = page
    packed = embedded(text)["map"]
    rounds, heads = len(packed["tail"]), packed["heads"]
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed["kept"])), np.uint8)
    bits = bits.reshape(len(heads), rounds, packed["stride"]).copy()
    for r in range(1, rounds):
        bits[:, r] ^= bits[:, r - 1]
    for number, sets in enumerate(trace.sets):
        for index, (layer, head) in enumerate(heads):
            found = np.unpackbits(bits[index, number])[: sets.tail_start].astype(bool)
            assert (found == sets.kept[layer, head]).all()


def test_split_characters_are_given_to_their_last_token():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé🙂b", add_special_tokens=False)["input_ids"]
    assert words(tokenizer, ids) == ["a", "", "é", "", "", "", "🙂", "b"]
    assert words(tokenizer, ids[3:5]) == ["", ""]


def test_assembling_puts_nothing_of_the_data_into_the_template():
    """A `{{body}}` in a text stays what it is."""
    page = assemble("study", "a <title>", {"text": "{{body}}"})
    assert "a &lt;title&gt;" in page
    assert embedded(page) == {"text": "{{body}}"}
