"""ggml's block types: all that llama.cpp reads weights of, decoded; and those that lowbit writes, encoded.

Here are Q4_0 to Q8_0 and the decoding of Q2_K to Q6_K (encoded in ggml_kquants). IQ4, the ternary types and FP4 are in ggml_tables, IQ1 to IQ3 in ggml_iquants.

A row is a sequence of blocks; fp16 and integers are little-endian. Bytes of each block, first to last:

    q4_0  32   d f16, 16 bytes: elements i and i + 16 in the low and high half       w = (code - 8) d
    q4_1  32   d, m, 16 bytes as q4_0                                                w = code d + m
    q5_0  32   d, 4 bytes: bit 4 of element i in bit i, 16 bytes as q4_0             w = (code - 16) d
    q5_1  32   d, m, 4 + 16 bytes as q5_0                                            w = code d + m
    q8_0  32   d, 32 int8                                                            w = code d
    q2_k  256  16 bytes of scale and minimum, 64 of codes, d, dmin                   w = d ls code - dmin lm
    q3_k  256  32 bytes of high bits, 64 of low bits, 12 of scales, d                w = d (ls - 32) (code - 4)
    q4_k  256  d, dmin, 12 bytes of scales and minima, 128 of codes                  w = d ls code - dmin lm
    q5_k  256  d, dmin, 12 bytes of scales and minima, 32 of high bits, 128          w = d ls code - dmin lm
    q6_k  256  128 bytes of low bits, 64 of high bits, 16 int8 scales, d             w = d ls (code - 32)

Source: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp; gguf-py's quants.py and libggml are the oracles of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError, RecipeError, ShapeError
from ..native import native, threads
from ..scheme import Scheme
from .ggml_iquants import SHARES, decode_grid
from .ggml_kquants import (
    FINE_TRIALS,
    KQUANTS,
    SUPER_BLOCK,
    TOO_LARGE,
    as_half,
    encode_super_blocks,
    join_fields,
    pack_super_blocks,
    read_half,
    reciprocal,
    search_affine,
    search_scale,
    signed_peak,
    split_fields,
)
from .ggml_tables import TABLES, decode_table, encode_table, take, with_table_codes


@dataclass(frozen=True)
class BlockType:
    """name: "q4_0". type_id: ggml's enum. block_size: elements of a block. block_bytes: bytes of a block.

    instead: of a type that is only read, the nearest one that is written too; "" where it is written itself.
    """

    name: str
    type_id: int
    block_size: int
    block_bytes: int
    instead: str = ""


BLOCK_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("q4_0", 2, 32, 2 + 16),
        BlockType("q4_1", 3, 32, 2 + 2 + 16),
        BlockType("q5_0", 6, 32, 2 + 4 + 16),
        BlockType("q5_1", 7, 32, 2 + 2 + 4 + 16),
        BlockType("q8_0", 8, 32, 2 + 32),
        BlockType("q2_k", 10, 256, 16 + 64 + 2 + 2),
        BlockType("q3_k", 11, 256, 32 + 64 + 12 + 2),
        BlockType("q4_k", 12, 256, 2 + 2 + 12 + 128),
        BlockType("q5_k", 13, 256, 2 + 2 + 12 + 32 + 128),
        BlockType("q6_k", 14, 256, 128 + 64 + 16 + 2),
        BlockType("iq4_nl", 20, 32, 2 + 16),
        BlockType("iq4_xs", 23, 256, 2 + 2 + 4 + 128),
        BlockType("tq1_0", 34, 256, 48 + 4 + 2),
        BlockType("tq2_0", 35, 256, 64 + 2),
        BlockType("ggml_mxfp4", 39, 32, 1 + 16),
        BlockType("iq2_xxs", 16, 256, 2 + 64, instead="q2_k"),
        BlockType("iq2_xs", 17, 256, 2 + 64 + 8, instead="q2_k"),
        BlockType("iq3_xxs", 18, 256, 2 + 64 + 32, instead="q3_k"),
        BlockType("iq1_s", 19, 256, 2 + 32 + 16, instead="q2_k"),
        BlockType("iq3_s", 21, 256, 2 + 64 + 8 + 32 + 4, instead="q3_k"),
        BlockType("iq2_s", 22, 256, 2 + 32 + 32 + 8 + 8, instead="q2_k"),
        BlockType("iq1_m", 29, 256, 32 + 16 + 8, instead="q2_k"),
        BlockType("ggml_nvfp4", 40, 64, 4 + 32, instead="ggml_mxfp4"),
        BlockType("q1_0", 41, 128, 2 + 16, instead="q2_k"),
        BlockType("q2_0", 42, 64, 2 + 16, instead="tq2_0"),
    )
}

WRITTEN = tuple(name for name, kind in BLOCK_TYPES.items() if not kind.instead)


@dataclass(frozen=True)
class _Legacy:
    """The codes of a 32-element type: bits, and the zero point of the symmetric ones (None: a minimum is stored)."""

    bits: int
    zero_point: int | None


_LEGACY = {
    "q4_0": _Legacy(4, 8),
    "q4_1": _Legacy(4, None),
    "q5_0": _Legacy(5, 16),
    "q5_1": _Legacy(5, None),
    "q8_0": _Legacy(8, 128),
}

# Weights of one pass. Its dozen float32 buffers take at most 32 MB; a CPU is faster when they stay in its cache.
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 19
_NATIVE_CHUNK = 1 << 22  # of the C++ encoders, which need no buffers

# About the share of the mean that a column of importance 0 counts for: ggml would store zeros for a block of them.
_LEAST_IMPORTANCE = 1e-6


def decode(blocks: Tensor, type_name: str) -> Tensor:
    """The values of blocks, bit for bit those of ggml.

    blocks: uint8 [rows, row_bytes]. Returns float32 [rows, columns].
    Raises FormatError for an unknown type, ShapeError when row_bytes is not a multiple of block_bytes.
    """
    kind = _block_type(type_name)
    rows = blocks.shape[0]
    values = torch.empty(rows, _blocks_per_row(blocks, kind) * kind.block_size, dtype=torch.float32, device=blocks.device)
    for part in _row_chunks(values):
        values[part] = _decode_blocks(blocks[part].reshape(-1, kind.block_bytes), kind).view(-1, values.shape[1])
    return values


def encode(W: Tensor, type_name: str, *, importance: Tensor | None = None) -> Tensor:
    """Encode a matrix as ggml blocks; W is not changed.

    W: float [rows, columns]. importance: [columns], the mean square of each input channel (llama.cpp's imatrix); only its proportions
    matter. Returns uint8 [rows, row_bytes].
    Equal to llama-quantize bit for bit: Q4_0 to Q5_1 without importance; IQ4_NL and IQ4_XS with it and without; Q8_0, TQ1_0, TQ2_0 and MXFP4, which do
    not use it.
    Raises ShapeError when columns is not a multiple of the block size or importance is not [columns]; FormatError for an unknown type,
    NaN or infinity, negative importance, and weights too large for the type's float16 scale; RecipeError for a type that is only read.
    """
    kind = _block_type(type_name)
    if kind.instead:
        raise RecipeError(only_read(type_name))
    _check_columns(W, kind)
    if importance is not None:
        importance = _relative_importance(importance, W)
    blocks = torch.empty(W.shape[0], W.shape[1] // kind.block_size * kind.block_bytes, dtype=torch.uint8, device=W.device)
    extension = native() if W.device.type == "cpu" and (kind.name in KQUANTS or (kind.name in _LEGACY and kind.name != "q8_0" and importance is not None)) else None
    for part in _row_chunks(W, _CPU_CHUNK if extension is None else _NATIVE_CHUNK):
        X = W[part].detach().float().contiguous()
        # A finite sum proves all values finite in one pass; an infinite one can also be an overflow.
        if not torch.isfinite(X.sum()) and not torch.isfinite(X).all():
            raise FormatError(
                f"{kind.name}: NaN or infinity among rows {part.start} to {part.stop - 1}; a block holds finite weights only."
            )
        if extension is None:
            blocks[part] = _encode_rows(X, kind, importance).view(X.shape[0], -1)
        elif not extension.encode(X.numpy(), kind.name, None if importance is None else importance.numpy(), blocks[part].numpy(), threads()):
            raise FormatError(TOO_LARGE)
    return blocks


def pack_codes(type_name: str, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Store existing codes unchanged as blocks of a 32-element type.

    codes: uint8 [rows, columns]. scale, minimum: float16 [rows, columns // 32]. w = (code - z) * scale with z = 8 (q4_0), 16 (q5_0),
    128 (q8_0); w = code * scale + minimum (q4_1, q5_1).
    Returns uint8 [rows, row_bytes].
    Raises FormatError for another type, a code out of range, a minimum too many or missing; ShapeError for a shape that does not fit.
    """
    kind, legacy = _legacy_type(type_name)
    _check_columns(codes, kind)
    if (minimum is None) != (legacy.zero_point is not None):
        raise FormatError(f"{type_name} {'stores no' if minimum is not None else 'needs a'} minimum.")
    for name, parameter in (("scale", scale), ("minimum", minimum)):
        expected = [codes.shape[0], codes.shape[1] // kind.block_size]
        if parameter is not None and list(parameter.shape) != expected:
            raise ShapeError(f"{type_name}: {name} is {list(parameter.shape)} and codes {list(codes.shape)} need {expected}.")
    if codes.numel() and int(codes.max()) >> legacy.bits:
        raise FormatError(f"{type_name} holds codes 0 to {(1 << legacy.bits) - 1}; got {int(codes.max())}.")
    columns = (t.reshape(-1, 1) for t in (scale, minimum) if t is not None)
    return _pack_legacy(codes.reshape(-1, kind.block_size), *columns, legacy=legacy).view(codes.shape[0], -1)


def unpack_codes(type_name: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of pack_codes: codes uint8 [rows, columns], scale and minimum (or None) float16 [rows, columns // 32]."""
    kind, legacy = _legacy_type(type_name)
    shape = (blocks.shape[0], _blocks_per_row(blocks, kind))
    codes, scale, minimum = _unpack_legacy(blocks.reshape(-1, kind.block_bytes), legacy)
    return codes.reshape(shape[0], -1), scale.reshape(shape), None if minimum is None else minimum.reshape(shape)


def only_read(type_name: str) -> str:
    """Why a type with BlockType.instead cannot be made, and what can."""
    return f"{type_name} is read from GGUF files and not made: lowbit has no encoder for it. Use {BLOCK_TYPES[type_name].instead}, the nearest type that it makes."


def scheme(type_name: str) -> Scheme:
    """The scheme of a block type."""
    block = (1, share(type_name))
    bits = next(int(letter) for letter in type_name if letter.isdigit())
    return Scheme(format=type_name, bits=bits, block=block, symmetric=not _has_minimum(type_name), range="full", scale_dtype="float16")


def affine(type_name: str, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """What blocks uint8 [rows, row_bytes] decode with: w = scale * q + offset, float32 [rows, columns // share]; offset None where there is none."""
    kind, rows = _block_type(type_name), blocks.shape[0]
    parts = blocks.reshape(-1, kind.block_bytes)
    if type_name in TABLES:
        return TABLES[type_name].scales(parts).reshape(rows, -1), None
    if type_name in KQUANTS:
        _, scale, minimum = _SPLIT[type_name](parts)
        return scale.reshape(rows, -1), None if minimum is None else -minimum.reshape(rows, -1)
    _, scale, minimum = _unpack_legacy(parts, _LEGACY[type_name])
    return scale.float().reshape(rows, -1), None if minimum is None else minimum.float().reshape(rows, -1)


def share(type_name: str) -> int:
    """Columns that share a scale."""
    if type_name in TABLES:
        return TABLES[type_name].share
    if type_name in SHARES:
        return SHARES[type_name]
    return KQUANTS[type_name].group if type_name in KQUANTS else _block_type(type_name).block_size


def bounds(type_name: str) -> tuple[float, float]:
    """The least and the largest q of w = scale * q + offset, of a type that is written."""
    if type_name in TABLES:
        return TABLES[type_name].bounds
    if type_name in KQUANTS:
        return KQUANTS[type_name].low, KQUANTS[type_name].high
    legacy = _legacy_type(type_name)[1]
    zero = legacy.zero_point or 0
    return -zero, (1 << legacy.bits) - 1 - zero


def codes_of(type_name: str, blocks: Tensor) -> Tensor | None:
    """Codes uint8 [rows, columns] of blocks uint8 [rows, row_bytes], counted from 0: q = code + bounds()[0]; None for types of tables, whose codes are places in them."""
    kind, rows = _block_type(type_name), blocks.shape[0]
    parts = blocks.reshape(-1, kind.block_bytes)
    if type_name in KQUANTS:
        codes = _SPLIT[type_name](parts)[0]
        return (codes if codes.dtype == torch.uint8 else (codes - int(KQUANTS[type_name].low)).view(torch.uint8)).reshape(rows, -1)
    return _unpack_legacy(parts, _LEGACY[type_name])[0].reshape(rows, -1) if type_name in _LEGACY else None


def nearest(type_name: str) -> Callable[[Tensor], Tensor] | None:
    """x -> the q nearest to it, of a written type whose codes are places in a table; None where q is any whole number within bounds."""
    if type_name not in TABLES:
        return None
    values, code_of = TABLES[type_name].values, TABLES[type_name].nearest
    assert code_of is not None
    return lambda x: take(values, code_of(x))


def with_codes(type_name: str, blocks: Tensor, q: Tensor) -> Tensor:
    """blocks [rows, row_bytes] with other codes: q [rows, columns] within bounds, scales and minima as they are."""
    kind = _block_type(type_name)
    if type_name in TABLES:
        return with_table_codes(type_name, blocks.reshape(-1, kind.block_bytes), q.reshape(-1, kind.block_size)).view_as(blocks)
    low, high = bounds(type_name)
    codes = (q - low).to(torch.uint8).reshape(-1, kind.block_size)
    ends = torch.tensor([[0], [high - low]], dtype=torch.uint8, device=q.device).expand(2, kind.block_size).contiguous()
    first, last = _bare(ends, type_name)
    mask = first ^ last  # the bits that codes lie in
    return (blocks.reshape(-1, kind.block_bytes) & ~mask | _bare(codes, type_name) & mask).view_as(blocks)


def _bare(codes: Tensor, type_name: str) -> Tensor:
    """Blocks of codes uint8 [blocks, block_size] with nothing else in them."""
    zeros = lambda width, dtype: torch.zeros(len(codes), width, dtype=dtype, device=codes.device)
    if type_name not in KQUANTS:
        legacy = _LEGACY[type_name]
        return _pack_legacy(codes, *[zeros(1, torch.float16)] * (1 if legacy.zero_point is not None else 2), legacy=legacy)
    kind = KQUANTS[type_name]
    integers, floats = zeros(SUPER_BLOCK // kind.group, torch.uint8), zeros(1, torch.float16)
    return pack_super_blocks(type_name, codes, *([integers] * 2 + [floats] * 2 if kind.low == 0 else [integers, floats]))


def _has_minimum(type_name: str) -> bool:
    return KQUANTS[type_name].low == 0 if type_name in KQUANTS else type_name in _LEGACY and _LEGACY[type_name].zero_point is None


def _block_type(type_name: str) -> BlockType:
    if type_name not in BLOCK_TYPES:
        raise FormatError(f"ggml block type {type_name!r} is not known; known: {', '.join(BLOCK_TYPES)}.")
    return BLOCK_TYPES[type_name]


def _legacy_type(type_name: str) -> tuple[BlockType, _Legacy]:
    if type_name not in _LEGACY:
        raise FormatError(f"plain codes cannot be stored as {type_name!r}; they can as {', '.join(_LEGACY)}.")
    return BLOCK_TYPES[type_name], _LEGACY[type_name]


def _check_columns(W: Tensor, kind: BlockType) -> None:
    if W.ndim != 2:
        raise ShapeError(f"{kind.name} encodes a matrix [rows, columns]; got {list(W.shape)}.")
    if W.shape[1] % kind.block_size:
        raise ShapeError(f"{kind.name} needs columns to be a multiple of {kind.block_size}, and {W.shape[1]} is not.")


def _blocks_per_row(blocks: Tensor, kind: BlockType) -> int:
    if blocks.dtype != torch.uint8:
        raise FormatError(f"{kind.name}: blocks are uint8; got {blocks.dtype}.")
    if blocks.ndim != 2 or blocks.shape[1] % kind.block_bytes:
        raise ShapeError(f"{kind.name}: blocks are [rows, a multiple of {kind.block_bytes} bytes]; got {list(blocks.shape)}.")
    return blocks.shape[1] // kind.block_bytes


def _relative_importance(importance: Tensor, W: Tensor) -> Tensor:
    """Importance float32 [columns] on W's device, with a mean of 1/2 to 1 (float32 sums could underflow) and positive everywhere.

    It is divided by a power of two, which changes no rounding: what ggml finds with the importance as given is found.
    """
    if list(importance.shape) != [W.shape[1]]:
        raise ShapeError(f"importance has one value for each of {W.shape[1]} columns; got {list(importance.shape)}.")
    importance = importance.to(W.device, torch.float32)
    if not torch.isfinite(importance).all() or (importance < 0).any():
        raise FormatError("importance holds NaN, infinity or negative values; it is a mean of squares.")
    mean = float(importance.mean(dtype=torch.float64))
    return torch.ones_like(importance) if mean == 0 else (importance.double() * 2.0 ** -math.frexp(mean)[1]).float().clamp_min_(_LEAST_IMPORTANCE)


def _row_chunks(W: Tensor, size: int = _CPU_CHUNK) -> list[slice]:
    size = size if W.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, size // max(1, W.shape[1]))
    return [slice(start, min(start + step, W.shape[0])) for start in range(0, W.shape[0], step)]


def _encode_rows(X: Tensor, kind: BlockType, importance: Tensor | None) -> Tensor:
    """Blocks uint8 [blocks, block_bytes] of rows X float32 [rows, columns]; importance [columns], positive."""
    groups = X.reshape(-1, kind.block_size)
    if kind.name not in _LEGACY:
        encode_blocks = encode_super_blocks if kind.name in KQUANTS else encode_table
        return encode_blocks(groups, kind.name, None if importance is None else importance.expand_as(X).reshape(groups.shape))
    legacy = _LEGACY[kind.name]
    fitted: tuple[Tensor, ...]
    if kind.name == "q8_0":
        fitted = _round_to_absmax(groups)
    elif importance is not None:
        weights = (X.square() + X.square().mean(1, keepdim=True)).sqrt_().mul_(importance).view(groups.shape)
        fitted = _fit_weighted(groups.t().contiguous(), weights.t().contiguous(), legacy)
    elif legacy.zero_point is not None:
        fitted = _round_to_peak(groups, legacy.zero_point)
    else:
        fitted = _round_to_range(groups, (1 << legacy.bits) - 1)
    return _pack_legacy(*fitted, legacy=legacy)


def _round_to_peak(X: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
    """Codes and scale float16 [blocks, 1] of q4_0, q5_0: the first value of largest magnitude gets code 0; halves round up."""
    scale = signed_peak(X) / -zero_point
    codes = (X * reciprocal(scale)).add_(zero_point + 0.5).clamp_(0, 2 * zero_point - 1)
    return codes.to(torch.uint8), as_half(scale)


def _round_to_range(X: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and minimum float16 [blocks, 1] of q4_1, q5_1: the range in equal steps; halves round up."""
    minimum = X.amin(1, keepdim=True)
    scale = (X.amax(1, keepdim=True) - minimum) / levels
    codes = (X - minimum).mul_(reciprocal(scale)).add_(0.5)
    return codes.to(torch.uint8), as_half(scale), as_half(minimum)


def _round_to_absmax(X: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale float16 [blocks, 1] of q8_0: absmax gets 127 steps; halves round away from zero."""
    scale = X.abs().amax(1, keepdim=True) / 127
    steps = X * reciprocal(scale)
    # Conversion cuts fractions off. The largest float below a half, unlike a half, never carries a lesser fraction to the next integer.
    steps += torch.copysign(steps.new_tensor(0.5).nextafter(steps.new_tensor(0.0)), steps)
    return steps.to(torch.int8).view(torch.uint8) ^ 128, as_half(scale)


def _fit_weighted(X: Tensor, W: Tensor, legacy: _Legacy) -> tuple[Tensor, ...]:
    """Codes [blocks, 32], scale and, for q4_1 and q5_1, minimum float16 [blocks, 1] by search; X, W float32 [32, blocks]."""
    top = (1 << legacy.bits) - 1
    if legacy.zero_point is None:
        scale, minimum = (as_half(t) for t in search_affine(X, W, levels=top, trials=FINE_TRIALS, signed_minimum=True))
        codes = (X - minimum.float()).mul_(reciprocal(scale.float())).round_().clamp_(0, top)
        return codes.to(torch.uint8).t().contiguous(), scale.unsqueeze(1), minimum.unsqueeze(1)
    scale = as_half(search_scale(X, W, low=-legacy.zero_point, high=legacy.zero_point - 1, trials=FINE_TRIALS))
    codes = (X * reciprocal(scale.float())).round_().add_(legacy.zero_point).clamp_(0, top)
    return codes.to(torch.uint8).t().contiguous(), scale.unsqueeze(1)


def _pack_legacy(codes: Tensor, *parameters: Tensor, legacy: _Legacy) -> Tensor:
    """uint8 codes [blocks, 32] and float16 parameters [blocks, 1] to [blocks, block_bytes]."""
    parts = [parameter.contiguous().view(torch.uint8) for parameter in parameters]
    if legacy.bits == 8:
        parts.append(codes ^ 128)
    if legacy.bits == 5:
        parts.append(join_fields((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1))
        codes = codes & 15
    if legacy.bits < 8:
        parts.append(join_fields(codes.view(-1, 2, 16), 4))
    return torch.cat(parts, dim=1)


def _unpack_legacy(blocks: Tensor, legacy: _Legacy) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of _pack_legacy: codes [blocks, 32], scale and minimum (or None) [blocks, 1]."""
    scale, rest = _split_half(blocks)
    minimum = None
    if legacy.zero_point is None:
        minimum, rest = _split_half(rest)
    if legacy.bits == 8:
        return rest ^ 128, scale, minimum
    codes = split_fields(rest[:, -16:], 4, 2).flatten(1)
    if legacy.bits == 5:
        codes |= split_fields(rest[:, :4], 1, 8).transpose(1, 2).flatten(1) << 4
    return codes, scale, minimum


def _split_half(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The float16 [blocks, 1] at the start of each block, and the bytes after it."""
    return blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:]


def _decode_blocks(blocks: Tensor, kind: BlockType) -> Tensor:
    """float32 [blocks, block_size] of uint8 [blocks, block_bytes]."""
    if kind.name not in _LEGACY:
        decode_any = _decode_super_blocks if kind.name in KQUANTS else decode_table if kind.name in TABLES else decode_grid
        return decode_any(blocks, kind.name)
    legacy = _LEGACY[kind.name]
    codes, scale, minimum = _unpack_legacy(blocks, legacy)
    if legacy.zero_point is not None:
        return (codes.float() - legacy.zero_point).mul_(scale.float())
    assert minimum is not None
    return codes.float().mul_(scale.float()).add_(minimum.float())


def _decode_super_blocks(blocks: Tensor, type_name: str) -> Tensor:
    """float32 [blocks, 256] of uint8 [blocks, block_bytes]."""
    codes, scale, minimum = _SPLIT[type_name](blocks)
    values = codes.view(*scale.shape, -1).float().mul_(scale.unsqueeze(2))
    if minimum is not None:
        values -= minimum.unsqueeze(2)
    return values.flatten(1)


def _split_q2_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, low_bits, d, dmin = blocks.split([16, 64, 2, 2], dim=1)
    return _quarters(low_bits), read_half(d) * (scales & 15), read_half(dmin) * (scales >> 4)


def _split_q3_k(blocks: Tensor) -> tuple[Tensor, Tensor, None]:
    high_bits, low_bits, scales, d = blocks.split([32, 64, 12, 2], dim=1)
    codes = _quarters(low_bits) | split_fields(high_bits, 1, 8).flatten(1) << 2
    ls = split_fields(scales[:, :8], 4, 2).flatten(1) | split_fields(scales[:, 8:], 2, 4).flatten(1) << 4
    return codes.view(torch.int8) - 4, read_half(d) * (ls.view(torch.int8) - 32), None


def _split_q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, dmin, scales, low_bits = blocks.split([2, 2, 12, 128], dim=1)
    ls, lm = _six_bit_pairs(scales)
    return _halves(low_bits), read_half(d) * ls, read_half(dmin) * lm


def _split_q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, dmin, scales, high_bits, low_bits = blocks.split([2, 2, 12, 32, 128], dim=1)
    ls, lm = _six_bit_pairs(scales)
    return _halves(low_bits) | split_fields(high_bits, 1, 8).flatten(1) << 4, read_half(d) * ls, read_half(dmin) * lm


def _split_q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, None]:
    low_bits, high_bits, scales, d = blocks.split([128, 64, 16, 2], dim=1)
    codes = split_fields(low_bits.reshape(-1, 2, 64), 4, 2).flatten(1) | _quarters(high_bits) << 4
    return codes.view(torch.int8) - 32, read_half(d) * scales.contiguous().view(torch.int8), None


_SPLIT = {"q2_k": _split_q2_k, "q3_k": _split_q3_k, "q4_k": _split_q4_k, "q5_k": _split_q5_k, "q6_k": _split_q6_k}


def _quarters(field: Tensor) -> Tensor:
    """256 two-bit fields of 64 bytes; every 32 bytes hold 128 elements."""
    return split_fields(field.reshape(-1, 2, 32), 2, 4).flatten(1)


def _halves(field: Tensor) -> Tensor:
    """256 four-bit fields of 128 bytes; every 32 bytes hold 64 elements."""
    return split_fields(field.reshape(-1, 4, 32), 4, 2).flatten(1)


def _six_bit_pairs(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and minima of 12 bytes; the top two bits of the last four are in the first eight bytes."""
    first, second, last = scales.split(4, dim=1)
    ls = torch.cat([first & 63, last & 15 | first >> 6 << 4], dim=1)
    return ls, torch.cat([second & 63, last >> 4 | second >> 6 << 4], dim=1)
