"""Several sequences in one target pass: each row is what it would be alone."""

from copy import deepcopy

import pytest
import torch

from specsmallkv.attention import AttentionCall, AttentionRows
from specsmallkv.cache_group import CacheGroup
from specsmallkv.decode import Decoder
from specsmallkv.presets import load_policy

# One sequence each: prompt tokens and policy; they differ in length, sets, sizes per layer and per-row state.
ROWS = [
    (150, "full", {}),
    (90, "snapkv", {}),
    (140, "pyramidkv", {"beta": 2}),
    (101, "h2o", {}),
    (77, "smallkv", {}),
    (120, "specsmallkv", {}),
    (133, "specsmallkv", {"selection": "query"}),
    (110, "oracle", {}),
]
NUM_DRAFTS = 3


@pytest.fixture(scope="module")
def rows(target, draft, prompt):
    """(decoder, sequence, drafts), planned for the first verify pass after the prompt."""
    return [planned(target, draft, prompt[:length], name, options) for length, name, options in ROWS]


@torch.inference_mode()
def planned(target, draft, prompt, name, options):
    options = {"kv_budget": 1.0 if name == "full" else 0.4, "window_size": 16, **options}
    decoder = Decoder(target, draft, load_policy(name, evict_block=64, **options), NUM_DRAFTS)
    sequence = decoder.start(prompt, 20)
    sequence.tokens.append(int(decoder.prefill(sequence).argmax()))
    decoder.settle(sequence)
    drafts = [1, 2, 3]
    decoder.read(sequence, drafts)
    decoder.plan(sequence, drafts)
    return decoder, sequence, drafts


@pytest.fixture
def both(rows):
    """Logits and sequences of a pass for each row alone, and of one pass for all."""
    alone, group = deepcopy([(s, d) for _, s, d in rows]), deepcopy([(s, d) for _, s, d in rows])
    with torch.inference_mode():
        logits = torch.stack([rows[i][0].verify(*pair) for i, pair in enumerate(alone)])
        together = rows[0][0].verify_group([s for s, _ in group], [d for _, d in group])
    return logits, [s for s, _ in alone], torch.stack(together), [s for s, _ in group]


def test_rows_of_unequal_lengths_and_sets_equal_each_row_alone(both):
    logits, alone, together, group = both
    torch.testing.assert_close(together, logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(group, alone, strict=True):
        for a, b in zip(ours.target.layers, theirs.target.layers, strict=True):
            assert a.seen == b.seen and torch.equal(a.positions, b.positions)
            torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-4)


def test_the_rows_really_differ(rows):
    """Else the test above would prove little: weights, tail terms, row masks, uneven layers are among them."""
    layers = [sequence.target.layers for _, sequence, _ in rows]
    assert len({row[0].seen for row in layers}) == len(ROWS)
    assert any(layer.marginal_weights is not None for row in layers for layer in row)
    assert any(layer.tail_term is not None for row in layers for layer in row)
    assert any(layer.row_mask is not None for row in layers for layer in row)
    assert any(len({layer.num_slots for layer in row}) > 1 for row in layers)


def test_each_row_keeps_its_own_evidence_and_bytes(both):
    _, alone, _, group = both
    for ours, theirs in zip(group, alone, strict=True):
        assert ours.counters.max_target_bytes == theirs.counters.max_target_bytes == ours.target.nbytes
        assert (ours.evidence.mass is None) == (theirs.evidence.mass is None)
        if ours.evidence.mass:
            pending = ours.evidence.mass.pending
            assert {x.shape[2] for x in pending.values()} == {NUM_DRAFTS + 1}
            torch.testing.assert_close(pending, theirs.evidence.mass.pending, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_row_is_recorded_only_where_its_own_call_asks(rows):
    decoder, sequences = rows[0][0], deepcopy([sequence for _, sequence, _ in rows[:2]])
    blocks = [[sequence.tokens[-1], 1] for sequence in sequences]
    end = sequences[1].target.seen + 2
    recorded = AttentionRows(3, 4, 2, end, decoder.device)
    recorded.start(end - 2, 2)
    calls = [AttentionCall(), AttentionCall(rows=recorded, num_queries=2)]
    decoder.forward_group(decoder.target, [sequence.target for sequence in sequences], blocks, calls)
    assert not calls[0].queries and calls[1].queries[0].shape == (1, 4, 2, 8)
    assert sequences[1].target.layers[0].num_kept, "the recorded row is a compressed one"
    torch.testing.assert_close(recorded.values.sum(-1), torch.ones(12, 2))


@torch.inference_mode()
def test_looking_together_is_looking_alone(rows):
    decoder, sequences = rows[0][0], deepcopy([sequence for _, sequence, _ in rows[5:]])
    before = [sequence.target.seen for sequence in sequences]
    together = decoder.look(sequences, [[1, 2]] * 3)
    for sequence, ours in zip(sequences, together, strict=True):
        (alone,) = decoder.look([sequence], [[1, 2]])
        assert ours.shape == (3, 2, sequence.target.seen + 3)
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.sum(-1), torch.ones(3, 2))
    assert [sequence.target.seen for sequence in sequences] == before


def test_positions_of_a_group_follow_each_rows_own_length(rows):
    group = CacheGroup([sequence.target for _, sequence, _ in rows], [2] * len(ROWS))
    expected = [position for length, *_ in ROWS for position in (length, length + 1)]
    assert group.positions(torch.device("cpu")).tolist() == [expected]
    assert group.get_seq_length() == 150
