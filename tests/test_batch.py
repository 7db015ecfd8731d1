"""Continuous batching: a row of a batch is what its prompt is alone (invariant 6), whoever its neighbours are."""

from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, policy_of

from specsmallkv import SpecSmallKV, UserError
from specsmallkv.batch import BatchDecoder, Job
from specsmallkv.decode import Decoder
from specsmallkv.presets import load_policy
from specsmallkv.sampling import Sampler

SETTINGS = {"kv_budget": 0.3, "evict_block": 16, "window_size": 8}
# Prompt length, new tokens: rows leave and join in the middle of the others; one ends with its first token.
LENGTHS = [(101, 14), (5, 34), (77, 6), (33, 1), (60, 18)]
RANDOM = torch.Generator().manual_seed(3)
JOBS = [
    Job(torch.randint(1, VOCAB, (length,), generator=RANDOM).tolist(), new, seed=number)
    for number, (length, new) in enumerate(LENGTHS)
]


def together(decoder, jobs, batch_size=3):
    """Rounds and row of each job, in order of the jobs, the batch, and how many tokens each row had in each pass."""
    batch, counts, forward_group = BatchDecoder(decoder, batch_size), [], decoder.forward_group

    def counted(model, caches, tokens, *args, **options):
        counts.append((model is decoder.target, [len(own) for own in tokens]))
        return forward_group(model, caches, tokens, *args, **options)

    decoder.forward_group = counted
    rounds, rows = [[] for _ in jobs], {}
    for row, round_ in batch.generate(jobs):
        rounds[row.number].append(round_)
        rows[row.number] = row
    return rounds, [rows[number] for number in range(len(jobs))], batch, counts


def assert_independent(
    target, draft, policy, num_draft_tokens, jobs=JOBS, sampler=None, batch_size=3, controller=None
):
    """The same rounds, not only the same tokens: what was drafted and accepted is the same too."""
    decoder, shared = (
        Decoder(target, draft, policy, num_draft_tokens, sampler, controller=controller) for _ in range(2)
    )
    results = rounds, rows, _, _ = together(shared, jobs, batch_size)
    for job, ours, row in zip(jobs, rounds, rows, strict=True):
        options = job.max_new_tokens, job.stop_ids, job.seed, job.compress_after
        expected = list(decoder.generate(job.prompt, *options))
        sequence = expected[-1][1]
        assert ours == [round_ for round_, _ in expected]
        assert row.sequence.tokens == sequence.tokens
        assert row.sequence.counters.max_target_bytes == sequence.counters.max_target_bytes
        for a, b in zip(row.sequence.target.layers, sequence.target.layers, strict=True):
            assert a.seen == b.seen and a.num_slots == b.num_slots and a.num_marginal == b.num_marginal
            assert policy.every_round or torch.equal(a.positions, b.positions)
    return results


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name, num_draft_tokens, options",
    [
        *((name, 2, {}) for name in ("snapkv", "h2o", "smallkv", "specsmallkv", "oracle")),
        ("full", 2, {"kv_budget": 1.0}),
        ("specsmallkv", 2, {"selection": "query"}),
        ("specsmallkv", 0, {}),
        ("specsmallkv", 2, {"own_share": 0.5}),
        ("specsmallkv", 2, {"key_bits": 4, "value_bits": 4}),
    ],
)
def test_a_row_of_a_batch_equals_its_prompt_alone(target, draft, name, num_draft_tokens, options):
    policy = load_policy(name, **SETTINGS | options)
    rounds, rows, batch, counts = assert_independent(target, draft, policy, num_draft_tokens)
    assert batch.counters.verify_passes < 0.7 * batch.counters.rounds, "rows shared passes"
    assert not policy.evicts or all(row.sequence.target.layers[0].num_kept for row in rows if len(row.job.prompt) > 50)
    if num_draft_tokens:
        assert len({tuple(round_.num_accepted for round_ in own[1:4]) for own in rounds}) > 2, "unequal acceptance"
        assert sum(is_target and len(set(own)) > 1 for is_target, own in counts) > 2, "unequal numbers of drafts"


def test_rows_with_one_and_with_two_pending_tokens_share_a_pass_of_the_draft(target):
    """Two after a block that was accepted whole, as all are where the target is its own draft; one after joining."""
    decoder = Decoder(target, target, load_policy("full"), 2)
    assert_independent(target, target, decoder.policy, 2, JOBS[:4])
    sizes = []
    draft_group = decoder.draft_group
    decoder.draft_group = lambda rows, tokens, *own: (
        sizes.append({*map(len, tokens)}) or draft_group(rows, tokens, *own)
    )
    list(BatchDecoder(decoder, 2).generate(JOBS[:4]))
    assert {1, 2} in sizes and {2} in sizes and {1} in sizes


@pytest.mark.parametrize("name", ["full", "smallkv", "specsmallkv", "specsmallkv in 4 bits"])
def test_a_sampled_row_depends_on_its_own_seed_alone(target, draft, name):
    policy = policy_of(name, **SETTINGS | ({"kv_budget": 1.0} if name == "full" else {}))
    jobs = [replace(JOBS[0], seed=1), replace(JOBS[0], seed=2), JOBS[2], replace(JOBS[0], seed=1)]
    rounds, rows, _, _ = assert_independent(target, draft, policy, 3, jobs, Sampler(0.9, top_k=20))
    tokens = [row.sequence.tokens for row in rows]
    assert tokens[0] == tokens[3] != tokens[1]
    assert any(0 < round_.num_accepted < round_.num_drafted for own in rounds for round_ in own)


def test_a_row_that_meets_its_stop_id_leaves_and_the_next_one_takes_its_place(target, draft):
    policy = load_policy("smallkv", **SETTINGS)
    whole, _, _, _ = together(Decoder(target, draft, policy, 3), JOBS[:2])
    stop = whole[0][4].tokens[0]
    jobs = [replace(JOBS[0], stop_ids={stop}), JOBS[1], JOBS[2]]
    rounds, rows, _, counts = assert_independent(target, draft, policy, 3, jobs, batch_size=2)
    assert rows[0].sequence.tokens[-1] == stop and len(rounds[0]) < len(whole[0])
    assert max(len(own) for _, own in counts) == 2


def test_a_later_turn_is_read_in_a_batch_as_alone(target, draft):
    jobs = [replace(JOBS[0], compress_after=60), JOBS[2]]
    assert_independent(target, draft, load_policy("specsmallkv", **SETTINGS), 3, jobs)


def test_the_queue_is_asked_for_a_prompt_only_when_there_is_room(target):
    taken = []

    def queue():
        for job in JOBS[:3]:
            taken.append(job)
            yield job

    batch = BatchDecoder(Decoder(target, None, load_policy("full"), 0), 1)
    for row, _ in batch.generate(queue()):
        assert len(taken) == row.number + 1
    assert len(taken) == 3


def test_bytes_of_a_batch_are_those_of_its_rows_in_the_fullest_pass(target, draft):
    policy, jobs = load_policy("specsmallkv", **SETTINGS), [JOBS[0]] * 3
    _, rows, one, _ = together(Decoder(target, draft, policy, 3), jobs[:1])
    _, _, three, _ = together(Decoder(target, draft, policy, 3), jobs)
    assert {key: 3 * count for key, count in one.counters.held.items()} == three.counters.held
    assert one.counters.held["target_kv_bytes"] == rows[0].sequence.counters.max_target_bytes
    assert [key for key, count in one.counters.held.items() if not count] == ["target_kv_window_bytes"]


# Text


TARGET = "random:llama?layers=3&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
DRAFT = "random:llama?layers=1&hidden=32&heads=4&kv_heads=2&vocab=320&seed=1"
PROMPTS = ["The harpooneer said nothing, and looked at the sea. " * 3, "a", "Who is the captain of this ship? " * 2]


@pytest.fixture(scope="module")
def spec():
    return SpecSmallKV.from_pretrained(TARGET, DRAFT, kv_budget=0.3, dtype="float32")


def test_generations_of_a_batch_equal_generations_alone_in_order_of_the_prompts(spec):
    settings = {"ignore_eos": True, "temperature": 0.8, "top_k": 5}
    each = [{"seed": 1, "max_new_tokens": 12}, {"seed": 2, "max_new_tokens": 20}, {"seed": 3, "max_new_tokens": 4}]
    lists = {key: [own[key] for own in each] for key in each[0]}
    batch = spec.stream_batch(PROMPTS, batch_size=2, **settings, **lists)
    finished = [generation.number for generation in batch]
    assert sorted(finished) == [0, 1, 2] and finished != [0, 1, 2], "they come as they finish"
    for own, prompt, generation in zip(each, PROMPTS, batch.generations, strict=True):
        alone = spec.generate(prompt, **settings, **own)
        assert (generation.token_ids, generation.text) == (alone.token_ids, alone.text)
        figures, expected = generation.figures(), alone.figures()
        same = ("rounds", "accepted_tokens", "target_kv_bytes", "draft_kv_bytes", "scratch_bytes", "finished")
        assert {key: figures[key] for key in same} == {key: expected[key] for key in same}
        assert 0 < figures["ttft_seconds"] < figures["seconds"] <= batch.seconds
        assert generation.sequence is None, "a finished row frees its caches"
        with pytest.raises(UserError, match="ran in a batch"):
            spec.stream([*generation.prompt_ids, *generation.token_ids, 8], continues=generation)


def test_a_stop_string_ends_one_row_of_a_batch_only(spec):
    settings = {"max_new_tokens": 30, "ignore_eos": True}
    whole = spec.generate_batch(PROMPTS, **settings)
    stop = next(c for c in whole[0].text[3:] if whole[0].text.index(c) > 2)
    cut = spec.generate_batch(PROMPTS, **settings, stop=(stop,))
    assert [one.text for one in cut] == [one.text.partition(stop)[0] for one in whole]
    assert len(cut[0].token_ids) < 30 and all(one.finished for one in cut)


def test_what_a_batch_cannot_use_is_refused_in_one_sentence(spec):
    for prompts, options, problem in (
        (PROMPTS, {"batch_size": 0}, "batch_size=0 is not positive"),
        (PROMPTS, {"seed": [1, 2]}, "seed has 2 values for 3 prompts"),
        (["", "a"], {"chat": False}, "has no tokens"),
        (["a", "a" * 100_000], {}, "exceed the context window"),
    ):
        with pytest.raises(UserError, match=problem):
            spec.generate_batch(prompts, **options)
    assert spec.generate_batch([]) == []
    batch = spec.stream_batch(PROMPTS[1:2], max_new_tokens=2)
    list(batch)
    with pytest.raises(UserError, match="iterated over before"):
        list(batch)
