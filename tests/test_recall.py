"""Entries that are sent ahead of a recall change when they move, and nothing else."""

from functools import partial

import pytest
import torch
from test_cache import DIM, HEADS, append, choose

from specsmallkv import load_policy
from specsmallkv.batch import BatchDecoder, Job
from specsmallkv.decode import Decoder
from specsmallkv.packed_layer import PackedLayer
from specsmallkv.recall import AHEAD_SHARE, recall_ahead
from specsmallkv.tiered_layer import TieredLayer

ENTRY, NEW = 2 * DIM * 4, 40


def two_layers(kind=TieredLayer):
    """Two equal layers behind a bus that have changed their set once, and the set that they are to take next."""
    layers = [kind(64, 32, "offload") for _ in range(2)]
    for layer in layers:
        layer.shares_memory = False
        for step, count in enumerate((24, 4, 4)):
            append(layer, count)
            if step < 2:
                layer.retain(choose(layer.seen - 4, 8, step), choose(9, 0, 0), layer.seen - 4)
    return layers, choose(layers[0].seen - 4, 8, 2)


def saliency_of(wanted, length):
    """(1, H_kv, length): the wanted positions and nothing else."""
    return torch.zeros(1, HEADS, length).scatter(2, wanted, 1.0)


PACKED = partial(PackedLayer, key_bits=8, value_bits=8)


@pytest.mark.parametrize("kind, entry", [(TieredLayer, ENTRY), (PACKED, 2 * (DIM + 8))])
@pytest.mark.parametrize("rotated", [0, 3, 11])
def test_a_set_is_the_same_whether_it_was_sent_ahead_in_whole_in_part_or_wrongly(rotated, kind, entry, monkeypatch):
    monkeypatch.setattr("specsmallkv.packed_layer.SETTLED", 1)  # what is on its way stays as it was packed
    (plain, ahead), wanted = two_layers(kind)
    recall_ahead([ahead], saliency_of((wanted + rotated) % (ahead.seen - 4), ahead.seen))
    sent, before = ahead.sent_nbytes, plain.recall_bytes
    for layer in (plain, ahead):
        layer.retain(wanted, choose(9, 0, 0), layer.seen - 4)
    assert torch.equal(plain.keys, ahead.keys) and torch.equal(plain.values, ahead.values)
    assert torch.equal(plain.positions, ahead.positions) and plain.num_new == ahead.num_new > 0
    assert sent == HEADS * int(8 * AHEAD_SHARE) * entry and ahead.sent is None
    late = ahead.recall_bytes - before - sent
    assert 0 <= late <= plain.num_new * entry, "what was sent ahead counts as moved, wanted or not"
    assert (late < plain.num_new * entry) or rotated, "and what came with it does not move again"


def test_what_left_the_store_before_it_was_packed_anew_is_not_taken():
    (plain, ahead), wanted = two_layers(PACKED)
    recall_ahead([ahead], saliency_of(wanted, ahead.seen))
    gathered = ahead.sent()  # as on a GPU, where it leaves at once
    ahead.sent = lambda: gathered
    for layer in (plain, ahead):
        layer.retain(wanted, choose(9, 0, 0), layer.seen - 4)
    assert torch.equal(plain.keys, ahead.keys) and torch.equal(plain.values, ahead.values)


def test_the_best_of_the_evicted_are_sent_and_nothing_that_is_resident():
    (_, layer), _ = two_layers()
    saliency = torch.rand(1, HEADS, layer.seen, generator=torch.Generator().manual_seed(0))
    recall_ahead([layer], saliency)
    positions, (k, v) = layer.sent()
    for head in range(HEADS):
        kept = layer.kept_positions[0, head].tolist()
        evicted = [i for i in range(layer.tail_start) if i not in kept]
        best = sorted(evicted, key=lambda i: -saliency[0, head, i])[: positions.shape[2]]
        assert positions[0, head].tolist() == sorted(best)
        assert torch.equal(k[0, head], layer.store[0][0, head, sorted(best)])
        assert torch.equal(v[0, head], layer.store[1][0, head, sorted(best)])


def test_nothing_is_sent_where_host_and_device_are_one_memory():
    (layer, _), wanted = two_layers()
    layer.shares_memory = True
    recall_ahead([layer], saliency_of(wanted, layer.seen))
    assert layer.sent is None and layer.sent_nbytes == 0


def behind_a_bus(decoder):
    start = decoder.start

    def start_there(*args):
        sequence = start(*args)
        for layer in sequence.target.layers:
            layer.shares_memory = False
        return sequence

    decoder.start = start_there
    return decoder


def decoded(target, draft, prompt, policy, over_a_bus):
    decoder = Decoder(target, draft, policy, 3)
    return [*(behind_a_bus(decoder) if over_a_bus else decoder).generate(prompt, NEW)][-1][1]


@pytest.mark.parametrize("options", [{}, {"selection": "query"}, {"key_bits": 4, "value_bits": 4}])
def test_decoding_over_a_bus_sends_ahead_and_gives_the_same_tokens(target, draft, prompt, options):
    policy = load_policy("specsmallkv", kv_budget=0.3, **options)
    plain, bus = (decoded(target, draft, prompt, policy, over_a_bus) for over_a_bus in (False, True))
    assert plain.tokens == bus.tokens
    assert plain.target.sent_nbytes == 0 < bus.target.sent_nbytes
    assert bus.held()["scratch_bytes"] == plain.held()["scratch_bytes"] + bus.target.sent_nbytes
    assert bus.counters.new_entries == plain.counters.new_entries


def test_rows_of_a_batch_send_ahead_too(target, draft, prompt):
    policy, prompts = load_policy("specsmallkv", kv_budget=0.3), [prompt, prompt[:-5]]
    batch = BatchDecoder(behind_a_bus(Decoder(target, draft, policy, 3)), 2)
    rows = {row.number: row.sequence for row, _ in batch.generate([Job(own, NEW) for own in prompts])}
    for number, own in enumerate(prompts):
        assert rows[number].tokens == decoded(target, draft, own, policy, False).tokens
        assert rows[number].target.sent_nbytes > 0


@pytest.mark.parametrize("name", ["smallkv", "oracle"])
def test_policies_that_do_not_look_ahead_by_the_draft_send_nothing(target, draft, prompt, name):
    bus = decoded(target, draft, prompt, load_policy(name, kv_budget=0.3, residency="offload"), True)
    assert bus.target.sent_nbytes == 0


@pytest.mark.gpu
def test_on_a_gpu_the_store_stays_on_the_host_and_the_tokens_are_those_of_the_cpu(target, draft, prompt):
    policy = load_policy("specsmallkv", kv_budget=0.3)
    expected = decoded(target, draft, prompt, policy, False).tokens
    sequence = decoded(target.to("cuda"), draft.to("cuda"), prompt, policy, True)
    target.to("cpu"), draft.to("cpu")
    assert sequence.tokens == expected and sequence.target.sent_nbytes > 0
    assert sequence.target.layers[0].store[0].device.type == "cpu"
