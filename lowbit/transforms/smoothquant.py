"""SmoothQuant: activation outliers are moved into the weights, channel by channel, so that both can be rounded.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv:2211.10438, eq. 4:

    s_j = max|x_j|^alpha / max|w_j|^(1-alpha)          x_j / s_j, w_j * s_j

alpha is fixed, or searched for each place: the one of a grid with the least squared error of the layers' outputs on some of their inputs, both rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import numerics
from ..errors import RecipeError
from ..numerics import activations
from ..scheme import Activation, Rounding
from .awq import Reader

LEAST = 1e-5


@dataclass(frozen=True)
class SmoothQuantOptions:
    """alpha: how much of the difficulty goes into the weights, 0 to 1; the authors take 0.5, for Llama 2 and 3 0.85.

    search: find alpha for each place, among n_grid + 1 values from 0 to 1. linears: also where a linear layer writes the channels (values to output, up to down), not only
    behind norms as the authors do.
    """

    alpha: float = 0.5
    search: bool = False
    n_grid: int = 20
    linears: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha}; expected 0 to 1.")
        if not isinstance(self.search, bool) or not isinstance(self.linears, bool) or self.n_grid < 1:
            raise RecipeError(f"search is {self.search!r}, linears {self.linears!r} and n_grid {self.n_grid}; expected true or false, twice, and 1 or more.")


def smooth_scale(readers: Sequence[Reader], options: SmoothQuantOptions, tie) -> Tensor | None:
    """The scale per channel [in_features] that weights are multiplied by and activations divided by."""
    peaks = [reader.stats.absmax for reader in readers if reader.stats.absmax is not None]
    if not peaks:
        return None
    x = torch.stack(peaks).amax(0).clamp(min=LEAST)
    w = torch.stack([reader.W.abs().amax(0) for reader in readers]).amax(0).clamp(min=LEAST)
    scale = lambda alpha: tie((x.pow(alpha) / w.pow(1 - alpha)).clamp(min=LEAST))
    if not options.search:
        return scale(options.alpha)
    return min((scale(step / options.n_grid) for step in range(options.n_grid + 1)), key=lambda found: sum(_error(reader, found) for reader in readers))


def _error(reader: Reader, scale: Tensor) -> float:
    """Squared error of the outputs with inputs / scale and weights * scale, both rounded."""
    if reader.stats.sample is None:
        return 0.0
    X = activations.fake_quantize(reader.stats.sample / scale, Rounding(replace(reader.scheme.act or Activation(), static=False)))
    W = numerics.dequantize(numerics.quantize(reader.W * scale, reader.scheme))
    return float((X @ W.T).sub_(reader.stats.sample @ reader.W.T).square_().sum())
