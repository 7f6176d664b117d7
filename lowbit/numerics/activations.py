"""Rounded activations: what a linear layer reads, on the grid of its Activation; and the scales of static ones, from what calibration saw.

Dynamic: each token's (or tensor's) own extremes. Static: one scale for all tokens, found by an observer:

    minmax      the least and the largest value
    average     moving averages of the extremes of each micro-batch, weight 0.01 (torch's MovingAverageMinMaxObserver)
    percentile  the range that holds so many percent of |x| (asymmetric: of x, the rest shared out at both ends)
    mse         the range with the least expected squared error over the histogram (each bin at its middle)
    kl          the threshold of |x| whose levels (128 of 8 bits) have the least KL divergence from the clipped histogram (Migacz, "8-bit Inference with TensorRT",
                GTC 2017; onnxruntime's and TensorRT's "entropy")

LLM.int8() (Dettmers et al., arXiv:2208.07339, section 3): outliers are taken out before the scales are found, and the columns that hold one multiply in full precision;
the rest is rounded from float16, as bitsandbytes does whatever the dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..scheme import INT, Activation, Rounding
from ..stats import BINS, Histogram, LayerStats
from . import floating, integer

AVERAGING = 0.01
SHRINKS = 100  # candidate ranges of the mse observer, per end
KL_STEP = 8  # bins between candidate thresholds of the kl observer
NEEDS = {"minmax": "range", "average": "average", "percentile": "histogram", "mse": "histogram", "kl": "histogram"}


def fake_quantize(x: Tensor, rounding: Rounding) -> Tensor:
    """x [..., in_features] rounded, in its own dtype; gradients pass straight through."""
    rounded = _rounded(x.detach(), rounding.act, None if rounding.scale is None else (rounding.scale, rounding.zero_point))
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _rounded(x: Tensor, act: Activation, fixed: tuple[float, float] | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).float()
    if not len(flat):
        return x
    if not bool(torch.isfinite(flat).all()):
        raise FormatError("the activations that reach it are infinite or NaN. Compute in a wider dtype (--dtype float32), or check the model.")
    outlying = None
    if act.threshold is not None:  # as bitsandbytes: judged and rounded from float16, and what is large in a column does not count for the scales of its tokens
        flat = flat.half().float()
        large = flat.abs() >= act.threshold
        flat, outlying = flat.masked_fill(large, 0.0), large.any(0)
    made = (_integers if act.format == INT else _floats)(flat, act, fixed).view(x.shape).to(x.dtype)
    return made if outlying is None else torch.where(outlying, x, made)


def _integers(x: Tensor, act: Activation, fixed: tuple[float, float] | None) -> Tensor:
    scheme = act.scheme
    if fixed is None:
        low, high = torch.aminmax(x, dim=-1) if act.per == "token" else torch.aminmax(x)
        scale, zero = integer.parameters(low, high, scheme)
    else:
        scale = x.new_tensor(fixed[0])
        zero = None if act.symmetric else x.new_tensor(fixed[1])
    scale = scale.unsqueeze(-1)
    codes = integer.clamp_signed_(torch.div(x, scale).round_(), zero, scheme)
    return codes.mul_(scale)


def _floats(x: Tensor, act: Activation, fixed: tuple[float, float] | None) -> Tensor:
    if fixed is None and act.format == "nvfp4":  # its factor of the whole tensor belongs to each token here, so that tokens do not depend on each other
        factor = floating.global_scale(x.abs().amax(1, keepdim=True))
        blocks = (x * factor).view(len(x), -1, act.scheme.group_size)
        scale = floating.decode(floating.encode((blocks.abs().amax(-1, keepdim=True) / floating.E2M1.largest).clamp_(min=2.0**-9), floating.E4M3), floating.E4M3)
        return floating.decode(floating.encode(blocks / scale, floating.E2M1), floating.E2M1).mul_(scale).view(x.shape) / factor
    if fixed is None:
        return floating.dequantize(floating.quantize(x, act.scheme))
    element = floating.KINDS[act.format].element
    return floating.decode(floating.encode(x / fixed[0], element), element).mul_(fixed[0])


def limits(rounding: Rounding) -> tuple[float, float]:
    """Between which inputs no code of a static rounding is clipped."""
    scale, act = rounding.scale or 0.0, rounding.act
    if act.format != INT:
        largest = floating.KINDS[act.format].element.largest * scale
        return -largest, largest
    zero = rounding.zero_point if not act.symmetric else act.scheme.zero_code
    return (-zero - 0.5) * scale, (act.scheme.max_code - zero + 0.5) * scale


def needs(act: Activation | None) -> tuple[str, ...]:
    """The statistics that a static activation's scale is found from."""
    return (NEEDS[act.observer],) if act is not None and act.static else ()


def settle(act: Activation, stats: LayerStats | None) -> Rounding:
    """The rounding of an activation, with the scale of a static one found from what calibration saw."""
    if not act.static:
        return Rounding(act)
    low, high = _bounds(act, stats or LayerStats())
    if act.format != INT:
        return Rounding(act, max(-float(low), float(high)) / floating.KINDS[act.format].element.largest or 1.0)
    scale, zero = integer.parameters(low.float(), high.float(), act.scheme)
    return Rounding(act, float(scale), 0.0 if zero is None else float(zero))


def _bounds(act: Activation, stats: LayerStats) -> tuple[Tensor, Tensor]:
    if act.observer == "minmax" and stats.low is not None and stats.high is not None:
        return stats.low, stats.high
    if act.observer == "average" and stats.mean_low is not None and stats.mean_high is not None:
        return stats.mean_low, stats.mean_high
    if stats.histogram is None:
        raise FormatError("no token of the calibration text reached this layer, so no scale of its activations can be found. Use dynamic activations, or more text.")
    if not bool(stats.histogram.counts.nonzero().flatten().sub(BINS).any()):  # nothing but zeros
        return torch.tensor(0.0), torch.tensor(0.0)
    if act.observer == "percentile":
        return percentile(stats.histogram, act.percentile, symmetric=act.symmetric)
    if act.observer == "kl":
        threshold = kl_threshold(stats.histogram, 2 ** (act.bits - 1))
        return -threshold, threshold
    return least_squares(stats.histogram, act)


def folded(histogram: Histogram) -> Tensor:
    """Counts of |x| in BINS bins, float64."""
    counts = histogram.counts.double()
    return counts[BINS:] + counts[:BINS].flip(0)


def percentile(histogram: Histogram, share: float, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The ends of the bins within which so many percent of the values lie."""
    width = histogram.width
    if symmetric:
        total = folded(histogram).cumsum(0)
        bins = int(torch.searchsorted(total, total[-1] * share / 100)) + 1
        limit = torch.tensor(min(bins, BINS) * width)
        return -limit, limit
    total = histogram.counts.double().cumsum(0)
    tail = (100 - share) / 200
    first = int(torch.searchsorted(total, total[-1] * tail, right=True))
    last = int(torch.searchsorted(total, total[-1] * (1 - tail)))
    return torch.tensor((first - BINS) * width), torch.tensor((min(last, 2 * BINS - 1) + 1 - BINS) * width)


def least_squares(histogram: Histogram, act: Activation) -> tuple[Tensor, Tensor]:
    """The range, of all that shrink the extremes by steps, with the least squared error of the histogram's values; asymmetric ends shrink in turn."""
    filled = histogram.counts.nonzero().flatten()
    values = (filled - BINS).double().add_(0.5).mul_(histogram.width).float()
    weights = histogram.counts[filled].float()
    low, high = values[0] - histogram.width / 2, values[-1] + histogram.width / 2
    shrink = 1 - torch.arange(SHRINKS) / SHRINKS

    def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        if act.format == INT:
            scale, zero = integer.parameters(lows, highs, act.scheme)
            codes = integer.clamp_signed_(torch.round(values / scale.unsqueeze(1)), zero, act.scheme)
        else:
            element = floating.KINDS[act.format].element
            scale = torch.maximum(-lows, highs) / element.largest
            codes = floating.decode(floating.encode(values / scale.unsqueeze(1), element), element)
        error = torch.addcmul(values, codes, scale.unsqueeze(1), value=-1).square_() @ weights
        return lows[error.argmin()], highs[error.argmin()]

    if act.symmetric:
        limit = torch.maximum(-low, high)
        return best(-limit * shrink, limit * shrink)
    for _ in range(2):
        low, high = best(low.expand(SHRINKS), high * shrink)
        low, high = best(low * shrink, high.expand(SHRINKS))
    return low, high


def kl_threshold(histogram: Histogram, levels: int = 128) -> Tensor:
    """The threshold of |x| with the least KL(P || Q), P the histogram with all beyond the threshold in its last bin, Q the one below it on so many levels."""
    counts = folded(histogram)
    counts = counts[: int(counts.nonzero().max()) + 1] if bool(counts.any()) else counts[:1]
    best, least = len(counts), float("inf")
    for bins in range(levels, len(counts) + 1, KL_STEP):
        p = counts[:bins].clone()
        p[-1] += counts[bins:].sum()
        found = _divergence(p, counts[:bins], levels)
        if found < least:
            best, least = bins, found
    return torch.tensor(best * histogram.width)


def _divergence(p: Tensor, q: Tensor, levels: int) -> float:
    """KL of two histograms over the same bins, q first brought to so many levels: each level's counts shared out evenly over its bins that hold any."""
    level = torch.arange(len(q)) * levels // len(q)
    filled = (q > 0).double()
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, q)
    members = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    spread = (total / members.clamp(min=1))[level] * filled
    if not bool(spread.any()):
        return float("inf")
    p, spread = _smoothed(p), _smoothed(spread)
    p, spread = p / p.sum(), spread / spread.sum()
    inside = (p > 0) & (spread > 0)
    return float((p[inside] * (p[inside] / spread[inside]).log()).sum())


def _smoothed(counts: Tensor, share: float = 1e-4) -> Tensor:
    """Empty bins get a little, taken from the others, so that a divergence is finite (as onnxruntime does)."""
    empty = counts == 0
    zeros, others = int(empty.sum()), int((~empty).sum())
    if not others or not zeros:
        return counts
    taken = share * zeros / others
    return torch.where(empty, share, counts - taken) if taken < 1.0 else counts
