"""What an algorithm with error feedback asks of a number format: ranges fitted to some columns at a time, then codes one column at a time.

Every format is w = scale * q + offset with q from a set that is the same everywhere (integers between two bounds, or a table of values), and scale
and offset shared by some columns of a row. Columns are fitted in units: a group, or a super-block of several that store their scales together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from ..scheme import INT, RangeSearch, Scheme
from ..tensor import QuantizedTensor
from . import codebook, floating, ggml, integer, ranges


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
    return _floating(W, scheme, size, search)


def _integers(scheme: Scheme, size: int, search: RangeSearch) -> Grid:
    top = scheme.max_code - scheme.zero_code

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        scale, zero = ranges.fit(values.unsqueeze(1), scheme, search, None if importance is None else importance.view(1, 1, -1))
        if zero is None:
            return Ranges(scale)
        return Ranges(scale, low=-zero.float(), high=scheme.max_code - zero.float(), stored=zero)

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        scale = torch.cat([each.scale for each in found], 1)
        zero = None if scheme.symmetric else torch.cat([each.stored for each in found], 1)
        shift = scheme.zero_code if zero is None else integer.spread(zero.float(), scheme, q.shape[1])
        return integer.from_codes((q + shift).to(torch.uint8), scale, zero, scheme, dtype)

    return Grid(size, size, (-scheme.zero_code, top), None, fit, finish)


def _ggml(scheme: Scheme) -> Grid:
    kind = ggml.BLOCK_TYPES[scheme.format]

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        blocks = ggml.encode(values, kind.name, importance=importance)
        return Ranges(*ggml.affine(kind.name, blocks), stored=blocks)

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        blocks = ggml.with_codes(kind.name, torch.cat([each.stored for each in found], 1), q)
        return QuantizedTensor(scheme, tuple(q.shape), dtype, {"blocks": blocks})

    return Grid(kind.block_size, ggml.share(kind.name), ggml.bounds(kind.name), None, fit, finish)


def _codebook(scheme: Scheme, search: RangeSearch) -> Grid:
    table = codebook.table(scheme.format)
    nearest = lambda x: table[codebook.nearest(x.clamp(-1, 1), scheme.format).int()]

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        return Ranges(_fit_scale(values, importance, search, nearest, 1.0, lambda scale: scale).unsqueeze(1))

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        return codebook.from_codes(codebook.nearest(q, scheme.format), torch.cat([each.scale for each in found], 1).reshape(-1), scheme, dtype)

    return Grid(scheme.group_size, scheme.group_size, (-1.0, 1.0), nearest, fit, finish)


def _floating(W: Tensor, scheme: Scheme, size: int, search: RangeSearch) -> Grid:
    kind = floating.KINDS[scheme.format]
    element = kind.element
    total = floating.global_scale(W.abs().amax()) if kind.scale == "nvfp4" else None
    nearest = lambda x: floating.decode(floating.encode(x, element), element)
    rounded = lambda scale: floating.effective_scale(floating.scales_from(scale, scheme, total), scheme)

    def fit(values: Tensor, importance: Tensor | None) -> Ranges:
        return Ranges(_fit_scale(values, importance, search, nearest, element.largest, rounded).unsqueeze(1))

    def finish(q: Tensor, found: list[Ranges], dtype: str) -> QuantizedTensor:
        parts = floating.scales_from(torch.cat([each.scale for each in found], 1), scheme, total)
        return QuantizedTensor(scheme, tuple(q.shape), dtype, {"codes": floating.encode(q, element), **parts})

    return Grid(size, size, (-element.largest, element.largest), nearest, fit, finish)


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
