"""The quantized view of a weight that is being trained: in the forward pass the values that the file will hold, behind them gradients that pass straight through.

Straight-through estimator: Bengio et al., arXiv:1308.3432; no gradient where a code was clipped: Jacob et al., arXiv:1712.05877, section 3. Learned scales:
Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, eq. 3 and section 2.2; learned zero-points: Bhalgat et al., "LSQ+", arXiv:2004.09576, eq. 8.
With w_q = s (q - z) + o, q = clip(round((w - o) / s + z)), and the upstream gradient g:

    dL/dw = g inside;   dL/ds = sum g (q - z - inside (w - o) / s) / sqrt(N Q);   dL/dz = -s sum g outside / sqrt(N Q);   dL/do = sum g outside / sqrt(N Q)

over the N weights of a group, Q the largest q.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import numerics
from ..errors import FormatError, RecipeError
from ..numerics import affine
from ..numerics.affine import Affine
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor

DERIVED = ("minmax", "mse")
MODES = ("learned", "fixed", *DERIVED)
CHUNK = 1 << 18  # weights that are worked on at once, so that what lies between stays in the cache


class View(nn.Module):
    """The view of one weight [out, in], made from its quantized tensor (what training starts from).

    scales: "learned" (the numbers behind scales and zero-points are parameters; where a format has none, they stay; a parameter of 1 is the number at the start: scales are
    multiplied by theirs, zero-points moved by theirs less 1, in codes, so that one learning rate suits all formats), "fixed" (all stay as they are), or found anew from the weight
    in every step: "minmax" (the format's plain rounding) or "mse" (integers: the range with the least squared error).
    """

    def __init__(self, start: QuantizedTensor, scales: str = "learned", *, straight: bool = False) -> None:
        """straight: of scales found anew, let gradients through where a code was clipped, too, as BitNet's training does."""
        super().__init__()
        affine.check(start.scheme)
        if scales not in MODES:
            raise RecipeError(f"scales is {scales!r}; expected one of {', '.join(MODES)}.")
        if straight and scales not in DERIVED:
            raise RecipeError(f"scales is {scales!r}; gradients through clipped codes go with {' or '.join(DERIVED)}.")
        self.scheme, self.shape, self.dtype_name, self.scales, self.straight = start.scheme, start.shape, start.dtype, scales, straight
        kept = {} if scales in DERIVED else {name: value for name, value in start.parts.items() if name != "codes"}
        self.names = tuple(kept)
        for name, value in kept.items():
            self.register_buffer(f"_{name}", value.clone(), persistent=False)
        learned = affine.parameters_of(start) if scales == "learned" else {}
        self.learned = tuple(learned)
        for name, value in learned.items():
            self.register_parameter(name, nn.Parameter(torch.ones_like(value)))
            self.register_buffer(f"_start_{name}", value.clone(), persistent=False)

    def forward(self, W: Tensor) -> Tensor:
        """What the file will decode to, float32 [out, in], with gradients to W float32 and the learned numbers."""
        if self.scales in DERIVED:
            return self._derived(W)
        grid = affine.affine(self._anchor(), self._stored())
        return _Rounded.apply(W, grid.scale, grid.shift, grid.offset, grid, self.scheme)

    @torch.no_grad()
    def quantized(self, W: Tensor) -> QuantizedTensor:
        """The view as data."""
        if self.scales in DERIVED:
            return numerics.quantize(W.detach(), self.scheme, self._search)
        if not bool(torch.isfinite(W).all()):
            raise FormatError("the weight holds values that are NaN or infinite.")
        anchor = affine.with_parameters(self._anchor(), self._stored())
        grid = affine.affine(anchor)
        q = torch.empty_like(W, dtype=torch.float32)
        for rows in _chunks(W, self.scheme):
            x, _ = _places(affine.grouped(W[rows].float(), self.scheme), grid, rows)
            q[rows] = affine.flat(x, self.scheme, (len(q[rows]), self.shape[1]))
        return affine.with_codes(anchor, q)

    def _anchor(self) -> QuantizedTensor:
        """The tensor that training started from, as it is now where nothing of it is learned; without codes of its own."""
        return QuantizedTensor(self.scheme, self.shape, self.dtype_name, {name: getattr(self, f"_{name}") for name in self.names})

    def _stored(self) -> dict[str, Tensor]:
        """The learned numbers as the file stores them; gradients pass straight through that rounding."""
        found = {}
        for name in self.learned:
            start, factor = getattr(self, f"_start_{name}"), getattr(self, name)
            exact = start + (factor - 1) if name == "zero_point" else start * factor
            found[name] = _Straight.apply(exact, affine.stored(name, exact.detach(), start, self.scheme))
        return found

    @property
    def _search(self) -> RangeSearch:
        return RangeSearch(self.scales)

    def _derived(self, W: Tensor) -> Tensor:
        """The view with scales found anew: as numerics.quantize finds them, which is what quantized gives."""
        with torch.no_grad():
            made = numerics.quantize(W.detach(), self.scheme, self._search)
            values = numerics.dequantize(made)
        return _Straight.apply(W, values) if self.straight else _Given.apply(W, values, affine.affine(made), self.scheme)


class _Straight(torch.autograd.Function):
    """rounded, with the gradient of value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Rounded(torch.autograd.Function):
    """The values of W on a grid (see the module)."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, scale: Tensor, shift: Tensor | float, offset: Tensor | None, grid: Affine, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(W, scale, *(value for value in (shift, offset) if isinstance(value, Tensor)))
        ctx.grid, ctx.scheme = grid, scheme
        values = torch.empty_like(W, dtype=torch.float32)
        for rows in _chunks(W, scheme):
            q, grids = _places(affine.grouped(W[rows].float(), scheme), grid, rows)
            q.sub_(grids.shift).mul_(grids.scale)
            if grids.offset is not None:
                q.add_(grids.offset)
            values[rows] = affine.flat(q, scheme, (len(W[rows]), W.shape[1]))
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        W, scheme = ctx.saved_tensors[0], ctx.scheme
        grid: Affine = ctx.grid
        learned = [place for place in (1, 2, 3) if ctx.needs_input_grad[place]]
        to_weight = torch.empty_like(W) if ctx.needs_input_grad[0] else None
        sums: dict[int, list[Tensor]] = {place: [] for place in learned}
        for rows in _chunks(W, scheme):
            g = affine.grouped(gradient[rows].float(), scheme)
            groups = affine.grouped(W[rows].float(), scheme)
            x, grids = _units(groups, grid, rows)
            inside = _inside(x, grid)
            if 1 in sums:
                q = _nearest(x, grid)
                sums[1].append(torch.where(inside, q - x, q.sub_(grids.shift)).mul_(g).sum(-1))
            beyond = g.masked_fill(inside, 0).sum(-1) if 2 in sums or 3 in sums else None
            if 2 in sums and beyond is not None:
                sums[2].append(-beyond * grids.scale.squeeze(-1))
            if 3 in sums and beyond is not None:
                sums[3].append(beyond)
            if to_weight is not None:
                to_weight[rows] = affine.flat(g.mul(inside), scheme, (len(W[rows]), W.shape[1])).to(W.dtype)
        found: list[Tensor | None] = [to_weight, None, None, None, None, None]
        for place, parts in sums.items():
            found[place] = _shared(torch.cat(parts), grid.scale) / _norm(W, grid)
        return tuple(found)


class _Given(torch.autograd.Function):
    """values, with the gradient of W where it lies within the grid."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, values: Tensor, grid: Affine, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(W)
        ctx.grid, ctx.scheme = grid, scheme
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (W,) = ctx.saved_tensors
        made = torch.empty_like(W)
        for rows in _chunks(W, ctx.scheme):
            x, _ = _units(affine.grouped(W[rows].float(), ctx.scheme), ctx.grid, rows)
            made[rows] = affine.flat(affine.grouped(gradient[rows].float(), ctx.scheme) * _inside(x, ctx.grid), ctx.scheme, (len(W[rows]), W.shape[1])).to(W.dtype)
        return made, None, None, None


def _chunks(W: Tensor, scheme: Scheme) -> list[slice]:
    """Rows that are worked on together; all of them where groups are not of one row."""
    if scheme.block[0] > 1 or affine.group_shape(scheme, (W.shape[0], W.shape[1]))[0] == 0 and W.shape[1] % scheme.block[1]:
        return [slice(0, len(W))]
    step = max(1, CHUNK // W.shape[1])
    return [slice(start, min(start + step, len(W))) for start in range(0, len(W), step)]


def _of_rows(grid: Affine, rows: slice, count: int) -> Affine:
    """The grid of some rows of the matrix, with an axis for the weights of a group; count: of groups' rows there."""

    def some(value: Tensor) -> Tensor:
        if len(value) == 1:
            return value.unsqueeze(-1)
        start = rows.start * count // (rows.stop - rows.start)
        return value[start : start + count].unsqueeze(-1)

    shift = some(grid.shift) if isinstance(grid.shift, Tensor) else grid.shift
    return replace(grid, scale=some(grid.scale), shift=shift, offset=None if grid.offset is None else some(grid.offset))


def _units(groups: Tensor, grid: Affine, rows: slice) -> tuple[Tensor, Affine]:
    """(w - offset) / scale + shift of weights [rows, groups, group], and the grid of these rows."""
    some = _of_rows(grid, rows, len(groups))
    x = groups / some.scale if some.offset is None else (groups - some.offset).div_(some.scale)
    return (x.masked_fill_(some.scale == 0, 0.0) if grid.zeros else x).add_(some.shift), some


def _places(groups: Tensor, grid: Affine, rows: slice) -> tuple[Tensor, Affine]:
    """q of weights [rows, groups, group], and the grid of these rows."""
    x, some = _units(groups, grid, rows)
    return _nearest(x, grid), some


def _nearest(x: Tensor, grid: Affine) -> Tensor:
    return x.round().clamp_(grid.low, grid.high) if grid.nearest is None else grid.nearest(x.clamp(grid.low, grid.high))


def _inside(x: Tensor, grid: Affine) -> Tensor:
    """Whether the code was not clipped."""
    margin = 0.5 if grid.nearest is None else 0.0
    return (x >= grid.low - margin) & (x <= grid.high + margin)


def _shared(parts: Tensor, scale: Tensor) -> Tensor:
    """Sums [rows, groups] brought to the shape of the scale, which may be one for all rows."""
    return parts.sum(0, keepdim=True) if len(scale) == 1 and len(parts) > 1 else parts


def _norm(W: Tensor, grid: Affine) -> float:
    """sqrt(N Q) of LSQ."""
    return (W.numel() / grid.scale.numel() * max(grid.high, 1.0)) ** 0.5
