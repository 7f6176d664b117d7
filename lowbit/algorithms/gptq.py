"""GPTQ: columns are rounded one after the other, and what each rounding loses is made up for in the columns that are still free.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323 (eq. 2 and 3, Cholesky form of section 3.3). H = X X^T of the layer's inputs, Hinv = H^-1 = U^T U, U upper triangular.

The whole loop works on W^T [in_features, out_features], where a column of W is contiguous, in blocks of columns whose effect on
the rest is one matrix product. Differences from the authors' code, each an option:
- a group's scale is fitted when its first column is due, to the weights as updated so far (their code takes stale ones within a block);
- order="activation" sorts columns by diag(H) with the groups fixed beforehand ("static groups": no index at run time); order="groups"
  sorts whole groups, and columns inside them, so that a group's scale still sees the updated weights;
- alpha > 0 counts the error of the inputs, too (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
  arXiv:2504.02692, eq. 15 to 18): the outputs are compared with those of the original model on its own inputs, dX = X_original - X,
  P = alpha ((dX X^T U^T) above the diagonal) U, and a column's w pushes the later ones by w P_ij;
- sweeps of coordinate descent over the codes afterwards, which minimise the same tr(dW H dW^T).
Any number format that numerics.grids knows takes part: its ranges are fitted where a group begins, its codes found one column at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import numerics
from ..errors import RecipeError
from ..native import native, threads
from ..numerics import grids
from ..numerics.grids import Grid, Ranges
from ..scheme import RangeSearch, Scheme
from ..stats import LayerStats
from ..tensor import QuantizedTensor
from .guided import GuidedOptions
from .parallel import over_rows

ORDERS = ("natural", "activation", "groups")
MAX_DAMP = 1.0
DAMP_STEP = 2.0
LEAF = 192  # of the recursion that inverts a triangular matrix


@dataclass(frozen=True)
class GptqOptions(GuidedOptions):
    """damp: added to the diagonal, as a share of its mean. order: of columns, see the module. search, grid, max_shrink: how scales are found.

    sweeps: coordinate-descent sweeps over all codes after the loop.
    alpha: weight of GPTAQ's term (0: off; its authors take 0.25).
    guide_groups: a Hessian for each of so many groups of outputs (GuidedQuant, arXiv:2505.07004, eq. 7), at so many times the memory and time.
    And those of GuidedOptions.
    """

    damp: float = 0.01
    order: str = "groups"
    search: str = "mse"
    grid: int = 10
    max_shrink: float = 0.5
    sweeps: int = 1
    alpha: float = 0.0
    guide_groups: int = 1

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise RecipeError(f"order is {self.order!r}; expected one of {', '.join(ORDERS)}.")
        if not 0 <= self.damp <= MAX_DAMP:
            raise RecipeError(f"damp is {self.damp}; expected 0 to {MAX_DAMP}, usually 0.01.")
        if self.sweeps < 0:
            raise RecipeError(f"sweeps is {self.sweeps}; expected 0 or more.")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha}; expected 0 (off) to 1, usually 0.25.")
        super().__post_init__()
        if self.guide_groups < 1 or (self.guide_groups > 1 and (self.alpha or not self.guided)):
            raise RecipeError(f"guide_groups is {self.guide_groups}; expected at least 1, and more only with guided = true and alpha = 0.")
        _ = self.range_search  # which checks its own

    @property
    def range_search(self) -> RangeSearch:
        return RangeSearch(method=self.search, grid=self.grid, max_shrink=self.max_shrink)


@dataclass
class Factor:
    """H made ready for the loop: everything here is in processing order.

    P [in, in] or None: GPTAQ's term, strictly upper triangular; cross: alpha dX X^T in processing order.
    order [in]: original column of each position. U [in, in] upper triangular, H^-1 = U^T U. H [in, in], damped. dead: columns that saw only zeros.
    damp: the share that was used in the end. notes: what had to be done to get here, for the provenance.
    """

    order: Tensor
    U: Tensor
    H: Tensor
    dead: Tensor
    damp: float
    notes: list[str] = field(default_factory=list)
    P: Tensor | None = None
    cross: Tensor | None = None


def gptq(W: Tensor, scheme: Scheme, stats: LayerStats, options: GptqOptions, notes: list[str]) -> QuantizedTensor:
    """Quantize W [out_features, in_features] so that the layer's output changes least on the calibration inputs.

    stats.hessian [in_features, in_features] float32. notes receives what deviated (raised damping, dead columns, fallback to rounding).
    W and stats are not changed. Raises nothing on a singular Hessian: damping is raised, then plain rounding is used, and noted.
    """
    assert stats.hessian is not None
    numerics.check_shape(scheme, tuple(W.shape))
    W32 = W.float()
    grid = grids.grid(W32, scheme, options.range_search)
    dtype = str(W.dtype).removeprefix("torch.")
    parts: list[tuple[Tensor, list[Ranges]]] = []
    if stats.hessian.ndim == 3 and scheme.block == (-1, -1):
        notes.append("one scale for the whole matrix: the mean of the Hessians of all groups of outputs was used")
    groups = [stats.hessian] if stats.hessian.ndim == 2 else [stats.hessian.mean(0)] if scheme.block == (-1, -1) else list(stats.hessian)
    for rows, H in zip(W32.tensor_split(len(groups)), groups, strict=True):
        found = _solve(rows, scheme, grid, H, stats, options, notes)
        if found is None:
            notes.append("the Hessian could not be factorized even with damping 1.0: plain rounding was used (with searched scales)")
            return numerics.quantize(W, scheme, options.range_search, stats.importance())
        parts += found
    return grid.finish(torch.cat([q for q, _ in parts]), [grids.join(list(each)) for each in zip(*(found for _, found in parts), strict=True)], dtype)


def _solve(W: Tensor, scheme: Scheme, grid: Grid, H: Tensor, stats: LayerStats, options: GptqOptions, notes: list[str]) -> list[tuple[Tensor, list[Ranges]]] | None:
    """q and the ranges of W float32, some rows at a time; None when H cannot be factorized."""
    factor = factorize(H, grid.unit, options)
    if factor is None:
        return None
    notes += [note for note in factor.notes if note not in notes]
    if options.alpha and stats.cross is not None:
        factor.cross = options.alpha * stats.cross[factor.order][:, factor.order]
        factor.P = (factor.cross @ factor.U.T).triu_(1) @ factor.U
    elif options.alpha:
        notes.append("the error of the inputs was not counted: it is not known for this matrix (experts)")
    run = lambda rows: _Solver(W[rows], scheme, grid, factor, options).solve()
    return [run(slice(None))] if scheme.block == (-1, -1) else over_rows(run, W.shape[0])


def dead_columns(count: int) -> str:
    """What the provenance says of input columns that saw only zeros."""
    return f"{count} dead input columns"


def factorize(H: Tensor, unit: int, options: GptqOptions) -> Factor | None:
    """Damp, order and factorize a Hessian; None when no damping up to 1 makes it positive definite. unit: columns whose ranges are fitted together."""
    H = H.float()
    diagonal = H.diagonal()
    dead = diagonal <= 0
    notes = [dead_columns(int(dead.sum()))] if bool(dead.any()) else []
    order = _column_order(torch.where(dead, 0.0, diagonal), unit, options)
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    if not torch.isfinite(H).all() or mean <= 0:
        return None
    H = H[order][:, order]
    gone = dead[order]
    H[gone] = 0
    H[:, gone] = 0
    diagonal = H.diagonal()
    diagonal[gone] = mean
    plain = diagonal.clone()
    damp = options.damp
    while True:
        diagonal.copy_(plain + damp * mean)
        U = _inverse_factor(H)
        if U is not None:
            if damp > options.damp:
                notes.append(f"damping raised from {options.damp:g} to {damp:g} to factorize the Hessian")
            return Factor(order, U, H, dead, damp, notes)
        if damp >= MAX_DAMP:
            return None
        damp = min(MAX_DAMP, max(damp * DAMP_STEP, 1e-4))


def _column_order(diagonal: Tensor, unit: int, options: GptqOptions) -> Tensor:
    columns = len(diagonal)
    if options.order == "natural":
        return torch.arange(columns, device=diagonal.device)
    if options.order == "activation" or unit >= columns:
        return torch.argsort(diagonal, descending=True, stable=True)
    padded = torch.nn.functional.pad(diagonal, (0, -columns % unit), value=-1.0).view(-1, unit)
    largest = padded.clamp(min=0).amax(1)
    if columns % unit:
        largest[-1] = -1.0  # a short last group stays last, so that the others begin at block starts
    groups = torch.argsort(largest, descending=True, stable=True)
    inside = torch.argsort(padded, dim=1, descending=True, stable=True)
    order = (inside + torch.arange(len(padded), device=diagonal.device).unsqueeze(1) * unit)[groups].flatten()
    return order[order < columns]


def _inverse_factor(H: Tensor) -> Tensor | None:
    """U upper triangular with H^-1 = U^T U, or None when H is not positive definite in float32."""
    # With J the exchange matrix and J H J = L L^T:  H^-1 = J L^-T L^-1 J = U^T U, U = J L^-1 J (lower flipped twice is upper).
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info) != 0:
        return None
    U = _lower_inverse(L).flip(0, 1).contiguous()
    return U if bool(torch.isfinite(U).all()) else None


def _lower_inverse(L: Tensor) -> Tensor:
    """L^-1, L lower triangular: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], a third of the work of solving for every column."""
    n = len(L)
    if n <= LEAF:
        return torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False)
    half = n // 2
    A, C = _lower_inverse(L[:half, :half]), _lower_inverse(L[half:, half:])
    inverse = torch.zeros_like(L)
    inverse[:half, :half], inverse[half:, half:] = A, C
    torch.mm(C, L[half:, :half] @ A, out=inverse[half:, :half]).neg_()
    return inverse


class _Solver:
    """One run of the loop on one matrix; arrays are [in_features in processing order, out_features]."""

    def __init__(self, W: Tensor, scheme: Scheme, grid: Grid, factor: Factor, options: GptqOptions) -> None:
        self.scheme, self.grid, self.factor, self.options = scheme, grid, factor, options
        W = W.detach().clone()
        W[:, factor.dead] = 0
        self.original = W
        self.columns, self.rows = W.shape[1], W.shape[0]
        self.WT = W.T[factor.order].contiguous()
        self.importance = 1 / factor.U.diagonal().square()  # 1 / Hinv_jj of what is still free: the price of an error in this column
        self.share_of = factor.order // grid.share  # which columns share a scale
        self.places: list[int] = self.share_of.tolist()  # the same, for one column at a time: a number picks a row faster than a tensor does
        self.found: dict[int, Ranges] = {}
        shares = -(-self.columns // grid.share)
        self.scale = W.new_zeros(shares, self.rows)
        self.divisor = W.new_zeros(shares, self.rows)  # the scale, infinite where it is 0: everything then rounds to 0
        self.offset: Tensor | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.Q = torch.empty_like(self.WT)

    def solve(self) -> tuple[Tensor, list[Ranges]]:
        """q [out_features, in_features] and the ranges of all units, both in the order of the columns."""
        static = self.options.order == "activation" or self.scheme.block == (-1, -1)
        if static:
            self._fit_all()
        self._loop(fit_on_the_way=not static)
        for _ in range(self.options.sweeps):
            self._descend()
        q = torch.empty(self.rows, self.columns, device=self.Q.device)
        q[:, self.factor.order] = self.Q.T
        return q, [self.found[unit] for unit in sorted(self.found)]

    def _fit_all(self) -> None:
        """Ranges of all units from the weights as they came (static groups)."""
        importance = torch.empty_like(self.importance)
        importance[self.factor.order] = self.importance
        for start in range(0, self.columns, self.grid.unit):
            columns = slice(start, start + self.grid.unit)
            self._keep(start // self.grid.unit, self.grid.fit(self.original[:, columns].contiguous(), importance[columns]))

    def _fit_unit(self, start: int) -> None:
        """Ranges of the unit that begins at position start, from its weights as updated so far."""
        unit = int(self.factor.order[start]) // self.grid.unit
        stop = min(start + self.grid.unit, self.columns)
        places = start + torch.argsort(self.factor.order[start:stop])
        self._keep(unit, self.grid.fit(self.WT[places].T.contiguous(), self.importance[places]))

    def _keep(self, unit: int, found: Ranges) -> None:
        self.found[unit] = found
        first = unit * (self.grid.unit // self.grid.share)
        places = slice(first, first + found.scale.shape[1])
        self.scale[places] = found.scale.T
        self.divisor[places] = torch.where(found.scale == 0, torch.inf, found.scale).T
        for name in ("offset", "low", "high"):
            value = getattr(found, name)
            if value is not None:
                if getattr(self, name) is None:
                    setattr(self, name, torch.zeros_like(self.scale))
                getattr(self, name)[places] = value.T

    def _round_(self, q: Tensor, share: int) -> Tensor:
        """Bring q [out_features] onto the grid, in place."""
        if self.grid.nearest is not None:
            return q.copy_(self.grid.nearest(q))
        q.round_()
        if self.low is None or self.high is None:
            return q.clamp_(*self.grid.bounds)
        return torch.minimum(torch.maximum(q, self.low[share], out=q), self.high[share], out=q)

    def _block(self) -> int:
        """Columns per block: small enough for the cache; units begin at block starts or lie inside a block."""
        unit = self.grid.unit
        return 32 if unit % 32 == 0 or unit >= self.columns or self.options.order == "activation" else unit if unit > 16 else 32 // unit * unit

    def _loop(self, *, fit_on_the_way: bool) -> None:
        WT, U, Q, P = self.WT, self.factor.U, self.Q, self.factor.P
        block = self._block()
        for i1 in range(0, self.columns, block):
            i2 = min(i1 + block, self.columns)
            W1, U1 = WT[i1:i2], U[i1:i2, i1:i2]
            Err1 = torch.empty_like(W1)
            if self._in_cpp(i2 - i1):
                starts = [i for i in range(i2 - i1) if fit_on_the_way and (i1 + i) % self.grid.unit == 0]
                for start, stop in zip(sorted({0, *starts}), [*(start for start in starts if start), i2 - i1], strict=True):
                    if start in starts:
                        self._fit_unit(i1 + start)
                    self._columns(W1, i1, Err1, U1, None if P is None else P[i1:i2, i1:i2], U1.diagonal().reciprocal(), start, stop, descend=False)
                self._after(i1, i2, Err1)
                continue
            inverse_diagonal = U1.diagonal().reciprocal().tolist()
            for i in range(i2 - i1):
                if fit_on_the_way and (i1 + i) % self.grid.unit == 0:
                    self._fit_unit(i1 + i)
                share = self.places[i1 + i]
                w, q = W1[i], Q[i1 + i]
                if self.offset is None:
                    torch.div(w, self.divisor[share], out=q)
                else:
                    torch.sub(w, self.offset[share], out=q).div_(self.divisor[share])
                self._round_(q, share)
                torch.addcmul(w, q, self.scale[share], value=-1, out=Err1[i])
                if self.offset is not None:
                    Err1[i].sub_(self.offset[share])
                Err1[i].mul_(inverse_diagonal[i])
                if i + 1 < i2 - i1:
                    W1[i + 1 :].addr_(U1[i, i + 1 :], Err1[i], alpha=-1)
                    if P is not None:
                        W1[i + 1 :].addr_(P[i1 + i, i1 + i + 1 : i2], w)
            self._after(i1, i2, Err1)

    def _after(self, i1: int, i2: int, error: Tensor) -> None:
        """The feedback of a block to the columns behind it."""
        WT, U, P = self.WT, self.factor.U, self.factor.P
        if i2 < self.columns:
            WT[i2:].addmm_(U[i1:i2, i2:].T, error, alpha=-1)
            if P is not None:
                WT[i2:].addmm_(P[i1:i2, i2:].T, WT[i1:i2])

    def _in_cpp(self, columns: int) -> bool:
        """Whether the columns of a block are rounded by the C++ code, which does what is written here: on a CPU, where q is a whole number."""
        return self.grid.nearest is None and self.WT.device.type == "cpu" and native() is not None and columns <= native().MOST_COLUMNS

    def _columns(self, W: Tensor, i1: int, error: Tensor, U: Tensor, P: Tensor | None, inverse: Tensor, start: int, stop: int, *, descend: bool) -> None:
        """Columns i1 + start to i1 + stop of the block W [columns, out_features] in C++ (csrc/solve.inc): q, the errors (or steps), and the feedback within the block."""
        given = lambda value: None if value is None else value.numpy()
        low, high = (self.low, self.high) if self.low is not None and self.high is not None else (None, None)
        native().gptq_columns(
            W.numpy(), self.Q[i1 : i1 + len(W)].numpy(), error.numpy(), U.contiguous().numpy(), None if P is None else P.contiguous().numpy(), self.divisor.numpy(), self.scale.numpy(),
            None if descend else given(self.offset), given(low), given(high), self.share_of[i1 : i1 + len(W)].numpy(), inverse.contiguous().numpy(),
            *map(float, self.grid.bounds), start, stop, descend, threads(),
        )  # fmt: skip

    def _descend(self) -> None:
        """One sweep of cyclic coordinate descent on tr(dW H dW^T) over the codes, scales fixed.

        With R = W - What and G = H R, the best value of column j alone is What_j + G_j / H_jj; it is rounded to the grid.
        """
        H, Q = self.factor.H, self.Q
        R = self.original.T[self.factor.order].addcmul_(self.scale[self.share_of], Q, value=-1)
        if self.offset is not None:
            R -= self.offset[self.share_of]
        G = H @ R
        if self.factor.cross is not None:  # the aim is W X_original: its product with X^T is W (H + dX X^T)
            G += self.factor.cross.T @ self.original.T[self.factor.order]
        block = 32
        for i1 in range(0, self.columns, block):
            i2 = min(i1 + block, self.columns)
            G1, H1, step = G[i1:i2].clone(), H[i1:i2, i1:i2], torch.empty_like(G[i1:i2])
            if self._in_cpp(i2 - i1):
                self._columns(G1, i1, step, H1, None, H1.diagonal().double().reciprocal().float(), 0, i2 - i1, descend=True)
                G[i2:].addmm_(H[i2:, i1:i2], step, alpha=-1)
                continue
            inverse_diagonal = H1.diagonal().double().reciprocal().tolist()
            for i in range(i2 - i1):
                j, share = i1 + i, self.places[i1 + i]
                new = self._round_(torch.addcdiv(Q[j], G1[i], self.divisor[share], value=inverse_diagonal[i]), share)
                torch.mul(new - Q[j], self.scale[share], out=step[i])
                Q[j] = new
                if i + 1 < i2 - i1:
                    G1[i + 1 :].addr_(H1[i, i + 1 :], step[i], alpha=-1)
            G[i2:].addmm_(H[i2:, i1:i2], step, alpha=-1)  # what was visited is not looked at again
