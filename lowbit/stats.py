"""What calibration learns about the inputs of one linear layer: sums and extremes, so that shards of data can be merged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LayerStats:
    """Statistics of the inputs x [tokens, in_features] of a linear layer; each is filled only if an algorithm asks for it.

    hessian: sum of x x^T over tokens (each with its weight in a guided job), float32 [in_features, in_features] (GPTQ's H is 2/n times this; the factor cancels).
    cross: sum of dx x^T, dx what the original model's input has more than x, float32 [in_features, in_features] (GPTAQ).
    sum_abs: sum of |x| over tokens, float32 [in_features].
    sum_sq: sum of x^2 over tokens, float32 [in_features] (llama.cpp's imatrix is sum_sq / n_tokens).
    absmax: max |x| over tokens, float32 [in_features].
    """

    n_tokens: int = 0
    sum_abs: Tensor | None = None
    sum_sq: Tensor | None = None
    absmax: Tensor | None = None
    hessian: Tensor | None = None
    cross: Tensor | None = None

    def importance(self) -> Tensor | None:
        """Mean of x^2 per input channel [in_features], or None without data."""
        if self.n_tokens == 0:
            return None
        if self.hessian is not None:
            return self.hessian.diagonal() / self.n_tokens
        return None if self.sum_sq is None else self.sum_sq / self.n_tokens


def merge(a: LayerStats, b: LayerStats) -> LayerStats:
    """The statistics of both shards of data together."""
    return LayerStats(
        n_tokens=a.n_tokens + b.n_tokens,
        sum_abs=_join(a.sum_abs, b.sum_abs, lambda x, y: x + y),
        sum_sq=_join(a.sum_sq, b.sum_sq, lambda x, y: x + y),
        absmax=_join(a.absmax, b.absmax, lambda x, y: x.maximum(y)),
        hessian=_join(a.hessian, b.hessian, lambda x, y: x + y),
        cross=_join(a.cross, b.cross, lambda x, y: x + y),
    )


def _join(x: Tensor | None, y: Tensor | None, op) -> Tensor | None:
    if x is None or y is None:
        return x if y is None else y
    return op(x, y)
