"""selection=query: every query of a verify pass reads its own set, out of one union on the device."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from specsmallkv.attention import AttentionCall, AttentionRows, attend, visible
from specsmallkv.backends import BACKENDS, attention_probabilities, reference_attention
from specsmallkv.config import CONFIG_DIR
from specsmallkv.matching import HeadMap
from specsmallkv.metrics import attention_recall, jaccard_of_top
from specsmallkv.oracle import AttentionOracle
from specsmallkv.policies import Evidence
from specsmallkv.policies.lookahead import union_of
from specsmallkv.presets import build, load_policy
from specsmallkv.tiered_layer import TieredLayer

H_Q, H_KV, DIM, SCALE = 6, 2, 8, 8**-0.5
N, TAIL, SIZE = 60, 6, 9  # tokens, of them in the tail, set of one query before the tail


def random_sets(num_queries, seed=0, start=0):
    """Sorted sets (1, H_KV, SIZE) of the queries; the second head's lie near `start`, so that its union is smaller."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_queries, 1, H_KV, N - TAIL, generator=generator)
    scores[:, :, 1, start : start + 12] += 1
    return list(scores.topk(SIZE, dim=-1).indices.sort(dim=-1).values)


def random_kv(length, heads=H_KV, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, length, DIM, generator=generator), torch.randn(
        1, heads, length, DIM, generator=generator
    )


def layer_with(sets, **options):
    """N tokens seen, the union of the sets resident, then a verify block with one token per set."""
    layer = TieredLayer(N + 40, 30, "offload", **options)
    layer.update(*random_kv(N))
    union, mask = union_of(sets, N - TAIL)
    layer.retain(union, union[..., :0], N - TAIL, mask)
    layer.update(*random_kv(len(sets), seed=1))
    return layer


@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_the_union_holds_what_any_query_chose_and_the_mask_who_chose_it(num_queries):
    sets = random_sets(num_queries)
    union, mask = union_of(sets, N - TAIL)
    for head in range(H_KV):
        read = mask[0, head].any(0)
        chosen = union[0, head][read].tolist()
        assert chosen == sorted(set().union(*(s[0, head].tolist() for s in sets)))
        assert (union[0, head][~read] == chosen[0]).all() and (union[0, head].diff() >= 0).all()
        for query, own in enumerate(sets):
            assert union[0, head][mask[0, head, query]].tolist() == own[0, head].tolist()
    assert mask.any(2).sum(-1).max() == union.shape[2]
    assert num_queries == 1 or mask.any(2).sum(-1).min() < union.shape[2], "one head is padded"


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_attention_under_the_row_mask_is_reference_attention_over_each_rows_own_set(backend, num_queries):
    sets, query = random_sets(num_queries), random_kv(num_queries, H_Q, seed=2)[0]
    layer = layer_with(sets)
    out = attend(layer, 0, query, SCALE, AttentionCall(backend))
    keys, values = layer.everything()
    for row, own in enumerate(sets):
        tail = torch.arange(N - TAIL, N + row + 1).expand(1, H_KV, -1)
        index = torch.cat((own, tail), dim=-1)[..., None].expand(-1, -1, -1, DIM)
        expected = reference_attention(
            query[:, :, row : row + 1], keys.gather(2, index), values.gather(2, index), SCALE
        )
        torch.testing.assert_close(out[:, :, row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_recorded_rows_under_the_row_mask_are_those_of_the_masked_attention():
    sets, query = random_sets(3), random_kv(3, H_Q, seed=2)[0]
    layer = layer_with(sets)
    rows = AttentionRows(1, H_Q, 3, layer.num_slots, query.device)
    rows.start(N, 3)
    rows.length = layer.num_slots  # slots of the device buffer, not positions
    out = attend(layer, 0, query, SCALE, AttentionCall(rows=rows))
    torch.testing.assert_close(out, BACKENDS["reference"](query, layer.keys, layer.values, SCALE, visible(layer, 3)))
    assert (
        rows.values.view(H_KV, -1, 3, layer.num_slots)[..., : layer.num_kept].gt(0) == layer.row_mask[0][:, None]
    ).all()


def test_a_mask_planned_for_another_number_of_queries_is_not_used():
    layer = layer_with(random_sets(3))
    with pytest.raises(AssertionError, match="another number of queries"):
        attend(layer, 0, random_kv(2, H_Q)[0], SCALE, AttentionCall())


@pytest.mark.parametrize("shares_memory", [True, False])
def test_recall_counts_only_the_entries_of_the_union_that_were_not_resident(shares_memory):
    first, second = random_sets(4), random_sets(4, seed=1, start=20)
    layer = layer_with(first)
    layer.shares_memory, before = shares_memory, layer.recall_bytes
    layer.rollback(4)
    union, mask = union_of(second, N - TAIL)
    layer.retain(union, union[..., :0], N - TAIL, mask)
    members = [[set().union(*(s[0, h].tolist() for s in sets)) for sets in (first, second)] for h in range(H_KV)]
    absent = sum(len(new - old) for old, new in members)
    assert min(members[1][1]) not in members[1][0] and len(members[1][1]) < union.shape[2], "its padding is new too"
    assert layer.num_new == absent > 0 and layer.recall_bytes - before == absent * 2 * DIM * 4
    keys, values = layer.everything()
    index = layer.positions[..., None].expand(-1, -1, -1, DIM)
    assert torch.equal(layer.keys, keys.gather(2, index)) and torch.equal(layer.values, values.gather(2, index))


def test_the_device_buffer_follows_the_union_and_its_bytes_are_reported():
    layer = layer_with(random_sets(8))
    union = layer.row_mask.any(2).sum(-1).max()
    assert layer.num_kept == union > 30 - TAIL, "more than the slots of one set"
    assert layer.nbytes == 2 * H_KV * (union + TAIL + 8) * DIM * 4 == layer.allocated_nbytes


def test_a_row_is_planned_alike_alone_and_in_any_block():
    """What a query reads follows its own row alone, bit for bit."""
    block = AttentionRows(2, 4, 6, 500, torch.device("cpu"))
    block.buffer.copy_((6 * torch.rand(8, 6, 500, generator=torch.Generator().manual_seed(0))).softmax(-1))
    oracle = AttentionOracle(block, H_KV)
    oracle.head_map = HeadMap(torch.rand(3, H_Q, 8).softmax(-1), torch.ones(3, H_Q))
    block.start(400, 6)
    together = oracle.row_saliencies(390)
    assert together.shape == (3, H_KV, 6, 390)
    for row in range(6):
        alone = AttentionRows(2, 4, 1, 450, torch.device("cpu"))
        alone.buffer[:, 0, :401] = block.buffer[:, row, :401]
        single = AttentionOracle(alone, H_KV)
        single.head_map = oracle.head_map
        alone.start(400, 1)
        assert torch.equal(single.row_saliencies(390), together[:, :, row : row + 1])


def test_each_query_gets_the_set_that_a_block_of_it_alone_would_get():
    layer = TieredLayer(N + 40, 30, "offload")
    layer.update(*random_kv(N))
    saliency = torch.rand(1, H_KV, 4, N, generator=torch.Generator().manual_seed(1))
    options = {"kv_budget": 0.4, "window_size": TAIL}
    by_query = load_policy("specsmallkv", selection="query", **options).plan(
        0, layer, Evidence(SCALE, saliency=saliency)
    )
    for query in range(4):
        evidence = Evidence(SCALE, saliency=saliency[:, :, query])
        by_block = load_policy("specsmallkv", selection="block", **options).plan(0, layer, evidence)
        read = by_query.row_mask[:, :, query]
        assert torch.equal(by_query.critical[read].view(1, H_KV, -1), by_block.critical)
        assert (read.sum(-1) == int(0.4 * N) - TAIL).all() and by_query.tail_start == by_block.tail_start


def test_metrics_look_at_each_querys_own_set():
    """Recall and overlap of a block are the means over its queries, each measured with its set alone."""
    num = 3
    sets, queries = random_sets(num), 3 * random_kv(num, H_Q, seed=2)[0]
    layer = layer_with(sets)
    keys, _ = layer.everything()
    rows = attention_probabilities(queries, keys, SCALE)
    recall, overlap = [], []
    for row, own in enumerate(sets):
        grouped = rows[:, :, row].unflatten(1, (H_KV, -1))
        kept = grouped.gather(-1, own[:, :, None].expand(-1, -1, H_Q // H_KV, -1)).sum(-1)
        recall.append(float((kept + grouped[..., N - TAIL :].sum(-1)).mean()))
        true = grouped.mean(2)[..., : N - TAIL].topk(SIZE).indices
        for head in range(H_KV):
            a, b = set(true[0, head].tolist()), set(own[0, head].tolist())
            overlap.append(len(a & b) / len(a | b))
    assert attention_recall(layer, queries, keys, SCALE) == pytest.approx(sum(recall) / num, abs=1e-5)
    assert jaccard_of_top(layer, queries, keys, SCALE) == pytest.approx(sum(overlap) / len(overlap), abs=1e-5)


def fidelity(tmp_path, num_draft_tokens, *overrides):
    """Results of task=fidelity on the tiny random pair."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(4000)), encoding="utf-8")
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        node = compose(
            "config",
            [
                "+model=tiny-random",
                "model.dtype=float32",
                "task=fidelity",
                f"task.text_file={text}",
                "task.context_tokens=200",
                "task.eval_tokens=40",
                "task.kv_budgets=[0.4]",
                "quiet=true",
                f"speculation.num_draft_tokens={num_draft_tokens}",
                *overrides,
            ],
        )
    config = OmegaConf.to_object(node)
    config.policy, task = build(node.policy, "policy"), build(node.task, "task")
    return task.run(config)["results"]


def test_fidelity_of_a_set_per_query_does_not_depend_on_block_length(tmp_path):
    """policy.selection reaches the policy that `policy` names, in task=fidelity too."""
    query, block = (
        [
            fidelity(
                tmp_path, k, "task.policies=[specsmallkv]", f"policy.selection={selection}", "policy.tail_factor=0"
            )[0]
            for k in (1, 5)
        ]
        for selection in ("query", "block")
    )
    assert query[0]["kl_mean"] == pytest.approx(query[1]["kl_mean"], rel=1e-5)
    assert query[0]["kl_mean"] != pytest.approx(block[0]["kl_mean"], rel=1e-3)
    assert block[0]["kl_mean"] != pytest.approx(block[1]["kl_mean"], rel=1e-4)
    assert query[1]["kv_share_mean"] > block[1]["kv_share_mean"], "the union is reported"
