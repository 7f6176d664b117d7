"""HQQ: the zero-point of each group fitted so that the error has few large entries (an l_p norm with p < 1), by half-quadratic splitting; no data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023), eq. 3 to 6. With W_r = (W_q - zero) * scale,
each round takes the part of the error that the prior holds for outliers, moves the zero-point to what is left, and trusts the codes a little more:

    W_e = sign(W - W_r) relu(|W - W_r| - |W - W_r|^(p-1) / beta)
    zero = mean over the group of W_q - (W - W_e) / scale
    beta = kappa beta        (1.01 in the article; the hqq package 0.2.8 leaves beta as it is, and so does the default here)

The scale is that of min-max and stays. It ends early when the mean error of the matrix grows. The zero-point is a real number (Scheme.zero_dtype);
groups lie along a row, or, with block (g, 1), along a column (the authors' axis 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from ..numerics import integer
from ..scheme import Scheme
from ..stats import LayerStats
from ..tensor import QuantizedTensor

LARGEST_INVERSE = 2e4  # of 1 / scale
FLAT = 1e-4  # a group whose range is smaller has scale 1


@dataclass(frozen=True)
class HqqOptions:
    """p: of the norm. beta, kappa, iterations: of the splitting."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.0
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise RecipeError(f"p is {self.p}; expected more than 0 and at most 1.")
        if self.beta <= 0 or self.kappa < 1 or self.iterations < 0:
            raise RecipeError(f"beta is {self.beta}, kappa {self.kappa} and iterations {self.iterations}; expected beta > 0, kappa >= 1, iterations >= 0.")


def hqq(W: Tensor, scheme: Scheme, stats: LayerStats | None, options: HqqOptions, notes: list[str]) -> QuantizedTensor:
    """Quantize W [out_features, in_features] to asymmetric integers with fitted zero-points; W is not changed, stats are not used."""
    if scheme.symmetric:
        raise RecipeError(f"hqq fits zero-points, and {scheme.name} has none; use asym.")
    groups, weights = integer.to_groups(W.float(), scheme)
    inverse, zero = _start(groups, scheme)
    if options.iterations:
        zero = _split(groups, inverse, zero, scheme, options)
    scale = integer.round_scale(1 / inverse, scheme)
    zero = zero.round().clamp(0, scheme.max_code) if scheme.zero_dtype == "int" else zero
    return integer.from_parameters(W, scheme, scale, zero)


def _start(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """1 / scale and zero-point of min-max [rows, groups]; whole zero-points for 4 bits, as the authors start."""
    low, high = torch.aminmax(groups, dim=-1)
    span = high - low
    inverse = torch.where(span.abs() <= FLAT, 1.0, scheme.max_code / span).clamp_(max=LARGEST_INVERSE)
    zero = -low * inverse
    return inverse, zero.round_() if scheme.bits == 4 else zero


def _split(W: Tensor, inverse: Tensor, zero: Tensor, scheme: Scheme, options: HqqOptions) -> Tensor:
    """The fitted zero-points; W [rows, groups, group]."""
    inverse, zero, beta, least = inverse.unsqueeze(-1), zero.unsqueeze(-1), options.beta, float("inf")
    codes, error, shrunk = torch.empty_like(W), torch.empty_like(W), torch.empty_like(W)
    for _ in range(options.iterations):
        torch.addcmul(zero, W, inverse, out=codes).round_().clamp_(0, scheme.max_code)
        torch.sub(codes, zero, out=error).div_(inverse)
        torch.sub(W, error, out=error)
        magnitude = torch.abs(error, out=shrunk)
        mean = float(magnitude.mean())
        # W - W_e in place: the error keeps its sign, and its magnitude loses |e|^(p-1) / beta but not more than all of it.
        threshold = magnitude.pow(options.p - 1).div_(beta)
        shrunk.sub_(threshold).clamp_(min=0).mul_(error.sign_())
        torch.sub(W, shrunk, out=shrunk).mul_(inverse)
        zero = torch.sub(codes, shrunk, out=codes).mean(-1, keepdim=True)
        beta *= options.kappa
        if mean >= least:
            break
        least = mean
    return zero.squeeze(-1)
