"""Every format that training knows as w = scale * (q - shift) + offset: the numbers behind the scales, which can be learned, and codes for them.

q lies between two bounds, a whole number or a value of a table; scale, shift and offset are shared by the weights of a group. The numbers that the file stores
for them ("parameters") are integers' scale and zero_point, ggml's float16 d and dmin, NF4's and FP4's absmax, the scale of fp8, binary and ternary weights. The
other parts of a tensor (sub-scales of k-quants, MX exponents, NVFP4's scales, double-quantized magnitudes) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import FormatError, RecipeError
from ..scheme import INT, Scheme
from ..tensor import QuantizedTensor
from . import codebook, floating, ggml, integer, ternary

FORMATS = (INT, *ggml.WRITTEN, *codebook.CODES, *floating.KINDS, *ternary.KINDS)
# Where the float16 numbers of a ggml block lie that its scales (d) and minima (dmin, m) are multiples of.
HALVES: dict[str, dict[str, int]] = {
    "q4_0": {"d": 0}, "q4_1": {"d": 0, "dmin": 2}, "q5_0": {"d": 0}, "q5_1": {"d": 0, "dmin": 2}, "q8_0": {"d": 0},
    "q2_k": {"d": 80, "dmin": 82}, "q3_k": {"d": 108}, "q4_k": {"d": 0, "dmin": 2}, "q5_k": {"d": 0, "dmin": 2}, "q6_k": {"d": 208},
    "iq4_nl": {"d": 0}, "iq4_xs": {"d": 0}, "tq1_0": {"d": 52}, "tq2_0": {"d": 64},
}  # fmt: skip


@dataclass(frozen=True)
class Affine:
    """w = scale * (q - shift) + offset for groups [rows, groups, group] of a matrix (see grouped).

    scale [rows or 1, groups] float32; shift the same or a number; offset the same or None. low, high: bounds of q. nearest: x -> q where q is not simply a whole number.
    """

    scale: Tensor
    shift: Tensor | float
    offset: Tensor | None
    low: float
    high: float
    nearest: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def zeros(self) -> bool:
        """Whether some groups have a scale of 0 (ggml's blocks of zeros)."""
        return bool((self.scale == 0).any())


def check(scheme: Scheme) -> None:
    """Raise RecipeError for a scheme that cannot be trained."""
    if scheme.format not in FORMATS:
        raise RecipeError(f"{scheme.name} cannot be trained: its codes are vectors of several weights. Train integers, nf4, fp4, fp8, MX formats, binary, ternary or a ggml type.")
    if scheme.outliers is not None:
        raise RecipeError(f"{scheme.name} cannot be trained: it keeps outlier channels beside the codes. Leave outN out.")


def group_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """Weights that share a scale, (rows, columns); (0, n): n consecutive weights of the flattened matrix."""
    if scheme.format in ggml.BLOCK_TYPES:
        return 1, ggml.share(scheme.format)
    if scheme.format in codebook.CODES:
        return 0, min(scheme.block[1], shape[0] * shape[1])
    rows, columns = scheme.block
    return (rows, columns) if rows > 1 else (shape[0] if rows == -1 else 1, shape[1] if columns == -1 else columns)


def grouped(x: Tensor, scheme: Scheme) -> Tensor:
    """x [out, in] as [rows, groups, group], a view where nothing has to be padded (with zeros); a scale for the whole matrix broadcasts over rows."""
    rows, columns = group_shape(scheme, (x.shape[0], x.shape[1]))
    if rows == 0:
        return torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % columns)).view(-1, 1, columns)
    if rows > 1 and columns == 1:
        return x.reshape(rows, -1).T.unsqueeze(1)
    return torch.nn.functional.pad(x, (0, -x.shape[1] % columns)).view(x.shape[0], -1, columns) if x.shape[1] % columns else x.view(x.shape[0], -1, columns)


def flat(groups: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """The inverse of grouped: [out, in]."""
    rows, columns = group_shape(scheme, shape)
    if rows == 0:
        return groups.reshape(-1)[: shape[0] * shape[1]].view(shape)
    if rows > 1 and columns == 1:
        return groups.squeeze(1).T.reshape(shape)
    return groups.reshape(shape[0], -1)[:, : shape[1]]


def affine(qt: QuantizedTensor, parameters: Mapping[str, Tensor] | None = None) -> Affine:
    """What qt decodes with; parameters: float32 numbers in place of the stored ones (see parameters_of), through which gradients then pass. They are taken as they are, not rounded."""
    scheme, given = qt.scheme, parameters or {}
    if scheme.format == INT:
        if "g_idx" in qt.parts:
            raise FormatError("groups that are not of neighbouring columns (GPTQ's act-order) cannot be trained. Quantize without act-order.")
        scale = given.get("scale", qt.parts["scale"].float())
        shift = float(scheme.zero_code) if scheme.symmetric else given.get("zero_point", qt.parts["zero_point"].float())
        return Affine(_per_group(scale, scheme), _per_group(shift, scheme) if isinstance(shift, Tensor) else shift, None, 0.0, float(scheme.max_code))
    if scheme.format in ggml.BLOCK_TYPES:
        return _ggml(qt, given)
    if scheme.format in codebook.CODES:
        absmax = given["absmax"] if "absmax" in given else codebook.absmax(qt)
        table = codebook.table(scheme.format, absmax.device)
        return Affine(absmax.reshape(-1, 1), 0.0, None, -1.0, 1.0, lambda x: table[codebook.nearest(x, scheme.format).int()])
    if scheme.format in ternary.KINDS:
        sign = (lambda x: torch.where(x > 0, 1.0, -1.0)) if scheme.format == "binary" else None
        return Affine(given.get("scale", qt.parts["scale"].float()), 0.0, None, -1.0, 1.0, sign)
    element = floating.KINDS[scheme.format].element
    scale = given["scale"] if "scale" in given else floating.effective_scale(qt.parts, scheme)
    return Affine(scale, 0.0, None, -element.largest, element.largest, lambda x: floating.decode(floating.encode(x, element), element))


def _per_group(value: Tensor, scheme: Scheme) -> Tensor:
    """Stored scales or zero-points as grouped has the groups."""
    return value.reshape(-1, 1) if scheme.block[0] > 1 else value


def _ggml(qt: QuantizedTensor, given: Mapping[str, Tensor]) -> Affine:
    name = qt.scheme.format
    low, high = ggml.bounds(name)
    if not given:
        scale, offset = ggml.affine(name, qt.parts["blocks"])
        return Affine(scale, 0.0, offset, low, high, ggml.nearest(name))
    factors = {key: torch.ones_like(value) for key, value in given.items()}
    units, minima = ggml.affine(name, with_parameters(qt, factors).parts["blocks"])  # what d and dmin are multiplied by
    spread = lambda value, of: value.unsqueeze(-1).mul(of.view(*value.shape, -1)).reshape(of.shape)
    return Affine(spread(given["d"], units), 0.0, None if minima is None else spread(given["dmin"], minima), low, high, ggml.nearest(name))


def parameters_of(qt: QuantizedTensor) -> dict[str, Tensor]:
    """The stored numbers that can be learned, float32, by name; none where a format has only those that cannot."""
    scheme, parts = qt.scheme, qt.parts
    if scheme.format in ggml.BLOCK_TYPES:
        blocks = parts["blocks"].reshape(len(parts["blocks"]), -1, ggml.BLOCK_TYPES[scheme.format].block_bytes)
        return {key: blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1).float() for key, at in HALVES.get(scheme.format, {}).items()}
    if scheme.format in codebook.CODES:
        return {} if scheme.nested else {"absmax": parts["absmax"].float()}
    if scheme.format in floating.KINDS and floating.KINDS[scheme.format].scale != "float":
        return {}
    return {key: parts[key].float() for key in ("scale", "zero_point") if key in parts}


def stored(name: str, value: Tensor, start: Tensor, scheme: Scheme) -> Tensor:
    """A learned number as it will be stored, float32; scales keep the sign that they had at the start and do not become 0."""
    if name == "zero_point" and scheme.zero_dtype == "int":
        return value.round().clamp(0, scheme.max_code)
    if name in ("dmin", "zero_point"):
        return value.to(torch.float16 if name == "dmin" else getattr(torch, scheme.scale_dtype)).float()
    dtype = "float16" if name == "d" else "float32" if name == "absmax" else scheme.scale_dtype
    sign = torch.where(start < 0, -1.0, 1.0)
    kept = torch.where(start == 0, 0.0, sign * (value * sign).clamp(min=0).maximum(start.abs() / 1024))
    return torch.where(start == 0, 0.0, integer.round_scale(kept, replace(_ANY, scale_dtype=dtype)))


_ANY = Scheme()


def with_parameters(qt: QuantizedTensor, parameters: Mapping[str, Tensor]) -> QuantizedTensor:
    """qt with other stored numbers, which must be such that their dtype holds them."""
    if qt.scheme.format not in ggml.BLOCK_TYPES:
        return replace(qt, parts={**qt.parts, **{key: value.to(qt.parts[key].dtype) for key, value in parameters.items()}})
    blocks = qt.parts["blocks"].reshape(len(qt.parts["blocks"]), -1, ggml.BLOCK_TYPES[qt.scheme.format].block_bytes).clone()
    for key, value in parameters.items():
        at = HALVES[qt.scheme.format][key]
        blocks[..., at : at + 2] = value.to(torch.float16).unsqueeze(-1).view(torch.uint8)
    return replace(qt, parts={"blocks": blocks.flatten(1)})


def with_codes(qt: QuantizedTensor, q: Tensor) -> QuantizedTensor:
    """qt with other codes: q [out, in], values within the bounds of its grid."""
    scheme = qt.scheme
    if scheme.format in ggml.BLOCK_TYPES:
        return replace(qt, parts={"blocks": ggml.with_codes(scheme.format, qt.parts["blocks"], q)})
    if scheme.format == INT:
        codes = q.to(torch.uint8)
    elif scheme.format in codebook.CODES:
        codes = codebook.nearest(q, scheme.format)
    elif scheme.format in ternary.KINDS:
        codes = ternary.encode(q, scheme)
    else:
        codes = floating.encode(q, floating.KINDS[scheme.format].element)
    return replace(qt, parts={**qt.parts, "codes": codes})
