"""Our SnapKV and PyramidKV keep exactly the tokens that kvpress's presses keep (extra `peers`, transformers < 5.3)."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from specsmallkv.decode import Decoder
from specsmallkv.presets import load_policy

pytestmark = pytest.mark.peers
LENGTH = 400


def assert_same_tokens(architecture, press, policy):
    """Both compress the same prompt on the same model: kvpress reads its queries from the module."""
    from transformers import DynamicCache

    model, theirs = tiny_model(architecture, seed=11), DynamicCache()
    prompt = torch.randint(1, 90, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode(), press(model):
        model(torch.tensor([prompt]), past_key_values=theirs)
    decoder = Decoder(model, None, policy, 0)
    with torch.inference_mode():
        sequence = decoder.start(prompt, 8)
        sequence.tokens.append(int(decoder.prefill(sequence).argmax()))
        decoder.prefill_draft(sequence)
        full = [layer.keys.clone() for layer in sequence.target.layers]
        decoder.evict(sequence, after_prefill=True)
    for index, layer in enumerate(sequence.target.layers):
        for head in range(layer.k.shape[1]):
            distance = torch.cdist(theirs.layers[index].keys[0, head], full[index][0, head])
            their_positions = distance.argmin(-1).sort().values
            assert torch.equal(layer.positions[0, head], their_positions), f"layer {index}, head {head}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget, window, kernel", [(0.1, 32, 7), (0.25, 16, 5), (0.5, 32, 7)])
def test_snapkv_keeps_the_tokens_of_kvpress(architecture, budget, window, kernel):
    kvpress = pytest.importorskip("kvpress")
    from kvpress.utils import compute_n_kept

    press = kvpress.SnapKVPress(compression_ratio=1 - budget, window_size=window, kernel_size=kernel)
    same = compute_n_kept(LENGTH, 1 - budget) / LENGTH  # its rounding of the number kept
    policy = load_policy("snapkv", kv_budget=same, window_size=window, kernel_size=kernel, num_sink_tokens=0)
    assert_same_tokens(architecture, press, policy)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget, window, beta", [(0.1, 8, 4), (0.25, 16, 5), (0.4, 8, 16), (0.2, 16, 1)])
def test_pyramidkv_keeps_the_tokens_of_kvpress(architecture, budget, window, beta):
    """Budgets whose shares are whole numbers; else kvpress rounds to the nearest and we down, to keep the sum."""
    kvpress = pytest.importorskip("kvpress")

    options = {"window_size": window, "kernel_size": 7, "beta": beta}
    press = kvpress.PyramidKVPress(compression_ratio=1 - budget, **options)
    policy = load_policy("pyramidkv", kv_budget=budget, num_sink_tokens=0, **options)
    assert_same_tokens(architecture, press, policy)


@pytest.mark.parametrize("num_layers", [2, 3, 30])
@pytest.mark.parametrize("beta", [1, 3, 20])
def test_pyramidkv_gives_each_layer_the_number_of_kvpress_but_for_rounding(num_layers, beta):
    """Where kvpress falls back on equal layers (the last one's share is below its window) ours is flatter instead."""
    kvpress = pytest.importorskip("kvpress")
    from types import SimpleNamespace

    config = SimpleNamespace(num_hidden_layers=num_layers)
    for length, budget in ((1000, 0.35), (4096, 0.1), (4096, 0.2), (10000, 0.45)):
        press = kvpress.PyramidKVPress(compression_ratio=1 - budget, window_size=8, beta=beta)
        policy = load_policy("pyramidkv", kv_budget=budget, window_size=8, num_sink_tokens=0, beta=beta)
        for index in range(num_layers):
            number = press.get_layer_budget(SimpleNamespace(config=config, layer_idx=index), length)
            assert 0 <= number - policy.tiers(length, index, num_layers).critical <= 1
