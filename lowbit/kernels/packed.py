"""A quantized matrix in the layout that the native kernels stream: codes in planes of 1, 2, 4 or 8 bits, scales and zero-points beside them (csrc/layout.h).

Every number format of w = scale * (code - zero) fits, whatever its groups: integers, ggml's blocks, ternary and binary weights; and those of 16 values in a table (NF4, FP4, MXFP4, NVFP4, IQ4_NL).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..native import native, threads
from ..numerics import affine, codebook, floating, ggml, integer, ternary
from ..scheme import INT, Scheme
from ..tensor import QuantizedTensor

CHUNK = 1 << 22  # weights that are packed at once
REALS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CONSTANT, CODES, NUMBERS, MINIMA = range(4)
WIDER = {1: (1, 2, 4), 2: (2, 4), 3: (3, 4), 4: (4,), 5: (5, 6, 8), 6: (6, 8), 7: (8,), 8: (8,)}  # widths that hold codes of so many bits


@dataclass(frozen=True)
class Plan:
    """How a scheme goes into the layout. table: 16 values, each a byte, or high bytes and low bytes, of which zero is 0; factor: what the scales are multiplied by for them."""

    bits: int
    kind: int
    zero: float = 0.0
    table: tuple[int, ...] | None = None
    factor: float = 1.0


class PackedMatrix:
    """A matrix [rows, cols] for products with int8 inputs: y = round(x) W^T, where round keeps 8 bits of every block of inputs."""

    def __init__(self, held: Any, shape: tuple[int, int]) -> None:
        self.held, self.shape = held, shape

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    @property
    def block(self) -> int:
        """Inputs that are rounded with one scale."""
        return self.held.block

    def matmul(self, x: Tensor, *, isa: str = "") -> Tensor:
        """x [..., cols] of any floating dtype; the result has it, too. isa: "" (the best), avx512, avx2 or portable."""
        flat = x.reshape(-1, self.shape[1]).float().contiguous()
        y = torch.empty(len(flat), self.shape[0])
        native().matmul(self.held, flat.numpy(), y.numpy(), threads(), isa)
        return y.view(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def dequantize(self) -> Tensor:
        """All rows as numbers, float32 [rows, cols]: what the products are of."""
        return torch.stack([self.row(index) for index in range(self.shape[0])])

    def row(self, index: int) -> Tensor:
        """One row as numbers, float32 [cols]."""
        out = torch.empty(self.shape[1])
        self.held.row(index, out.numpy())
        return out


def can_pack(scheme: Scheme) -> bool:
    """Whether the kernels take a number format (its columns may still be too odd: see pack)."""
    return scheme.outliers is None and plan_of(scheme) is not None


def plan_of(scheme: Scheme) -> Plan | None:
    name = scheme.format
    if name == INT:
        kind = CONSTANT if scheme.symmetric else NUMBERS if scheme.zero_dtype == "float" else CODES
        return Plan(scheme.bits, kind, float(scheme.zero_code) if scheme.symmetric else 0.0) if 2 <= scheme.bits <= 8 and scheme.block[0] == 1 else None
    if name in ternary.KINDS:
        return Plan(1, CONSTANT, 0.5, factor=2.0) if name == "binary" else Plan(2, CONSTANT, 1.0)
    if name == "nf4":
        return _wide([round((float(value) + 1) * 32767) for value in codebook.table("nf4")], 32767.0, 1 / 32767)
    if name == "fp4":
        return _wide([round(float(value) * 192) + 192 for value in codebook.table("fp4")], 192.0, 1 / 192)
    if name in floating.KINDS and floating.KINDS[name].element.bits == 4:
        elements = floating.decode(torch.arange(16, dtype=torch.uint8), floating.KINDS[name].element)
        return Plan(4, CONSTANT, 12.0, tuple(round(float(value) * 2) + 12 for value in elements), 0.5)
    if name in ggml.TABLES:
        values = _table_values(name)
        if len(values) == 2:  # -1, 1
            return Plan(1, CONSTANT, 0.5, factor=2.0)
        if len(values) <= 4:  # from -1 up
            return Plan(2, CONSTANT, 1.0)
        return Plan(4, CONSTANT, 128.0, tuple(round(value) + 128 for value in (values + values[-1:])[:16]))
    if name in affine.HALVES and name not in ggml.TABLES:
        low, high = ggml.bounds(name)
        bits = max(1, math.ceil(math.log2(high - low + 1)))
        return Plan(bits, MINIMA if "dmin" in affine.HALVES[name] else CONSTANT, -low)
    return None


def _wide(words: list[int], zero: float, factor: float) -> Plan:
    """A table of 16 values of 16 bits."""
    return Plan(4, CONSTANT, zero, tuple(word >> 8 for word in words) + tuple(word & 255 for word in words), factor)


def _table_values(name: str) -> list[float]:
    return sorted({float(value) for value in ggml.TABLES[name].values})


def pack(qt: QuantizedTensor) -> PackedMatrix:
    """The matrix in the kernels' layout. FormatError for formats that the kernels do not take, and for groups that are no multiple of 8 columns."""
    plan, (rows, cols) = plan_of(qt.scheme), qt.shape
    if plan is None or qt.scheme.outliers is not None:
        raise FormatError(f"{qt.scheme.name} is not among the formats of the native kernels.")
    order, group = order_of(qt), group_of(qt)
    module = native()
    bits = next((width for width in WIDER[plan.bits] if module.largest_block(width, group)), 0)
    if not bits:
        raise FormatError(f"groups of {group} of {cols} columns are no multiple of 8, which the native kernels need.")
    if (blocks := qt.parts.get("blocks")) is not None and qt.scheme.format not in ggml.TABLES:
        per_block = ggml.BLOCK_TYPES[qt.scheme.format].block_size // group
        held = module.Packed(rows, cols, bits, group, REALS[torch.float16], plan.kind, plan.zero, None, super=per_block if per_block > 1 else 0)
        held.fill_blocks(blocks.contiguous().numpy(), qt.scheme.format, threads())
        return PackedMatrix(held, qt.shape)
    dtype = scale_dtype_of(qt)
    held = module.Packed(rows, cols, bits, group, REALS[dtype], plan.kind, plan.zero, None if plan.table is None else list(plan.table), None if order is None else order.int().numpy())
    for first, codes, scale, zero in chunks_of(qt, plan, group, order):
        held.fill(first, codes.numpy(), scale.numpy(), None if zero is None else zero.numpy(), threads())
    return PackedMatrix(held, qt.shape)


def order_of(qt: QuantizedTensor) -> Tensor | None:
    """The columns, group by group, of a matrix whose groups are of any columns (GPTQ's act-order), int64 [cols]; None: they are neighbours. FormatError where groups are of different sizes."""
    if "g_idx" not in qt.parts:
        return None
    index = qt.parts["g_idx"].long()
    counts = torch.bincount(index, minlength=qt.scheme.groups(qt.shape[1]))
    if bool((counts != qt.scheme.group_size).any()):
        raise FormatError("its groups are of different sizes, which the native kernels do not take.")
    return torch.argsort(index, stable=True)


def group_of(qt: QuantizedTensor) -> int:
    """Columns that share a scale in every row, and divide the columns."""
    cols = qt.shape[1]
    rows, size = affine.group_shape(qt.scheme, qt.shape)
    return math.gcd(cols, size) if rows <= 1 or size != 1 else cols


def scale_dtype_of(qt: QuantizedTensor) -> torch.dtype:
    """The type of scales and zero-points in a layout of one scale for each group: the stored one where both have it; ggml's products in float16 where they fit (rounded by at most 2^-12)."""
    name = qt.scheme.format
    if name == INT:
        dtype, zero = qt.parts["scale"].dtype, qt.parts.get("zero_point")
        return dtype if dtype in REALS and (zero is None or qt.scheme.zero_dtype == "int" or zero.dtype == dtype) else torch.float32
    if name in ("q4_0", "q5_0", "q8_0", "q4_1", "q5_1"):
        return torch.float16
    if name in ggml.BLOCK_TYPES:
        blocks = qt.parts["blocks"]
        return torch.float16 if all(_fits_half(*ggml.affine(name, part)) for part in blocks.split(max(1, CHUNK // qt.shape[1]))) else torch.float32
    return torch.float32


def _fits_half(scale: Tensor, offset: Tensor | None) -> bool:
    """Whether scales and offsets are normal numbers of float16, or 0."""
    largest = max(float(scale.abs().max()), 0.0 if offset is None else float(offset.abs().max()))
    small = scale[scale != 0].abs()
    return largest < 65504 and (not small.numel() or float(small.min()) >= 2**-14)


def chunks_of(qt: QuantizedTensor, plan: Plan, group: int, order: Tensor | None = None) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """(first row, codes uint8 [n, cols], scales float32 [n, groups], zero-points or minima or None) for runs of rows."""
    rows, cols = qt.shape
    step = max(16, CHUNK // cols // 16 * 16)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        codes, scale, zero = _rows(qt, plan, slice(first, first + count), group)
        codes = codes if order is None else codes[:, order]
        yield first, codes.contiguous(), (scale.float() * plan.factor).contiguous(), None if zero is None else zero.float().contiguous()


def _rows(qt: QuantizedTensor, plan: Plan, at: slice, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
    scheme, (rows, cols) = qt.scheme, qt.shape
    n, groups = at.stop - at.start, cols // group
    if scheme.format in ggml.BLOCK_TYPES:
        blocks = qt.parts["blocks"][at]
        scale, offset = ggml.affine(scheme.format, blocks)
        if (codes := ggml.codes_of(scheme.format, blocks)) is not None:
            return codes, scale, None if offset is None or plan.kind != MINIMA else -offset
        spread = lambda value: value.unsqueeze(-1).expand(-1, -1, cols // value.shape[1]).reshape(n, cols)
        q = (ggml.decode(blocks, scheme.format) / spread(torch.where(scale == 0, 1.0, scale))).round()
        return torch.searchsorted(torch.tensor(_table_values(scheme.format)), q).to(torch.uint8), scale, None
    if scheme.format == INT:
        codes = qt.parts["codes"][at].to(torch.uint8)
        spread_to = lambda value: integer.spread(value[at], scheme, cols)[:, ::group] if value.ndim == 2 and value.shape[1] > 1 else value[at].reshape(n, 1).expand(n, groups)
        zero = None if plan.kind == CONSTANT else spread_to(qt.parts["zero_point"])
        return codes, spread_to(qt.parts["scale"]), zero
    if scheme.format in codebook.CODES:
        starts = torch.arange(at.start * cols, at.stop * cols, group)
        return qt.parts["codes"][at].to(torch.uint8), codebook.absmax(qt).flatten()[starts // scheme.block[1]].view(n, groups), None
    if scheme.format in ternary.KINDS:
        scale = affine.affine(qt).scale
        part = scale[at] if scale.shape[0] == rows else scale.expand(n, -1)
        return qt.parts["codes"][at].to(torch.uint8), part.repeat_interleave(groups // part.shape[1], 1), None
    scale = affine.affine(qt).scale
    part = scale[at] if scale.shape[0] == rows else scale.expand(n, -1)
    size = cols if part.shape[1] == 1 else scheme.block[1]
    return qt.parts["codes"][at].to(torch.uint8), part[:, torch.arange(0, cols, group) // size], None
