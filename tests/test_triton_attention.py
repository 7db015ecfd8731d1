"""The fused kernel against the float32 reference: under Triton's interpreter on CPUs, compiled on a GPU."""

import pytest
import torch

from specsmallkv.attention import AttentionCall, attend, compensate
from specsmallkv.attention_form import Scaling
from specsmallkv.backends import BACKENDS, WITH_SINKS, attention_scores, attention_with_sinks, reference_attention
from specsmallkv.decode import Decoder
from specsmallkv.packed_values import BITS, pack, unpack
from specsmallkv.presets import load_policy
from specsmallkv.slots import select
from specsmallkv.tiered_layer import TieredLayer

pytest.importorskip("triton")  # conftest.py has its interpreter run kernels where there is no GPU
from specsmallkv import triton_attention
from specsmallkv.triton_attention import Marginal, split_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, SCALE = 24, 24**-0.5  # not a power of two


def numbers(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def qkv(q, n, heads=6, kv_heads=2, batch=1, dtype=torch.float32):
    shapes = (batch, heads, q, DIM), (batch, kv_heads, n, DIM), (batch, kv_heads, n, DIM)
    return [numbers(shape, seed, dtype) for seed, shape in enumerate(shapes)]


def log_sums(query, keys, scaling):
    group = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(group, 1).transpose(2, 3) * scaling
    q, n = scores.shape[2:]
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(n - q), -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
@pytest.mark.parametrize("q, n", [(1, 5), (4, 200), (64, 64), (50, 130)])
def test_any_number_of_parts_gives_the_reference_and_its_log_sums(q, n, num_parts):
    query, keys, values = qkv(q, n, batch=2)
    output, sums = split_attention(query, keys, values, SCALE, num_parts=num_parts)
    torch.testing.assert_close(output, reference_attention(query, keys, values, SCALE), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, log_sums(query, keys, SCALE), atol=1e-5, rtol=1e-5)


def test_slices_of_a_larger_buffer_need_no_copy():
    query, keys, values = qkv(3, 400)
    views = keys[:, :, :150], values[:, :, :150]
    assert not views[0].is_contiguous()
    expected = reference_attention(query, *(x.contiguous() for x in views), SCALE)
    torch.testing.assert_close(split_attention(query, *views, SCALE)[0], expected, atol=1e-5, rtol=1e-5)


def test_an_index_reads_what_gathering_would_have_copied():
    query, keys, values = qkv(4, 500)
    order = torch.rand(1, 2, 496, generator=torch.Generator().manual_seed(5)).argsort(-1)[..., :60].sort(-1).values
    index = torch.cat((order, torch.arange(496, 500).expand(1, 2, -1)), -1).to(DEVICE)
    gathered = select(keys, index), select(values, index)
    output, _ = split_attention(query, keys, values, SCALE, index=index, num_parts=2)
    torch.testing.assert_close(output, reference_attention(query, *gathered, SCALE), atol=1e-5, rtol=1e-5)


def test_a_mask_says_what_each_query_reads():
    query, keys, values = qkv(3, 90)
    mask = torch.rand(1, 2, 3, 90, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., -1] = True
    mask[:, :, 0, 40:89] = False  # a whole part without anything to read
    mask = mask.to(DEVICE)
    output, _ = split_attention(query, keys, values, SCALE, mask, num_parts=3)
    expected = reference_attention(query, keys, values, SCALE, mask)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_capped_scores():
    query, keys, values = qkv(2, 70)
    scaling = Scaling(1.0, softcap=3.0)
    output, _ = split_attention(query, keys, values, scaling)
    expected = reference_attention(query, keys, values, scaling)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert (expected - reference_attention(query, keys, values, 1.0)).abs().max() > 0.05  # the cap matters here


@pytest.mark.parametrize("bits", [None, *BITS])
def test_parts_share_the_marginal_values_too(bits):
    query, keys, values = qkv(2, 120)
    weights = torch.rand(1, 6, 2, 77, generator=torch.Generator().manual_seed(3)).to(DEVICE) / 100
    marginal = Marginal(weights, pack(numbers((1, 2, 77, DIM), 7), bits), bits)
    whole, parted = (split_attention(query, keys, values, SCALE, marginal=marginal, num_parts=n)[0] for n in (1, 3))
    torch.testing.assert_close(parted, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("q, num_marginal", [(1, 3), (4, 100), (50, 90)])
def test_marginal_values_are_added_and_their_weights_taken_from_the_rest(q, num_marginal, bits):
    query, keys, values = qkv(q, 120)
    layer = TieredLayer(120, marginal_bits=bits)
    layer.update(keys, values)
    layer.marginal = pack(numbers((1, 2, num_marginal, DIM), 7), bits)
    layer.marginal_positions = torch.zeros(1, 2, num_marginal, dtype=torch.long, device=DEVICE)
    weights = torch.rand(1, 6, q, num_marginal, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    layer.marginal_weights = weights / weights.sum(-1, keepdim=True) * 0.4
    expected = compensate(reference_attention(query, keys, values, SCALE), layer)
    output = attend(layer, 0, query, SCALE, AttentionCall("triton"))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert (output - BACKENDS["triton"](query, keys, values, SCALE, None)).abs().max() > 0.01


def test_the_sinks_share_follows_from_the_log_sums():
    query, keys, values = qkv(3, 40)
    ours = WITH_SINKS["triton"](query, keys, values, SCALE, None, 4)
    for own, expected in zip(ours, attention_with_sinks(query, keys, values, SCALE, None, 4), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_the_sinks_share_is_no_less_exact_in_half_precision():
    """Where nearly all attention is on the sinks, what is left decides the tail term; scores may be large."""
    query, keys, values = qkv(3, 40, dtype=torch.float16)
    keys[:, :, :4] = 4 * query[:, ::3, :1]
    scaling = 8 * SCALE
    exact = attention_with_sinks(*(x.float() for x in (query, keys, values)), scaling, None, 4)[1]
    beside, expected = 1 - WITH_SINKS["triton"](query, keys, values, scaling, None, 4)[1], 1 - exact
    assert expected.min() < 1e-3 and (beside >= 0).all()
    scores = attention_scores(query.float(), keys.float(), scaling)
    last_digit = torch.finfo(torch.float32).eps * scores.abs().max().item()  # of a log sum of this size
    torch.testing.assert_close(beside, expected, atol=last_digit, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "triton"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_kernels_of_a_gpu_tell_output_and_sinks_share_at_real_sizes(backend, dim):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    shapes = (1, 12, 4, dim), (1, 2, 900, dim), (1, 2, 900, dim)
    query, keys, values = (numbers(shape, seed, torch.bfloat16) for seed, shape in enumerate(shapes))
    ours = WITH_SINKS[backend](query, keys, values, dim**-0.5, None, 4)
    expected = attention_with_sinks(*(x.float() for x in (query, keys, values)), dim**-0.5, None, 4)
    for own, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(own.float(), exact, atol=2e-2, rtol=2e-2)


# Triton's interpreter has no products in bfloat16.
ON_GPUS = pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.gpu)


@pytest.mark.parametrize("dtype, most", [(torch.float16, 2e-3), ON_GPUS])
def test_half_precision_stays_near_the_float32_reference(dtype, most):
    query, keys, values = qkv(4, 300, dtype=dtype)
    output, _ = split_attention(query, keys, values, SCALE)
    assert output.dtype == dtype
    expected = reference_attention(*(x.float() for x in (query, keys, values)), SCALE)
    torch.testing.assert_close(output.float(), expected, atol=most, rtol=most)


@pytest.mark.parametrize("dtype, most", [(torch.float16, 2e-3), ON_GPUS])
@pytest.mark.parametrize("bits", [None, *BITS])
def test_marginal_values_in_half_precision(bits, dtype, most):
    query, keys, values = (numbers((1, heads, n, 80), n, dtype) for heads, n in ((6, 4), (2, 120), (2, 121)))
    stored = pack(numbers((1, 2, 90, 80), 7, dtype), bits)
    weights = torch.rand(1, 6, 4, 90, generator=torch.Generator().manual_seed(3)).to(DEVICE) / 100
    output, _ = split_attention(query, keys, values[:, :, :120], SCALE, marginal=Marginal(weights, stored, bits))
    whole = reference_attention(*(x.float() for x in (query, keys, values[:, :, :120])), SCALE)
    added = weights @ unpack(stored, bits).float().repeat_interleave(3, 1)
    expected = (1 - weights.sum(-1, keepdim=True)) * whole + added
    torch.testing.assert_close(output.float(), expected, atol=most, rtol=most)


POLICIES = [
    ("full", {}),
    ("specsmallkv", {}),  # tail terms
    ("specsmallkv", {"selection": "query"}),  # masks
    ("smallkv", {"marginal_similarity": 0.0}),  # marginal values
]


@pytest.mark.parametrize("policy, options", POLICIES)
def test_the_loop_says_the_same_with_the_kernel_as_with_the_reference(policy, options, target, draft, prompt):
    texts, calls, chosen = [], [], load_policy(policy, kv_budget=0.4, **options)
    with pytest.MonkeyPatch.context() as patch:
        launch = triton_attention._launch
        patch.setattr(triton_attention, "_launch", lambda *arguments: calls.append(1) or launch(*arguments))
        for attention in ("reference", "triton"):
            assert not calls
            decoder = Decoder(target.to(DEVICE), draft.to(DEVICE), chosen, 3, attention=attention)
            texts.append([token for turn, _ in decoder.generate(prompt, 16) for token in turn.tokens])
    target.cpu(), draft.cpu()
    assert texts[0] == texts[1] and calls
