"""Casts to float32, float16 and bfloat16, as number formats like any other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Cast W to scheme.format; values that overflow raise FormatError."""
    weight = W.to(getattr(torch, scheme.format), copy=True)
    if not bool(torch.isfinite(weight).all()):
        raise FormatError(f"a value of {float(W.float().abs().max()):.3g} does not fit {scheme.format} (or is NaN); use bfloat16 or float32.")
    return QuantizedTensor(scheme, matrix_shape(W.shape), str(W.dtype).removeprefix("torch."), {"weight": weight})


def dequantize(qt: QuantizedTensor) -> Tensor:
    """The stored values as float32."""
    return qt.parts["weight"].float()


def bits(scheme: Scheme, rows: int, columns: int) -> int:
    return rows * columns * (32 if scheme.format == "float32" else 16)
