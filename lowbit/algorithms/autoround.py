"""AutoRound (SignRound): rounding and ranges of a whole block learned by sign descent on the error of the block's output.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv:2309.05516, eq. 3 to 5. For each weight

    code = clip(round(W / s + V) + zero, 0, 2^b - 1)          V in [-0.5, 0.5]
    s, zero from alpha * max and beta * min of the group       alpha, beta in [0, 1]

V, alpha and beta move by lr * sign(gradient), lr falling linearly to 0; gradients pass the rounding straight through. The parameters with the least loss are
kept. A block-level algorithm: its layers are learned together, on inputs that come through the blocks already quantized, against the original model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..numerics import integer
from ..scheme import Scheme
from ..tensor import QuantizedTensor

SMALLEST_SCALE = 1e-5
CHUNK = 1 << 17  # weights


@dataclass(frozen=True)
class AutoRoundOptions:
    """iterations; batch: sequences in each. lr: of rounding and ranges (0: 1 / iterations). minmax: learn the ranges, too."""

    iterations: int = 200
    batch: int = 8
    lr: float = 0.0
    minmax: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1 or self.lr < 0:
            raise RecipeError(f"iterations is {self.iterations}, batch {self.batch} and lr {self.lr}; expected at least 1, at least 1, and 0 (for 1 / iterations) or more.")


@dataclass(frozen=True)
class Task:
    """A block to be learned. assign: puts weights float32 [out, in] by name into the block, differentiably. loss: the mean squared error of its output on some of the batches,
    which are of so many sequences each.

    loss(numbers) adds the gradient of the mean over the batches numbered to whatever was assigned, and returns the mean.
    """

    assign: Callable[[dict[str, Tensor]], None]
    loss: Callable[[list[int]], float]
    batches: int
    sequences_per_batch: int


class _Layer:
    """The learned parameters of one matrix; groups are views [rows, groups, group]."""

    def __init__(self, W: Tensor, scheme: Scheme) -> None:
        self.scheme, self.shape = scheme, W.shape
        self.W, _ = integer.to_groups(W.float(), scheme)
        low, high = torch.aminmax(self.W, dim=-1)
        self.low, self.high = low.clamp(max=0), high.clamp(min=0)
        self.V = torch.zeros_like(self.W, requires_grad=True)
        self.alpha = torch.ones_like(high, requires_grad=True)
        self.beta = torch.ones_like(low, requires_grad=True)

    def parameters(self, minmax: bool) -> list[Tensor]:
        return [self.V, self.alpha, self.beta] if minmax else [self.V]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero-point [rows, groups], differentiable in alpha and beta."""
        scheme, low, high = self.scheme, self.low * self.beta, self.high * self.alpha
        if not scheme.symmetric:
            scale = _stored((high - low) / scheme.max_code, scheme)
            return scale, (_straight(-low / scale, torch.round)).clamp(0, scheme.max_code)
        if scheme.range == "full":
            scale = _stored(torch.where(high > -low, high, low) / -float(scheme.zero_code), scheme)
        else:
            scale = _stored(torch.maximum(-low, high) / (scheme.zero_code - (1.0 if scheme.range == "textbook" else 0.5)), scheme)
        return scale, torch.full_like(scale, float(scheme.zero_code))

    def decoded(self) -> Tensor:
        """The weight that the codes stand for [out, in], differentiable."""
        values = _Values.apply(self.V, *self.grid(), self.W, self.scheme.max_code)
        return values.reshape(values.shape[0], -1)[:, : self.shape[1]] if self.scheme.block != (-1, -1) else values.view(self.shape)

    @torch.no_grad()
    def result(self, dtype: str) -> QuantizedTensor:
        scale, zero = self.grid()
        codes = (torch.round(self.W / scale.unsqueeze(-1) + self.V) + zero.unsqueeze(-1)).clamp(0, self.scheme.max_code).to(torch.uint8)
        codes = codes.reshape(codes.shape[0], -1)[:, : self.shape[1]] if self.scheme.block != (-1, -1) else codes.view(self.shape)
        return integer.from_codes(codes.contiguous(), scale, None if self.scheme.symmetric else zero, self.scheme, dtype)


def autoround(weights: dict[str, Tensor], schemes: dict[str, Scheme], task: Task, options: AutoRoundOptions, *, seed: int) -> tuple[dict[str, QuantizedTensor], float, float]:
    """Learn all matrices of a block, weights [out_features, in_features] by name; they are not changed.

    Returns the tensors, and the loss of the block's output at the start (plain rounding) and of what is kept.
    """
    layers = {name: _Layer(W, schemes[name]) for name, W in weights.items()}
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters(options.minmax)]
    generator = torch.Generator().manual_seed(seed)
    lr = options.lr or 1 / options.iterations
    count = min(task.batches, max(1, round(options.batch / task.sequences_per_batch)))
    first, least, best = float("nan"), float("inf"), [parameter.detach().clone() for parameter in parameters]
    for iteration in range(options.iterations):
        with torch.enable_grad():
            values = {name: layer.decoded() for name, layer in layers.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        task.assign(leaves)
        loss = task.loss(torch.randperm(task.batches, generator=generator)[:count].tolist())
        first = loss if iteration == 0 else first
        if loss < least:
            least, best = loss, [parameter.detach().clone() for parameter in parameters]
        used = [name for name in values if leaves[name].grad is not None]
        gradients = torch.autograd.grad([values[name] for name in used], parameters, [leaves[name].grad for name in used], allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient.sign_(), alpha=lr * (1 - iteration / options.iterations))
            for layer in layers.values():
                layer.V.clamp_(-0.5, 0.5)
                layer.alpha.clamp_(0, 1)
                layer.beta.clamp_(0, 1)
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    return {name: layer.result(str(weights[name].dtype).removeprefix("torch.")) for name, layer in layers.items()}, first, least


class _Values(torch.autograd.Function):
    """(clip(round(W / s + V) + z, 0, max) - z) s, gradients straight through the rounding; V, W [rows, groups, group], s, z [rows, groups]. Some rows at a time, so that what lies between
    stays in the cache."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, scale: Tensor, zero: Tensor, W: Tensor, max_code: int) -> Tensor:
        ctx.save_for_backward(V, scale, zero, W)
        ctx.max_code = max_code
        values = torch.empty_like(W)
        for rows in _chunks(W):
            s, z = scale[rows].unsqueeze(-1), zero[rows].unsqueeze(-1)
            q = torch.div(W[rows], s, out=values[rows]).add_(V[rows]).round_()
            q.add_(z).clamp_(0, max_code).sub_(z).mul_(s)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        V, scale, zero, W = ctx.saved_tensors
        to_V, to_scale, to_zero = torch.empty_like(V), torch.empty_like(scale), torch.empty_like(zero)
        for rows in _chunks(W):
            s, z, g = scale[rows].unsqueeze(-1), zero[rows].unsqueeze(-1), gradient[rows]
            exact = W[rows] / s
            rounded = (exact + V[rows]).round_()
            q = rounded.add(z).clamp_(0, ctx.max_code).sub_(z)
            clipped = q != rounded
            to_scale[rows] = q.sub_(exact.masked_fill_(clipped, 0)).mul_(g).sum(-1)
            scaled = torch.mul(g, s)
            to_zero[rows] = -(scaled * clipped).sum(-1)
            to_V[rows] = scaled.masked_fill_(clipped, 0)
        return to_V, to_scale, to_zero, None, None


def _chunks(W: Tensor) -> list[slice]:
    step = max(1, CHUNK // W[0].numel())
    return [slice(start, start + step) for start in range(0, len(W), step)]


def _straight(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x) with the gradient of x (the straight-through estimator)."""
    return x + (function(x.detach()) - x.detach())


def _stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """The scale as it will be stored, not smaller than SMALLEST_SCALE, with the gradient of the scale."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    safe = torch.where(scale.abs() < SMALLEST_SCALE, sign * SMALLEST_SCALE, scale)
    return _straight(safe, lambda x: integer.round_scale(x, scheme))
