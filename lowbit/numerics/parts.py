"""A quantized matrix as tensors to store: its parts, with codes of fewer than 8 bits packed along the rows.

    int, nf4, fp4, small floats, binary, ternary   codes int32 [N, ceil(K b / 32)], each row one LSB-first stream of b-bit codes (packing.py); uint8 [N, K] for 8 bits
    all others                                     as QuantizedTensor has them

Which parts a scheme has, and their shapes and dtypes, is the table in shapes(). G: groups of a row, B: blocks of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import CASTS, INT, Scheme
from ..tensor import QuantizedTensor
from . import additive, codebook, floating, ggml, lattice, outliers, packing, ternary

Shapes = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
INDICES = ("g_idx", outliers.INDEX)
OF_COLUMNS = ("g_idx", *outliers.OF_CHANNELS)  # parts with a number for each input channel, and no row for each output
SIGNS = ("row_signs", "column_signs")


def code_bits(scheme: Scheme) -> int | None:
    """Bits of a code that is packed; None: the format has no codes of that kind."""
    if scheme.format == INT:
        return scheme.bits
    if scheme.format in codebook.CODES:
        return 4
    if scheme.format in floating.KINDS:
        return floating.KINDS[scheme.format].element.bits
    return ternary.KINDS[scheme.format].bits if scheme.format in ternary.KINDS else None


def store(qt: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, in the order of their names; restore is the inverse."""
    bits = code_bits(qt.scheme)
    packed = {"codes": packing.pack(qt.parts["codes"], bits)} if bits is not None and bits < 8 else {}
    return {name: value.contiguous() for name, value in sorted({**qt.parts, **packed}.items())}


def restore(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    """The matrix that tensors stand for, whose names, shapes and dtypes are those of shapes(); CheckpointError for values that mean nothing."""
    parts, bits = dict(stored), code_bits(scheme)
    if bits is not None and bits < 8:
        parts["codes"] = packing.unpack(parts["codes"], bits, shape[1])
    for name, value in parts.items():
        if value.is_floating_point() and value.dtype in (torch.float32, torch.float16, torch.bfloat16) and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} holds NaN or infinity. The file is damaged.")
    if scheme.format == "ternary" and bool((parts["codes"] > 2).any()):
        raise CheckpointError("a ternary code is 3; expected 0, 1 and 2.")
    if scheme.format == INT and "zero_point" in parts and parts["zero_point"].dtype == torch.uint8 and int(parts["zero_point"].max()) > scheme.max_code:
        raise CheckpointError(f"a zero-point is {int(parts['zero_point'].max())}; expected at most {scheme.max_code}.")
    limits = {"g_idx": scheme.groups(shape[1]), outliers.INDEX: shape[1]}
    for name in INDICES:
        if name in parts and (int(parts[name].min()) < 0 or int(parts[name].max()) >= limits[name]):
            raise CheckpointError(f"{name} reaches from {int(parts[name].min())} to {int(parts[name].max())}; expected 0 to {limits[name] - 1}.")
    return QuantizedTensor(scheme, shape, dtype, parts)


def shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    """Shape and possible dtypes of every stored part of a matrix [N, K]. g_idx, which only some integer matrices have, is among them: see optional."""
    found = next(make for formats, make in _SHAPES if scheme.format in formats)(scheme, shape)
    bits = code_bits(scheme)
    if bits is not None:
        found["codes"] = (shape, (torch.uint8,)) if bits == 8 else ((shape[0], packing.words_per_row(shape[1], bits)), (torch.int32,))
    if scheme.outliers is not None:
        count = min(scheme.outliers, shape[1])
        found |= {outliers.INDEX: ((count,), (torch.int32,)), outliers.WEIGHT: ((shape[0], count), (torch.int8 if scheme.outlier_bits == 8 else torch.float16,))}
        found |= {outliers.SCALE: ((count,), (torch.float16,))} if scheme.outlier_bits == 8 else {}
    return found


def optional(scheme: Scheme) -> tuple[str, ...]:
    """The parts that a matrix of this scheme may lack."""
    return ("g_idx",) if scheme.format == INT else ()


def _scales(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    if scheme.block == (-1, -1):
        return 1, 1
    return (shape[0] * shape[1] // scheme.block[0], 1) if scheme.block[0] > 1 else (shape[0], scheme.groups(shape[1]))


def _int(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    stored = getattr(torch, scheme.scale_dtype)
    found: Shapes = {"scale": (_scales(scheme, shape), (stored,)), "g_idx": ((shape[1],), (torch.int32,))}
    return found if scheme.symmetric else {**found, "zero_point": (_scales(scheme, shape), (torch.uint8 if scheme.zero_dtype == "int" else stored,))}


def _cast(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    return {"weight": (shape, (getattr(torch, scheme.format),))}


def _ggml(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    kind = ggml.BLOCK_TYPES[scheme.format]
    return {"blocks": ((shape[0], shape[1] // kind.block_size * kind.block_bytes), (torch.uint8,))}


def _codebook(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    blocks = -(-shape[0] * shape[1] // scheme.block[1])
    if scheme.nested:
        return {"absmax_codes": ((blocks,), (torch.uint8,)), "nested_absmax": ((-(-blocks // scheme.nested),), (torch.float32,)), "nested_offset": ((), (torch.float32,))}
    return {"absmax": ((shape[0], blocks // shape[0]) if codebook.rowwise(scheme, shape[1]) else (blocks,), (torch.float32,))}


def _floating(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    kind = floating.KINDS[scheme.format].scale
    found: Shapes = {"scale": (_scales(scheme, shape), (getattr(torch, scheme.scale_dtype) if kind == "float" else torch.uint8,))}
    return {**found, "global_scale": ((), (torch.float32,))} if kind == "nvfp4" else found


def _ternary(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    return {"scale": (_scales(scheme, shape), (getattr(torch, scheme.scale_dtype),))}


def _additive(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    count, bits = additive.KINDS[scheme.format]
    codes = ((shape[0], shape[1] // additive.GROUP, count), (torch.uint8 if bits <= 8 else torch.int16,))
    return {"codes": codes, "codebooks": ((count, 1 << bits, additive.GROUP), (torch.float16,)), "scale": ((shape[0],), (torch.float16,))}


def _lattice(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    kind, points = lattice.KINDS[scheme.format], (shape[0], shape[1] // lattice.GROUP)
    found: Shapes = {"points": (points, (torch.int16,)), "scale": ((1,), (torch.float32,))}
    found |= {name: ((packing.words_per_row(count, 1),), (torch.int32,)) for name, count in zip(SIGNS, shape, strict=True)}
    if kind.residual is not None:
        found |= {"residual": (points, (torch.uint8 if kind.bits == 3 else torch.int16,)), "residual_scale": ((1,), (torch.float32,))}
    return found


_SHAPES: tuple[tuple[Container[str], Callable[[Scheme, tuple[int, int]], Shapes]], ...] = (
    ((INT,), _int), (CASTS, _cast), (ggml.BLOCK_TYPES, _ggml), (codebook.CODES, _codebook), (floating.KINDS, _floating), (ternary.KINDS, _ternary),
    (additive.KINDS, _additive), (lattice.KINDS, _lattice),
)  # fmt: skip
