"""Number formats: what a code means. quantize, dequantize and size of any of them, by one table.

Adding a format is one file and one entry in FORMATS; tests/numerics/test_contract.py then runs on it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError, RecipeError, ShapeError
from ..scheme import CASTS, INT, SCALE_DTYPES, RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape
from . import additive, cast, codebook, floating, ggml, hadamard, integer, lattice, outliers, parts, ternary

__all__ = ["FORMATS", "Format", "bits_per_weight", "check_shape", "dequantize", "has_rows", "nbytes", "quantize", "refuse_bad_values", "rows_of", "scheme_of"]


@dataclass(frozen=True)
class Format:
    """One number format.

    quantize: (W, scheme, search, importance) -> QuantizedTensor, plain rounding; None for one that is only read. dequantize: QuantizedTensor -> float32.
    bits: (scheme, out_features, in_features) -> stored bits in all. multiple: in_features must be divisible by it.
    rowwise: (scheme, in_features) -> whether all parts have a row for each output, so that matrices can be put together and taken apart by rows.
    """

    quantize: Callable[[Tensor, Scheme, RangeSearch, Tensor | None], QuantizedTensor] | None
    dequantize: Callable[[QuantizedTensor], Tensor]
    bits: Callable[[Scheme, int, int], int]
    multiple: int = 1
    rowwise: Callable[[Scheme, int], bool] = lambda scheme, columns: True
    description: str = ""


def _int_bits(scheme: Scheme, rows: int, columns: int) -> int:
    groups = 1 if scheme.block == (-1, -1) else rows * columns // scheme.block[0] if scheme.block[0] > 1 else rows * scheme.groups(columns)
    scale_bits = 32 if scheme.scale_dtype == SCALE_DTYPES[0] else 16
    zero_bits = 0 if scheme.symmetric else scheme.bits if scheme.zero_dtype == "int" else scale_bits
    return rows * columns * scheme.bits + groups * (scale_bits + zero_bits)


def _ggml_entry(name: str) -> Format:
    kind = ggml.BLOCK_TYPES[name]

    def make(W: Tensor, scheme: Scheme, search: RangeSearch, importance: Tensor | None) -> QuantizedTensor:
        return QuantizedTensor(scheme, matrix_shape(W.shape), str(W.dtype).removeprefix("torch."), {"blocks": ggml.encode(W, name, importance=importance)})

    return Format(
        quantize=None if kind.instead else make,
        dequantize=lambda qt: ggml.decode(qt.parts["blocks"], name),
        bits=lambda scheme, rows, columns: rows * (columns // kind.block_size) * kind.block_bytes * 8,
        multiple=kind.block_size,
        description=f"ggml {name.removeprefix('ggml_').upper()}: blocks of {kind.block_size} in {kind.block_bytes} bytes{', only read' if kind.instead else ''}",
    )


FORMATS: dict[str, Format] = {
    INT: Format(integer.quantize, integer.dequantize, _int_bits, rowwise=lambda scheme, columns: scheme.block[0] == 1, description="uniform integers, 2 to 8 bits, with a scale per group"),
    **{name: Format(cast.quantize, cast.dequantize, cast.bits, description=f"rounded to {name}") for name in CASTS},
    **{name: _ggml_entry(name) for name in ggml.BLOCK_TYPES},
    **{
        name: Format(codebook.quantize, codebook.dequantize, codebook.bits, rowwise=codebook.rowwise, description=f"{name.upper()}: 16 values times the largest magnitude of a block")
        for name in codebook.CODES
    },
    **{
        name: Format(floating.quantize, floating.dequantize, floating.bits, floating.KINDS[name].block or 1, floating.rowwise, description=floating.describe(name))
        for name in floating.KINDS
    },
    **{
        name: Format(ternary.quantize, ternary.dequantize, ternary.bits, rowwise=ternary.rowwise, description=f"{', '.join(f'{v:g}' for v in kind.values)} times a mean magnitude (BitNet)")
        for name, kind in ternary.KINDS.items()
    },
    **{
        name: Format(additive.quantize, additive.dequantize, additive.bits, additive.GROUP, lambda scheme, columns: False, additive.describe(name))
        for name in additive.KINDS
    },
    **{
        name: Format(lattice.quantize, lattice.dequantize, lattice.bits, lattice.GROUP, lambda scheme, columns: False, lattice.describe(name))
        for name in lattice.KINDS
    },
}


def scheme_of(name: str, *, bits: int = 4, **given: object) -> Scheme:
    """The scheme of a number format by its name, e.g. "nf4", "q4_k", "int" (with bits), with what belongs to it; given: fields that are chosen (block, nested, ...)."""
    if name == INT:
        return Scheme(INT, bits, **given)  # type: ignore[arg-type]
    if name in codebook.CODES:
        return Scheme(name, 4, **given)  # type: ignore[arg-type]
    if name in floating.KINDS:
        kind = floating.KINDS[name]
        return Scheme(name, kind.element.bits, **{"block": (1, kind.block) if kind.block else (1, -1), **given})  # type: ignore[arg-type]
    if name in ggml.BLOCK_TYPES:
        return ggml.scheme(name)
    if name in ternary.KINDS:
        return Scheme(name, ternary.KINDS[name].bits, **{"block": (-1, -1), **given})  # type: ignore[arg-type]
    if name in lattice.KINDS:
        return Scheme(name, lattice.KINDS[name].bits, (-1, -1))
    if name in additive.KINDS:
        return Scheme(name, additive.KINDS[name][1], (-1, -1))
    return Scheme(name, 32 if name == "float32" else 16)


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Round W [out_features, in_features] to the nearest values of the scheme (round to nearest); W is not changed.

    importance [in_features]: the weight of each input channel's squared error where the format searches scales.
    """
    check_shape(scheme, W.shape)
    make = entry(scheme).quantize
    if make is None:
        raise RecipeError(ggml.only_read(scheme.format))
    if scheme.outliers is None:
        return make(W, scheme, search, importance)
    index = outliers.choose(W, scheme.outliers, importance)
    return outliers.add(make(outliers.without(W, index), outliers.plain(scheme), search, importance), scheme, W, index)


def dequantize(qt: QuantizedTensor) -> Tensor:
    """The values that the codes stand for, float32 [out_features, in_features]."""
    values = entry(qt.scheme).dequantize(qt)
    return values if qt.scheme.outliers is None else outliers.restore_(values, qt)


def has_rows(scheme: Scheme, columns: int) -> bool:
    """Whether such a matrix can be taken apart by output rows (rows_of)."""
    return entry(scheme).rowwise(scheme, columns) or scheme.format == "nvfp4"  # each part of which keeps the factor of the whole


def rows_of(qt: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows start to stop (at most to the last) of a matrix that has_rows; views of its parts."""
    some = {name: value if name in parts.OF_COLUMNS or value.ndim == 0 else value[start:stop] for name, value in qt.parts.items()}
    return QuantizedTensor(qt.scheme, (min(stop, qt.shape[0]) - start, qt.shape[1]), qt.dtype, some)


def bits_per_weight(scheme: Scheme, shape: tuple[int, int]) -> float:
    """Stored bits per weight, scales and zero-points included."""
    return bits(scheme, shape) / (shape[0] * shape[1])


def nbytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Stored bytes of a matrix, scales and zero-points included (without padding to words)."""
    return -(-bits(scheme, shape) // 8)


def bits(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Stored bits of a matrix in all."""
    return entry(scheme).bits(scheme, *shape) + outliers.bits(scheme, *shape)


def entry(scheme: Scheme) -> Format:
    """The table entry of a scheme's format."""
    if scheme.format not in FORMATS:
        raise RecipeError(f"number format {scheme.format!r} is not known; known: {', '.join(FORMATS)}.")
    return FORMATS[scheme.format]


def check_shape(scheme: Scheme, shape: tuple[int, ...], *, name: str = "the weight") -> None:
    """Raise ShapeError when a matrix of this shape cannot be stored in the scheme."""
    if len(shape) != 2:
        raise ShapeError(f"{name}: a weight is a matrix [out_features, in_features]; got {list(shape)}.")
    multiple = entry(scheme).multiple
    if shape[1] % multiple:
        raise ShapeError(f"{name}: {scheme.name} needs in_features to be a multiple of {multiple}, and {shape[1]} is not.")
    if scheme.block[0] > 1 and shape[0] * shape[1] % scheme.block[0]:
        raise ShapeError(f"{name}: groups of {scheme.block[0]} do not divide {shape[0]} x {shape[1]} weights.")
    if scheme.format in lattice.KINDS:
        for side in shape:
            hadamard.check(side)


def refuse_bad_values(W: Tensor, name: str) -> None:
    """Raise FormatError naming the weight when it holds NaN or infinity."""
    total = W.sum(dtype=torch.float64 if W.dtype == torch.float32 else torch.float32)
    if torch.isfinite(total):
        return
    bad = int((~torch.isfinite(W)).sum())
    if bad:
        raise FormatError(f"{name}: {bad} of {W.numel()} values are NaN or infinite. The checkpoint is damaged; nothing was quantized from it.")
