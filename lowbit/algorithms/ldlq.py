"""LDLQ: blocks of eight columns are rounded to lattice points one after the other, each with the feedback of those before it (QuIP#).

Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", arXiv:2307.13304, section 3; Tseng et al., "QuIP#", arXiv:2402.04396, section 4.1. With the
weights and the Hessian in the basis of the randomized Hadamard transform and H = L D L^T, L unit lower triangular by blocks of 8, from the last block to the first

    What_k = Q(W_k + (W - What)_{>k} L_{>k, k})

then passes over all blocks, each set to the best value that the others leave it and rounded again: What_k = Q(What_k + (W - What) H_k inv(H_kk)). A pass that does not
lower the error is not taken. The scale is searched: some rows are rounded with each of a few, and the one with the least tr(dW H dW^T) is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import numerics
from ..errors import RecipeError
from ..numerics import lattice
from ..numerics.lattice import GROUP, Kind
from ..scheme import Scheme
from ..stats import LayerStats
from ..tensor import QuantizedTensor
from .error import exact_output_energy
from .gptq import dead_columns
from .guided import GuidedOptions
from .parallel import over_rows

PANEL = 128  # columns whose feedback is summed at once
SAMPLE_ROWS, SEARCH_PASSES = 128, 2  # rows that the scale is searched with, and passes: the best scale after the first is not always the best in the end
SCALES = (0.8, 0.87, 0.94, 1.0, 1.06)  # of the usual one


@dataclass(frozen=True)
class LdlqOptions(GuidedOptions):
    """damp: added to the Hessian's diagonal, as a share of its mean. passes: at most so many over all blocks after the first (the authors: 10); they end when one gains
    less than the share tolerance of the error. search: of the scale. seed: of the signs.
    And those of GuidedOptions.
    """

    damp: float = 0.01
    passes: int = 10
    tolerance: float = 0.003
    search: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damp <= 1 or self.passes < 0 or not 0 <= self.tolerance < 1:
            raise RecipeError(f"damp is {self.damp}, passes {self.passes}, tolerance {self.tolerance}; expected 0 to 1 (usually 0.01), 0 or more, and 0 to 1.")


def ldlq(W: Tensor, scheme: Scheme, stats: LayerStats, options: LdlqOptions, notes: list[str]) -> QuantizedTensor:
    """Quantize W [out_features, in_features] to a lattice so that the layer's output changes least; stats.hessian as in gptq. W and stats are not changed."""
    assert stats.hessian is not None
    numerics.check_shape(scheme, tuple(W.shape))
    kind = lattice.KINDS[scheme.format]
    W32, H = W.float(), stats.hessian if stats.hessian.ndim == 2 else stats.hessian.mean(0)
    mean = H.diagonal().mean()
    if not bool(torch.isfinite(W32).all()) or not bool(torch.isfinite(H).all()) or mean <= 0:
        notes.append("the Hessian is zero or not finite: plain rounding was used")
        return numerics.quantize(W, scheme)
    generator = torch.Generator().manual_seed(options.seed)
    columns, rows = lattice.random_signs(W.shape[1], generator), lattice.random_signs(W.shape[0], generator)
    turned = lattice.incoherent(W32, rows, columns)
    if dead := int((H.diagonal() <= 0).sum()):
        notes.append(dead_columns(dead))
    H = H / mean
    H.diagonal().add_(options.damp)
    H = lattice.incoherent(H, columns, columns)
    L = block_ldl(H)
    if L is None:
        notes.append("the Hessian could not be factorized: its damping was raised to 1")
        H.diagonal().add_(1.0)
        L = block_ldl(H)
    if L is None:
        notes.append("the Hessian could not be factorized even with damping 1: plain rounding was used")
        return numerics.quantize(W, scheme)
    scale, residual = _scale(turned, H, L, kind, options)
    aim = turned / scale

    def run(part: slice) -> Solver:
        solver = Solver(aim[part], H, L, kind, residual)
        solver.first()
        for _ in range(options.passes):
            if not solver.improve(options.tolerance):
                break
        return solver

    solvers = over_rows(run, len(aim))
    code = torch.cat([solver.codes for solver in solvers])
    second = None if residual is None else torch.cat([solver.seconds for solver in solvers])
    return lattice.from_codes(code, second, scale, residual, rows, columns, scheme, str(W.dtype).removeprefix("torch."))


def _scale(W: Tensor, H: Tensor, L: Tensor, kind: Kind, options: LdlqOptions) -> tuple[Tensor, float | None]:
    size, residual = kind.best
    usual = lattice.scale_of(W, size)
    if not options.search:
        return usual, residual
    some = W[:: max(1, len(W) // SAMPLE_ROWS)][:SAMPLE_ROWS]

    def error(factor: float) -> float:
        solver = Solver(some / (usual * factor), H, L, kind, residual)
        solver.first()
        for _ in range(min(options.passes, SEARCH_PASSES)):
            solver.improve()
        return solver.error() * factor**2

    return usual * min(SCALES, key=error), residual


def block_ldl(H: Tensor) -> Tensor | None:
    """L of H = L D L^T, unit lower triangular by blocks of 8, float32 [in, in]; None when H is not positive definite."""
    C, info = torch.linalg.cholesky_ex(H)
    if int(info) != 0:
        return None
    blocks = C.view(len(C) // GROUP, GROUP, len(C) // GROUP, GROUP)
    diagonal = torch.stack([blocks[k, :, k] for k in range(len(blocks))])
    L = torch.linalg.solve_triangular(diagonal, C.view(len(C), -1, GROUP).transpose(0, 1), upper=False, left=False)
    return L.transpose(0, 1).reshape(C.shape)


class Solver:
    """One matrix W [out, in] (divided by its scale) on its way to lattice points: hat, codes and seconds [out, in / 8]."""

    def __init__(self, W: Tensor, H: Tensor, L: Tensor, kind: Kind, residual: float | None) -> None:
        self.W, self.H, self.L, self.kind, self.residual = W, H, L, kind, residual
        self.hat = torch.zeros_like(W)
        self.codes = torch.zeros(len(W), W.shape[1] // GROUP, dtype=torch.int64)
        self.seconds = torch.zeros_like(self.codes)

    def error(self) -> float:
        """tr(dW H dW^T)."""
        return exact_output_energy(self.W - self.hat, self.H)

    def _round(self, k: int, x: Tensor) -> None:
        values, code, second = lattice.round_vectors(x.contiguous(), self.kind, self.residual)
        self.hat[:, k * GROUP : (k + 1) * GROUP] = values
        self.codes[:, k] = code
        if second is not None:
            self.seconds[:, k] = second

    def first(self) -> None:
        """The pass with feedback through L."""
        n = self.W.shape[1]
        aim = self.W.clone()
        for stop in range(n, 0, -PANEL):
            start = max(0, stop - PANEL)
            for k in range(stop // GROUP - 1, start // GROUP - 1, -1):
                block = slice(k * GROUP, (k + 1) * GROUP)
                self._round(k, aim[:, block])
                aim[:, start : block.start].addmm_(self.W[:, block] - self.hat[:, block], self.L[block, start : block.start])
            aim[:, :start].addmm_(self.W[:, start:stop] - self.hat[:, start:stop], self.L[start:stop, :start])

    def improve(self, tolerance: float = 0.0) -> bool:
        """One more pass over all blocks; whether it lowered the error by more than the share tolerance. One that raised it is taken back."""
        before, kept = self.error(), (self.hat.clone(), self.codes.clone(), self.seconds.clone())
        n = self.W.shape[1]
        G = (self.W - self.hat) @ self.H
        inverse = torch.linalg.inv(torch.stack([self.H[i : i + GROUP, i : i + GROUP] for i in range(0, n, GROUP)]))
        for stop in range(n, 0, -PANEL):
            start = max(0, stop - PANEL)
            old = self.hat[:, start:stop].clone()
            for k in range(stop // GROUP - 1, start // GROUP - 1, -1):
                block = slice(k * GROUP, (k + 1) * GROUP)
                was = self.hat[:, block].clone()
                self._round(k, was + G[:, block] @ inverse[k])
                G[:, start:stop].addmm_(self.hat[:, block] - was, self.H[block, start:stop], alpha=-1)
            G[:, :start].addmm_(self.hat[:, start:stop] - old, self.H[start:stop, :start], alpha=-1)
        after = self.error()
        if not after < before:
            self.hat, self.codes, self.seconds = kept
        return after < (1 - tolerance) * before
