"""Linear layers whose weights lie in memory as one of torch's CPU kernels reads them, which a plain layer's do not.

"packed", for CPUs without bfloat16 arithmetic, whose products torch computes row by row. There a verify pass over
k + 1 tokens costs k + 1 single ones, so speculation cannot pay. FBGEMM's kernel reads float16 weights once for up to
six rows and adds in float32. float16 has three bits of mantissa more than bfloat16, so weights from 2^-17 to 65504 in
size stay exactly what they are; smaller ones move by 2^-25 at most.

"blocked", for CPUs with such arithmetic. oneDNN computes a plain layer's product, too, but copies its weights into
blocks each time, which for the few rows of decoding costs more than the product does; here they are kept in blocks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .arithmetic import has_arithmetic
from .errors import UserError

LARGEST = torch.finfo(torch.float16).max
FEWEST = 4  # rows; of fewer, oneDNN's product was measured to take longer than of these
BLOCK = 2**25  # weights packed at once; bounds the float32 copy that packing needs, not the result


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU with weights in FBGEMM's form; the original's weights are not kept."""

    def __init__(self, layer: nn.Linear, blocks: list[Any]):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.dtype, self.blocks = layer.bias, layer.weight.dtype, blocks

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """Whether this form can hold these weights."""
        return bool(weight.abs().max() <= LARGEST)

    @staticmethod
    def pack(weight: Tensor) -> list[Any]:
        """weight (out_features, in_features), of which a float32 copy of one block at a time is made."""
        parts = weight.split(max(1, BLOCK // weight.shape[1]))
        return [torch.ops.quantized.linear_prepack_fp16(part.float(), None) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), of the original weights' type."""
        x = x.float()
        parts = [torch.ops.quantized.linear_dynamic_fp16(x, block) for block in self.blocks]
        out = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(self.dtype)
        return out if self.bias is None else out + self.bias

    @property
    def nbytes(self) -> int:
        """Of the packed weights."""
        return 2 * self.in_features * self.out_features

    @property
    def read_nbytes(self) -> int:
        """Of what one product of few rows reads."""
        return self.nbytes

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class BlockedLinear(PackedLinear):
    """The same with weights in oneDNN's form, which multiplies as torch does but for the order of sums."""

    @staticmethod
    def holds(weight: Tensor) -> bool:
        return True

    @staticmethod
    def pack(weight: Tensor) -> list[Any]:
        return [torch.ops.mkldnn._reorder_linear_weight(weight)]

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.in_features
        if not 0 < count < FEWEST:
            return self._product(x)
        rows = nn.functional.pad(x.reshape(count, self.in_features), (0, 0, 0, FEWEST - count))
        return self._product(rows)[:count].view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self.blocks[0], self.bias, "none", [], "")

    @property
    def nbytes(self) -> int:
        """Of the weights, without what oneDNN may add to fill its blocks."""
        return self.dtype.itemsize * self.in_features * self.out_features


FORMS: dict[str, type[PackedLinear]] = {"packed": PackedLinear, "blocked": BlockedLinear}
Slot = tuple[nn.Module, str, nn.Module]  # parent, name there, layer
Packed = dict[int, list[Any]]  # by the address of the original weights: tied ones are packed once


def linear_layers(model: nn.Module) -> list[Slot]:
    """The model's plain linear layers and where they stand."""
    children = ((parent, *child) for parent in model.modules() for child in parent.named_children())
    return [slot for slot in children if type(slot[2]) is nn.Linear]


def pack_linears(model: nn.Module, form: str, packed: Packed | None = None) -> None:
    """Replace the model's linear layers one by one. packed: what models that share weights have packed already.

    A layer with a weight that the form cannot hold stays.
    """
    packed, slots, kind = {} if packed is None else packed, linear_layers(model), FORMS[form]
    while slots:  # emptied on the way, so that each layer's own weights are freed before the next is packed
        parent, name, layer = slots.pop()
        assert isinstance(layer, nn.Linear), "linear_layers finds no others"
        weight = layer.weight.detach()
        if kind.holds(weight):
            if weight.data_ptr() not in packed:
                packed[weight.data_ptr()] = kind.pack(weight)
            setattr(parent, name, kind(layer, packed[weight.data_ptr()]))


def exchange(slots: list[Slot]) -> list[Slot]:
    """Put layers where they belong and return those that stood there."""
    others = [(parent, name, parent.get_submodule(name)) for parent, name, _ in slots]
    for parent, name, layer in slots:
        setattr(parent, name, layer)
    return others


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FBGEMM can hold weights of this type here."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def can_block(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN can hold weights of this type here, in which it computes."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return known and device.type == "cpu" and has_arithmetic(dtype)


def choose_linear(requested: str, dtype: torch.dtype, device: torch.device, compiled: bool = False) -> str:
    """`model.linear` resolved: "auto" packs where torch would multiply row by row and else blocks.

    UserError if it cannot be. compiled: graphs of `model.compile` hold plain layers only, so auto blocks none.
    """
    if requested == "auto":
        if can_pack(dtype, device) and not has_arithmetic(dtype):
            return "packed"
        return "blocked" if dtype != torch.float32 and can_block(dtype, device) and not compiled else "torch"
    name = str(dtype).removeprefix("torch.")
    if requested == "packed" and not can_pack(dtype, device):
        raise UserError(
            "model.linear=packed needs a CPU, bfloat16 or float16 weights and a torch built with FBGEMM, "
            f"not {device} with {name}; use model.linear=auto."
        )
    if requested == "blocked" and not can_block(dtype, device):
        raise UserError(
            "model.linear=blocked needs a CPU that computes in the weights' type and a torch built with oneDNN, "
            f"not {device} with {name}; use model.linear=auto."
        )
    return requested
