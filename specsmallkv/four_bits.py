"""Linear layers with weights in four bits, for a draft: what a drafting step waits for is its weights.

Rounding to nearest within groups of GROUP weights of a row, each with a scale and a centre; of a few ranges that one
with the least squared error. What such a draft proposes is verified like any other's. Few rows go through torch's
kernel, which multiplies row by row; many, as a prompt's, take a product with the weights as they were rounded.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .arithmetic import has_arithmetic
from .errors import UserError
from .linear import PackedLinear, Slot, linear_layers

GROUP = 32
ROWS_OF_KERNEL = 16  # its blocks of output features
RANGES = (1.0, 0.9, 0.8)  # of a group's weights, what of it the 16 levels span
MANY = 256  # rows from which a copy of some million weights costs less than the kernel
BLOCK = 2**20  # weights that are copied, or rounded, at once; bounds scratch, not the result


class FourBitLinear(PackedLinear):
    """A linear layer for inference on a CPU. blocks: codes for the kernel, scales and centres, codes by two a byte."""

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """Whether the kernel takes this shape."""
        return weight.shape[0] % ROWS_OF_KERNEL == 0 and weight.shape[1] % GROUP == 0

    @staticmethod
    def pack(weight: Tensor) -> list[Any]:
        parts = [rounded(part) for part in weight.split(rows_at_once(weight.shape[1]))]
        levels, affine = (torch.cat(own) for own in zip(*parts, strict=True))
        kernels = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
        return [kernels, affine.permute(1, 0, 2).contiguous(), levels[:, ::2] | levels[:, 1::2] << 4]

    def forward(self, x: Tensor) -> Tensor:
        rows, (kernels, affine, _) = x.reshape(-1, self.in_features).contiguous(), self.blocks
        if len(rows) < MANY:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, kernels, GROUP, affine)
        else:
            dtype = self.dtype if has_arithmetic(self.dtype) else torch.float32
            rows = rows.to(dtype)
            out = torch.cat([F.linear(rows, part.to(dtype)) for part in self.weights()], dim=1).to(self.dtype)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def weights(self) -> Iterator[Tensor]:
        """(out_features, in_features) float32, as rounded, made anew, some rows at a time."""
        _, affine, codes = self.blocks
        size = rows_at_once(self.in_features)
        for part, numbers in zip(codes.split(size), affine.split(size, dim=1), strict=True):
            scale, centre = numbers.float().permute(1, 0, 2).split(1, dim=-1)
            levels = torch.empty(len(part), self.in_features)
            levels[:, ::2], levels[:, 1::2] = part & 15, part >> 4
            groups = levels.view(len(part), -1, GROUP)
            yield torch.addcmul(centre - 8 * scale, groups, scale).flatten(1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.blocks)

    @property
    def read_nbytes(self) -> int:
        return sum(part.nbytes for part in self.blocks[:2])


def rows_at_once(columns: int) -> int:
    """Of a matrix, as many as BLOCK allows."""
    return max(1, BLOCK // columns)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (out, in) uint8 below 16 and (out, in / GROUP, 2): a weight is (level - 8) * scale + centre."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    levels, affine, error = _rounded(groups, RANGES[0], weight.dtype)
    for part in RANGES[1:]:
        others, their_affine, their_error = _rounded(groups, part, weight.dtype)
        better = their_error < error
        levels, affine = torch.where(better, others, levels), torch.where(better, their_affine, affine)
        error = torch.minimum(error, their_error)
    return levels.flatten(1), affine


def _rounded(groups: Tensor, part: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scale and centre, and the squared error of each group, if levels span so much of its range."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    smallest = max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, 1e-30)  # float16 has no much smaller ones
    scale = ((high - low) * part / 15).clamp_min(smallest).to(dtype).float()
    centre = ((high + low + scale) / 2).to(dtype).float()
    levels = ((groups - centre) / scale + 8).round_().clamp_(0, 15)
    error = ((levels - 8) * scale + centre - groups).square().sum(dim=-1, keepdim=True)
    return levels.to(torch.uint8), torch.cat((scale, centre), dim=-1).to(dtype), error


def layers_to_round(draft: PreTrainedModel) -> list[Slot]:
    """Linear layers whose shape the kernel takes, but for the output layer, which the rounding would harm most."""
    head = draft.get_output_embeddings()
    kept = set() if head is None else {id(module) for module in head.modules()}
    slots = (slot for slot in linear_layers(draft) if id(slot[2]) not in kept)
    return [slot for slot in slots if isinstance(slot[2], nn.Linear) and FourBitLinear.holds(slot[2].weight)]


def round_linears(draft: PreTrainedModel) -> None:
    """Put four-bit layers in the places of those."""
    slots = layers_to_round(draft)
    while slots:  # emptied on the way, so that each layer's own weights are freed before the next is rounded
        parent, name, layer = slots.pop()
        assert isinstance(layer, nn.Linear), "layers_to_round finds no others"
        setattr(parent, name, FourBitLinear(layer, FourBitLinear.pack(layer.weight.detach())))


def four_bit_bytes(weight: Tensor, dtype: torch.dtype) -> int:
    """What a layer with such weights holds: codes twice, and two numbers of that type for each group."""
    return weight.numel() + 2 * dtype.itemsize * weight.numel() // GROUP


def check_bits(bits: int | None, device: torch.device, compiled: bool) -> None:
    """UserError where `model.draft_bits` cannot be had, before anything is loaded."""
    if bits is None:
        return
    if device.type != "cpu":
        raise UserError(f"model.draft_bits={bits} needs a CPU, not {device}; use model.draft_bits=null.")
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise UserError(
            f"model.draft_bits={bits} needs a torch with products of four-bit weights on CPUs (2.6 or newer), not "
            f"{torch.__version__}; use model.draft_bits=null."
        )
    if compiled:
        raise UserError(f"model.draft_bits={bits} and model.compile are set together; keep one of them.")
