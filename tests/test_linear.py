"""Packed and blocked linear layers against the plainest product, and where they stand in for torch's."""

from copy import deepcopy

import pytest
import torch
from conftest import tiny_model
from torch import nn

from specsmallkv import linear
from specsmallkv.arithmetic import has_arithmetic
from specsmallkv.config import ModelConfig
from specsmallkv.errors import UserError
from specsmallkv.linear import BlockedLinear, PackedLinear, choose_linear, exchange, linear_layers, pack_linears
from specsmallkv.models import linear_of, load_pair, resolve_dtype
from specsmallkv.weights import fingerprint

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(not linear.can_pack(torch.bfloat16, CPU), reason="torch was built without FBGEMM"),
    pytest.mark.skipif(not linear.can_block(torch.float32, CPU), reason="torch was built without oneDNN"),
]


def bfloat16_layer(bias: bool = True) -> nn.Linear:
    """float32, with the weights of a bfloat16 checkpoint: of all sizes down to the smallest that float16 holds."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=bias)
    sizes = torch.logspace(-17, 2, 40, base=2)
    layer.weight.data = ((1 + torch.rand(24, 40)) * sizes).bfloat16().float()
    return layer


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, 7 * 40, linear.BLOCK])
def test_bfloat16_weights_are_multiplied_as_they_are(bias, block, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", block)
    layer, x = bfloat16_layer(bias), torch.randn(2, 7, 40)
    expected = layer.double()(x.double())
    model = nn.Sequential(layer.float())
    pack_linears(model, "packed")
    assert isinstance(model[0], PackedLinear) and len(model[0].blocks) == max(1, -(-24 // max(1, block // 40)))
    torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_smallest_weights_move_by_no_more_than_was_said():
    layer = nn.Linear(8, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0**-18 * 1.0078125, 2.0**-25, 3e-8, 0, 0, 0, 0, 0]])
    model = nn.Sequential(layer)
    pack_linears(model, "packed")
    moved = model(torch.eye(8)).T - layer.weight
    assert moved.abs().max() <= 2.0**-25


@torch.inference_mode()
@pytest.mark.parametrize("form", linear.FORMS)
def test_a_row_is_the_same_alone_and_among_others_up_to_rounding(form):
    model, x = nn.Sequential(bfloat16_layer()), torch.randn(5, 40)
    pack_linears(model, form)
    torch.testing.assert_close(torch.cat([model(row) for row in x.split(1)]), model(x), atol=1e-5, rtol=1e-6)


def test_a_layer_beyond_float16_stays():
    model = nn.Sequential(bfloat16_layer(), bfloat16_layer())
    model[1].weight.data[3, 3] = 1e5
    pack_linears(model, "packed")
    assert type(model[0]) is PackedLinear and type(model[1]) is nn.Linear


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 2, 40), (3, 5, 40), (0, 40), (1, 0, 40)])
def test_blocked_weights_are_multiplied_as_they_are_whatever_the_rows(bias, shape):
    layer, x = bfloat16_layer(bias), torch.randn(shape)
    model = nn.Sequential(layer)
    expected = layer.double()(x.double())
    layer.float()
    pack_linears(model, "blocked")
    assert type(model[0]) is BlockedLinear and model(x).shape == expected.shape
    torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_blocked_weights_take_rows_that_lie_apart():
    model, x = nn.Sequential(bfloat16_layer()), torch.randn(3, 6, 40)[:, 1]
    expected = model(x)
    pack_linears(model, "blocked")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.skipif(not linear.can_block(torch.bfloat16, CPU), reason="this CPU has no bfloat16 arithmetic")
@pytest.mark.parametrize("rows", [1, 3, 4, 40])
def test_blocked_weights_give_torchs_own_product_in_bfloat16_up_to_its_last_digit(rows):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(96, 64)).bfloat16(), torch.randn(rows, 96, dtype=torch.bfloat16)
    expected = model(x)
    pack_linears(model, "blocked")
    digit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(model(x), expected, atol=digit, rtol=digit)  # few rows may be added in another order


@torch.inference_mode()
@pytest.mark.parametrize(
    ("form", "dtype"), [("packed", torch.bfloat16), ("packed", torch.float32), ("blocked", torch.float32)]
)
def test_a_packed_model_gives_the_models_logits_in_its_own_type(form, dtype):
    model, ids = tiny_model("qwen2").bfloat16().to(dtype), torch.randint(1, 90, (1, 12))
    expected, own = model.float()(ids).logits, model.to(dtype)(ids).logits.float()
    originals = linear_layers(model)
    pack_linears(model, form)
    assert not linear_layers(model) and model(ids).logits.dtype == dtype
    assert (model(ids).logits.float() - expected).abs().mean() <= (own - expected).abs().mean() + 1e-4
    packed = exchange(originals)
    assert linear_layers(model) == originals and all(type(layer) is linear.FORMS[form] for _, _, layer in packed)
    assert torch.equal(model.float()(ids).logits, expected)


def pair(linear_: str, dtype: str = "bfloat16"):
    draft = "random:llama?layers=1&hidden=32&heads=2&kv_heads=2"
    config = ModelConfig("tiny", "random:llama", draft, dtype, "cpu", "auto", linear=linear_)
    return load_pair(config, need_draft=True)


@pytest.mark.parametrize(("form", "dtype"), [("packed", "bfloat16"), ("blocked", "float32")])
def test_a_packed_pair_keeps_its_bytes_and_fingerprints(form, dtype):
    packed, plain = pair(form, dtype), pair("torch", dtype)
    assert packed.linear == form and plain.linear == "torch"
    assert packed.target_weight_bytes == plain.target_weight_bytes
    assert packed.draft_weight_bytes == plain.draft_weight_bytes
    assert fingerprint(packed.target) == fingerprint(plain.target) != fingerprint(packed.draft)


@pytest.mark.parametrize(("form", "dtype"), [("packed", "bfloat16"), ("blocked", "float32")])
def test_a_head_tied_to_another_models_is_packed_and_counted_once(form, dtype):
    plain, packed = pair("torch", dtype), pair("torch", dtype)
    for own in (plain, packed):
        own.draft = deepcopy(own.target)
        own.draft.lm_head.weight = own.target.lm_head.weight
    packed.pack(form)
    assert packed.draft.lm_head.blocks is packed.target.lm_head.blocks
    assert packed.draft_weight_bytes == plain.draft_weight_bytes < plain.target_weight_bytes


@pytest.mark.parametrize(
    ("arithmetic", "dtype", "device", "expected"),
    [
        (False, torch.bfloat16, "cpu", "packed"),
        (True, torch.bfloat16, "cpu", "blocked"),
        (False, torch.float32, "cpu", "torch"),
        (False, torch.bfloat16, "cuda", "torch"),
    ],
)
def test_auto_packs_where_torch_would_go_row_by_row_else_blocks(arithmetic, dtype, device, expected, monkeypatch):
    monkeypatch.setattr(linear, "has_arithmetic", lambda _: arithmetic)
    assert choose_linear("auto", dtype, torch.device(device)) == expected
    assert choose_linear("torch", dtype, torch.device(device)) == "torch"
    compiled = choose_linear("auto", dtype, torch.device(device), compiled=True)
    assert compiled == ("torch" if expected == "blocked" else expected)


@pytest.mark.parametrize(
    ("accepts", "told", "expected"),
    [
        (False, {"architecture": "x86_64", "avx512_bf16": True}, False),
        (True, {"architecture": "x86_64", "avx512_bf16": True}, True),
        (True, {"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": False}, True),
        (True, {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        (True, {"architecture": "aarch64"}, True),
        (True, {}, True),
    ],
)
def test_arithmetic_is_what_onednn_accepts_and_an_x86_has_instructions_for(monkeypatch, accepts, told, expected):
    asked = has_arithmetic.__wrapped__  # without its memory
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: accepts)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert asked(torch.bfloat16) is expected and asked(torch.float32)


def test_packing_what_cannot_be_packed_is_refused_with_the_remedy(monkeypatch):
    with pytest.raises(UserError, match=r"packed needs .* not cpu with float32; use model\.linear=auto"):
        choose_linear("packed", torch.float32, CPU)
    with pytest.raises(UserError, match=r"blocked needs .* not cuda with bfloat16; use model\.linear=auto"):
        choose_linear("blocked", torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(linear, "has_arithmetic", lambda dtype: dtype == torch.float32)
    with pytest.raises(UserError, match=r"blocked needs .* not cpu with bfloat16; use model\.linear=auto"):
        choose_linear("blocked", torch.bfloat16, CPU)


def of_device(device: str, linear_: str, compile_: str | None = None) -> ModelConfig:
    return ModelConfig("tiny", "random:llama", None, "float32", device, "auto", linear=linear_, compile=compile_)


def test_a_split_target_keeps_plain_layers():
    assert linear_of(of_device("tensor_parallel", "auto"), torch.bfloat16, CPU) == "torch"
    with pytest.raises(UserError, match=r"model\.linear=blocked needs whole layers; use model\.linear=torch"):
        linear_of(of_device("tensor_parallel", "blocked"), torch.float32, CPU)


def test_a_compiled_pair_keeps_plain_layers_by_itself(monkeypatch):
    monkeypatch.setattr(linear, "has_arithmetic", lambda _: True)
    assert linear_of(of_device("cpu", "auto"), torch.bfloat16, CPU) == "blocked"
    assert linear_of(of_device("cpu", "auto", "default"), torch.bfloat16, CPU) == "torch"


def test_the_type_is_float32_where_only_packing_would_help_and_blocks_are_asked_for(monkeypatch):
    monkeypatch.setattr("specsmallkv.models.computes_in_bfloat16", lambda _: False)
    assert resolve_dtype("auto", CPU, "packed") == torch.bfloat16
    assert resolve_dtype("auto", CPU, "blocked") == torch.float32
