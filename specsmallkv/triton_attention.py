"""A fused kernel for a verify pass: a few queries over gathered critical keys, plus what marginal values add.

Each program takes one KV head and a part of its keys: all query rows of the group at once, so that keys and values are
read from memory once and no score ever goes back there. With an index it reads only the named entries of a longer
cache, so nothing is gathered first. A second kernel merges the parts by their log sums and adds the marginal values:

    o = (1 - sum_i w_i) o_L + sum_i w_i v_i        (paper: marginal information compensation)

`backends.reference_attention` with `attention.compensate` is the same on any device. TRITON_INTERPRET=1, set before
the first import, runs both kernels on the CPU.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_form import softcap_of
from .backends import fold
from .packed_values import Stored

BLOCK = 64  # keys at a time
LEAST_PART = 256  # keys of a program, at least
LARGEST_TILE = 2**14  # numbers of a program's query tile, which needs registers beside keys and sums
PARTS_PER_PROCESSOR = 2  # programs for each of a GPU's multiprocessors


class Marginal(NamedTuple):
    """weights (B, H_q, q, m), already normalised, of values (B, H_kv, m, D) as `packed_values.pack` stores them."""

    weights: Tensor
    stored: Stored
    bits: int | None = None


@triton.jit
def _unpacked(values, affine, slot, inside, column, dim, BITS: tl.constexpr):
    """Values (KEYS, DIM) of these slots: codes times the slot's scale plus its offset; BITS 0: as they are."""
    tile = inside[:, None] & (column < dim)[None, :]
    width = dim * BITS // 8 if BITS else dim
    found = tl.load(values + slot[:, None] * width + (column % width)[None, :], mask=tile, other=0)
    if BITS:
        if BITS == 4:
            found = (found >> tl.where(column < width, 0, 4).to(tl.uint8)[None, :]) & 15
        scale = tl.load(affine + 2 * slot, mask=inside, other=0.0)
        offset = tl.load(affine + 2 * slot + 1, mask=inside, other=0.0)
        exact = found.to(tl.float32) * scale.to(tl.float32)[:, None] + offset.to(tl.float32)[:, None]
        found = exact.to(scale.dtype)
    return found


@triton.jit
def _marginal_sum(
    weights,
    values,
    affine,
    first,
    end,
    num_rows,
    num_marginal,
    dim,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Sum (ROWS, DIM) of a head's values [first, end), each by its weight (num_rows, num_marginal)."""
    row, column, lane = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    total = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(first, end, KEYS):
        slot = start + lane
        inside = slot < end
        at = row[:, None] * num_marginal + slot[None, :]
        w = tl.load(weights + at, mask=(row < num_rows)[:, None] & inside[None, :], other=0.0)
        v = _unpacked(values, affine, slot, inside, column, dim, BITS)
        total += tl.dot(w.to(v.dtype), v, input_precision="ieee")
    return total


# Lengths differ from round to round: without this each that is a multiple of 16 would be compiled anew.
VARYING = ["num_rows", "num_queries", "length", "num_marginal", "part_length", "part_marginal"]


@triton.jit(do_not_specialize=VARYING)
def _part(
    query,
    keys,
    values,
    index,
    mask,
    marginal_values,
    affine,
    weights,
    partial,
    extra,
    log_sums,
    num_rows,
    num_queries,
    length,
    num_marginal,
    part_length,
    part_marginal,
    num_heads,
    dim,
    scaling,
    softcap,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_MARGINAL: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Softmax attention of `num_rows` rows over slots [part * part_length, ...), and its share of the marginal sum."""
    pair, part = tl.program_id(0), tl.program_id(1)
    batch, head = pair // num_heads, pair % num_heads
    row, column, lane = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    is_row, is_column = row < num_rows, column < dim
    tile = is_row[:, None] & is_column[None, :]
    q = tl.load(query + (pair * num_rows + row[:, None]) * dim + column[None, :], mask=tile, other=0.0)
    key_base, value_base = keys + batch * key_batch + head * key_head, values + batch * value_batch + head * value_head
    own = row % num_queries  # which query of the block a row belongs to
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, DIM), tl.float32)
    end = tl.minimum((part + 1) * part_length, length)
    for start in range(part * part_length, end, KEYS):
        slot = start + lane
        inside = slot < end
        place = tl.load(index + pair * length + slot, mask=inside, other=0) if HAS_INDEX else slot
        block = inside[:, None] & is_column[None, :]
        k = tl.load(key_base + place[:, None] * key_slot + column[None, :], mask=block, other=0.0)
        v = tl.load(value_base + place[:, None] * value_slot + column[None, :], mask=block, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if HAS_CAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        if HAS_MASK:
            at = (pair * num_queries + own[:, None]) * length + slot[None, :]
            seen = tl.load(mask + at, mask=is_row[:, None] & inside[None, :], other=0) != 0
        else:
            seen = inside[None, :] & (slot[None, :] <= (length - num_queries + own)[:, None])
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - higher)
        shares = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(shares, 1)
        output = output * shrink[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        largest = higher
    place = (part * tl.num_programs(0) + pair) * num_rows + row
    tl.store(log_sums + place, tl.where(total > 0, largest + tl.log(tl.maximum(total, 1e-37)), -1e30), mask=is_row)
    output = output / tl.maximum(total, 1e-37)[:, None]
    tl.store(partial + place[:, None] * dim + column[None, :], output, mask=tile)
    if HAS_MARGINAL:
        first = part * part_marginal
        end = tl.minimum(first + part_marginal, num_marginal)
        own = pair * num_marginal  # entries of the heads before
        width = dim * BITS // 8 if BITS else dim
        sum_ = _marginal_sum(
            weights + own * num_rows,
            marginal_values + own * width,
            affine + own * 2,
            first,
            end,
            num_rows,
            num_marginal,
            dim,
            BITS,
            ROWS,
            KEYS,
            DIM,
        )
        tl.store(extra + place[:, None] * dim + column[None, :], sum_, mask=tile)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _merge(
    partial,
    extra,
    log_sums,
    rest,
    output,
    log_sum,
    num_rows,
    num_parts,
    dim,
    HAS_MARGINAL: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Parts weighted by their share of all softmax sums; then rest * o_L and the marginal sum."""
    pair = tl.program_id(0)
    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    is_row = row < num_rows
    tile = is_row[:, None] & (column < dim)[None, :]
    largest = tl.full((ROWS,), -1e30, tl.float32)
    for part in range(0, num_parts):
        place = (part * tl.num_programs(0) + pair) * num_rows + row
        largest = tl.maximum(largest, tl.load(log_sums + place, mask=is_row, other=-1e30))
    total = tl.zeros((ROWS,), tl.float32)
    sum_ = tl.zeros((ROWS, DIM), tl.float32)
    added = tl.zeros((ROWS, DIM), tl.float32)
    for part in range(0, num_parts):
        place = (part * tl.num_programs(0) + pair) * num_rows + row
        share = tl.exp(tl.load(log_sums + place, mask=is_row, other=-1e30) - largest)
        at = place[:, None] * dim + column[None, :]
        sum_ += share[:, None] * tl.load(partial + at, mask=tile, other=0.0)
        total += share
        if HAS_MARGINAL:
            added += tl.load(extra + at, mask=tile, other=0.0)
    result = sum_ / tl.maximum(total, 1e-37)[:, None]
    place = pair * num_rows + row
    if HAS_MARGINAL:
        result = tl.load(rest + place, mask=is_row, other=0.0)[:, None] * result + added
    tl.store(output + place[:, None] * dim + column[None, :], result, mask=tile)
    tl.store(log_sum + place, largest + tl.log(tl.maximum(total, 1e-37)), mask=is_row)


def num_parts_of(length: int, num_pairs: int, device: torch.device) -> int:
    """How many programs share one head's keys: enough to keep the GPU busy, each with enough to do."""
    most = triton.cdiv(length, LEAST_PART)
    if device.type != "cuda":
        return most
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, PARTS_PER_PROCESSOR * processors // num_pairs))


def split_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    marginal: Marginal | None = None,
    num_parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H_q, q, D) and log sums of the softmax over critical keys, (B, H_q, q) float32.

    query (B, H_q, q, D); keys and values (B, H_kv, N, D), entries contiguous. index (B, H_kv, n): the entries that are
    read, in this order; None reads all. The last q of them are the queries' own tokens, seen causally, unless mask
    (B, H_kv, q, n) says what each query reads. marginal: what is added, its weights' sum taken from the rest.
    num_parts: programs that share a head's keys; None: as many as the device wants.
    """
    count, length = query.shape[2], keys.shape[2] if index is None else index.shape[2]
    step = max(1, LARGEST_TILE // power_of_2(keys.shape[3]) * keys.shape[1] // query.shape[1])
    parts = []
    for first in range(0, count, step):
        last = min(first + step, count)
        end = length if mask is not None else length - count + last  # later keys are not seen
        parts.append(
            _launch(
                query[:, :, first:last],
                keys if index is not None else keys[:, :, :end],
                values,
                scaling,
                None if mask is None else mask[:, :, first:last],
                None if index is None else index[:, :, :end],
                None if marginal is None else marginal._replace(weights=marginal.weights[:, :, first:last]),
                num_parts,
            )
        )
    outputs, log_sums = zip(*parts, strict=True)
    return (outputs[0], log_sums[0]) if len(parts) == 1 else (torch.cat(outputs, 2), torch.cat(log_sums, 2))


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    mask: Tensor | None,
    index: Tensor | None,
    marginal: Marginal | None,
    num_parts: int | None,
) -> tuple[Tensor, Tensor]:
    """Both kernels over as many queries as one program holds rows of."""
    batch, heads, _, dim = keys.shape
    pairs, rows, num_queries = batch * heads, query.shape[1] // heads * query.shape[2], query.shape[2]
    assert keys.stride(3) == values.stride(3) == 1, "an entry's numbers lie side by side"
    length, softcap = keys.shape[2] if index is None else index.shape[2], softcap_of(scaling)
    count, bits = (0, None) if marginal is None else (marginal.weights.shape[3], marginal.bits)
    num_parts = num_parts or num_parts_of(max(length, count), pairs, keys.device)
    partial, extra = query.new_empty(2, num_parts, pairs, rows, dim, dtype=torch.float32)
    log_sums = partial.new_empty(num_parts, pairs, rows)
    output, log_sum = query.new_empty(query.shape), log_sums.new_empty(query.shape[:3])
    reads, weights = _tables(query, mask, index, marginal, (batch, heads, num_queries, length))
    sizes = (rows, num_queries, length, count, triton.cdiv(length, num_parts), triton.cdiv(count, num_parts))
    strides = (*keys.stride()[:3], *values.stride()[:3])
    given = {"HAS_INDEX": index is not None, "HAS_MASK": mask is not None, "HAS_CAP": softcap is not None}
    tile: dict[str, Any] = {"HAS_MARGINAL": count > 0, "ROWS": power_of_2(rows), "DIM": power_of_2(dim)}
    with torch.cuda.device_of(keys):  # a kernel starts on the current device, whatever its tensors lie on
        _part[(pairs, num_parts)](
            *(fold(query, heads).contiguous(), keys, values, *reads, weights, partial, extra, log_sums),
            *(*sizes, heads, dim, float(scaling), softcap or 1.0, *strides),
            **given,
            **tile,
            BITS=bits or 0,
            KEYS=BLOCK,
        )
        rest = 1 - weights.sum(dim=-1)
        _merge[(pairs,)](partial, extra, log_sums, rest, output, log_sum, rows, num_parts, dim, **tile)
    return output, log_sum


def _tables(
    query: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    marginal: Marginal | None,
    shape: tuple[int, int, int, int],
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Index, mask, marginal values, their scales and offsets as the kernel reads them, and the weights; or empty."""
    nothing = query.new_empty(0)
    stored = [] if marginal is None else [part.contiguous() for part in marginal.stored]
    return (
        nothing if index is None else index.contiguous(),
        nothing if mask is None else mask.expand(shape).contiguous().view(torch.uint8),
        stored[0] if stored else nothing,
        stored[1] if stored[1:] else nothing,
    ), (nothing if marginal is None else fold(marginal.weights, shape[1]).float().contiguous())


def power_of_2(size: int) -> int:
    """A tile's length: the next power of two, but no less than a matrix unit takes."""
    return max(16, triton.next_power_of_2(size))
