"""The range of each group of weights: from min-max, a percentile, a fixed clamp, or a search for the least squared error.

A group's range decides its scale (and zero_point); a smaller range clips outliers and rounds the rest more finely.
The searches weigh each column's squared error with its importance (for GPTQ 1 / Hinv_jj, else E[x_j^2]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..scheme import RangeSearch, Scheme
from . import integer

GOLDEN = (5**0.5 - 1) / 2


def fit(groups: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Choose scale and zero_point of every group.

    groups: [..., group] float32. weights: broadcastable to groups, the importance of each value's squared error; 0 leaves it out.
    Returns scale [...] float32, already rounded to scheme.scale_dtype, and zero_point uint8 [...] (None when symmetric).
    """
    low, high = _bounds(groups, search)
    if search.method == "mse":
        return _grid(groups, low, high, scheme, search, weights)
    if search.method == "golden":
        return _golden(groups, low, high, scheme, search, weights)
    return integer.parameters(low, high, scheme)


def _bounds(groups: Tensor, search: RangeSearch) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(groups, dim=-1)
    if search.method in ("percentile", "clamp") and not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        # The cut would hide what integer.parameters refuses in the other methods.
        raise FormatError("the weight holds values that are NaN or infinite.")
    if search.method == "percentile":
        tail = (100 - search.percentile) / 200
        return _quantile(groups, tail), _quantile(groups, 1 - tail)
    if search.method == "clamp":
        return low.clamp(min=-search.clamp), high.clamp(max=search.clamp)
    return low, high


def _quantile(groups: Tensor, q: float) -> Tensor:
    """Linear-interpolated quantile along the last axis (torch.quantile refuses more than 2^24 values)."""
    ordered = groups.sort(dim=-1).values
    position = q * (ordered.shape[-1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below)


def squared_error(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, weights: Tensor | None) -> Tensor:
    """Weighted squared error of rounding each group to the grid, [...]."""
    return _error(groups, integer.signed_codes(groups, scale, zero, scheme), scale, weights)


def _error(groups: Tensor, codes: Tensor, scale: Tensor, weights: Tensor | None) -> Tensor:
    error = torch.addcmul(groups, codes, scale.unsqueeze(-1), value=-1).square_()
    return error.sum(-1) if weights is None else error.mul_(weights).sum(-1)


def _grid(groups: Tensor, low: Tensor, high: Tensor, scheme: Scheme, search: RangeSearch, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Shrunk ranges, each with the scale that fits its codes best by least squares; min-max where nothing is better.

    With codes q (zero_point taken off) the best scale is S = sum(w x q) / sum(w q^2) and leaves the error sum(w x^2) - S sum(w x q), so
    candidates are compared by S sum(w x q) without decoding.
    """
    start_scale, start_zero = integer.parameters(low, high, scheme)
    weighted = groups if weights is None else groups * weights
    best = torch.full_like(low, -torch.inf)
    best_scale, best_zero = start_scale.clone(), None if start_zero is None else start_zero.clone()
    codes, product = torch.empty_like(groups), torch.empty_like(groups)
    for step in range(search.grid):
        scale, zero = integer.parameters(low * (shrink := 1 - search.max_shrink * step / search.grid), high * shrink, scheme)
        torch.mul(groups, scale.reciprocal().unsqueeze(-1), out=codes).round_()
        integer.clamp_signed_(codes, zero, scheme)
        with_x = torch.mul(codes, weighted, out=product).sum(-1)
        torch.mul(codes, codes, out=product)
        with_q = (product if weights is None else product.mul_(weights)).sum(-1)
        fitted = with_x / with_q
        gain = fitted * with_x
        better = (gain > best) & (fitted.sign() == scale.sign())  # false for 0 / 0
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, fitted, best_scale)
        best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
    best_scale = integer.round_scale(best_scale, scheme)
    worse = squared_error(groups, best_scale, best_zero, scheme, weights) > squared_error(groups, start_scale, start_zero, scheme, weights)
    return torch.where(worse, start_scale, best_scale), None if start_zero is None or best_zero is None else torch.where(worse, start_zero, best_zero)


def _golden(groups, low, high, scheme, search, weights):
    """Golden-section search of the shrink factor in [1 - max_shrink, 1], all groups at once; keeps min-max where it is better."""

    def error_at(shrink):
        scale, zero = integer.parameters(low * shrink, high * shrink, scheme)
        return squared_error(groups, scale, zero, scheme, weights)

    a, b = torch.full_like(low, 1 - search.max_shrink), torch.ones_like(low)
    c, d = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
    fc, fd = error_at(c), error_at(d)
    for _ in range(search.grid):
        left = fc <= fd  # equal where a range is so wide that all but an outlier round to zero: narrower is the way out
        a, b = torch.where(left, a, c), torch.where(left, d, b)
        c, d = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
        fc, fd = error_at(c), error_at(d)
    shrink = (a + b) / 2
    shrink = torch.where(error_at(shrink) < error_at(torch.ones_like(shrink)), shrink, torch.ones_like(shrink))
    return integer.parameters(low * shrink, high * shrink, scheme)
