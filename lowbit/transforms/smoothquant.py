"""SmoothQuant: activation outliers are moved into the weights, channel by channel, so that both can be rounded.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv:2211.10438, eq. 4:

    s_j = max|x_j|^alpha / max|w_j|^(1-alpha)          x_j / s_j, w_j * s_j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from .awq import Reader

LEAST = 1e-5


@dataclass(frozen=True)
class SmoothQuantOptions:
    """alpha: how much of the difficulty goes into the weights, 0 to 1; the authors take 0.5, for Llama 2 and 3 0.85."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha}; expected 0 to 1.")


def smooth_scale(readers: Sequence[Reader], options: SmoothQuantOptions, tie) -> Tensor | None:
    """The scale per channel [in_features] that weights are multiplied by and activations divided by."""
    peaks = [reader.stats.absmax for reader in readers if reader.stats.absmax is not None]
    if not peaks:
        return None
    x = torch.stack(peaks).amax(0).clamp(min=LEAST)
    w = torch.stack([reader.W.abs().amax(0) for reader in readers]).amax(0).clamp(min=LEAST)
    return tie((x.pow(options.alpha) / w.pow(1 - options.alpha)).clamp(min=LEAST))
