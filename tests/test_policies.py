"""Every policy keeps its budget, the sinks and the window, and what scores highest.

A new policy is a row in POLICIES.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from specsmallkv.attention import AttentionMass
from specsmallkv.errors import UserError
from specsmallkv.policies import (
    H2O,
    Evidence,
    FullCache,
    Lookahead,
    Oracle,
    Policy,
    PyramidKV,
    SmallKV,
    SnapKV,
    StreamingLLM,
)
from specsmallkv.presets import load_policy, names
from specsmallkv.tiered_layer import TieredLayer

POLICIES = {
    "full": FullCache,
    "streaming_llm": StreamingLLM,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "h2o": H2O,
    "smallkv_paper": SmallKV,
    "smallkv": SmallKV,
    "specsmallkv": Lookahead,
    "specsmallkv_packed": Lookahead,
    "oracle": Oracle,
}
COMPRESSING = sorted(set(POLICIES) - {"full"})
H_Q, H_KV, DIM, N = 4, 2, 8, 400


def layer_of(length, residency):
    generator = torch.Generator().manual_seed(0)
    layer = TieredLayer(2 * length, residency=residency)
    layer.update(*(torch.randn(1, H_KV, length, DIM, generator=generator) for _ in range(2)))
    return layer


def evidence_of(window, saliency=None):
    generator = torch.Generator().manual_seed(1)
    queries = {0: torch.randn(1, H_Q, window, DIM, generator=generator)}
    saliency = torch.rand(1, H_KV, 2 * N, generator=generator) if saliency is None else saliency
    mass = AttentionMass(2 * N)
    mass.sums[0] = torch.rand(1, H_KV, 2 * N, generator=generator)
    return Evidence(scaling=DIM**-0.5, queries=queries, saliency=saliency, mass=mass)


def planned(policy, layer, evidence):
    layer.retain(*policy.plan(0, layer, evidence))
    return layer


def test_every_preset_is_in_this_table_and_instantiates_its_class():
    assert names("policy") == sorted(POLICIES)
    for name, policy_class in POLICIES.items():
        policy = load_policy(name)
        assert type(policy) is policy_class and policy.name == name


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("budget", [0.12, 0.3, 0.7, 0.95])
def test_resident_bytes_never_exceed_the_budget(name, budget):
    policy = load_policy(name, kv_budget=budget)
    layer = planned(policy, layer_of(N, policy.residency), evidence_of(policy.window_size))
    assert layer.nbytes <= budget * layer.full_nbytes
    assert layer.nbytes >= (budget - 0.01) * layer.full_nbytes, "and use it up"


@pytest.mark.parametrize("name", COMPRESSING)
def test_sinks_and_recent_window_are_always_critical(name):
    policy = load_policy(name, kv_budget=0.01)
    layer = planned(policy, layer_of(N, policy.residency), evidence_of(policy.window_size))
    expected = [*range(policy.num_sink_tokens), *range(N - policy.window_size, N)]
    assert layer.positions.tolist() == [[expected] * H_KV]


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_budget_that_covers_everything_plans_nothing(name):
    assert not load_policy(name, kv_budget=1.0).due(N)
    policy = load_policy(name, kv_budget=0.2)
    least = policy.num_sink_tokens + policy.window_size
    assert not policy.due(least) and policy.due(least + 1)


def test_an_oracle_that_removes_from_a_middle_rank_on_keeps_what_is_above_and_the_least_attended():
    order = torch.randperm(2 * N, generator=torch.Generator().manual_seed(0)).float()
    policy = load_policy("oracle", kv_budget=0.75, removed_from=0.1, num_sink_tokens=0, window_size=8)
    layer = planned(policy, layer_of(N, policy.residency), evidence_of(8, order.expand(1, H_KV, -1)))
    ranked = order[: N - 8].argsort(descending=True).tolist()
    above, removed = 40, N // 4  # 0.1 x 392 candidates, rounded up
    kept = ranked[:above] + ranked[above + removed :]
    assert layer.kept_positions[0].tolist() == [sorted(kept)] * H_KV


@pytest.mark.parametrize("name", ["smallkv", "smallkv_paper", "specsmallkv", "oracle"])
def test_the_most_salient_tokens_are_critical_and_the_next_marginal(name):
    policy = load_policy(name, kv_budget=0.25, **({"own_share": 0.0} if name == "smallkv" else {}))
    order = torch.stack([torch.randperm(2 * N, generator=torch.Generator().manual_seed(h)) for h in range(H_KV)])
    saliency = order.unsqueeze(0).float()
    layer = planned(policy, layer_of(N, policy.residency), evidence_of(policy.window_size, saliency))
    older = N - policy.window_size
    for head in range(H_KV):
        ranked = saliency[0, head, policy.num_sink_tokens : older].argsort(descending=True) + policy.num_sink_tokens
        count = layer.num_kept - policy.num_sink_tokens
        assert set(layer.kept_positions[0, head].tolist()) - set(range(4)) == set(ranked[:count].tolist())
        assert set(layer.marginal_positions[0, head].tolist()) == set(
            ranked[count : count + layer.num_marginal].tolist()
        )


def test_drop_never_promotes_a_marginal_token_and_offload_recalls_anything():
    first, second = torch.zeros(2, 1, H_KV, 2 * N)
    first[..., 100:150], second[..., 200:250] = 1.0, 1.0
    for name, kept_after in (("smallkv_paper", False), ("specsmallkv", True)):
        policy = load_policy(name, kv_budget=0.25)
        layer = planned(policy, layer_of(N, policy.residency), evidence_of(policy.window_size, first))
        assert not set(range(200, 250)) <= set(layer.kept_positions[0, 0].tolist())
        planned(policy, layer, evidence_of(policy.window_size, second))
        assert (set(range(200, 250)) <= set(layer.kept_positions[0, 0].tolist())) is kept_after


def test_smallkv_adds_the_attention_that_each_query_gave_to_what_the_draft_predicts():
    saliency = torch.full((1, H_KV, 2 * N), 1e-3)
    saliency[..., 100:110] = 1.0
    evidence = evidence_of(32, saliency)
    mass = evidence.mass.sums[0].zero_()
    mass[..., 20:40], mass[..., 350:360] = 190.0, 45.0  # 0.5 a query that could see the former, nearly 1 the latter
    drafts, own = [*range(100, 110)], [*range(350, 360)]
    for own_share, kept in ((0.0, drafts), (1.0, own), (0.5, drafts + own)):
        policy = load_policy("smallkv", kv_budget=46.5 / N + 0.025 * (own_share == 0.5), own_share=own_share)
        policy = replace(policy, marginal_share=0.0)
        layer = planned(policy, layer_of(N, "drop"), evidence)
        assert layer.kept_positions[0, 0].tolist()[4:] == kept, own_share


@pytest.mark.parametrize("name", ["smallkv", "smallkv_paper", "specsmallkv"])
def test_a_draft_that_is_not_trusted_leaves_the_choice_to_snapkv(name):
    policy, rival = load_policy(name, kv_budget=0.2), load_policy("snapkv", kv_budget=0.2)
    expected = planned(rival, layer_of(N, "drop"), evidence_of(128))
    for trusted in (True, False):
        evidence = evidence_of(128)
        evidence.oracle = SimpleNamespace(trusted=trusted, similarity=1.0)
        layer = planned(policy, layer_of(N, policy.residency), evidence)
        assert torch.equal(layer.positions, expected.positions) is not trusted
        assert (layer.num_marginal > 0) is (trusted and policy.marginal_share > 0)
    assert layer.nbytes == expected.nbytes


def test_marginal_tokens_need_a_head_map_that_matches_well():
    policy = load_policy("smallkv", kv_budget=0.2)
    for similarity, marginal_similarity, expected in ((0.6, 0.7, False), (0.7, 0.7, True), (0.6, 0.0, True)):
        evidence = evidence_of(128)
        evidence.oracle = SimpleNamespace(trusted=True, similarity=similarity)
        own = replace(policy, marginal_similarity=marginal_similarity)
        layer = planned(own, layer_of(N, "drop"), evidence)
        assert (layer.num_marginal > 0) is expected
        assert layer.num_kept + layer.num_marginal / 2 == pytest.approx(0.2 * N - policy.window_size, abs=1)


@pytest.mark.parametrize("tail", [0, 9])
@pytest.mark.parametrize("budget", [0.03, 0.3, 0.9])
def test_layers_planned_together_get_the_plans_that_each_gets_alone(budget, tail):
    """Some of the layers, as where they are spread over devices; `tail` tokens came since the last eviction."""
    policy, generator = load_policy("specsmallkv", kv_budget=budget), torch.Generator().manual_seed(2)
    saliency = torch.rand(4, H_KV, 2 * N, generator=generator)
    evidence = replace(evidence_of(8, saliency), budgeted=[0, 1, 2, 3])
    layers = {index: layer_of(N + tail, "offload") for index in (3, 1)}
    for index, plan in zip(layers, policy.plan_layers(layers, evidence, N), strict=True):
        alone = policy.plan(index, layers[index], evidence, N)
        assert torch.equal(plan.critical, alone.critical) and plan.tail_start == alone.tail_start
        assert plan.marginal.shape == alone.marginal.shape and plan.row_mask is None
    assert not torch.equal(*(plan.critical for plan in policy.plan_layers(layers, evidence, N))) or budget < 0.1


@pytest.mark.parametrize("hook", ["score", "predicted_score", "layer_shares", "plan"])
def test_a_subclass_of_specsmallkv_is_asked_layer_by_layer(hook):
    class Mine(Lookahead):
        asked = 0

    def asks(self, *args):
        Mine.asked += 1
        return getattr(Lookahead, hook)(self, *args)

    setattr(Mine, hook, asks)
    policy, saliency = Mine(name="mine", kv_budget=0.3), torch.rand(2, H_KV, 2 * N)
    evidence = replace(evidence_of(8, saliency), budgeted=[0, 1])
    policy.plan_layers({index: layer_of(N, "offload") for index in range(2)}, evidence, N)
    assert Mine.asked >= 2


def test_a_policy_that_spends_bytes_on_marginal_values_needs_the_drafts_rows_at_every_step():
    class Plain(SnapKV):
        marginal_share, compensation = 0.2, "raw"

    assert Plain(name="plain").compensates(evidence_of(8)) and not load_policy("snapkv").compensates(evidence_of(8))
    assert load_policy("smallkv_paper").compensates(evidence_of(8))
    assert not load_policy("smallkv", marginal_share=0.0).compensates(evidence_of(8))
    assert not load_policy("smallkv", compensation="none").compensates(evidence_of(8))


def test_snapkv_freezes_the_prompts_scores():
    policy = load_policy("snapkv")
    layer, evidence = layer_of(N, "drop"), evidence_of(policy.window_size)
    planned(policy, layer, evidence)
    before = layer.kept_positions.clone()
    layer.update(*(torch.randn(1, H_KV, 32, DIM) for _ in range(2)))
    planned(policy, layer, evidence)
    survivors = layer.kept_positions[layer.kept_positions < N - policy.window_size]
    assert torch.isin(survivors, before).all() and layer.num_kept > before.shape[2]


def test_streaming_llm_keeps_the_latest():
    policy = load_policy("streaming_llm")
    layer = planned(policy, layer_of(N, "drop"), evidence_of(policy.window_size))
    assert layer.positions[0, 0].tolist() == [0, 1, 2, 3, *range(N - 76, N)]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5, 0.66, 0.8, 0.99, 1.0])
def test_tier_sizes_fit_the_budget_for_every_length(share, budget, bits):
    policy = load_policy("smallkv", kv_budget=budget, marginal_share=share, marginal_bits=bits).fitted(64, 2)
    previous = 0
    for seen in range(1, 1200, 7):
        sizes = policy.tiers(seen)
        least = min(seen, policy.num_sink_tokens + policy.window_size)
        assert sizes.critical + sizes.marginal <= seen
        assert sizes.critical + sizes.marginal * policy.marginal_cost <= max(budget * seen, least) + 1e-6
        assert sizes.critical >= max(least, previous), "the critical tier never shrinks as text grows"
        previous = sizes.critical


class Shares(StreamingLLM):
    """Budgets in proportion to what a test wants."""

    def layer_shares(self, num_layers):
        return self.shares


@pytest.mark.parametrize("shares", [[1, 1, 1], [0, 5, 1], [1, 0, 0, 0, 0, 0], [3, 2, 1.5, 1]])
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5, 0.95])
def test_budgets_of_unequal_layers_stay_within_the_sum_and_their_bounds(shares, budget):
    policy, num_layers = Shares(name="shares", kv_budget=budget), len(shares)
    policy.shares = shares
    previous = [0] * num_layers
    for seen in range(1, 1500, 13):
        sizes = [policy.tiers(seen, index, num_layers).critical for index in range(num_layers)]
        least = min(seen, policy.num_sink_tokens + policy.window_size)
        assert sum(sizes) <= max(budget * seen, least) * num_layers + 1e-6
        assert sum(sizes) > (budget * seen - 1) * num_layers - 1e-6, "and use it up"
        assert all(least <= size <= seen for size in sizes)
        assert all(now >= then for now, then in zip(sizes, previous, strict=True)), "a buffer's size is its last"
        previous = sizes


def test_pyramidkv_falls_linearly_from_the_first_layer_to_the_mean_over_beta_in_the_last():
    policy = load_policy("pyramidkv", kv_budget=0.2, beta=4)
    sizes = [policy.tiers(5000, index, 5).critical for index in range(5)]
    assert sizes == [1750, 1375, 1000, 625, 250]
    least = policy.num_sink_tokens + policy.window_size
    short = [policy.tiers(400, index, 3).critical for index in range(3)]
    assert short == [160 - least, 80, least], "flatter where the last layer could not keep sinks and window"
    assert [load_policy("pyramidkv", beta=1).tiers(1000, index, 3).critical for index in range(3)] == [200] * 3


def test_h2o_keeps_heavy_hitters_and_the_recent_half():
    policy, layer = load_policy("h2o", kv_budget=0.25), layer_of(N, "drop")  # 100 of 400
    evidence = evidence_of(policy.window_size)
    heavy = [torch.randperm(340, generator=torch.Generator().manual_seed(h))[:46] + 4 for h in range(H_KV)]
    for head in range(H_KV):
        evidence.mass.sums[0][0, head, heavy[head]] += 1
    planned(policy, layer, evidence)
    for head in range(H_KV):
        expected = [*range(4), *heavy[head].sort().values.tolist(), *range(350, N)]
        assert layer.positions[0, head].tolist() == expected


def test_a_fork_of_the_evidence_counts_its_own_mass():
    first = evidence_of(32)
    second, third = first.fork(reads_mass=True, reads_last=True), first.fork(reads_mass=False, reads_last=False)
    before = first.mass.sums[0].clone()
    second.mass.sums[0] += 1
    second.frozen[0] = before
    assert torch.equal(first.mass.sums[0], before) and not first.frozen
    assert second.queries is first.queries and third.mass is None
    assert second.last.queries == {} and third.last is None


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("specsmallkv", "kv_budget", 0.0),
        ("specsmallkv", "kv_budget", 1.5),
        ("snapkv", "kernel_size", 4),
        ("snapkv", "window_size", 0),
        ("smallkv", "matching", "best"),
        ("smallkv", "compensation", "yes"),
        ("smallkv", "marginal_share", 1.0),
        ("smallkv", "marginal_bits", 3),
        ("specsmallkv", "key_bits", 2),
        ("specsmallkv", "value_bits", 16),
        ("smallkv", "own_share", 1.5),
        ("smallkv", "num_foreseen_tokens", -1),
        ("smallkv", "evict_block", 0),
        ("smallkv", "residency", "disk"),
        ("specsmallkv", "residency", "drop"),
        ("oracle", "residency", "drop"),
        ("snapkv", "kv_budget", "abc"),
        ("snapkv", "window_size", 2.5),
        ("snapkv", "kv_budget", True),
        ("specsmallkv", "selection", "token"),
        ("specsmallkv", "own_share", -0.1),
        ("specsmallkv", "own_share", 1.0),
        ("specsmallkv", "tail_limit", 0.0),
        ("specsmallkv", "tail_limit", "none"),
        ("streaming_llm", "num_sink_tokens", -1),
        ("pyramidkv", "beta", 0.5),
        ("h2o", "recent_share", 1.0),
        ("oracle", "removed_from", 1.5),
    ],
)
def test_impossible_settings_are_refused_with_their_value(name, field, value):
    with pytest.raises(UserError, match=f"policy.{field}={value}"):
        load_policy(name, **{field: value})


def test_heads_of_odd_length_are_not_packed_in_pairs():
    with pytest.raises(UserError, match="heads have 7; use 8 bits"):
        load_policy("specsmallkv", value_bits=4).fitted(7, 2)
    load_policy("specsmallkv", value_bits=8).fitted(7, 2)


def test_full_takes_any_budget_of_a_sweep_and_keeps_everything():
    assert load_policy("full", kv_budget=0.1).kv_budget == 1.0


def test_unknown_presets_and_fields_are_refused():
    with pytest.raises(UserError, match="choose one of full"):
        load_policy("h3o")
    with pytest.raises(UserError, match="no field budget"):
        load_policy("snapkv", budget=0.1)


def test_a_policy_from_outside_the_package_works():
    class KeepOldest(Policy):
        def score(self, index, layer, candidates, evidence):
            return -candidates.positions.float()

    policy = KeepOldest(name="oldest", kv_budget=0.25)
    layer = planned(policy, layer_of(N, "drop"), evidence_of(32))
    assert layer.kept_positions[0, 0].tolist() == list(range(100 - 32))
