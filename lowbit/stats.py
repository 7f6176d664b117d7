"""What calibration learns about the inputs of one linear layer: sums and extremes, so that shards of data can be merged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 2048  # of a histogram, on each side of zero


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins [i w, (i + 1) w), i from -BINS to BINS - 1, w = 2^exponent: a power of two, so that histograms of any two ranges merge exactly.

    counts: int64 [2 BINS].
    """

    counts: Tensor
    exponent: int

    @property
    def width(self) -> float:
        return 2.0**self.exponent

    @staticmethod
    def of(x: Tensor) -> Histogram:
        """Of all values of x; infinities and NaN must have been refused."""
        largest = float(x.abs().max())
        exponent = -126 if largest == 0 else max(-126, math.floor(math.log2(largest)) + 1 - int(math.log2(BINS)))
        place = (x.float() * 2.0**-exponent).floor_().clamp_(-BINS, BINS - 1).long().add_(BINS).flatten()
        return Histogram(torch.bincount(place, minlength=2 * BINS), exponent)

    def widened(self, exponent: int) -> Histogram:
        """The same counts in bins of a larger width."""
        counts = self.counts
        for _ in range(min(exponent - self.exponent, 2 * BINS)):
            middle = counts.view(BINS, 2).sum(1)
            counts = torch.nn.functional.pad(middle, (BINS // 2, BINS // 2))
        return Histogram(counts, exponent)

    def __add__(self, other: Histogram) -> Histogram:
        exponent = max(self.exponent, other.exponent)
        return Histogram(self.widened(exponent).counts + other.widened(exponent).counts, exponent)


@dataclass
class LayerStats:
    """Statistics of the inputs x [tokens, in_features] of a linear layer; each is filled only if an algorithm asks for it.

    hessian: sum of x x^T over tokens (each with its weight in a guided job), float32 [in_features, in_features] (GPTQ's H is 2/n times this; the factor cancels);
        [groups, in_features, in_features] where groups of outputs weigh tokens differently.
    cross: sum of dx x^T, dx what the original model's input has more than x, float32 [in_features, in_features] (GPTAQ).
    sum_abs: sum of |x| over tokens, float32 [in_features].
    sum_sq: sum of x^2 over tokens, float32 [in_features] (llama.cpp's imatrix is sum_sq / n_tokens).
    absmax: max |x| over tokens, float32 [in_features].
    low, high: of all values, float32 []; mean_low, mean_high: their moving averages over micro-batches. histogram: of all values.
    sample: some of the inputs, float32 [tokens, in_features].
    """

    n_tokens: int = 0
    sum_abs: Tensor | None = None
    sum_sq: Tensor | None = None
    absmax: Tensor | None = None
    hessian: Tensor | None = None
    cross: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    mean_low: Tensor | None = None
    mean_high: Tensor | None = None
    histogram: Histogram | None = None
    sample: Tensor | None = None

    def importance(self) -> Tensor | None:
        """Mean of x^2 per input channel [in_features], or None without data."""
        if self.n_tokens == 0:
            return None
        if self.hessian is not None:
            diagonal = self.hessian.diagonal(dim1=-2, dim2=-1)
            return (diagonal if diagonal.ndim == 1 else diagonal.mean(0)) / self.n_tokens
        return None if self.sum_sq is None else self.sum_sq / self.n_tokens


def merge(a: LayerStats, b: LayerStats) -> LayerStats:
    """The statistics of both shards of data together (moving averages, which have an order, are left out)."""
    return LayerStats(
        n_tokens=a.n_tokens + b.n_tokens,
        sum_abs=_join(a.sum_abs, b.sum_abs, lambda x, y: x + y),
        sum_sq=_join(a.sum_sq, b.sum_sq, lambda x, y: x + y),
        absmax=_join(a.absmax, b.absmax, lambda x, y: x.maximum(y)),
        hessian=_join(a.hessian, b.hessian, lambda x, y: x + y),
        cross=_join(a.cross, b.cross, lambda x, y: x + y),
        low=_join(a.low, b.low, lambda x, y: x.minimum(y)),
        high=_join(a.high, b.high, lambda x, y: x.maximum(y)),
        histogram=_join(a.histogram, b.histogram, lambda x, y: x + y),
        sample=_join(a.sample, b.sample, lambda x, y: torch.cat([x, y])),
    )


def _join(x, y, op):
    if x is None or y is None:
        return x if y is None else y
    return op(x, y)
