"""Turns of known tokens: what a decoder reads after prompt and eviction, and several turns over one cache."""

import itertools

import pytest
import torch
from conftest import VOCAB, policy_of

from specsmallkv import SpecSmallKV, UserError
from specsmallkv.attention import AttentionCall, AttentionMass
from specsmallkv.decode import Decoder
from specsmallkv.presets import load_policy

STATIC = ("streaming_llm", "snapkv", "smallkv", "smallkv_paper")
SETTINGS = {"kv_budget": 0.3, "evict_block": 16, "window_size": 8}
NEW = 40


def decode(target, draft, policy, num_draft_tokens, prompt, new=NEW, **options):
    """Tokens and the sequence after the last round."""
    rounds = list(Decoder(target, draft, policy, num_draft_tokens).generate(prompt, new, **options))
    return [token for round_, _ in rounds for token in round_.tokens], rounds[-1][1]


def extended(decoder, prompt, turn):
    """A sequence that has read the prompt, was compressed and has read the turn; the turn's last logits."""
    with torch.inference_mode():
        sequence = decoder.start(prompt, len(turn) + NEW)
        decoder.prefill(sequence)
        return sequence, decoder.extend(sequence, turn)


@pytest.mark.smoke
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
@pytest.mark.parametrize("name", ["full", *STATIC, "specsmallkv", "oracle"])
def test_a_later_turn_equals_one_long_prompt_at_budget_one(target, draft, prompt, name, num_draft_tokens):
    policy = load_policy(name, kv_budget=1.0)
    whole, _ = decode(target, draft, policy, num_draft_tokens, prompt)
    for first in (1, 90, 149, 150):
        assert decode(target, draft, policy, num_draft_tokens, prompt, compress_after=first)[0] == whole


@pytest.mark.smoke
@pytest.mark.parametrize("name", STATIC)
def test_blocks_of_known_tokens_equal_one_by_one_under_static_policies(target, draft, prompt, name):
    """Prompts so short that nothing is evicted at first, and long ones."""
    for first in (5, 90):
        policy = load_policy(name, **SETTINGS)
        in_blocks, logits = extended(Decoder(target, draft, policy, 3), prompt[:first], prompt[first:])
        single = Decoder(target, draft, policy, 3)
        single.turn_size = lambda sequence: 1
        one_by_one, expected = extended(single, prompt[:first], prompt[first:])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert in_blocks.target.layers[0].num_kept > 0
        for a, b in zip(in_blocks.target.layers, one_by_one.target.layers, strict=True):
            assert torch.equal(a.positions, b.positions)
            assert torch.equal(a.marginal_positions, b.marginal_positions)
        if policy.reads_draft:
            one, two = in_blocks.evidence.oracle, one_by_one.evidence.oracle
            torch.testing.assert_close(one._sum[:, :150], two._sum[:, :150], atol=1e-5, rtol=1e-5)
            assert one._count == two._count


QUERY = {"selection": "query"}, {"selection": "query", "key_bits": 8, "value_bits": 4}


@pytest.mark.smoke
@pytest.mark.parametrize("name, options", [*((name, {}) for name in STATIC), *(("specsmallkv", own) for own in QUERY)])
def test_speculation_changes_no_token_after_a_later_turn(target, draft, prompt, name, options):
    for first in (5, 100):
        policy = load_policy(name, **SETTINGS | options)
        plain, _ = decode(target, draft, policy, 0, prompt, compress_after=first)
        speculated, sequence = decode(target, draft, policy, 4, prompt, compress_after=first)
        assert plain == speculated
        assert 0 < sequence.counters.accepted < sequence.counters.drafted
    whole, _ = decode(target, draft, policy, 0, prompt)
    assert name == "streaming_llm" or whole != plain, "the later turn did not choose what stays"


@pytest.mark.parametrize("name", [*STATIC, "specsmallkv", "specsmallkv in 4 bits", "oracle"])
def test_resident_bytes_stay_within_budget_while_a_turn_is_read_and_afterwards(target, draft, name):
    tokens = torch.randint(1, VOCAB, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    policy = policy_of(name, **SETTINGS | {"kv_budget": 0.2, "window_size": 16})
    for _, sequence in Decoder(target, draft, policy, 3).generate(tokens, NEW, compress_after=400):
        layer = sequence.target.layers[0]
        entry = sequence.target.full_nbytes / layer.seen
        assert sequence.target.nbytes <= 0.2 * sequence.target.full_nbytes + (16 + 4) * entry
        assert sequence.target.allocated_nbytes <= 0.2 * (600 + NEW) * entry + (16 + 4 + 1) * entry
        assert (layer.positions.diff(dim=-1) > 0).all() and layer.positions[0, 0, -1] == layer.seen - 1
    assert sequence.counters.max_target_bytes <= 0.2 * sequence.counters.full_bytes_then + (16 + 4) * entry
    most = 0.9 if name.endswith("bits") else 0.5
    assert all(kept["critical"] < most * kept["total"] for kept in sequence.target.kept_per_layer())


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_the_drafts_rows_of_each_known_block_steer_the_targets_read_of_it(target, draft, prompt, num_draft_tokens):
    """At every plan the oracle holds the draft's true attention of exactly the tokens that are read next."""
    policy = load_policy("specsmallkv", **SETTINGS)
    decoder, seen, evict_block = Decoder(target, draft, policy, num_draft_tokens), [], policy.evict_block
    everything = decoder.new_rows(len(prompt), len(prompt))
    with torch.inference_mode():
        sequence = Decoder(draft, None, load_policy("full"), 0).start(prompt, 1)
        everything.start(0, len(prompt))
        decoder.forward(draft, sequence.target, prompt, AttentionCall(rows=everything))
    plan = decoder.plan

    def checked_plan(sequence, following):
        block, start = sequence.evidence.oracle.block, sequence.target.seen
        end = start + len(following) + 1
        assert sequence.tokens[-1:] + following == prompt[start:end]
        torch.testing.assert_close(block.values, everything.values[:, start:end, :end], atol=1e-4, rtol=1e-4)
        plan(sequence, following)
        for index, layer in enumerate(sequence.target.layers):
            older = sequence.evidence.saliency[index][:, : layer.tail_start].clone()
            older[:, :4] = torch.inf  # sinks
            best = older.topk(layer.num_kept, dim=-1).indices.sort(dim=-1).values
            assert torch.equal(layer.kept_positions[0], best)
        seen.append(len(following) + 1)

    decoder.plan = checked_plan
    sequence, _ = extended(decoder, prompt[:101], prompt[101:])
    assert sum(seen) == len(prompt) - 101 and max(seen) == 4
    ends = list(itertools.accumulate(seen, initial=101))
    events = range(101 // evict_block * evict_block + evict_block, len(prompt), evict_block)
    assert set(events) <= set(ends), "a block ends at every eviction event"
    assert sequence.evidence.oracle.block.buffer.shape[1] == num_draft_tokens + 1, "a turn's scratch is freed"


def test_a_hidden_question_reaches_recalled_tokens_under_specsmallkv_alone(target, prompt):
    """With the target as its own draft, recall reads the turn nearly as the full cache; static eviction does not."""
    _, full = extended(Decoder(target, None, load_policy("full"), 0), prompt[:100], prompt[100:])
    distances, exact = {}, {"marginal_bits": None}
    policies = {name: load_policy(name, **SETTINGS) for name in ("snapkv", "specsmallkv", "oracle")}
    policies |= {"smallkv": load_policy("smallkv", **SETTINGS | exact), "packed": load_policy("smallkv", **SETTINGS)}
    for name, policy in policies.items():
        _, logits = extended(Decoder(target, target, policy, 3), prompt[:100], prompt[100:])
        distances[name] = torch.nn.functional.kl_div(logits.log_softmax(-1), full.softmax(-1), reduction="sum")
    static = min(distances["snapkv"], distances["smallkv"])
    assert distances["oracle"] < static / 2
    assert distances["specsmallkv"] < min(static, distances["packed"]) / 2


# Branches


@pytest.mark.parametrize("name", ["full", *STATIC, "specsmallkv", "specsmallkv in 4 bits"])
@torch.inference_mode()
def test_a_branch_of_a_shared_prefill_equals_a_sequence_of_its_own(target, draft, prompt, name):
    base_decoder = Decoder(target, draft, load_policy("specsmallkv", **SETTINGS), 3)
    policy = load_policy(name) if name == "full" else policy_of(name, **SETTINGS)
    base = base_decoder.start(prompt[:100], 50 + NEW)
    base.evidence.mass = AttentionMass(base.target.layers[0].capacity)
    base_decoder.prefill(base)
    base_decoder.prefill_draft(base)
    for _ in range(2):
        decoder = Decoder(target, draft, policy, 3)
        sequence = decoder.branch(base)
        assert sequence.draft is base.draft, "the draft reads the prompt once for all"
        logits = decoder.extend(sequence, prompt[100:])
        tokens = [token for round_, _ in decoder.decode(sequence, logits) for token in round_.tokens]
        assert tokens == decode(target, draft, policy, 3, prompt, compress_after=100)[0]
        base.draft.rollback(base.draft.seen - 100)


@pytest.mark.parametrize("name", ["snapkv", "smallkv", "pyramidkv", "specsmallkv"])
@torch.inference_mode()
def test_a_branch_of_a_prompt_too_short_for_its_policy_equals_a_sequence_of_its_own(target, draft, prompt, name):
    """24 tokens: the base is due, most branches are not; they read their window at the first eviction, as alone."""
    new, budget = 60, 0.8
    base_decoder = Decoder(target, draft, load_policy("specsmallkv", kv_budget=budget), 3)
    base = base_decoder.start(prompt[:24], new)
    base.evidence.mass = AttentionMass(base.target.layers[0].capacity)
    logits = base_decoder.prefill(base)
    base_decoder.prefill_draft(base)
    alone, decoder = (Decoder(target, draft, load_policy(name, kv_budget=budget), 3) for _ in range(2))
    expected = list(alone.generate(prompt[:24], new))
    found = list(decoder.decode(decoder.branch(base), logits))
    assert [round_.tokens for round_, _ in found] == [round_.tokens for round_, _ in expected]
    for ours, theirs in zip(found[-1][1].target.layers, expected[-1][1].target.layers, strict=True):
        assert torch.equal(ours.kept_positions, theirs.kept_positions)


# Several turns over one cache


@pytest.mark.parametrize("name", [*STATIC, "specsmallkv"])
@torch.inference_mode()
def test_a_cache_that_had_to_grow_equals_one_that_was_large_from_the_start(target, draft, prompt, name):
    for first in (3, 100):
        decoder, turn, states = Decoder(target, draft, load_policy(name, **SETTINGS), 0), prompt[100:], []
        for room in (20, 500):
            rounds = decoder.generate(prompt[:first], room)
            sequence = [sequence for _, (_, sequence) in zip(range(20), rounds, strict=False)][-1]
            known = sequence.tokens[: sequence.target.seen]
            if room == 20:
                decoder.resume(sequence, known + turn, NEW)
            sequence.tokens = known
            states.append((decoder.extend(sequence, turn), sequence))
        (logits, grown), (expected, large) = states
        assert torch.equal(logits, expected)
        for a, b in zip(grown.target.layers, large.target.layers, strict=True):
            assert torch.equal(a.positions, b.positions) and torch.equal(a.keys, b.keys)
            assert torch.equal(a.marginal_v, b.marginal_v)


TARGET = "random:llama?layers=3&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
QUESTION = "The harpooneer said nothing, and looked at the sea. " * 3
SECOND = " And the captain? " * 4


def generator(policy, **options):
    return SpecSmallKV.from_pretrained(TARGET, DRAFT, policy=policy, dtype="float32", **options)


@pytest.mark.parametrize("name", ["full", "specsmallkv", "smallkv"])
@pytest.mark.parametrize("new", [1, 20])
def test_three_turns_over_one_cache_equal_fresh_runs_at_budget_one(name, new):
    spec = generator(load_policy(name, kv_budget=1.0))
    settings = {"max_new_tokens": new, "ignore_eos": True}
    ids, previous = spec.encode(QUESTION), None
    for _ in range(3):
        turn = spec.generate(ids, continues=previous, **settings)
        assert turn.token_ids == spec.generate(ids, **settings).token_ids
        assert turn.reused_tokens == (len(previous.prompt_ids) + new - 1 if previous else 0)
        ids, previous = ids + turn.token_ids + spec.encode(SECOND, chat=False), turn


@pytest.mark.parametrize("name", [*STATIC, "specsmallkv"])
@pytest.mark.parametrize("first", ["x", QUESTION])
def test_a_compressed_cache_goes_on_in_the_next_turn(name, first):
    """Short and long first turns: caches that were and were not compressed before they had to grow."""
    answers = []
    for num_draft_tokens in (0, 3):
        spec = generator(load_policy(name, **SETTINGS), num_draft_tokens=num_draft_tokens)
        turn, settings = spec.generate(first, max_new_tokens=20, ignore_eos=True), {"ignore_eos": True}
        before = turn.figures()
        for _ in range(2):
            ids = turn.prompt_ids + turn.token_ids + spec.encode(SECOND * 2, chat=False)
            turn = spec.generate(ids, continues=turn, max_new_tokens=30, **settings)
        figures, layer = turn.figures(), turn.sequence.target.layers[0]
        answers.append(turn.token_ids)
        entry = figures["target_kv_bytes_full"] / layer.seen
        assert figures["target_kv_bytes"] <= 0.3 * figures["target_kv_bytes_full"] + (16 + 4 + 1) * entry
        assert figures["target_kv_allocated_bytes"] <= 0.3 * (len(turn.prompt_ids) + 30) * entry + 21 * entry
        assert len(turn.token_ids) == 30 and before["new_tokens"] == 20 and before["target_kv_bytes"] > 0
    assert answers[0] == answers[1] or name == "specsmallkv"


def test_a_conversation_continues_by_its_text_whatever_tokens_the_model_chose():
    spec = generator("full", num_draft_tokens=3)
    messages = [{"role": "user", "content": QUESTION}]
    settings = {"max_new_tokens": 2, "ignore_eos": True, "temperature": 1.0}
    tries = (spec.generate(messages, seed=seed, **settings) for seed in range(100))
    first = next(turn for turn in tries if turn.text and "\ufffd" not in turn.text)  # random bytes are seldom text
    asked = [*messages, {"role": "assistant", "content": first.text}, {"role": "user", "content": SECOND}]
    second = spec.generate(asked, continues=first, max_new_tokens=5)
    begin = first.prompt_ids + first.token_ids
    assert second.prompt_ids[: len(begin)] == begin and second.reused_tokens == len(begin) - 1
    assert spec.pair.tokenizer.decode(second.prompt_ids) == spec.render(asked)[0]


def test_known_beginnings_keep_their_tokens():
    spec = generator("full")
    spelled = list(b"<|im_end|>")  # the characters, which the tokenizer itself reads as one special token
    assert spec.encode("<|im_end|>B", chat=False, beginning=spelled) == [*spelled, ord("B")]
    assert spec.encode("<|im_end|>B", chat=False, beginning=[65]) == spec.encode("<|im_end|>B", chat=False)


def test_what_cannot_be_continued_is_refused_in_one_sentence():
    spec, other = generator("full"), generator("full")
    first = spec.generate(QUESTION, max_new_tokens=5, ignore_eos=True)
    ids = first.prompt_ids + first.token_ids
    for prompt, options, problem in (
        ([7, *ids[1:], 8], {}, "after 0 equal tokens"),
        (ids[:20], {}, "after 20 equal tokens"),
        (ids[:-1], {}, f"after {len(ids) - 1} equal tokens"),
        ("Something else", {}, "does not go on from the generation"),
        ([*ids, 8], {"compress_after": 3}, "compress_after=3 and continues"),
    ):
        with pytest.raises(UserError, match=problem):
            spec.stream(prompt, continues=first, **options)
    with pytest.raises(UserError, match="not in a batch"):
        spec.generate_batch([[*ids, 8]], continues=first)
    with pytest.raises(UserError, match="another generator's"):
        other.stream([*ids, 8], continues=first)
    with pytest.raises(UserError, match="has not run"):
        spec.stream([*ids, 8], continues=spec.stream(ids))
    second = spec.generate([*ids, 8], continues=first, max_new_tokens=3)
    with pytest.raises(UserError, match="was continued already"):
        spec.stream([*ids, 8], continues=first)
    with pytest.raises(UserError, match="runs once"):
        list(second)
    for number in (0, len(ids) + 1):
        with pytest.raises(UserError, match=f"compress_after={number} is not within"):
            spec.stream(ids, compress_after=number)


def test_an_interrupted_stream_can_be_continued_where_it_stopped_but_not_inside_a_round():
    spec = generator("specsmallkv", kv_budget=0.3)
    stream = spec.stream(QUESTION, max_new_tokens=30, ignore_eos=True)
    for _ in zip(stream, range(3), strict=False):
        pass
    held = list(stream.sequence.tokens)
    second = spec.generate([*held, 8, 9], continues=stream, max_new_tokens=4, ignore_eos=True)
    assert second.reused_tokens == len(held) - 1 and len(second.token_ids) == 4

    class Broken(Exception):
        pass

    third = spec.stream(QUESTION, max_new_tokens=30, ignore_eos=True)
    pieces = iter(third)
    next(pieces)
    third.sequence.target.layers[1].update = lambda *args: (_ for _ in ()).throw(Broken)
    with pytest.raises(Broken):
        list(pieces)
    with pytest.raises(UserError, match="was interrupted"):
        spec.stream([*third.sequence.tokens, 8], continues=third)
