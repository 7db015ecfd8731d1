"""Our SnapKV keeps exactly the tokens that kvpress's SnapKVPress keeps (extra `peers`, transformers < 5.3)."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from specsmallkv.decode import Decoder
from specsmallkv.presets import load_policy

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget, window, kernel", [(0.1, 32, 7), (0.25, 16, 5), (0.5, 32, 7)])
def test_snapkv_keeps_the_tokens_of_kvpress(architecture, budget, window, kernel):
    kvpress = pytest.importorskip("kvpress")
    from kvpress.utils import compute_n_kept
    from transformers import DynamicCache

    # kvpress reads its queries from the module, so both run on the same model and prompt
    model = tiny_model(architecture, seed=11)
    prompt = torch.randint(1, 90, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    press = kvpress.SnapKVPress(compression_ratio=1 - budget, window_size=window, kernel_size=kernel)
    theirs = DynamicCache()
    with torch.inference_mode(), press(model):
        model(torch.tensor([prompt]), past_key_values=theirs)

    same = compute_n_kept(len(prompt), 1 - budget) / len(prompt)  # its rounding of the number kept
    policy = load_policy("snapkv", kv_budget=same, window_size=window, kernel_size=kernel, num_sink_tokens=0)
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
