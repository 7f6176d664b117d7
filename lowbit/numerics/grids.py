"""What an algorithm with error feedback asks of a number format: ranges fitted to some columns at a time, then codes one column at a time.

Every format is w = scale * q + offset with q from a set that is the same everywhere (integers between two bounds, or a table of values), and scale
and offset shared by some columns of a row. Columns are fitted in units: a group, or a super-block of several that store their scales together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ShapeError
from ..scheme import INT, RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape
from . import codebook, floating, ggml, integer, ranges, ternary

PER_TENSOR = (-1, -1)
FORMATS = (INT, *ggml.WRITTEN, *codebook.CODES, *floating.KINDS, *ternary.KINDS)


@dataclass
class Ranges:
    """The fitted ranges of one unit of columns, subs of which share a scale.

    scale [rows, subs] float32, as stored. offset [rows, subs] or None. low, high: bounds of q where they differ by row, else None.
    stored: what finish puts into the tensor.
    """

    scale: Tensor
    offset: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    stored: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """One number format, for one matrix.

    unit: columns that are fitted together. share: columns that share a scale. bounds: least and largest q.
    nearest: (x) -> the q nearest to each x, where q is not simply a whole number. fit: (values [rows, columns], importance [columns]) -> Ranges.
    finish: (q [rows, in_features], ranges of all units in the order of the columns, dtype name) -> QuantizedTensor.
    """

    unit: int
    share: int
    bounds: tuple[float, float]
    nearest: Callable[[Tensor], Tensor] | None
    fit: Callable[[Tensor, Tensor | None], Ranges]
    finish: Callable[[Tensor, list[Ranges], str], QuantizedTensor]


def join(parts: list[Ranges]) -> Ranges:
    """The ranges of one unit for the rows of all parts."""
    def put(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    return Ranges(torch.cat([part.scale for part in parts]), put("offset"), put("low"), put("high"), put("stored"))


def grid(W: Tensor, scheme: Scheme, search: RangeSearch) -> Grid:
    """The grid of a scheme for W float32 [out_features, in_features]; what depends on the whole matrix is taken from it."""
    columns = W.shape[1]
    size = columns if scheme.group_size == -1 else scheme.group_size
    if scheme.format == INT:
        return _integers(scheme, size, search)
    if scheme.format in ggml.BLOCK_TYPES:
        return _ggml(scheme)
    if scheme.format in codebook.CODES:
        if columns % size:
            raise ShapeError(f"{scheme.name}: error feedback needs blocks that end with the rows, and {columns} columns are not a multiple of {size}.")
        return _codebook(scheme, search)
    if scheme.format in ternary.KINDS:
        return _ternary(scheme, size)
    return _floating(W, scheme, size, search)


def _integers(scheme: Scheme, size: int, search: RangeSearch) -> Grid:
    whole = scheme if scheme.block == PER_TENSOR else replace(scheme, block=(1, -1))

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        groups, weights = integer.to_groups(values, whole, importance)
        scale, zero = ranges.fit(groups, scheme, search, weights)
        scale = scale.expand(len(values), 1)
        if zero is None:
            return Ranges(scale)
        zero = zero.expand(len(values), 1)
        return Ranges(scale, low=-zero.float(), high=scheme.max_code - zero.float(), stored=zero)

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        rows = slice(0, 1) if scheme.block == PER_TENSOR else slice(None)
        scale = torch.cat([each.scale for each in found], 1)[rows]
        zero = None if scheme.symmetric else _stored(found)[rows]
        shift = scheme.zero_code if zero is None else integer.spread(zero.float(), scheme, q.shape[1])
        return integer.from_codes((q + shift).to(torch.uint8), scale, zero, scheme, dtype)

    return Grid(size, size, (-scheme.zero_code, scheme.max_code - scheme.zero_code), None, fit, finish)


def _ggml(scheme: Scheme) -> Grid:
    kind = ggml.BLOCK_TYPES[scheme.format]

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        blocks = ggml.encode(values, kind.name, importance=importance)
        return Ranges(*ggml.affine(kind.name, blocks), stored=blocks)

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        return QuantizedTensor(scheme, matrix_shape(q.shape), dtype, {"blocks": ggml.with_codes(kind.name, _stored(found), q)})

    return Grid(kind.block_size, ggml.share(kind.name), ggml.bounds(kind.name), ggml.nearest(kind.name), fit, finish)


def _codebook(scheme: Scheme, search: RangeSearch) -> Grid:
    table = codebook.table(scheme.format)
    nearest = lambda x: table[codebook.nearest(x.clamp(-1, 1), scheme.format).int()]

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        return Ranges(_fit_scale(values, importance, search, nearest, 1.0, lambda scale: scale).unsqueeze(1))

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        return codebook.from_codes(codebook.nearest(q, scheme.format), torch.cat([each.scale for each in found], 1).reshape(-1), scheme, dtype)

    return Grid(scheme.group_size, scheme.group_size, (-1.0, 1.0), nearest, fit, finish)


def _ternary(scheme: Scheme, size: int) -> Grid:
    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        whole = scheme if scheme.block == PER_TENSOR else replace(scheme, block=(1, -1))
        return Ranges(ternary.mean_magnitude(values, whole).expand(len(values), 1))

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        scale = torch.cat([each.scale for each in found], 1)[: 1 if scheme.block == PER_TENSOR else None]
        return ternary.from_codes(ternary.encode(q, scheme), scale, scheme, dtype)

    nearest = (lambda x: torch.where(x > 0, 1.0, -1.0)) if scheme.format == "binary" else None
    return Grid(size, size, (-1, 1), nearest, fit, finish)


def _floating(W: Tensor, scheme: Scheme, size: int, search: RangeSearch) -> Grid:
    kind = floating.KINDS[scheme.format]
    element = kind.element
    total = floating.global_scale(W.abs().amax()) if kind.scale == "nvfp4" else None
    nearest = lambda x: floating.decode(floating.encode(x, element), element)
    rounded = lambda scale: floating.effective_scale(floating.scales_from(scale, scheme, total), scheme)

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        rows = len(values)
        if scheme.block == PER_TENSOR:
            values, importance = values.reshape(1, -1), None if importance is None else importance.repeat(rows)
        return Ranges(_fit_scale(values, importance, search, nearest, element.largest, rounded).unsqueeze(1).expand(rows, 1))

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        scale = torch.cat([each.scale for each in found], 1)[: 1 if scheme.block == PER_TENSOR else None]
        parts = floating.scales_from(scale, scheme, total)
        return QuantizedTensor(scheme, matrix_shape(q.shape), dtype, {"codes": floating.encode(q, element), **parts})

    return Grid(size, size, (-element.largest, element.largest), nearest, fit, finish)


def _stored(found: list[Ranges]) -> Tensor:
    return torch.cat([each.stored for each in found if each.stored is not None], 1)


def _fit_scale(values: Tensor, importance: Tensor | None, search: RangeSearch, nearest, largest: float, rounded) -> Tensor:
    """The stored scale of each row [rows] with the least weighted squared error among shrunk ranges, each fitted by least squares; values [rows, columns]."""
    base = values.abs().amax(1) / largest
    base = torch.where(base == 0, 1.0, base)
    weights = torch.ones(values.shape[1], device=values.device) if importance is None else importance
    best = rounded(base)
    if search.method == "minmax":
        return best

    def error(scale: Tensor) -> tuple[Tensor, Tensor]:
        q = nearest(values / scale.unsqueeze(1))
        return (values - q * scale.unsqueeze(1)).square_().mul_(weights).sum(1), q

    least, _ = error(best)
    for step in range(search.grid):
        _, q = error(rounded(base * (1 - search.max_shrink * step / search.grid)))
        fitted = (values * q * weights).sum(1) / (q * q * weights).sum(1)
        scale = rounded(torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, base))
        found, _ = error(scale)
        best = torch.where(found < least, scale, best)
        least = torch.minimum(found, least)
    return best
