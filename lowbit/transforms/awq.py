"""AWQ: input channels that carry large activations are scaled up before rounding, and down in what writes them; then ranges are clipped.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978, eq. 4 and 5. For a ratio r in 0 .. 1

    s = mean|x|^r / mean|w|^(1-r)          mean|w| of weights divided by the largest of their group

normalised to sqrt(max s * min s) = 1; the r of a grid with the least squared error of the layers' outputs, tr(dW H dW^T), is taken, or no scale where
that is better still. The authors measure the error of the attention's or the MLP's output on some tokens; H has all tokens of the layers' own outputs.
Clipping (with plain rounding): each group's range is shrunk to what leaves the least dW_g H_gg dW_g^T; Q and K are left alone, as by the authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import numerics
from ..algorithms.error import output_energy
from ..errors import RecipeError
from ..numerics import integer
from ..scheme import INT, Scheme
from ..stats import LayerStats

LEAST = 1e-4
UNCLIPPED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class AwqOptions:
    """n_grid: ratios tried. clip: shrink the ranges, too (only before plain rounding). clip_grid, max_shrink: of that search."""

    n_grid: int = 20
    clip: bool = True
    clip_grid: int = 20
    max_shrink: float = 0.5

    def __post_init__(self) -> None:
        if self.n_grid < 1 or self.clip_grid < 2 or not 0 < self.max_shrink < 1:
            raise RecipeError(f"n_grid is {self.n_grid}, clip_grid {self.clip_grid}, max_shrink {self.max_shrink}; expected 1 or more, 2 or more, and a share between 0 and 1.")


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the channels: W float32 [out_features, in_features], its scheme, and the statistics of its inputs."""

    W: Tensor
    scheme: Scheme
    stats: LayerStats


def awq_scale(readers: Sequence[Reader], options: AwqOptions, tie) -> Tensor | None:
    """The scale per channel [in_features] that weights are multiplied by, or None where none helps. tie: (scale) -> the scale that the place allows."""
    x, w = _mean_activation(readers), _mean_weight(readers)
    if x is None:
        return None
    best, least = None, sum(_error(reader, None) for reader in readers)
    for step in range(options.n_grid):
        ratio = step / options.n_grid
        scale = (x.pow(ratio) / (w.pow(1 - ratio) + LEAST)).clamp(min=LEAST)
        scale = tie(scale / (scale.max() * scale.min()).sqrt())
        if not bool(torch.isfinite(scale).all()):
            continue
        error = sum(_error(reader, scale) for reader in readers)
        if error < least:
            best, least = scale, error
    return best


def _mean_activation(readers: Sequence[Reader]) -> Tensor | None:
    """Mean |x| over all tokens, with the smallest positive one in place of 0."""
    distinct = {id(reader.stats): reader.stats for reader in readers}.values()
    tokens = sum(stats.n_tokens for stats in distinct)
    if not tokens:
        return None
    mean = torch.stack([stats.sum_abs for stats in distinct if stats.sum_abs is not None]).sum(0) / tokens
    return mean.clamp(min=float(mean[mean > 0].min()) if bool((mean > 0).any()) else 1.0)


def _mean_weight(readers: Sequence[Reader]) -> Tensor:
    """Mean over all rows of |w| / the largest of its group."""
    total, rows = torch.zeros(readers[0].W.shape[1]), 0
    for reader in readers:
        size = reader.scheme.group_size if reader.scheme.group_size > 0 else reader.W.shape[1]
        magnitude = torch.nn.functional.pad(reader.W.abs(), (0, -reader.W.shape[1] % size)).view(len(reader.W), -1, size)
        share = magnitude / (magnitude.amax(-1, keepdim=True) + 1e-6)
        total += share.flatten(1)[:, : reader.W.shape[1]].sum(0)
        rows += len(reader.W)
    return total / rows


def _error(reader: Reader, scale: Tensor | None) -> float:
    """tr(dW H dW^T) of plain rounding with the channels multiplied by scale."""
    W = reader.W if scale is None else reader.W * scale
    D = numerics.dequantize(numerics.quantize(W, reader.scheme))
    if scale is not None:
        D /= scale
    D -= reader.W
    return 0.0 if reader.stats.hessian is None else output_energy(D, reader.stats.hessian)


def clipped(W: Tensor, scheme: Scheme, H: Tensor, options: AwqOptions) -> Tensor:
    """W float32 [out, in] clamped to the ranges of its groups that round best; as it is for other formats than integers and for a short last group."""
    if scheme.format != INT or scheme.block[0] != 1 or (scheme.group_size > 0 and W.shape[1] % scheme.group_size):
        return W
    groups, _ = integer.to_groups(W, scheme)
    H = H if H.ndim == 2 else H.mean(0)
    size = groups.shape[-1]
    blocks = torch.stack([H[i : i + size, i : i + size] for i in range(0, W.shape[1], size)])  # [groups, group, group]
    largest = groups.abs().amax(-1, keepdim=True)
    best, least = largest, torch.full_like(largest, torch.inf)
    for step in range(int(options.max_shrink * options.clip_grid)):
        limit = largest * (1 - step / options.clip_grid)
        rounded = numerics.dequantize(numerics.quantize(groups.clamp(-limit, limit).view_as(W), scheme)).view_as(groups)
        D = (rounded - groups).transpose(0, 1)  # [groups, rows, group]
        error = (D @ blocks).mul_(D).sum(-1).T.unsqueeze(-1)
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return groups.clamp(-best, best).view_as(W)
