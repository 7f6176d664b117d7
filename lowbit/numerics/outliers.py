"""Outlier channels: a few input channels of a matrix kept in float16, or in 8 bits, beside the codes of the others, in any number format.

Channels are chosen by what rounding them costs, E[x_j^2] * sum of w_ij^2 over the outputs (without data by the weights alone). As LLM.int8()
(arXiv:2208.07339) and SpQR (arXiv:2306.03078) keep columns and weights that must not be rounded; whole columns need no index per weight.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import FormatError
from ..scheme import Scheme
from ..tensor import QuantizedTensor

INDEX, WEIGHT, SCALE = "outlier_index", "outlier_weight", "outlier_scale"
OF_CHANNELS = (INDEX, SCALE)  # parts that have no row for each output


def choose(W: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """The count channels that cost most when rounded, int32, ascending. W [out_features, in_features], importance E[x^2] [in_features]."""
    cost = W.float().square().sum(0)
    if importance is not None:
        cost = cost * importance.to(cost.device)
    return cost.topk(min(count, len(cost))).indices.sort().values.to(torch.int32)


def without(W: Tensor, index: Tensor) -> Tensor:
    """W with the channels set to zero, which every number format holds."""
    rest = W.clone()
    rest[:, index.long()] = 0
    return rest


def plain(scheme: Scheme) -> Scheme:
    """The scheme of the other channels."""
    return replace(scheme, outliers=None, outlier_bits=16)


def add(qt: QuantizedTensor, scheme: Scheme, W: Tensor, index: Tensor) -> QuantizedTensor:
    """The quantized rest together with the channels of W that stand beside it."""
    if scheme.outlier_bits == 8:
        kept = W[:, index.long()].float()
        scale = (kept.abs().amax(0) / 127).half()
        if not bool(torch.isfinite(scale).all()):
            raise FormatError(f"an outlier channel holds {float(kept.abs().max()):.3g}, whose scale does not fit float16 (or is NaN).")
        codes = torch.where(scale > 0, kept / scale.float(), 0.0).round().clamp_(-127, 127).to(torch.int8)
        return QuantizedTensor(scheme, qt.shape, qt.dtype, {**qt.parts, INDEX: index, WEIGHT: codes, SCALE: scale})
    kept = W[:, index.long()].half()
    if not bool(torch.isfinite(kept).all()):
        raise FormatError(f"an outlier channel holds {float(W[:, index.long()].float().abs().max()):.3g}, which does not fit float16 (or is NaN).")
    return QuantizedTensor(scheme, qt.shape, qt.dtype, {**qt.parts, INDEX: index, WEIGHT: kept})


def restore_(values: Tensor, qt: QuantizedTensor) -> Tensor:
    """Put the channels into decoded values float32 [out, in], in place."""
    kept = qt.parts[WEIGHT].float()
    values[:, qt.parts[INDEX].long()] = kept * qt.parts[SCALE].float() if SCALE in qt.parts else kept
    return values


def bits(scheme: Scheme, rows: int, columns: int) -> int:
    """What they take beside the codes of all channels."""
    return 0 if scheme.outliers is None else min(scheme.outliers, columns) * (scheme.outlier_bits * rows + 32 + (16 if scheme.outlier_bits == 8 else 0))
