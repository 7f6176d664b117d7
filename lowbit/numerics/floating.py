"""Small floating-point numbers: FP8 with float scales, the microscaling formats MXFP8, MXFP6 and MXFP4, and NVFP4.

    format      element        block  scale of a block                            largest element
    fp8_e4m3    E4M3 (fn)      any    float, max|x| / 448                         448
    fp8_e5m2    E5M2           any    float, max|x| / 57344                       57344
    mxfp8_e4m3  E4M3 (fn)      32     E8M0: 2^(floor(log2 max|x|) - 8)            448
    mxfp8_e5m2  E5M2           32     E8M0: 2^(floor(log2 max|x|) - 15)           57344
    mxfp6_e2m3  E2M3           32     E8M0: 2^(floor(log2 max|x|) - 2)            7.5
    mxfp6_e3m2  E3M2           32     E8M0: 2^(floor(log2 max|x|) - 4)            28
    mxfp4       E2M1           32     E8M0: 2^(floor(log2 max|x|) - 2)            6
    nvfp4       E2M1           16     E4M3 times a float32 of the whole matrix    6

Elements round to nearest, halves to even, and saturate. OCP Microscaling Formats (MX) v1.0, section 5 and 6.3; Micikevicius et al., "FP8 Formats
for Deep Learning", arXiv:2209.05433; NVFP4 as in compressed-tensors (global scale 448 * 6 / max|W|: block scales are multiplied by it when stored, and divided by it when used).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import FormatError, RecipeError
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape
from . import integer

_LEAST = -127  # exponent of the smallest E8M0 scale


@dataclass(frozen=True)
class Element:
    """bits of exponent and mantissa beside the sign; bias; largest: the value where it saturates; top: its exponent, floor(log2 largest)."""

    exponent: int
    mantissa: int
    bias: int
    largest: float
    top: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


E4M3, E5M2 = Element(4, 3, 7, 448.0, 8), Element(5, 2, 15, 57344.0, 15)
E2M3, E3M2, E2M1 = Element(2, 3, 1, 7.5, 2), Element(3, 2, 3, 28.0, 4), Element(2, 1, 1, 6.0, 2)
_TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


@dataclass(frozen=True)
class Kind:
    """element; block: its fixed length, None for one that the scheme says; scale: "float", "e8m0" or "nvfp4"."""

    element: Element
    block: int | None
    scale: str


KINDS: dict[str, Kind] = {
    "fp8_e4m3": Kind(E4M3, None, "float"),
    "fp8_e5m2": Kind(E5M2, None, "float"),
    "mxfp8_e4m3": Kind(E4M3, 32, "e8m0"),
    "mxfp8_e5m2": Kind(E5M2, 32, "e8m0"),
    "mxfp6_e2m3": Kind(E2M3, 32, "e8m0"),
    "mxfp6_e3m2": Kind(E3M2, 32, "e8m0"),
    "mxfp4": Kind(E2M1, 32, "e8m0"),
    "nvfp4": Kind(E2M1, 16, "nvfp4"),
}


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Round W [out_features, in_features] to the nearest elements; the range of a block is its largest magnitude."""
    if KINDS[scheme.format].block not in (None, scheme.block[1]):
        raise RecipeError(f"{scheme.format} has blocks of {KINDS[scheme.format].block}; block is {scheme.block}.")
    W32 = W.float()
    groups, _ = integer.to_groups(W32, scheme)
    absmax = groups.abs().amax(-1)
    parts = scales(absmax, scheme)
    codes = encode(W32 / integer.spread(effective_scale(parts, scheme), scheme, W.shape[1]), KINDS[scheme.format].element)
    return QuantizedTensor(scheme, matrix_shape(W.shape), str(W.dtype).removeprefix("torch."), {"codes": codes, **parts})


def dequantize(qt: QuantizedTensor) -> Tensor:
    """element * scale, float32 [out_features, in_features]."""
    values = decode(qt.parts["codes"], KINDS[qt.scheme.format].element)
    return values.mul_(integer.spread(effective_scale(qt.parts, qt.scheme), qt.scheme, qt.shape[1]))


def scales(absmax: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The stored scales of blocks whose largest magnitudes are absmax float32 [rows, groups].

    scale: in scheme.scale_dtype; uint8, the biased exponent (E8M0); or uint8, E4M3, beside global_scale float32 [] (NVFP4).
    """
    kind = KINDS[scheme.format]
    if not bool(torch.isfinite(absmax).all()):
        raise FormatError("the weight holds values that are NaN or infinite.")
    if kind.scale == "e8m0":
        return {"scale": _exponents(absmax, kind.element)}
    total = global_scale(absmax.max()) if kind.scale == "nvfp4" else None
    return scales_from(absmax / kind.element.largest, scheme, total)


def scales_from(scale: Tensor, scheme: Scheme, total: Tensor | None) -> dict[str, Tensor]:
    """The stored parts of scales float32 [rows, groups]; total: the scale of the whole matrix (NVFP4). Stored scales give themselves."""
    kind = KINDS[scheme.format]
    if kind.scale == "e8m0":
        return {"scale": _exponents(scale * kind.element.largest, kind.element)}
    if kind.scale == "nvfp4":
        assert total is not None
        return {"scale": encode((scale * total).clamp(min=2.0**-9), E4M3), "global_scale": total}
    return {"scale": integer.round_scale(scale, scheme).to(getattr(torch, scheme.scale_dtype))}


def global_scale(largest: Tensor) -> Tensor:
    """NVFP4's factor of a whole matrix whose largest magnitude is largest: its block scales then reach 448."""
    return torch.where(largest == 0, 1.0, E4M3.largest * E2M1.largest / largest).clamp(max=3e38).float()


def _exponents(absmax: Tensor, element: Element) -> Tensor:
    """Biased exponents uint8 of the power of two that leaves absmax below twice the element's largest power of two."""
    exponent = torch.frexp(absmax).exponent - 1 - element.top  # frexp: x = m 2^e with 0.5 <= m < 1
    return torch.where(absmax == 0, 0, exponent).clamp(_LEAST, 127).add(127).to(torch.uint8)


def effective_scale(parts: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """What elements are multiplied by, float32 [rows, groups]."""
    kind, scale = KINDS[scheme.format], parts["scale"]
    if kind.scale == "float":
        return scale.float()
    if kind.scale == "e8m0":
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return decode(scale, E4M3) / parts["global_scale"]


def encode(x: Tensor, element: Element) -> Tensor:
    """The bit patterns uint8 of the elements nearest to x float32; halves go to the even one, what is too large to the largest."""
    x = x.clamp(-element.largest, element.largest)
    if element in _TORCH:
        return x.to(_TORCH[element]).view(torch.uint8)
    middles = _middles(element, x.device)
    magnitude = x.abs()
    code = torch.searchsorted(middles, magnitude)  # of a tie the lower one: a code is even where its mantissa is
    tie = (code < len(middles)) & (magnitude == middles[code.clamp(max=len(middles) - 1)])
    code += tie & (code % 2 == 1)
    return code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << (element.bits - 1))


def decode(codes: Tensor, element: Element) -> Tensor:
    """The values of bit patterns uint8, float32."""
    if element in _TORCH:
        return codes.view(_TORCH[element]).float()
    return torch.tensor(table(element), dtype=torch.float32, device=codes.device)[codes.int()]


@lru_cache
def table(element: Element) -> tuple[float, ...]:
    """The value of every bit pattern of an element without infinities and NaN."""
    positive = []
    for code in range(2 ** (element.bits - 1)):
        exponent, mantissa = code >> element.mantissa, code & (2**element.mantissa - 1)
        fraction = mantissa / 2**element.mantissa + (exponent > 0)
        positive.append(fraction * 2.0 ** (max(exponent, 1) - element.bias))
    return (*positive, *(-value for value in positive))


def _middles(element: Element, device: torch.device) -> Tensor:
    values = torch.tensor(table(element)[: 2 ** (element.bits - 1)], device=device)
    return (values[:-1] + values[1:]) / 2


def bits(scheme: Scheme, rows: int, columns: int) -> int:
    kind = KINDS[scheme.format]
    groups = 1 if scheme.block == (-1, -1) else rows * scheme.groups(columns)
    each = {"float": 32 if scheme.scale_dtype == "float32" else 16, "e8m0": 8, "nvfp4": 8}[kind.scale]
    return rows * columns * kind.element.bits + groups * each + (32 if kind.scale == "nvfp4" else 0)


def rowwise(scheme: Scheme, columns: int) -> bool:
    """Whether no scale is shared between rows."""
    return scheme.block != (-1, -1) and KINDS[scheme.format].scale != "nvfp4"


def describe(name: str) -> str:
    kind = KINDS[name]
    scale = {"float": "a float for every group", "e8m0": "a power of two for every 32 weights", "nvfp4": "an FP8 scale for every 16 weights and a float for the matrix"}
    return f"E{kind.element.exponent}M{kind.element.mantissa} floats with {scale[kind.scale]}"
