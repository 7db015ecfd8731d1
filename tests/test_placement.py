"""A target that is too large for one device is spread over several, and generates what it would on one."""

import pytest
import torch
from accelerate import dispatch_model
from conftest import tiny_model
from pretend_device import SecondDevice
from transformers import LlamaForCausalLM

from specsmallkv import models, random_model
from specsmallkv.config import ModelConfig
from specsmallkv.decode import Decoder
from specsmallkv.errors import UserError
from specsmallkv.matching import HeadMap
from specsmallkv.placement import device_map
from specsmallkv.presets import load_policy
from specsmallkv.tokenizer import byte_tokenizer

TARGET = "random:llama?layers=6&hidden=64&heads=4&kv_heads=2&seed=0"
LAYERS = 6
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "ipu:1",
    "model.layers.2": "ipu:1",
    "model.norm": "ipu:1",
    "lm_head": "cpu",
}


def generated(target, draft, prompt, name, **settings):
    policy = load_policy(name, kv_budget=0.3, evict_block=8, **settings)
    head_map = HeadMap(torch.full((3, 4, 8), 1 / 8), torch.ones(3, 4))
    decoder = Decoder(
        target, draft, policy, 3, attention="reference", head_map=head_map if policy.prefill_chunk else None
    )
    return [(round_.tokens, sequence.target.nbytes) for round_, sequence in decoder.generate(prompt, 12)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("h2o", {}),
        ("smallkv", {}),
        ("specsmallkv", {}),
        ("specsmallkv", {"selection": "query"}),
        ("specsmallkv", {"key_bits": 4, "value_bits": 4}),
        ("smallkv", {"prefill_chunk": 32}),
        ("specsmallkv", {"prefill_chunk": 32}),
        ("oracle", {}),
    ],
)
def test_a_target_spread_over_two_devices_generates_what_it_would_on_one(target, draft, prompt, name, settings):
    prompt = prompt[:90]
    expected = generated(target, draft, prompt, name, **settings)
    with SecondDevice():
        model = tiny_model(seed=1)
        dispatch_model(model, SPREAD, main_device="cpu", skip_keys=model._skip_keys_device_placement)
        assert generated(model, draft, prompt, name, **settings) == expected
    assert str(model.model.layers[2].self_attn.k_proj.weight.device) == "ipu:1"


@pytest.fixture
def directory(tmp_path):
    random_model.build(TARGET, torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def place(directory, room, draft=None):
    return device_map(directory, draft, torch.float32, True, len(room), room.__getitem__)


def size(directory):
    return sum(p.numel() for p in random_model.build(TARGET).parameters()) * 4


def test_a_pair_that_fits_on_the_first_device_is_not_spread(directory):
    room = 2 * size(directory)
    assert place(directory, [room, 0], directory) is None
    assert place(directory, [room - 1, room], directory) is not None
    assert place(directory, [room - 1], directory) is None, "one device is all there is"


@pytest.mark.parametrize("shares", [(0.7, 0.7), (0.9, 0.35), (0.4, 0.4, 0.4)])
def test_layers_are_spread_in_order_and_no_device_gets_more_than_it_has_room_for(directory, shares):
    room = [int(share * size(directory)) for share in shares]
    found = place(directory, room)
    assert found["model.embed_tokens"] == 0, "the draft shares the embeddings and lies on the first device"
    devices = [found[f"model.layers.{index}"] for index in range(LAYERS)]
    assert devices == sorted(devices) and set(devices) == set(range(len(shares)))
    model = random_model.build(TARGET)
    for device, space in enumerate(room):
        modules = [model.get_submodule(name) for name, where in found.items() if where == device]
        assert sum(p.numel() for module in modules for p in module.parameters()) * 4 <= space


def test_tied_embeddings_stay_together(tmp_path):
    config = random_model.build(TARGET).config
    config.tie_word_embeddings = True
    type(random_model.build(TARGET))(config).save_pretrained(tmp_path)
    found = place(str(tmp_path), [size(tmp_path) // 2] * 3)
    assert found["lm_head"] == found["model.embed_tokens"] == 0 and found["model.norm"] > 0


def test_the_draft_takes_its_room_on_the_first_device(directory):
    whole = size(directory)
    alone = place(directory, [int(0.6 * whole), whole])
    assert place(directory, [int(1.6 * whole), whole], directory) == alone


def test_what_no_device_can_hold_is_one_sentence_with_the_sizes(directory):
    whole = size(directory)
    with pytest.raises(
        UserError, match=r"GiB of weights in float32, which do not fit on the 2 CUDA .* model.device=cpu\.$"
    ):
        place(directory, [whole // 3, whole // 3])


@pytest.mark.parametrize(("device", "asked"), [("auto", True), ("cpu", False)])
def test_only_auto_spreads_and_the_target_alone_follows_the_map(directory, monkeypatch, device, asked):
    everywhere, given, load = {"model": "cpu", "lm_head": "cpu"}, [], LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(models, "device_map", lambda *_: everywhere)
    monkeypatch.setattr(
        LlamaForCausalLM,
        "from_pretrained",
        lambda *args, **options: given.append(options.get("device_map")) or load(*args, **options),
    )
    pair = models.load_pair(ModelConfig("x", directory, directory, "float32", device, "auto"), need_draft=True)
    assert given == [everywhere if asked else None, None]
    assert str(pair.target.device) == str(pair.draft.device) == "cpu"
