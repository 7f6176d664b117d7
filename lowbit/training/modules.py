"""Layers that are trained as they will be stored: a master weight in full precision, and its quantized view in every forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..numerics import activations
from ..scheme import Rounding
from ..tensor import QuantizedTensor
from .views import View


class FakeQuantLinear(nn.Linear):
    """y = round(x) Q(W)^T + bias. weight [out, in] is the master; view gives Q(W), what the file will hold; act: how inputs are rounded (see ActView).

    phase: from 0 to 1, how much of the rounding is there: W + phase (Q(W) - W), inputs alike. At 1 the weight is Q(W) bit for bit.
    tied: the view is the embedding's, which has it in its state (as a tied weight, it is stored once).
    """

    view: View
    phase = 1.0

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, view: View, act: ActView | None = None, *, tied: bool = False) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.act = weight, act
        if tied:
            self.__dict__["view"] = view
        else:
            self.view = view
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in any floating dtype, or under autocast."""
        if self.act is not None:
            x = _between(x, self.act, self.phase)
        weight = _between(self.weight, self.view, self.phase)
        return nn.functional.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _between(value: Tensor, rounded: nn.Module, phase: float) -> Tensor:
    if phase == 0:
        return value
    return rounded(value) if phase == 1 else value.lerp(rounded(value), phase)


class FakeQuantEmbedding(nn.Module):
    """Rows of Q(W) times a factor (Gemma's embeddings have one). weight [vocabulary, size] is the master."""

    def __init__(self, weight: nn.Parameter, view: View, padding_idx: int | None, factor: Tensor | float | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.view, self.padding_idx, self.factor = weight, view, padding_idx, factor

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.view(self.weight), self.padding_idx)
        return rows if self.factor is None else rows * self.factor


def quantized(layer: FakeQuantLinear | FakeQuantEmbedding, name: str) -> QuantizedTensor:
    """The matrix of a layer as data; FormatError with its name for one that holds NaN."""
    try:
        return layer.view.quantized(layer.weight)
    except FormatError as error:
        raise FormatError(f"{name}: {error} Lower the learning rates, or compute in float32.") from error


def as_stored(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Let a model compute with its dense parameters (norms, biases, embeddings) as the file will hold them: rounded to these dtypes by name; gradients go straight through to the masters."""
    held = {id(parameter): dtypes[name] for name, parameter in model.named_parameters() if dtypes.get(name, parameter.dtype) != parameter.dtype}
    for module in model.modules():
        if isinstance(module, FakeQuantLinear | FakeQuantEmbedding):
            held.pop(id(module.weight), None)
    for module in model.modules():
        if own := {name: held[id(parameter)] for name, parameter in module.named_parameters(recurse=False) if id(parameter) in held}:
            rounding = _Rounded(own)
            module.register_forward_pre_hook(rounding.enter)
            module.register_forward_hook(rounding.leave, always_call=True)


class _Rounded:
    """Forward hooks of one module: its parameters are their rounded values while it runs."""

    def __init__(self, dtypes: dict[str, torch.dtype]) -> None:
        self.dtypes = dtypes
        self.masters: dict[str, nn.Parameter | None] = {}

    def enter(self, module: nn.Module, _: Any) -> None:
        self.masters = {name: module._parameters[name] for name in self.dtypes}
        for name, master in self.masters.items():
            assert master is not None
            module._parameters[name] = master.detach().to(self.dtypes[name]).to(master.dtype) + (master - master.detach())  # type: ignore[assignment]

    def leave(self, module: nn.Module, *_: Any) -> None:
        module._parameters.update(self.masters)


class ActView(nn.Module):
    """Inputs as the stored model rounds them: per token from their own extremes; a static scale is a parameter, learned as LSQ learns it."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.given = rounding
        if rounding.scale is not None:
            self.scale = nn.Parameter(torch.ones(()))  # times the one at the start

    def forward(self, x: Tensor) -> Tensor:
        if self.given.scale is None:
            return activations.fake_quantize(x, self.given)
        return _Static.apply(x, self.scale * self.given.scale, self.rounding())

    def rounding(self) -> Rounding:
        """What the file says of the inputs."""
        if self.given.scale is None:
            return self.given
        return Rounding(self.given.act, float(self.scale.detach().abs().clamp(min=1e-6)) * self.given.scale, self.given.zero_point)


class _Static(torch.autograd.Function):
    """Static rounding with LSQ's gradient for its scale (arXiv:1902.08153, eq. 3; N: the features of a token)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rounding = rounding
        return activations.fake_quantize(x.detach(), rounding)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        value, scale = activations.fake_quantize(x, rounding).float(), rounding.scale or 1.0
        low, high = activations.limits(rounding)
        inside = (x.float() >= low) & (x.float() <= high)
        g = gradient.float()
        to_scale = (g * torch.where(inside, value - x.float(), value)).sum() / scale
        largest = max(abs(low), abs(high)) / scale
        return (g * inside).to(x.dtype), to_scale / (x.shape[-1] * largest) ** 0.5, None

