"""A draft's linear layers with weights in four bits (`model.draft_bits`)."""

import pytest
import torch
from conftest import run_task, tiny_model
from test_plan import TINY, planned
from torch import nn
from torch.nn.functional import linear

from specsmallkv import SpecSmallKV, UserError
from specsmallkv.four_bits import GROUP, MANY, FourBitLinear, check_bits, layers_to_round, round_linears, rounded
from specsmallkv.linear import PackedLinear
from specsmallkv.trimmed_head import trim_head
from specsmallkv.weights import loaded_bytes

PAIR = ("random:llama?layers=3&hidden=64&heads=4&kv_heads=2", "random:llama?layers=2&hidden=32&heads=2&kv_heads=1")
CPU = torch.device("cpu")


def layer_of(rows=48, columns=64, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).to(dtype)


def whole(layer):
    return torch.cat(list(layer.weights()))


def four_bits(layer):
    return FourBitLinear(layer, FourBitLinear.pack(layer.weight.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64), (MANY - 1, 64), (2, MANY // 2, 64), (0, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_and_many_are_multiplied_by_the_same_rounded_weights(dtype, shape, bias):
    plain = layer_of(dtype=dtype, bias=bias)
    layer, x = four_bits(plain), torch.randn(shape).to(dtype)
    with torch.inference_mode():
        out, exact = layer(x), linear(x.double(), whole(layer).double(), plain.bias.double() if bias else None)
    assert out.dtype == dtype and out.shape == (*shape[:-1], 48)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("arithmetic", [True, False])
def test_many_rows_are_multiplied_in_float32_where_the_cpu_lacks_the_type(monkeypatch, arithmetic):
    types, layer = set(), four_bits(layer_of(dtype=torch.bfloat16))

    def noted(x, weight):
        types.update((x.dtype, weight.dtype))
        return linear(x, weight)

    monkeypatch.setattr("specsmallkv.four_bits.has_arithmetic", lambda _: arithmetic)
    monkeypatch.setattr("specsmallkv.four_bits.F.linear", noted)
    assert layer(torch.randn(MANY, 64).bfloat16()).dtype == torch.bfloat16
    assert types == {torch.bfloat16 if arithmetic else torch.float32}


def test_in_how_many_parts_weights_are_rounded_and_read_changes_nothing(monkeypatch):
    plain, x, found = layer_of(), torch.randn(MANY, 64), []
    for block in (2**20, 100):
        monkeypatch.setattr("specsmallkv.four_bits.BLOCK", block)
        layer = four_bits(plain)
        found.append((layer.blocks[2], layer.blocks[1], layer(x)))
    assert len(list(layer.weights())) == 48
    assert all(torch.equal(a, b) for a, b in zip(*(own[:2] for own in found), strict=True))
    torch.testing.assert_close(found[0][2], found[1][2])


def test_rows_that_do_not_lie_side_by_side_are_multiplied_too():
    layer = four_bits(layer_of())
    x = torch.randn(1, 64, 5).transpose(1, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_off_by_half_a_level_at_most_and_groups_do_not_touch_each_other(dtype):
    weight = layer_of(32, 4 * GROUP, dtype).weight.detach()
    weight[:, GROUP : 2 * GROUP] *= 100
    weight[3, :GROUP], weight[4, :GROUP] = 0.25, 0  # all alike
    weight[5, :GROUP] *= 1e-4
    layer = FourBitLinear(nn.Linear(4 * GROUP, 32, bias=False), FourBitLinear.pack(weight))
    layer.dtype = dtype
    groups, found = (x.float().unflatten(1, (-1, GROUP)) for x in (weight, whole(layer)))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    error = (found - groups).norm(dim=-1, keepdim=True)
    assert (error <= (high - low) / 15 * 0.5 * GROUP**0.5 + 0.01 * groups.norm(dim=-1, keepdim=True)).all()
    torch.testing.assert_close(found[3, 0], groups[3, 0], atol=1e-3, rtol=1e-2)
    assert found[4, 0].abs().max() < 1e-6


def test_weights_that_lie_on_16_levels_stay_what_they_are():
    levels = torch.stack([torch.randperm(GROUP) % 16 for _ in range(16)]).float()  # all of them in each group
    weight = torch.cat((levels / 16 - 0.25, 3 - levels / 4), dim=1)
    layer = FourBitLinear(nn.Linear(2 * GROUP, 16, bias=False), FourBitLinear.pack(weight))
    torch.testing.assert_close(whole(layer), weight)


def test_of_several_ranges_each_group_takes_the_one_with_the_least_error(monkeypatch):
    weight = torch.randn(16, 8 * GROUP, generator=torch.Generator().manual_seed(0))

    def errors(ranges):
        monkeypatch.setattr("specsmallkv.four_bits.RANGES", ranges)
        levels, affine = rounded(weight)
        scale, centre = affine.split(1, dim=-1)
        found = (levels.unflatten(1, (-1, GROUP)).float() - 8) * scale + centre
        return (found - weight.unflatten(1, (-1, GROUP))).square().sum(-1)

    single = [errors((part,)) for part in (1.0, 0.9, 0.8)]
    torch.testing.assert_close(errors((1.0, 0.9, 0.8)), torch.stack(single).amin(0))


def test_layers_are_rounded_and_the_output_layer_is_not():
    draft = tiny_model()
    rounds = {name for _, name, _ in layers_to_round(draft)}
    assert rounds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}  # down_proj has 48 columns
    round_linears(draft)
    assert type(draft.lm_head) is nn.Linear and type(draft.model.layers[0].mlp.down_proj) is nn.Linear
    assert all(type(layer.self_attn.q_proj) is FourBitLinear for layer in draft.model.layers)


def test_nor_is_any_part_of_a_smaller_output_layer():
    draft = tiny_model()
    trim_head(draft, torch.arange(64), keep_full=True)
    round_linears(draft)
    assert FourBitLinear not in {type(module) for module in draft.lm_head.modules()}
    assert FourBitLinear in {type(module) for module in draft.modules()}


@pytest.mark.parametrize("form", ["torch", "blocked"])
def test_the_target_keeps_its_weights_and_a_full_cache_its_text(form):
    texts, options = [], {"dtype": "float32", "device": "cpu", "linear": form, "policy": "full", "num_draft_tokens": 3}
    for bits in (None, 4):
        spec = SpecSmallKV.from_pretrained(*PAIR, draft_bits=bits, **options)
        texts.append(spec.generate("Once upon a time", max_new_tokens=40, ignore_eos=True).token_ids)
        kinds = {type(m) for m in spec.pair.target.modules()}
        assert FourBitLinear not in kinds and spec.pair.linear == form
        assert (FourBitLinear in {type(m) for m in spec.pair.draft.modules()}) == bool(bits)
        assert (type(spec.pair.draft.lm_head) is nn.Linear) == (form == "torch")
    assert texts[0] == texts[1]


@pytest.mark.parametrize("size", [0, 96])
@pytest.mark.parametrize(("linear_", "dtype"), [("torch", "bfloat16"), ("packed", "bfloat16"), ("blocked", "float32")])
def test_bytes_are_those_that_a_run_loads(linear_, dtype, size, tmp_path):
    asked = [f"model.dtype={dtype}", f"model.linear={linear_}", "max_new_tokens=2", f"model.draft_vocab_size={size}"]
    asked += ["model.draft_bits=4"]
    run = run_task(*TINY, *asked, "prompt=hello", f"run_dir={tmp_path}")
    plan = planned(*asked)
    assert plan["draft_weight_bytes"] == run["draft_weight_bytes"] < planned(*asked[:4])["draft_weight_bytes"]
    assert plan["target_weight_bytes"] == run["target_weight_bytes"]


def test_a_distilled_draft_keeps_its_own_output_layer_and_is_counted_as_loaded():
    pair = SpecSmallKV.from_preset(draft_bits=4).pair
    plan = run_task("+model=smollm2-135m", "model.draft_bits=4", "task=plan", "task.context_tokens=100", "quiet=true")
    assert plan["draft_weight_bytes"] == pair.draft_weight_bytes
    assert plan["target_weight_bytes"] == pair.target_weight_bytes
    assert FourBitLinear not in {type(module) for module in pair.draft.lm_head.modules()}


def test_a_drafting_step_reads_the_kernels_codes_alone():
    layer = four_bits(layer_of(dtype=torch.bfloat16))
    weights = 48 * 64
    assert (
        layer.read_nbytes == weights // 2 + 4 * weights // GROUP and layer.nbytes == layer.read_nbytes + weights // 2
    )
    assert isinstance(layer, PackedLinear) and loaded_bytes(nn.ModuleList([layer])) == layer.nbytes + 48 * 2


def test_throughput_gives_transformers_the_plain_draft_and_ours_the_rounded_one(tmp_path):
    (tmp_path / "text.txt").write_text("One two three, said the cat to the dog. " * 15, encoding="utf-8")
    asked = ("task=throughput", "task.systems=[assisted,full+draft]", "task.repeats=1", "max_new_tokens=8")
    asked += (f"task.text_file={tmp_path}/text.txt", "task.context_tokens=40", "task.warmup_tokens=2")
    few, plain = (
        run_task(*TINY, *asked, f"model.draft_bits={bits}", f"run_dir={tmp_path}/{bits}")["systems"]
        for bits in (4, "null")
    )
    assert [row["name"] for row in few] == ["assisted", "full+draft"]
    assert few[0]["draft_weight_bytes"] == plain[0]["draft_weight_bytes"]
    assert few[1]["draft_weight_bytes"] < plain[1]["draft_weight_bytes"]
    assert few[0]["token_ids"] == plain[0]["token_ids"] == few[1]["token_ids"]


def test_what_cannot_be_had_is_refused_with_the_remedy(monkeypatch):
    with pytest.raises(UserError, match=r"draft_bits=4 needs a CPU, not cuda; use model\.draft_bits=null"):
        check_bits(4, torch.device("cuda"), False)
    with pytest.raises(UserError, match=r"draft_bits=4 and model\.compile are set together; keep one"):
        check_bits(4, CPU, True)
    with pytest.raises(UserError, match=r"model\.draft_bits=3 is not possible; use null \(as they come\) or 4"):
        SpecSmallKV.from_pretrained(*PAIR, draft_bits=3)
    check_bits(None, torch.device("cuda"), True)
    monkeypatch.setattr("specsmallkv.four_bits.torch.ops.aten", object())
    with pytest.raises(UserError, match=r"draft_bits=4 needs a torch with products of four-bit weights .*2\.6"):
        check_bits(4, CPU, False)


def test_what_keeps_its_weights_is_not_fingerprinted_for_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr("specsmallkv.models.fingerprint", asked.append)
    options = {"policy": "full", "dtype": "float32", "device": "cpu", "linear": "torch"}
    pair = SpecSmallKV.from_pretrained(*PAIR, draft_bits=4, **options).pair
    assert len(asked) == 1 and asked[0] is pair.draft


def test_without_a_draft_nothing_is_rounded_or_refused(monkeypatch):
    monkeypatch.setattr("specsmallkv.models.fingerprint", lambda _: pytest.fail("for nothing"))
    options = {"policy": "full", "num_draft_tokens": 0, "dtype": "float32", "device": "cpu", "linear": "torch"}
    assert SpecSmallKV.from_pretrained(PAIR[0], None, draft_bits=4, **options).pair.draft is None
    spec = SpecSmallKV.from_pretrained(PAIR[0], None, draft_bits=4, compile="default", **options)
    assert spec.pair.compile == "default"
