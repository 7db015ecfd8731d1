"""The loop's invariants (docs/architecture.md) on tiny random models in float32."""

import itertools
from copy import deepcopy

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, policy_of, tiny_model

from specsmallkv.batch import BatchDecoder, Job
from specsmallkv.decode import Decoder
from specsmallkv.presets import load_policy
from specsmallkv.sampling import Sampler

NEW = 44  # two or three eviction events of 16 tokens, behind short and long prompts
STATIC = ("streaming_llm", "snapkv", "pyramidkv", "h2o", "smallkv", "smallkv_paper")


def decode(target, draft, policy, num_draft_tokens, prompt, new=NEW, stop_ids=(), seed=0, sampler=None, **options):
    """Tokens and the sequence after the last round."""
    decoder = Decoder(target, draft, policy, num_draft_tokens, sampler, **options)
    rounds = list(decoder.generate(prompt, new, set(stop_ids), seed))
    return [token for round_, _ in rounds for token in round_.tokens], rounds[-1][1]


def transformers_greedy(model, prompt, new=NEW):
    output = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, repetition_penalty=1.0)
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def greedy(target, prompt):
    """What transformers writes behind the prompt."""
    return transformers_greedy(target, prompt)


@pytest.mark.smoke
@pytest.mark.parametrize("num_draft_tokens", [0, 4])
@pytest.mark.parametrize("name", ["full", *STATIC, "specsmallkv", "specsmallkv in 4 bits"])
def test_budget_one_equals_transformers_generate(target, draft, prompt, greedy, name, num_draft_tokens):
    """Invariant 1."""
    tokens, _ = decode(target, draft, policy_of(name, kv_budget=1.0), num_draft_tokens, prompt)
    assert tokens == greedy and len(set(tokens)) > 5


@pytest.mark.smoke
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_budget_one_equals_transformers_generate_on_every_architecture(architecture, prompt):
    target, draft = tiny_model(architecture, seed=5), tiny_model(architecture, layers=2, seed=5)
    tokens, _ = decode(target, draft, load_policy("full"), 3, prompt)
    assert tokens == transformers_greedy(target, prompt)


@pytest.mark.smoke
@pytest.mark.parametrize("budget", [0.15, 0.6])
@pytest.mark.parametrize("name", [*STATIC, "smallkv without odds"])
def test_speculation_changes_no_token_of_a_static_policy(target, draft, prompt, name, budget):
    """Invariant 2, greedy; budgets small enough to evict many times, prompts long and short.

    Without odds the draft waits where nobody wants its drafts.
    """
    for length in (5, 150):
        settings = {"kv_budget": budget, "evict_block": 16, "window_size": 8}
        settings |= {"marginal_share": 0.0} if name.endswith("odds") else {}
        name = name.partition(" ")[0]
        plain, waited = decode(target, draft, load_policy(name, **settings), 0, prompt[:length])
        assert (waited.counters.catch_ups > 0) == ("marginal_share" in settings)
        speculated, sequence = decode(target, draft, load_policy(name, **settings), 4, prompt[:length])
        assert plain == speculated
        assert 0 < sequence.counters.accepted < sequence.counters.drafted, "some drafts pass, some do not"
        assert sequence.target.layers[0].num_kept > 0, "and something was evicted"


@pytest.fixture(scope="module", params=[0, 3])
def snapkv(request, target, draft, prompt):
    """A number of drafts, and what snapkv does with it; it drops for good what ours keep in their host stores."""
    return request.param, *decode(target, draft, load_policy("snapkv", kv_budget=0.3), request.param, prompt)


@pytest.mark.parametrize("name", ["smallkv", "smallkv_paper", "specsmallkv"])
def test_a_draft_that_predicts_nothing_changes_nothing_that_snapkv_does(
    target, draft, prompt, name, snapkv, monkeypatch
):
    monkeypatch.setattr("specsmallkv.oracle.TRUSTED_SIMILARITY", 2.0)
    num_draft_tokens, expected, rival = snapkv
    policy = load_policy(name, kv_budget=0.3)
    tokens, sequence = decode(target, draft, policy, num_draft_tokens, prompt)
    assert tokens == expected
    for ours, theirs in zip(sequence.target.layers, rival.target.layers, strict=True):
        assert ours.num_marginal == 0 and theirs.num_kept > 0 and ours.tail_term is None
        if not policy.every_round:  # which has yet to act on the last eviction event
            assert torch.equal(ours.positions, theirs.positions)


def test_packed_tokens_that_a_useless_draft_let_go_do_not_come_back(target, draft, prompt, monkeypatch):
    """Though a budget of 0.4 in 4 bits gains more tokens than come."""
    monkeypatch.setattr("specsmallkv.oracle.TRUSTED_SIMILARITY", 2.0)
    policy = policy_of("specsmallkv in 4 bits", kv_budget=0.4, window_size=8)
    own = policy.fitted(8, 4)
    assert own.tiers(160).critical - own.tiers(len(prompt)).critical > 160 - len(prompt)
    *_, (_, sequence) = Decoder(target, draft, policy, 3).generate(prompt, 60)
    layer = sequence.target.layers[0]
    assert layer.num_kept and layer.num_slots < layer.seen and not sequence.target.recall_bytes


@pytest.mark.parametrize("name", ["smallkv", "specsmallkv"])
def test_a_short_prompt_with_a_draft_that_predicts_nothing_still_decodes(target, draft, prompt, name, monkeypatch):
    monkeypatch.setattr("specsmallkv.oracle.TRUSTED_SIMILARITY", 2.0)
    policy = load_policy(name, kv_budget=0.3, evict_block=16, window_size=8)
    tokens, sequence = decode(target, draft, policy, 3, prompt[:5])
    assert len(tokens) == NEW and sequence.target.layers[0].num_slots < sequence.target.seen


@torch.inference_mode()
def test_foreseen_rows_count_as_accepted_ones_and_leave_the_drafts_cache_alone(target, draft, prompt):
    decoder = Decoder(target, draft, load_policy("smallkv", kv_budget=0.3, num_foreseen_tokens=8), 0)
    sequence = decoder.start(prompt, NEW)
    decoder.prefill(sequence)
    decoder.prefill_draft(sequence)
    oracle, keys = sequence.evidence.oracle, [layer.keys.clone() for layer in sequence.draft.layers]
    count, total = oracle._count, oracle._sum.sum()
    decoder.foresee(sequence)
    assert oracle._count == count + 8 and total + 4 * len(oracle._sum) < oracle._sum.sum() < total + 8 * len(
        oracle._sum
    )
    for before, layer in zip(keys, sequence.draft.layers, strict=True):
        torch.testing.assert_close(layer.keys, before, atol=1e-5, rtol=1e-5)


QUERY = {"selection": "query", "evict_block": 16, "window_size": 8}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "seed, budget, bits", [(1, 0.2, None), (2, 0.35, None), (3, 0.5, None), (1, 0.2, 8), (3, 0.35, 4)]
)
def test_speculation_changes_no_token_if_each_query_has_its_own_set(seed, budget, bits):
    """Invariant 2, greedy, for specsmallkv with selection=query; another pair and prompt for each seed."""
    target = tiny_model(seed=seed)
    draft = tiny_model(layers=2, seed=seed)
    draft.load_state_dict({k: v for k, v in target.state_dict().items() if k in draft.state_dict()})
    prompt = torch.randint(1, VOCAB, (150,), generator=torch.Generator().manual_seed(seed)).tolist()
    for length in (5, 150):
        policy = load_policy("specsmallkv", kv_budget=budget, key_bits=bits, value_bits=bits, **QUERY)
        plain, _ = decode(target, draft, policy, 0, prompt[:length])
        for num_draft_tokens in (3, 6):
            speculated, sequence = decode(target, draft, policy, num_draft_tokens, prompt[:length])
            assert plain == speculated
            assert 0 < sequence.counters.accepted < sequence.counters.drafted, "some drafts pass, some do not"
            assert sequence.target.layers[0].num_kept > 0, "and something was evicted"
    assert sequence.target.recall_bytes > 0, "and recalled"


def test_each_query_reads_exactly_the_budget_and_the_union_is_what_is_held(target, draft, prompt):
    """Invariant 5 for selection=query: sets hold the budget each, bytes are those of the union."""
    policy = load_policy("specsmallkv", kv_budget=0.3, **QUERY)
    decoder, unions = Decoder(target, draft, policy, 3), []
    for index, (round_, sequence) in enumerate(decoder.generate(prompt, NEW)):
        if index == 0:
            continue
        before = sequence.target.seen - len(round_.tokens)
        count = policy.tiers(max(len(prompt), before - before % 16)).critical - 8
        for layer in sequence.target.layers:
            assert layer.row_mask.shape[2] == round_.num_drafted + 1
            assert (layer.row_mask.sum(-1) == count).all() and (layer.kept_positions[..., :4] < 4).all()
            read = layer.row_mask.any(2)
            assert read.sum(-1).max() == layer.num_kept, "heads are padded to the largest union only"
            assert (layer.kept_positions.diff(dim=-1) > 0)[read[..., 1:] & read[..., :-1]].all()
            unions.append(layer.num_kept / count)
        held = [layer.kept_positions.numel() + 2 * (layer.seen - layer.tail_start) for layer in sequence.target.layers]
        assert sequence.target.nbytes == sum(held) * 2 * 8 * 4, "K and V of 8 float32 numbers in 2 heads"
    assert 1.05 < max(unions) < 4


def step(decoder, sequence, forced):
    """One round by hand: every draft rejected, `forced` emitted; the verify pass's logits."""
    drafts, _ = decoder.draft(sequence, torch.Generator())
    decoder.plan(sequence, drafts)
    logits = decoder.verify(sequence, drafts)
    sequence.tokens.append(forced)
    decoder.rollback(sequence, len(drafts))
    decoder.evict(sequence)
    return logits


def begin(decoder, prompt, forced):
    """A sequence after prefill whose first new token is `forced`, and the logits it replaced."""
    sequence = decoder.start(prompt, 60)
    logits = decoder.prefill(sequence)
    sequence.tokens.append(forced)
    decoder.prefill_draft(sequence)
    decoder.evict(sequence, after_prefill=True)
    return sequence, logits


def exact_pairs(decoder, prompt, vocab, warp):
    """Probability of every pair of second and third tokens, given first token 0, when decoding one by one."""
    pairs = torch.zeros(vocab, vocab)
    with torch.inference_mode():
        for second in range(vocab):
            sequence, _ = begin(decoder, prompt, 0)
            p_second = warp(step(decoder, sequence, second)[0])[second]
            pairs[second] = p_second * warp(step(decoder, sequence, 0)[0])
    return pairs


@pytest.mark.parametrize(
    "name, budget, options",
    [
        ("full", 1.0, {}),
        ("smallkv", 0.4, {"window_size": 4}),
        ("specsmallkv", 0.4, {"window_size": 2, "num_sink_tokens": 1, "selection": "query"}),
    ],
)
def test_sampling_with_speculation_keeps_the_distribution(name, budget, options, prompt):
    """Invariant 2, temperature > 0: sampled pairs of tokens against exact enumeration without speculation."""
    target, draft = tiny_model(layers=2, vocab=6, seed=7), tiny_model(layers=1, vocab=6, seed=8)
    prompt, sampler, runs = [token % 6 for token in prompt[:12]], Sampler(0.8, top_k=4), 500
    settings = {"evict_block": 4, "matching": "one_hot"} | options if budget < 1 else {}
    policy = load_policy(name, kv_budget=budget, **settings)
    exact = exact_pairs(Decoder(target, draft, policy, 0), prompt, 6, sampler.probabilities)
    decoder, counts, generator = (
        Decoder(target, draft, policy, 3, sampler),
        torch.zeros(6, 6),
        torch.Generator(),
    )
    generator.manual_seed(0)
    with torch.inference_mode():
        begun, _ = begin(decoder, prompt, 0)
        for _ in range(runs):
            sequence = deepcopy(begun)
            while len(sequence.tokens) < len(prompt) + 3:
                decoder.round(sequence, generator, set())
            counts[tuple(sequence.tokens[len(prompt) + 1 : len(prompt) + 3])] += 1
    distance = (counts / runs - exact).abs().sum() / 2
    expected_noise = (exact * (1 - exact) / runs).sqrt().sum() / 2
    assert distance < 1.3 * expected_noise, f"total variation {distance:.3f}, sampling noise {expected_noise:.3f}"


def test_rollback_is_exact_in_full_if_each_query_has_its_own_set(target, draft, prompt):
    """Invariant 4 for selection=query: K and V of every token, host store included, and the oracle's sums.

    Which of them lie on the device follows the rejected rows too: that is what the next round may recall less of.
    """
    policy = load_policy("specsmallkv", kv_budget=0.4, **QUERY)
    states = []
    for wrong in (0, 3):
        decoder = Decoder(target, draft, policy, wrong)
        with torch.inference_mode():
            sequence, _ = begin(decoder, prompt, 5)
            for token in range(1, 40):
                step(decoder, sequence, token)
        states.append(sequence)
    plain, rolled = states
    assert plain.evicted_at == rolled.evicted_at == 176 and plain.target.seen == rolled.target.seen
    for a, b in zip(plain.target.layers, rolled.target.layers, strict=True):
        assert a.tail_start == b.tail_start
        torch.testing.assert_close(a.everything(), b.everything(), atol=1e-4, rtol=1e-4)
    assert plain.draft.seen == rolled.draft.seen
    one, two = plain.evidence.oracle, rolled.evidence.oracle
    assert torch.equal(one._sum[:, :180], two._sum[:, :180]) and one._count == two._count
    assert torch.equal(one.head_map.weights, two.head_map.weights)


@pytest.mark.parametrize("name", ["full", *STATIC, "specsmallkv", "specsmallkv in 4 bits"])
def test_rollback_leaves_both_caches_as_if_rejected_tokens_never_were(target, draft, prompt, name):
    """Invariant 4: after a verify pass whose drafts are all wrong, contents and sums equal those of plain decoding."""
    options = {"marginal_bits": None} if name == "smallkv" else {}  # else a step of the codes may lie between both
    policy = load_policy(name) if name == "full" else policy_of(name, kv_budget=0.4, evict_block=16, **options)
    lookahead, states = name.startswith("specsmallkv"), []
    for wrong in (0, 3):
        decoder = Decoder(target, draft, policy, wrong)
        with torch.inference_mode():
            sequence, _ = begin(decoder, prompt, 5)
            for token in (7, 11, 13, 17):
                step(decoder, sequence, token)
            if name == "h2o":  # what waits for the next eviction
                sequence.evidence.mass.count(sequence.target.layers, sequence.evidence.scaling)
        states.append(sequence)
    plain, rolled = states
    assert plain.target.seen == rolled.target.seen == len(prompt) + 4
    for a, b in zip(plain.target.layers, rolled.target.layers, strict=True):
        if lookahead and a is not plain.target.layers[0]:
            continue  # the set it reads follows the rejected drafts' rows too; keys of the first layer do not
        assert a.tail_start == b.tail_start
        tail = a.seen - a.tail_start if lookahead else a.num_slots
        assert torch.equal(a.positions[..., -tail:], b.positions[..., -tail:])
        torch.testing.assert_close(a.keys[:, :, -tail:], b.keys[:, :, -tail:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values[:, :, -tail:], b.values[:, :, -tail:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.marginal_v, b.marginal_v, atol=1e-4, rtol=1e-4)
        stored = zip(a.everything(), b.everything(), strict=True)
        most = 0.5 if name.endswith("bits") else 1e-4  # rounding may put a code into the next step
        assert all((own - other).abs().max() < most for own, other in stored)
        assert getattr(a, "early", None) is None or torch.allclose(a.early, b.early, atol=1e-4)
    if name == "h2o":
        for index, sums in plain.evidence.mass.sums.items():
            torch.testing.assert_close(sums[..., :154], rolled.evidence.mass.sums[index][..., :154])
    if lookahead or name == "smallkv":
        assert plain.draft.seen == rolled.draft.seen
        one, two = plain.evidence.oracle, rolled.evidence.oracle
        torch.testing.assert_close(one._sum[:, :150], two._sum[:, :150], atol=1e-5, rtol=1e-5)
        assert one._count == two._count


@pytest.mark.smoke
@pytest.mark.parametrize("budget", [0.1, 0.3])
@pytest.mark.parametrize("name", [*STATIC, "specsmallkv", "specsmallkv in 4 bits", "specsmallkv in 8 bits"])
def test_resident_bytes_stay_within_budget_block_and_evict_block(target, draft, name, budget):
    """Invariants 5, 7 and 8, looked at after every round of a long prompt."""
    prompt = torch.randint(1, VOCAB, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    policy = policy_of(name, kv_budget=budget, evict_block=16, window_size=16)
    decoder, packed = Decoder(target, draft, policy, 3), name.endswith("bits")
    for index, (_, sequence) in enumerate(decoder.generate(prompt, NEW)):
        if index == 0:
            continue  # the prefill's token: compression comes right after it
        layer = sequence.target.layers[0]
        entry = sequence.target.full_nbytes / layer.seen
        allowed = budget * sequence.target.full_nbytes + (16 + 4) * entry
        assert sequence.target.nbytes <= allowed
        assert sequence.target.allocated_nbytes <= budget * (700 + NEW) * entry + (16 + 4 + 1) * entry
        assert (sequence.target.host_nbytes > 0) is (policy.residency == "offload")
        assert not packed or sequence.target.host_nbytes < 0.8 * sequence.target.full_nbytes
        assert (layer.positions.diff(dim=-1) > 0).all() and layer.positions[0, 0, -1] == layer.seen - 1
    assert sequence.counters.max_target_bytes <= budget * sequence.counters.full_bytes_then + (16 + 4) * entry
    kept, half = sequence.target.kept_per_layer(), sequence.target.seen * (0.9 if packed else 0.5)
    assert sum(layer["critical"] for layer in kept) < half * len(kept)
    most = 2 * budget * sequence.target.seen if name == "pyramidkv" else half
    assert all(layer["critical"] < most for layer in kept), "compression fired in every layer"


@pytest.mark.smoke
@pytest.mark.parametrize("name", [*STATIC, "specsmallkv"])
def test_every_key_held_is_that_of_its_logical_position(target, draft, prompt, name):
    """Invariant 7 through the model: keys of the first layer depend on token and position alone."""
    decoder = Decoder(target, draft, load_policy(name, kv_budget=0.3, evict_block=16, window_size=8), 3)
    *_, (_, sequence) = decoder.generate(prompt, 40)
    layer, ids = sequence.target.layers[0], torch.tensor([sequence.tokens[: sequence.target.seen]])
    with torch.inference_mode():
        full = target(ids, use_cache=True).past_key_values.layers[0].keys
    assert layer.num_slots < layer.seen, "something was evicted"
    index = layer.positions.unsqueeze(-1).expand(-1, -1, -1, full.shape[3])
    torch.testing.assert_close(layer.keys, full.gather(2, index), atol=1e-5, rtol=1e-5)


def bytes_in_forced_rounds(decoder, prompt, rounds):
    """Target bytes in each verify pass; every draft is rejected, so that all policies see the same lengths."""
    seen = []
    with torch.inference_mode():
        sequence, _ = begin(decoder, prompt, 5)
        sequence.counters.see = lambda cache: seen.append(cache.nbytes)
        for token in range(1, rounds + 1):
            step(decoder, sequence, token)
    return seen


@pytest.mark.parametrize("length", [20, 150])
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_static_and_lookahead_policies_hold_equal_bytes_in_every_pass(target, draft, prompt, length, num_draft_tokens):
    """Invariant 5: policies are compared at equal resident bytes; the prompts are evicted early and late."""
    settings = {"kv_budget": 0.3, "evict_block": 16, "window_size": 8}
    seen = [
        bytes_in_forced_rounds(
            Decoder(target, draft, load_policy(name, **settings), num_draft_tokens), prompt[:length], 50
        )
        for name in ("snapkv", "specsmallkv", "oracle")
    ]
    assert seen[0] == seen[1] == seen[2]
    assert sum(after < before for before, after in itertools.pairwise(seen[0])) >= 3, "and evictions happened"


@pytest.mark.parametrize("name", ["specsmallkv", "oracle"])
def test_tokens_leave_the_window_of_a_lookahead_policy_in_blocks_only(target, draft, prompt, name):
    policy = load_policy(name, kv_budget=0.3, evict_block=16, window_size=8)
    decoder = Decoder(target, draft, policy, 4)
    for index, (round_, sequence) in enumerate(decoder.generate(prompt, 60)):
        if index == 0:
            continue
        seen, layer = sequence.target.seen, sequence.target.layers[0]
        before = seen - len(round_.tokens)  # the block was planned at this committed length
        event = max(len(prompt), before - before % 16)
        assert layer.tail_start == event - 8 and layer.num_kept == policy.tiers(event).critical - 8
        assert before // 16 == (seen - 1) // 16 and before + round_.num_drafted + 1 <= before - before % 16 + 16
    assert seen > len(prompt) + 48


@pytest.mark.parametrize(
    "name, options",
    [
        ("full", {}),
        ("smallkv", {"kv_budget": 0.3}),
        ("specsmallkv", {"kv_budget": 0.3}),
        ("specsmallkv", {"kv_budget": 0.3, "selection": "query"}),
    ],
)
def test_the_reference_backend_gives_the_same_tokens_as_sdpa(target, draft, prompt, name, options):
    policy = load_policy(name, **options)
    outputs = [decode(target, draft, policy, 3, prompt, attention=backend)[0] for backend in ("sdpa", "reference")]
    assert outputs[0] == outputs[1]


def test_h2o_sums_the_prompts_attention_of_transformers(prompt):
    target = tiny_model(seed=1)
    target.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = target(torch.tensor([prompt]), output_attentions=True).attentions
        decoder = Decoder(target, None, load_policy("h2o", kv_budget=0.3), 0)
        sequence = decoder.start(prompt, 8)
        decoder.prefill(sequence)
    for index, rows in enumerate(expected):
        sums = rows.sum(2).unflatten(1, (2, -1)).mean(2)
        torch.testing.assert_close(sequence.evidence.mass.sums[index][..., : len(prompt)], sums)


def test_layers_of_a_pyramid_hold_and_allocate_what_is_theirs(target, prompt):
    policy = load_policy("pyramidkv", kv_budget=0.3, window_size=8, evict_block=16)
    _, sequence = decode(target, None, policy, 0, prompt)
    slots = [layer.num_slots for layer in sequence.target.layers]
    assert slots[0] - slots[1] > 30 and slots[1] - slots[2] > 30
    for index, layer in enumerate(sequence.target.layers):
        assert layer.k.shape[2] == policy.tiers(len(prompt) + NEW, index, 3).critical + 16 + 1


def test_marginal_compensation_is_in_use(target, draft, prompt):
    settings = {"kv_budget": 0.3, "window_size": 8, "evict_block": 16}
    outputs = [
        decode(target, draft, load_policy("smallkv", compensation=compensation, **settings), 0, prompt)
        for compensation in ("renormalised", "raw", "none")
    ]
    assert all(sequence.target.layers[0].num_marginal > 0 for _, sequence in outputs)
    assert outputs[0][0] != outputs[2][0] and outputs[1][0] != outputs[2][0]


def test_a_draft_equal_to_its_target_is_always_accepted_and_sees_everything(target, prompt):
    _, sequence = decode(target, target, load_policy("full"), 4, prompt)
    assert sequence.counters.accepted == sequence.counters.drafted > 0
    assert sequence.counters.rounds == -(-(NEW - 1) // 5)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 3, 7])
@pytest.mark.parametrize("new", [1, 2, 5, 33])
def test_exactly_max_new_tokens_come_out(target, draft, prompt, num_draft_tokens, new):
    for name in ("full", "smallkv", "specsmallkv"):
        tokens, sequence = decode(target, draft, load_policy(name), num_draft_tokens, prompt, new)
        assert len(tokens) == new == len(sequence.tokens) - len(prompt)


def test_a_stop_id_inside_an_accepted_block_ends_the_text_there(target, draft, prompt):
    plain, _ = decode(target, draft, load_policy("full"), 0, prompt)
    for stop in plain[1:12]:
        expected = plain[: plain.index(stop) + 1]
        for name, k in itertools.product(("full", "specsmallkv"), (0, 4)):
            tokens, sequence = decode(target, draft, load_policy(name, kv_budget=1.0), k, prompt, stop_ids=[stop])
            assert tokens == expected and sequence.target.seen == len(prompt) + len(tokens) - 1


def test_a_seed_decides_the_sample(target, draft, prompt):
    run = [
        decode(target, draft, load_policy("smallkv"), 3, prompt, seed=seed, sampler=Sampler(1.0))[0]
        for seed in (1, 1, 2)
    ]
    assert run[0] == run[1] != run[2]


def test_no_draft_is_run_when_nothing_needs_it(target, prompt):
    for name in ("full", "snapkv", "streaming_llm"):
        tokens, sequence = decode(target, None, load_policy(name), 0, prompt)
        assert sequence.draft is None and len(tokens) == NEW
    with pytest.raises(AssertionError, match="needs a draft"):
        Decoder(target, None, load_policy("smallkv"), 0)


def test_a_larger_draft_vocabulary_is_harmless(target, prompt, greedy):
    draft = tiny_model(layers=2, seed=1, vocab=VOCAB + 32)
    tokens, _ = decode(target, draft, load_policy("full"), 3, prompt)
    assert tokens == greedy


def test_a_short_prompt_is_compressed_once_the_text_has_grown(target, draft, prompt):
    for name in (*STATIC, "specsmallkv"):
        policy = load_policy(name, kv_budget=0.2, window_size=8, evict_block=16)
        _, sequence = decode(target, draft, policy, 3, prompt[:3], new=64)
        assert sequence.target.layers[0].num_slots < 40, name


@pytest.mark.parametrize("name", ["snapkv", "smallkv", "specsmallkv"])
def test_what_only_the_fit_needed_is_free_after_the_first_eviction(target, draft, prompt, name):
    """Rows of the window, its queries and rows of foreseen tokens; they are larger than the target's whole cache."""
    _, sequence = decode(target, draft, load_policy(name, kv_budget=0.3, evict_block=8), 3, prompt, new=20)
    evidence, oracle = sequence.evidence, sequence.evidence.oracle
    assert evidence.observed and not evidence.queries and not evidence.foreseen
    if oracle is not None:
        num_heads, most = len(oracle.block.buffer), 3 * 4
        fit = [x for value in vars(oracle._fit).values() for x in (value if isinstance(value, list) else [value])]
        assert all(x.numel() <= num_heads * max(num_heads, most) for x in fit if isinstance(x, torch.Tensor))


def test_a_policy_may_keep_the_windows_queries(target, draft, prompt):
    policy = load_policy("snapkv", kv_budget=0.3, evict_block=8)
    policy.keeps_window = True
    _, sequence = decode(target, draft, policy, 3, prompt, new=20)
    assert sequence.evidence.queries and sequence.held()["scratch_bytes"] >= sequence.evidence.nbytes > 0


def test_a_draft_without_the_ids_that_pad_the_targets_vocabulary_reads_on(target, prompt):
    lacking, prompt = tiny_model(layers=2, seed=1, vocab=VOCAB - 30), [token % (VOCAB - 30) for token in prompt]
    policy, sampler = load_policy("specsmallkv", kv_budget=0.5, evict_block=16), Sampler(temperature=20.0)
    tokens, _ = decode(target, lacking, policy, 3, prompt, sampler=sampler)
    assert max(tokens) >= VOCAB - 30
    batch = BatchDecoder(Decoder(target, lacking, policy, 3, sampler), 2)
    rows = {row.number: row.sequence for row, _ in batch.generate([Job(prompt, NEW), Job(prompt[:50], NEW)])}
    assert rows[0].tokens[len(prompt) :] == tokens


def test_a_buffer_is_never_larger_than_the_whole_text(target, draft, prompt):
    for name in ("snapkv", "specsmallkv"):
        policy = load_policy(name, kv_budget=0.3, evict_block=512)
        tokens, sequence = decode(target, draft, policy, 3, prompt)
        longest = len(prompt) + NEW + 4
        assert all(layer.k.shape[2] <= longest for layer in sequence.target.layers)
        assert len(tokens) == NEW
