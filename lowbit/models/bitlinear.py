"""BitLinear: a linear layer of binary or ternary weights that reads 8-bit activations, computed on the codes.

Wang et al., "BitNet", arXiv:2310.11453, eq. 4 and 11; Ma et al., "The Era of 1-bit LLMs", arXiv:2402.17764 (absmean ternary weights, absmax activations for each
token). The layer keeps a code in two bits (binary ones, too). An ordinary model does not survive this rounding; it has to be trained with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..numerics import packing, ternary
from ..scheme import Scheme
from ..tensor import QuantizedTensor

BITS = 2


class BitLinear(nn.Module):
    """y = (codes' values @ round(x 127 / max|x|)) scale max|x| / 127 + bias, the product of whole numbers exact in float32.

    packed: int32 [out_features, ceil(in_features / 16)], sixteen codes in a word; scale: float32 [1] or [out_features, 1].
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, qt: QuantizedTensor, bias: Tensor | None = None) -> None:
        """qt: a matrix in the format "binary" or "ternary" with a scale for the tensor or for each channel (numerics.ternary)."""
        super().__init__()
        if qt.scheme.format not in ternary.KINDS or qt.scheme.block not in ((-1, -1), (1, -1)):
            raise RecipeError(f"BitLinear holds binary and ternary weights with a scale for the tensor or for each channel, and not {qt.scheme.name}.")
        self.out_features, self.in_features = qt.shape
        self.values = ternary.KINDS[qt.scheme.format].values
        self.register_buffer("packed", packing.pack(qt.parts["codes"], BITS))
        self.register_buffer("scale", qt.parts["scale"].float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @staticmethod
    def from_linear(linear: nn.Linear, format: str = "ternary") -> BitLinear:
        """Round the weight of an ordinary layer, one scale for all of it."""
        return BitLinear(ternary.quantize(linear.weight.detach(), Scheme(format, ternary.KINDS[format].bits, (-1, -1))), linear.bias)

    def signs(self) -> Tensor:
        """The weights without their scale, -1, 0 and 1, float32 [out_features, in_features]."""
        codes = packing.unpack(self.packed, BITS, self.in_features)
        return torch.tensor(self.values, device=codes.device)[codes.int()]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in any floating dtype, which the result has, too."""
        top = x.detach().float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        codes = torch.round(x.float() * (127 / top)).clamp_(-128, 127)
        y = nn.functional.linear(codes, self.signs()) * (top / 127) * self.scale.view(-1)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, values={self.values}, bias={self.bias is not None}"
