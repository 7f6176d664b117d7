"""GPTQ: columns are rounded one after the other, and what each rounding loses is made up for in the columns that are still free.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323 (eq. 2 and 3, Cholesky form of section 3.3). H = X X^T of the layer's inputs, Hinv = H^-1 = U^T U, U upper triangular.

The whole loop works on W^T [in_features, out_features], where a column of W is contiguous, in blocks of columns whose effect on
the rest is one matrix product. Differences from the authors' code, each an option:
- a group's scale is fitted when its first column is due, to the weights as updated so far (their code takes stale ones within a block);
- order="activation" sorts columns by diag(H) with the groups fixed beforehand ("static groups": no index at run time); order="groups"
  sorts whole groups, and columns inside them, so that a group's scale still sees the updated weights;
- sweeps of coordinate descent over the codes afterwards, which minimise the same tr(dW H dW^T), and joint least squares of all scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import RecipeError
from ..numerics import integer, ranges
from ..scheme import RangeSearch, Scheme
from ..stats import LayerStats
from ..tensor import QuantizedTensor, matrix_shape
from .parallel import over_rows

ORDERS = ("natural", "activation", "groups")
MAX_DAMP = 1.0
DAMP_STEP = 2.0


@dataclass(frozen=True)
class GptqOptions:
    """damp: added to the diagonal, as a share of its mean. order: of columns, see the module. search, grid, max_shrink: how scales are found.

    sweeps: coordinate-descent sweeps over all codes after the loop. refit: scales of a row fitted jointly by least squares.
    guided: tokens count in the Hessian by the squared gradient of the loss at the layer's output, to the power guide_power and at most guide_cap
    times their mean (0: no limit); a backward sweep through the model finds them (pipeline/guidance.py).
    """

    damp: float = 0.01
    order: str = "groups"
    search: str = "mse"
    grid: int = 10
    max_shrink: float = 0.5
    sweeps: int = 1
    refit: bool = False
    guided: bool = False
    guide_power: float = 1.0
    guide_cap: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise RecipeError(f"order is {self.order!r}; expected one of {', '.join(ORDERS)}.")
        if not 0 <= self.damp <= MAX_DAMP:
            raise RecipeError(f"damp is {self.damp}; expected 0 to {MAX_DAMP}, usually 0.01.")
        if self.sweeps < 0:
            raise RecipeError(f"sweeps is {self.sweeps}; expected 0 or more.")
        if self.guide_power <= 0 or self.guide_cap < 0:
            raise RecipeError(f"guide_power is {self.guide_power} and guide_cap {self.guide_cap}; expected a power above 0 and a cap of 0 (none) or more.")
        _ = self.range_search  # which checks its own

    @property
    def range_search(self) -> RangeSearch:
        return RangeSearch(method=self.search, grid=self.grid, max_shrink=self.max_shrink)


@dataclass
class Factor:
    """H made ready for the loop: everything here is in processing order.

    order [in]: original column of each position. U [in, in] upper triangular, H^-1 = U^T U. H [in, in], damped. dead: columns that saw only zeros.
    damp: the share that was used in the end. notes: what had to be done to get here, for the provenance.
    """

    order: Tensor
    U: Tensor
    H: Tensor
    dead: Tensor
    damp: float
    notes: list[str] = field(default_factory=list)


def gptq(W: Tensor, scheme: Scheme, stats: LayerStats, options: GptqOptions, notes: list[str]) -> QuantizedTensor:
    """Quantize W [out_features, in_features] to integers so that the layer's output changes least on the calibration inputs.

    stats.hessian [in_features, in_features] float32. notes receives what deviated (raised damping, dead columns, fallback to rounding).
    W and stats are not changed. Raises nothing on a singular Hessian: damping is raised, then plain rounding is used, and noted.
    """
    assert stats.hessian is not None
    factor = factorize(stats.hessian, scheme, options)
    if factor is None:
        notes.append("the Hessian could not be factorized even with damping 1.0: plain rounding was used (with searched scales)")
        return integer.quantize(W, scheme, options.range_search, stats.importance())
    notes += factor.notes
    if scheme.block == (-1, -1):  # one scale for all rows
        return _Solver(W, scheme, factor, options).solve()
    parts = over_rows(lambda rows: _Solver(W[rows], scheme, factor, options).solve(), W.shape[0])
    return QuantizedTensor(scheme, matrix_shape(W.shape), parts[0].dtype, {key: torch.cat([part.parts[key] for part in parts]) for key in parts[0].parts})


def factorize(H: Tensor, scheme: Scheme, options: GptqOptions) -> Factor | None:
    """Damp, order and factorize a Hessian; None when no damping up to 1 makes it positive definite."""
    H = H.float().clone()
    diagonal = H.diagonal()
    dead = diagonal <= 0
    notes = [f"{int(dead.sum())} dead input columns"] if bool(dead.any()) else []
    order = _column_order(torch.where(dead, 0.0, diagonal), scheme, options)
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    if not torch.isfinite(H).all() or mean <= 0:
        return None
    H[dead] = 0
    H[:, dead] = 0
    diagonal[dead] = mean
    H = H[order][:, order].contiguous()
    damp = options.damp
    while True:
        damped = H.clone()
        damped.diagonal().add_(damp * mean)
        U = _inverse_factor(damped)
        if U is not None:
            if damp > options.damp:
                notes.append(f"damping raised from {options.damp:g} to {damp:g} to factorize the Hessian")
            return Factor(order, U, damped, dead, damp, notes)
        if damp >= MAX_DAMP:
            return None
        damp = min(MAX_DAMP, max(damp * DAMP_STEP, 1e-4))


def _column_order(diagonal: Tensor, scheme: Scheme, options: GptqOptions) -> Tensor:
    columns = len(diagonal)
    if options.order == "natural":
        return torch.arange(columns, device=diagonal.device)
    if options.order == "activation" or scheme.groups(columns) == 1:
        return torch.argsort(diagonal, descending=True, stable=True)
    size = scheme.group_size
    padded = torch.nn.functional.pad(diagonal, (0, -columns % size), value=-1.0).view(-1, size)
    largest = padded.clamp(min=0).amax(1)
    if columns % size:
        largest[-1] = -1.0  # a short last group stays last, so that the others begin at block starts
    groups = torch.argsort(largest, descending=True, stable=True)
    inside = torch.argsort(padded, dim=1, descending=True, stable=True)
    order = (inside + torch.arange(len(padded), device=diagonal.device).unsqueeze(1) * size)[groups].flatten()
    return order[order < columns]


def _inverse_factor(H: Tensor) -> Tensor | None:
    """U upper triangular with H^-1 = U^T U, or None when H is not positive definite in float32."""
    # With J the exchange matrix and J H J = L L^T:  H^-1 = J L^-T L^-1 J = U^T U, U = J L^-1 J (lower flipped twice is upper).
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info) != 0:
        return None
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(H), dtype=H.dtype, device=H.device), upper=False)
    U = inverse.flip(0, 1).contiguous()
    return U if bool(torch.isfinite(U).all()) else None


class _Solver:
    """One run of the loop on one matrix; arrays are [in_features in processing order, out_features]."""

    def __init__(self, W: Tensor, scheme: Scheme, factor: Factor, options: GptqOptions) -> None:
        self.scheme, self.factor, self.options, self.dtype = scheme, factor, options, str(W.dtype).removeprefix("torch.")
        W = W.float().clone()
        W[:, factor.dead] = 0
        self.original = W
        self.columns, self.rows = W.shape[1], W.shape[0]
        self.WT = W.T[factor.order].contiguous()
        self.importance = 1 / factor.U.diagonal().square()  # 1 / Hinv_jj of what is still free: the price of an error in this column
        self.group_of = torch.zeros_like(factor.order) if scheme.groups(self.columns) == 1 else factor.order // scheme.group_size
        groups = 1 if scheme.block == (-1, -1) else scheme.groups(self.columns)
        self.scale = W.new_zeros(groups, self.rows)  # [groups, out]
        self.zero = None if scheme.symmetric else W.new_zeros(groups, self.rows)
        self.Q = torch.empty_like(self.WT)  # code - zero_point

    def solve(self) -> QuantizedTensor:
        static = self.options.order == "activation" or self.scheme.block == (-1, -1)
        if static:
            self._fit_all()
        self._loop(fit_on_the_way=not static)
        for _ in range(self.options.sweeps):
            self._descend()
        if self.options.refit:
            self._refit()
        return self._result()

    def _fit_all(self) -> None:
        """Scales of all groups from the weights as they came (static groups)."""
        importance = torch.empty_like(self.importance)
        importance[self.factor.order] = self.importance
        groups, weights = integer.to_groups(self.original, self.scheme, importance)
        scale, zero = ranges.fit(groups, self.scheme, self.options.range_search, weights)
        self.scale.copy_(scale.T.expand_as(self.scale))
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero.T.expand_as(self.zero))

    def _fit_group(self, start: int) -> None:
        """Scale of the group that begins at position start, from its weights as updated so far."""
        group = int(self.group_of[start])
        members = self.group_of == group
        stop = start + int(members.sum())
        values = self.WT[start:stop].T.contiguous().unsqueeze(1)
        scale, zero = ranges.fit(values, self.scheme, self.options.range_search, self.importance[start:stop].view(1, 1, -1))
        self.scale[group] = scale[:, 0]
        if self.zero is not None and zero is not None:
            self.zero[group] = zero[:, 0].float()

    def _block(self) -> int:
        """Columns per block: small enough for the cache; groups begin at block starts or lie inside a block."""
        size = self.scheme.group_size
        return 32 if size == -1 or size % 32 == 0 or self.options.order == "activation" else size if size > 16 else 32 // size * size

    def _loop(self, *, fit_on_the_way: bool) -> None:
        WT, U, Q = self.WT, self.factor.U, self.Q
        starts = self._group_starts() if fit_on_the_way else set()
        low, high = -self.scheme.zero_code, self.scheme.max_code - self.scheme.zero_code
        block = self._block()
        for i1 in range(0, self.columns, block):
            i2 = min(i1 + block, self.columns)
            W1, U1 = WT[i1:i2], U[i1:i2, i1:i2]
            Err1 = torch.empty_like(W1)
            inverse_diagonal = U1.diagonal().reciprocal().tolist()
            for i in range(i2 - i1):
                if i1 + i in starts:
                    self._fit_group(i1 + i)
                group = self.group_of[i1 + i]
                w, q, s = W1[i], Q[i1 + i], self.scale[group]
                torch.div(w, s, out=q).round_()
                if self.zero is None:
                    q.clamp_(low, high)
                else:
                    torch.minimum(torch.maximum(q, -self.zero[group], out=q), self.scheme.max_code - self.zero[group], out=q)
                torch.addcmul(w, q, s, value=-1, out=Err1[i]).mul_(inverse_diagonal[i])
                if i + 1 < i2 - i1:
                    W1[i + 1 :].addr_(U1[i, i + 1 :], Err1[i], alpha=-1)
            if i2 < self.columns:
                WT[i2:].addmm_(U[i1:i2, i2:].T, Err1, alpha=-1)

    def _group_starts(self) -> set[int]:
        first = torch.ones(self.columns, dtype=torch.bool)
        first[1:] = self.group_of[1:] != self.group_of[:-1]
        return set(torch.nonzero(first).flatten().tolist())

    def _descend(self) -> None:
        """One sweep of cyclic coordinate descent on tr(dW H dW^T) over the codes, scales fixed.

        With R = W - What and G = H R, the best value of column j alone is What_j + G_j / H_jj; it is rounded to the grid.
        """
        H, Q = self.factor.H, self.Q
        scale = self.scale[self.group_of]
        R = self.original.T[self.factor.order] - scale * Q
        G = H @ R
        block, low, high = 32, -self.scheme.zero_code, self.scheme.max_code - self.scheme.zero_code
        for i1 in range(0, self.columns, block):
            i2 = min(i1 + block, self.columns)
            G1, H1, step = G[i1:i2].clone(), H[i1:i2, i1:i2], torch.empty_like(G[i1:i2])
            for i in range(i2 - i1):
                j, group = i1 + i, self.group_of[i1 + i]
                s = scale[j]
                new = torch.addcdiv(Q[j], G1[i], s, value=1 / float(H1[i, i])).round_()
                if self.zero is None:
                    new.clamp_(low, high)
                else:
                    new = torch.minimum(torch.maximum(new, -self.zero[group]), self.scheme.max_code - self.zero[group])
                torch.mul(new - Q[j], s, out=step[i])
                Q[j] = new
                if i + 1 < i2 - i1:
                    G1[i + 1 :].addr_(H1[i, i + 1 :], step[i], alpha=-1)
            G.addmm_(H[:, i1:i2], step, alpha=-1)

    def _refit(self) -> None:
        """All scales of a row by least squares with the codes fixed: minimise (w - A s)^T H (w - A s), A [in, groups] the codes by group."""
        groups = self.scale.shape[0]
        if self.scheme.block == (-1, -1):
            return
        H, Q = self.factor.H, self.Q
        HW = H @ self.original.T[self.factor.order]
        normal = H.new_empty(self.rows, groups, groups)
        target = H.new_empty(self.rows, groups)
        members = [torch.nonzero(self.group_of == g).flatten() for g in range(groups)]
        for g, columns in enumerate(members):
            HQ = H[:, columns] @ Q[columns]  # [in, out]
            target[:, g] = (HW[columns] * Q[columns]).sum(0)
            for h, others in enumerate(members):
                normal[:, h, g] = (HQ[others] * Q[others]).sum(0)
        normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
        solved, info = torch.linalg.solve_ex(normal, target.unsqueeze(-1))
        fitted = integer.round_scale(solved.squeeze(-1).T.clone(), self.scheme)
        change = fitted / self.scale
        usable = torch.isfinite(fitted) & (change > 0.5) & (change < 2)
        self.scale = torch.where(usable.all(0) & (info == 0), fitted, self.scale)

    def _result(self) -> QuantizedTensor:
        zero = self.scheme.zero_code if self.zero is None else self.zero[self.group_of]
        codes = torch.empty(self.rows, self.columns, dtype=torch.uint8, device=self.Q.device)
        codes[:, self.factor.order] = (self.Q + zero).T.to(torch.uint8)
        if self.scheme.block == (-1, -1):
            return integer.from_codes(codes, self.scale[:, :1], None if self.zero is None else self.zero[:, :1], self.scheme, self.dtype)
        return integer.from_codes(codes, self.scale.T.contiguous(), None if self.zero is None else self.zero.T.contiguous(), self.scheme, self.dtype)
