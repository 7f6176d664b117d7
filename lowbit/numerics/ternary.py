"""BitNet's weights: binary (a sign) and ternary (-1, 0, 1), times a mean magnitude of the whole matrix or of a group.

binary: Wang et al., "BitNet: Scaling 1-bit Transformers for Large Language Models", arXiv:2310.11453, eq. 1 to 3: sign(W - mean W) * mean|W|; the mean
that is taken off is not given back. ternary: Ma et al., "The Era of 1-bit LLMs", arXiv:2402.17764, eq. 1 to 3 (b1.58):
RoundClip(W / (mean|W| + 1e-5), -1, 1) * mean|W|. Codes are 0, 1 (binary: -1, 1) and 0, 1, 2 (ternary: -1, 0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape
from . import integer

LEAST = 1e-5


@dataclass(frozen=True)
class Kind:
    """bits a code takes as it is stored (transformers packs four ternary codes into a byte). values: by code."""

    bits: int
    values: tuple[float, ...]


KINDS = {"binary": Kind(1, (-1.0, 1.0)), "ternary": Kind(2, (-1.0, 0.0, 1.0))}


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Round W [out_features, in_features] to the signs or the ternary codes; the scale is the mean magnitude."""
    W32 = W.float()
    scale = mean_magnitude(W32, scheme)
    if scheme.format == "binary":
        codes = torch.gt(W32, W32.mean()).to(torch.uint8)
    else:
        codes = encode(W32 / integer.spread(scale, scheme, W.shape[1]), scheme)
    return from_codes(codes, scale, scheme, str(W.dtype).removeprefix("torch."))


def from_codes(codes: Tensor, scale: Tensor, scheme: Scheme, dtype: str) -> QuantizedTensor:
    """Wrap codes uint8 [out, in] and scale float32 [rows, groups]."""
    return QuantizedTensor(scheme, matrix_shape(codes.shape), dtype, {"codes": codes, "scale": scale.to(getattr(torch, scheme.scale_dtype))})


def dequantize(qt: QuantizedTensor) -> Tensor:
    """value(code) * scale, float32 [out_features, in_features]."""
    values = qt.parts["codes"].float()
    values = values.mul_(2).sub_(1) if qt.scheme.format == "binary" else values.sub_(1)
    return values.mul_(integer.spread(qt.parts["scale"].float(), qt.scheme, qt.shape[1]))


def mean_magnitude(W: Tensor, scheme: Scheme) -> Tensor:
    """Mean |w| of each group, float32 [rows, groups], as it will be stored; of a short last group of its own weights."""
    groups, weights = integer.to_groups(W.abs(), scheme, torch.ones(W.shape[1], device=W.device))
    mean = groups.mean(-1) if weights is None else (groups * weights).sum(-1) / weights.expand_as(groups).sum(-1)
    if not bool(torch.isfinite(mean).all()):
        raise FormatError("the weight holds values that are NaN or infinite.")
    return torch.where(mean == 0, LEAST, mean).to(getattr(torch, scheme.scale_dtype)).float() if scheme.format == "ternary" else mean


def encode(x: Tensor, scheme: Scheme) -> Tensor:
    """Codes uint8 of the values nearest to x = W / scale."""
    if scheme.format == "binary":
        return (x > 0).to(torch.uint8)
    return x.round().clamp_(-1, 1).add_(1).to(torch.uint8)


def bits(scheme: Scheme, rows: int, columns: int) -> int:
    groups = 1 if scheme.block == (-1, -1) else rows * scheme.groups(columns)
    return rows * columns * KINDS[scheme.format].bits + groups * (32 if scheme.scale_dtype == "float32" else 16)


def rowwise(scheme: Scheme, columns: int) -> bool:
    """Whether nothing is shared between rows (the mean that binary codes are taken from is)."""
    return scheme.block != (-1, -1) and scheme.format != "binary"
