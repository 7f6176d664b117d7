"""Whole models that keep their quantized matrices packed: linear layers decode theirs whenever they are used, in the backward pass once more."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import numerics
from ..errors import FormatError, ModelError
from ..kernels import PackedMatrix, can_pack, native, pack
from ..kernels.decode import decode
from ..numerics import activations, parts
from ..scheme import Rounding
from ..tensor import QuantizedTensor
from . import rounding, skeleton
from .linears import find_linears
from .skeleton import Skeleton

if TYPE_CHECKING:
    from ..kernels.triton import GpuMatrix, Int8Matrix


class QuantLinear(nn.Module):
    """y = round(x) W^T + bias, with W [out_features, in_features] in any number format; rounding: of the inputs (None: as they are).

    The parts of W are buffers, packed as numerics/parts.py has them; they belong to no state dict, since a dtype cast there would change what they mean.
    """

    bias: Tensor | None

    def __init__(self, qt: QuantizedTensor, bias: Tensor | None = None, rounding: Rounding | None = None, decode_to: torch.dtype | None = None) -> None:
        """decode_to: what decoded weights are rounded to; None: the dtype that they stand for (as Checkpoint.dense does: what is measured is what runs)."""
        super().__init__()
        self.scheme, self.dtype_name, self.rounding = qt.scheme, qt.dtype, rounding
        self.decode_to: torch.dtype = decode_to or getattr(torch, qt.dtype)
        self.out_features, self.in_features = qt.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        stored = parts.store(qt)
        self.names = tuple(stored)
        for name, value in stored.items():
            self.register_buffer(f"_{name}", value, persistent=False)

    def quantized(self) -> QuantizedTensor:
        """The matrix as data."""
        stored = {name: getattr(self, f"_{name}") for name in self.names}
        return parts.restore(stored, self.scheme, (self.out_features, self.in_features), self.dtype_name)

    @property
    def weight(self) -> Tensor:
        """The decoded matrix."""
        return self.decoded(self.decode_to)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The decoded matrix, rounded to decode_to, in a dtype."""
        made = decode({name: getattr(self, f"_{name}") for name in self.names}, self.scheme, (self.out_features, self.in_features), dtype, self.decode_to)
        return numerics.dequantize(self.quantized()).to(self.decode_to).to(dtype) if made is None else made

    @property
    def qweight(self) -> Tensor:
        """One of the packed parts: peft looks under this name for the device of a layer without decoding it."""
        return getattr(self, f"_{self.names[0]}")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in any floating dtype, which the result has, too. The graph keeps no decoded matrix (see _Product)."""
        if self.rounding is not None:
            x = activations.fake_quantize(x, self.rounding)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return _Product.apply(x, self.bias, self)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        device = x.device.type
        return nn.functional.linear(x, self.decoded(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype), self.bias)

    def _apply(self, fn, recurse: bool = True) -> QuantLinear:
        """Moves to devices; casts of dtype leave the parts as they are."""
        before = {name: getattr(self, f"_{name}") for name in self.names}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, f"_{name}")
            if moved.dtype != value.dtype:
                setattr(self, f"_{name}", value.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.name}, bias={self.bias is not None}"


class PackedLinear(nn.Module):
    """y = x W^T + bias by the kernels: those for the CPU round x to 8 bits in blocks (kernels/packed.py), those for GPUs do not (kernels/triton.py). For running, not for training."""

    def __init__(self, matrix: PackedMatrix | GpuMatrix | Int8Matrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The decoded matrix, float32."""
        return self.matrix.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in any floating dtype, which the result has, too."""
        y = self.matrix.matmul(x.detach())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.matrix.nbytes:,} bytes, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T + bias, of which nothing is kept but the layer: W is decoded again for the gradient of x, G W (Dettmers et al., arXiv:2305.14314, section 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer: QuantLinear = ctx.layer
        to_x = (gradient @ layer.decoded(gradient.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


def load(built: Skeleton, dtype: torch.dtype, device: torch.device = torch.device("cpu"), *, decode_to: torch.dtype | None = None, packed: bool = False) -> nn.Module:
    """Fill the skeleton's model: quantized matrices of linear layers stay packed (decode_to: see QuantLinear; packed: PackedLinear where it can be), everything else is decoded to dtype."""
    model = built.model
    skeleton.fill_buffers(model, model, device)
    for name, module in model.named_modules():
        skeleton.fill_stored_buffers(built, name, module, device)
    install(built, model, dtype, device, decode_to, packed)
    tied = model.all_tied_weights_keys
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and not (name in tied and name not in built.sources):
            set_parameter(model, name, skeleton.load_parameter(built, name, dtype).to(device))
    model.tie_weights()
    for index, block in enumerate(built.blocks):  # those that are dense here; a QuantLinear rounds its inputs itself
        rounding.attach(block, find_linears(built, index), built.checkpoint.activations)
    return model.eval()


def install(built: Skeleton, model: nn.Module, dtype: torch.dtype, device: torch.device, decode_to: torch.dtype | None = None, packed: bool = False) -> list[str]:
    """Put a QuantLinear (or with packed a PackedLinear, where the kernels take it) where the checkpoint has a quantized matrix for a linear layer of model; returns the parameters that it replaced."""
    replaced = []
    for parameter, name in matrices(built).items():
        module = parameter.removesuffix(".weight")
        old = model.get_submodule(module)
        bias = skeleton.load_parameter(built, f"{module}.bias", dtype).to(device) if getattr(old, "bias", None) is not None else None
        qt, rounding = built.checkpoint.quantized[name].load(), built.checkpoint.activations.get(name)
        matrix = _packed(qt, rounding, device) if packed else None
        made = QuantLinear(qt, bias, rounding, decode_to).to(device) if matrix is None else PackedLinear(matrix, bias)
        model.set_submodule(module, made.eval())
        replaced.append(parameter)
    return replaced


def _packed(qt: QuantizedTensor, rounding: Rounding | None, device: torch.device) -> PackedMatrix | GpuMatrix | Int8Matrix | None:
    """The matrix in the kernels' layout, or None where they do not take it or its inputs."""
    with suppress(FormatError, ImportError):  # groups of a size that they have not; no triton
        if device.type == "cuda":
            from ..kernels.triton import pack_gpu, pack_int8

            return pack_gpu(qt, device) if rounding is None else pack_int8(qt, rounding.act, device)
        if device.type == "cpu" and rounding is None and native() is not None and can_pack(qt.scheme):
            return pack(qt)
    return None


def matrices(built: Skeleton) -> dict[str, str]:
    """The parameters of linear layers whose matrix is quantized in the checkpoint, and its name there."""
    tied = {name for pair in built.model.all_tied_weights_keys.items() for name in pair}
    found = {}
    for parameter, source in built.sources.items():
        names = source.flat()
        module = built.model.get_submodule(parameter.rpartition(".")[0])
        if source.converter is None and parameter not in tied and names[0] in built.checkpoint.quantized and type(module) in (nn.Linear, Conv1D):
            found[parameter] = names[0]
    return found


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def refuse_rounded_experts(built: Skeleton) -> None:
    """Raise ModelError where experts read rounded inputs, which only a model that lowbit builds does."""
    plain = set(matrices(built).values())
    if left := next((name for name in built.checkpoint.activations if name not in plain), None):
        raise ModelError(f"{left} is to read rounded inputs, which transformers' own experts do not. Load it with lowbit.load.")
