"""Uniform integers of 2 to 8 bits, symmetric and asymmetric: w = scale * (code - zero_point), codes unsigned.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877, eq. 1.
Rounding is to the nearest, halves to even (torch.round).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape

_SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
_LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Round W [out_features, in_features] to the nearest code of the grid that the range search chooses for each group.

    importance: [in_features], weights of the squared error in the searches.
    """
    from .ranges import fit

    groups, weights = to_groups(W.float(), scheme, importance)
    scale, zero = fit(groups, scheme, search, weights)
    return from_parameters(W, scheme, scale, zero)


def from_parameters(W: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> QuantizedTensor:
    """Round W to the nearest codes of a given grid: scale, zero_point [rows, groups]."""
    return from_codes(encode(W.float(), scale, zero, scheme), scale, zero, scheme, _dtype_name(W.dtype))


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, dtype: str) -> QuantizedTensor:
    """Wrap codes uint8 [out, in], scale and zero_point [rows, groups] as a QuantizedTensor."""
    parts = {"codes": codes, "scale": scale.to(getattr(torch, scheme.scale_dtype))}
    if not scheme.symmetric:
        assert zero is not None
        parts["zero_point"] = zero.to(torch.uint8 if scheme.zero_dtype == "int" else parts["scale"].dtype)
    return QuantizedTensor(scheme, matrix_shape(codes.shape), dtype, parts)


def dequantize(qt: QuantizedTensor) -> Tensor:
    """scale * (code - zero_point), float32 [out_features, in_features]."""
    codes, scale = qt.parts["codes"], qt.parts["scale"].float()
    zero = qt.parts["zero_point"].float() if "zero_point" in qt.parts else None
    rows, columns = codes.shape
    if "g_idx" in qt.parts:  # groups of any columns (GPTQ's act-order): scales and zero-points of every column
        index = qt.parts["g_idx"].long()
        return (codes.float() - (qt.scheme.zero_code if zero is None else zero[:, index])).mul_(scale[:, index])
    values = codes.float()
    if zero is None:
        values -= qt.scheme.zero_code
    else:
        values -= spread(zero, qt.scheme, columns)
    return values.mul_(spread(scale, qt.scheme, columns))


def refuse_order(qt: QuantizedTensor, target: str) -> None:
    """Raise FormatError for a matrix in act-order, whose groups are of any columns, where a layout has groups of neighbours only."""
    if "g_idx" in qt.parts:
        raise FormatError(f"its groups are not of neighbouring columns (GPTQ's act-order), and {target} has no index of groups. Convert it to gptq, or to safetensors, which holds the values.")


def encode(W: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes uint8 [out, in] of W float32 on the grid scale, zero_point [rows, groups]."""
    columns = W.shape[1]
    codes = W / spread(scale, scheme, columns)
    if zero is not None and scheme.zero_dtype == "float":
        codes += spread(zero, scheme, columns)
        return codes.round_().clamp_(0, scheme.max_code).to(torch.uint8)
    codes.round_()
    codes += scheme.zero_code if zero is None else spread(zero.float(), scheme, columns)
    return codes.clamp_(0, scheme.max_code).to(torch.uint8)


def to_groups(W: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """View W [out, in] as [rows, groups, group]; a short last group repeats its last column, with weight zero.

    Returns the groups and the weights [1, groups, group] (None when every value counts the same).
    """
    if W.ndim != 2:
        raise ShapeError(f"a weight is a matrix [out_features, in_features]; got {list(W.shape)}.")
    rows, columns = W.shape
    if scheme.block[0] > 1:
        size = scheme.block[0]
        if rows * columns % size:
            raise ShapeError(f"{scheme.name}: groups of {size} do not divide {rows} x {columns} weights.")
        spread_out = None if importance is None else importance.expand(rows, columns).reshape(size, -1).T.unsqueeze(1)
        return W.reshape(size, -1).T.unsqueeze(1), spread_out
    if scheme.block == (-1, -1):
        return W.reshape(1, 1, -1), None if importance is None else importance.repeat(rows).view(1, 1, -1)
    size = columns if scheme.group_size == -1 else scheme.group_size
    missing = -columns % size
    if missing:
        W = torch.cat([W, W[:, -1:].expand(rows, missing)], dim=1)
        importance = torch.ones(columns, device=W.device) if importance is None else importance
        importance = torch.nn.functional.pad(importance, (0, missing))
    weights = None if importance is None else importance.view(1, -1, size)
    return W.view(rows, -1, size), weights


def spread(values: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """Per-group values [rows, groups] at every column [rows, columns] (or broadcastable to it)."""
    if scheme.block[0] > 1:
        return values.view(1, -1).expand(scheme.block[0], -1).reshape(-1, columns)
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(scheme.group_size, dim=1)[:, :columns]


def parameters(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale (rounded to scheme.scale_dtype, as float32) and zero_point (uint8, None when symmetric) of the range low..high.

    Symmetric: scale = max|x| / (2^(b-1) - 1), / (2^(b-1) - 0.5) or / 2^(b-1), see Scheme.range ("full": the signed value of
    largest magnitude sits on code 0, so the scale may be negative). Asymmetric: scale = (max - min) / (2^b - 1),
    zero_point = round(-min / scale), the range made to include 0.
    """
    if scheme.symmetric:
        if scheme.range == "full":
            extreme = torch.where(high > -low, high, low)
            scale = extreme / -float(scheme.zero_code)
        else:
            top = scheme.zero_code - (1.0 if scheme.range == "textbook" else 0.5)
            scale = torch.maximum(-low, high).clamp_(min=0) / top
        return round_scale(scale, scheme), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = round_scale((high - low) / scheme.max_code, scheme)
    zero = torch.round(-low / scale).clamp_(0, scheme.max_code)
    return scale, zero.to(torch.uint8)


def round_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """The scale as it will be stored, as float32; a group of zeros gets 1, a scale too small for the dtype its smallest number."""
    name = scheme.scale_dtype
    if scale.numel() and not bool((scale.abs() <= _LARGEST[name]).all()):
        raise FormatError(f"a scale of {float(scale.abs().max()):.3g} does not fit {name}; use scale_dtype bfloat16 or float32, or check the weights for NaN.")
    tiny = torch.full_like(scale, _SMALLEST[name]).copysign(scale)
    stored = torch.where(scale.abs() < _SMALLEST[name], tiny, scale).to(getattr(torch, name)).float()
    return torch.where(scale == 0, 1.0, stored)


def signed_codes(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """code - zero_point of groups [..., group] on the grid scale, zero_point [...], as float32: decoded values are scale times these."""
    return clamp_signed_(torch.round(groups / scale.unsqueeze(-1)), zero, scheme)


def clamp_signed_(codes: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Bring code - zero_point [..., group] into the range of the scheme, in place; zero [...] (None when symmetric)."""
    if zero is None:
        return codes.clamp_(-scheme.zero_code, scheme.max_code - scheme.zero_code)
    low = -zero.float().unsqueeze(-1)
    return codes.clamp_(low, low + scheme.max_code)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
