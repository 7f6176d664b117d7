"""The layouts of compressed-tensors: which tensors stand for one matrix X [N, K], by the library's "format" (version 0.20).

    pack-quantized          weight_packed int32 [N, ceil(K b / 32)]   weight_scale [N, G]   weight_zero_point int32 [ceil(N b / 32), G]   weight_shape int64 [2]
    int-quantized           weight int8 [N, K]                        weight_scale [N, G]   weight_zero_point int8 [N, G]
    float-quantized         weight float8_e4m3fn [N, K]               weight_scale [N, 1] or [1]         (naive-quantized where activations are not rounded)
    nvfp4-pack-quantized    weight_packed uint8 [N, K / 2]            weight_scale float8_e4m3fn [N, K / 16]   weight_global_scale float32 [1]
    mxfp4-pack-quantized    weight_packed uint8 [N, K / 2]            weight_scale uint8 (E8M0) [N, K / 32]
    mxfp8-quantized         weight float8_e4m3fn [N, K]               weight_scale uint8 (E8M0) [N, K / 32]

G scales a row; [N, 1] per channel, [1] per tensor. pack-quantized: each row is one LSB-first stream of codes, as numerics.packing, zero-points are packed along the
rows, and per tensor are int8 [1]. Codes of integers are signed, q = code - 2^(b-1); pack-quantized stores them with 2^(b-1) added again, which is lowbit's unsigned code.
Two FP4 codes share a byte, the first in the low half. A static activation adds input_scale [1] (and input_zero_point int8 [1]).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..numerics import integer, packing
from ..scheme import INT, Activation, Rounding, Scheme
from ..tensor import QuantizedTensor

PACKED = "pack-quantized"
PER_TENSOR = (-1, -1)
FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
FP8 = torch.float8_e4m3fn

Shapes = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]


@dataclass(frozen=True)
class Layout:
    """shapes: (scheme, (N, K)) -> shape and possible dtypes of every tensor. encode: QuantizedTensor -> tensors; decode is its inverse, its input checked before.

    arguments: (scheme) -> what quantization_config says of the weights. main: the tensor by which a matrix of this layout is found.
    """

    shapes: Callable[[Scheme, tuple[int, int]], Shapes]
    encode: Callable[[QuantizedTensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], Scheme, tuple[int, int], str], QuantizedTensor]
    arguments: Callable[[Scheme], dict]
    main: str


def layout_of(scheme: Scheme) -> str | None:
    """The name of the layout that holds a scheme; None: none does."""
    if scheme.outliers is not None:
        return None
    act = scheme.act
    if scheme.format == INT:
        if scheme.zero_dtype != "int" or scheme.block[0] > 1:
            return None
        plain = act is not None and act.format == INT and act.threshold is None and (act.static or act.range == "half")  # the library's own dynamic scales are "half"
        return PACKED if act is None else "int-quantized" if plain else None
    if scheme.format == "fp8_e4m3" and (scheme.block == PER_TENSOR or scheme.block == (1, -1)):
        return "naive-quantized" if act is None else "float-quantized" if act.format == "fp8_e4m3" else None
    if act is not None and act.format not in ("mxfp4", "mxfp8_e4m3"):
        return None
    return {"nvfp4": None if act else "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8_e4m3": "mxfp8-quantized"}.get(scheme.format)


def encode(qt: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, by their local names."""
    name = layout_of(qt.scheme)
    assert name is not None
    integer.refuse_order(qt, "compressed-tensors")
    return LAYOUTS[name].encode(qt)


def nbytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bytes of all tensors of a matrix."""
    name = layout_of(scheme)
    assert name is not None
    stored = [(torch.Size(size).numel(), _written_dtype(part, dtypes, scheme)) for part, (size, dtypes) in LAYOUTS[name].shapes(scheme, shape).items()]
    inputs = (4 + (0 if scheme.act.symmetric else 1)) if scheme.act is not None and scheme.act.static else 0
    return sum(count * dtype.itemsize for count, dtype in stored) + inputs


def _written_dtype(part: str, dtypes: tuple[torch.dtype, ...], scheme: Scheme) -> torch.dtype:
    return dtypes[0] if len(dtypes) == 1 else getattr(torch, scheme.scale_dtype)


# ------------------------------------------------------------------------------------------------------------------ integers


def _scale_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, ...]:
    return (1,) if scheme.block == PER_TENSOR else (shape[0], scheme.groups(shape[1]))


def _packed_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    rows, columns = shape
    found: Shapes = {"weight_packed": ((rows, packing.words_per_row(columns, scheme.bits)), (torch.int32,)), "weight_scale": (_scale_shape(scheme, shape), tuple(FLOATS))}
    if not scheme.symmetric:
        whole = scheme.block == PER_TENSOR
        found["weight_zero_point"] = ((1,), (torch.int8,)) if whole else ((packing.words_per_row(rows, scheme.bits), scheme.groups(columns)), (torch.int32,))
    return {**found, "weight_shape": ((2,), (torch.int64,))}


def _encode_packed(qt: QuantizedTensor) -> dict[str, Tensor]:
    parts = {"weight_packed": packing.pack(qt.parts["codes"], qt.scheme.bits), "weight_scale": _flat_scale(qt)}
    if not qt.scheme.symmetric:
        zero = qt.parts["zero_point"]
        parts["weight_zero_point"] = _signed(zero, qt.scheme).reshape(1) if qt.scheme.block == PER_TENSOR else packing.pack(zero.T.contiguous(), qt.scheme.bits).T.contiguous()
    parts["weight_shape"] = torch.tensor(qt.shape, dtype=torch.int64)
    return parts


def _decode_packed(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    rows, columns = shape
    decoded = {"codes": packing.unpack(parts["weight_packed"], scheme.bits, columns), "scale": parts["weight_scale"].reshape(-1, scheme.groups(columns))}
    if not scheme.symmetric:
        zero = parts["weight_zero_point"]
        decoded["zero_point"] = _unsigned(zero, scheme).reshape(1, 1) if scheme.block == PER_TENSOR else packing.unpack(zero.T.contiguous(), scheme.bits, rows).T.contiguous()
    return QuantizedTensor(scheme, shape, dtype, decoded)


def _int8_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    found: Shapes = {"weight": (shape, (torch.int8,)), "weight_scale": (_scale_shape(scheme, shape), tuple(FLOATS))}
    return found if scheme.symmetric else {**found, "weight_zero_point": (_scale_shape(scheme, shape), (torch.int8,))}


def _encode_int8(qt: QuantizedTensor) -> dict[str, Tensor]:
    parts = {"weight": _signed(qt.parts["codes"], qt.scheme), "weight_scale": _flat_scale(qt)}
    if not qt.scheme.symmetric:
        zero = _signed(qt.parts["zero_point"], qt.scheme)
        parts["weight_zero_point"] = zero.reshape(1) if qt.scheme.block == PER_TENSOR else zero
    return parts


def _decode_int8(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    half = scheme.zero_code
    codes = parts["weight"]
    if int(codes.min()) < -half or int(codes.max()) >= half:
        raise CheckpointError(f"a code is outside of {scheme.bits} bits ({int(codes.min())} to {int(codes.max())}).")
    decoded = {"codes": _unsigned(codes, scheme), "scale": parts["weight_scale"].reshape(-1, scheme.groups(shape[1]))}
    if not scheme.symmetric:
        decoded["zero_point"] = _unsigned(parts["weight_zero_point"], scheme).reshape(decoded["scale"].shape)
    return QuantizedTensor(scheme, shape, dtype, decoded)


def _flat_scale(qt: QuantizedTensor) -> Tensor:
    return qt.parts["scale"].reshape(1) if qt.scheme.block == PER_TENSOR else qt.parts["scale"]


def _signed(codes: Tensor, scheme: Scheme) -> Tensor:
    return (codes.to(torch.int16) - scheme.zero_code).to(torch.int8)


def _unsigned(codes: Tensor, scheme: Scheme) -> Tensor:
    return (codes.to(torch.int16) + scheme.zero_code).to(torch.uint8)


def _int_arguments(scheme: Scheme) -> dict:
    strategy = {(1, -1): "channel", PER_TENSOR: "tensor"}.get(scheme.block, "group")
    return {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": strategy, "group_size": scheme.group_size if strategy == "group" else None, "dynamic": False,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ floats


def _fp8_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    return {"weight": (shape, (FP8,)), "weight_scale": (_scale_shape(scheme, shape), tuple(FLOATS))}


def _encode_fp8(qt: QuantizedTensor) -> dict[str, Tensor]:
    return {"weight": qt.parts["codes"].view(FP8), "weight_scale": _flat_scale(qt)}


def _decode_fp8(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    return QuantizedTensor(scheme, shape, dtype, {"codes": _numbers(parts["weight"]), "scale": parts["weight_scale"].reshape(-1, 1)})


def _mxfp8_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    return {"weight": (shape, (FP8,)), "weight_scale": ((shape[0], shape[1] // 32), (torch.uint8,))}


def _encode_mxfp8(qt: QuantizedTensor) -> dict[str, Tensor]:
    return {"weight": qt.parts["codes"].view(FP8), "weight_scale": qt.parts["scale"]}


def _decode_mxfp8(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    return QuantizedTensor(scheme, shape, dtype, {"codes": _numbers(parts["weight"]), "scale": _exponents(parts["weight_scale"])})


def _exponents(scale: Tensor) -> Tensor:
    """E8M0 scales; CheckpointError when one is NaN."""
    if bool((scale == 0xFF).any()):
        raise CheckpointError("a scale is NaN (the exponent 255).")
    return scale


def _numbers(codes: Tensor) -> Tensor:
    """The bit patterns of FP8 numbers; CheckpointError when one is NaN."""
    patterns = codes.view(torch.uint8)
    if bool((patterns & 0x7F == 0x7F).any()):
        raise CheckpointError("an FP8 number is NaN.")
    return patterns


def _fp4_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    rows, columns = shape
    found: Shapes = {"weight_packed": ((rows, columns // 2), (torch.uint8,)), "weight_scale": ((rows, columns // scheme.group_size), (FP8 if scheme.format == "nvfp4" else torch.uint8,))}
    return {**found, "weight_global_scale": ((1,), (torch.float32,))} if scheme.format == "nvfp4" else found


def _encode_fp4(qt: QuantizedTensor) -> dict[str, Tensor]:
    codes = qt.parts["codes"]
    parts = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": qt.parts["scale"]}
    if qt.scheme.format == "nvfp4":
        parts |= {"weight_scale": parts["weight_scale"].view(FP8), "weight_global_scale": qt.parts["global_scale"].reshape(1)}
    return parts


def _decode_fp4(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    decoded = {"codes": torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1), "scale": scale}
    if scheme.format == "nvfp4":
        total = parts["weight_global_scale"]
        if not bool(torch.isfinite(total).all()) or float(total) <= 0:
            raise CheckpointError(f"weight_global_scale is {float(total)}; expected a positive number.")
        decoded |= {"scale": _numbers(scale), "global_scale": total.reshape(())}
    else:
        decoded["scale"] = _exponents(scale)
    return QuantizedTensor(scheme, shape, dtype, decoded)


def _float_arguments(scheme: Scheme) -> dict:
    if scheme.group_size == -1:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor" if scheme.block == PER_TENSOR else "channel", "group_size": None, "dynamic": False}
    nv = scheme.format == "nvfp4"
    return {
        "num_bits": scheme.bits, "type": "float", "symmetric": True, "strategy": "tensor_group" if nv else "group", "group_size": scheme.group_size, "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn" if nv else "torch.uint8",
    }  # fmt: skip


LAYOUTS: dict[str, Layout] = {
    PACKED: Layout(_packed_shapes, _encode_packed, _decode_packed, _int_arguments, "weight_packed"),
    "int-quantized": Layout(_int8_shapes, _encode_int8, _decode_int8, _int_arguments, "weight"),
    "float-quantized": Layout(_fp8_shapes, _encode_fp8, _decode_fp8, _float_arguments, "weight"),
    "naive-quantized": Layout(_fp8_shapes, _encode_fp8, _decode_fp8, _float_arguments, "weight"),
    "nvfp4-pack-quantized": Layout(_fp4_shapes, _encode_fp4, _decode_fp4, _float_arguments, "weight_packed"),
    "mxfp4-pack-quantized": Layout(_fp4_shapes, _encode_fp4, _decode_fp4, _float_arguments, "weight_packed"),
    "mxfp8-quantized": Layout(_mxfp8_shapes, _encode_mxfp8, _decode_mxfp8, _float_arguments, "weight"),
}


# ------------------------------------------------------------------------------------------------------------------ activations


def activation_arguments(act: Activation) -> dict:
    """What quantization_config says of rounded inputs."""
    if act.format.startswith("mxfp"):
        return {"num_bits": act.bits, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"}
    kind = "int" if act.format == INT else "float"
    return {"num_bits": act.bits, "type": kind, "symmetric": act.symmetric, "strategy": act.per, "group_size": None, "dynamic": not act.static}


def activation_tensors(rounding: Rounding) -> dict[str, Tensor]:
    """The tensors of a static rounding."""
    if rounding.scale is None:
        return {}
    parts = {"input_scale": torch.tensor([rounding.scale])}
    if not rounding.act.symmetric:
        parts["input_zero_point"] = torch.tensor([round(rounding.zero_point) - 2 ** (rounding.act.bits - 1)], dtype=torch.int8)
    return parts
