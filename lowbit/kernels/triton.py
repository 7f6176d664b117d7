"""Products with packed matrices on a GPU: one Triton kernel that decodes tiles of codes in registers, for every number format that packed.py takes.

A matrix is held as lowbit's own files hold it (numerics/packing.py): codes int32 [rows, ceil(cols b / 32)], each row one LSB-first stream, scales and zero-points [rows, groups]. A program
multiplies BLOCK_M rows of inputs with BLOCK_N rows of the matrix; a tile of codes becomes numbers in the inputs' dtype, and tl.dot adds in float32. With few rows of inputs the columns are split among
several programs, whose sums are added in a fixed order, so that results do not change from run to run. Inputs stay in their dtype: nothing is rounded but the decoded weights, to that dtype.

    KIND  0: (code - zero) scale, one zero for all    1: (code - zeros[row, group]) scale    2: code scale - zeros[row, group]    3: table[code] scale

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before the first import), which the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import FormatError
from ..numerics import codebook, integer, packing
from ..scheme import INT, Activation, Scheme
from ..tensor import QuantizedTensor
from .packed import MINIMA, NUMBERS, Plan, chunks_of, group_of, plan_of, scale_dtype_of

CONSTANT_ZERO, ZEROS, OFFSETS, TABLE = range(4)  # KIND
LARGEST_BLOCK = 128  # columns of a tile
FEW = 16  # rows of inputs, up to which columns are split among programs
MANY = 512  # rows of inputs, from which on the matrix is decoded once and multiplied by torch
PROGRAMS = 264  # that keep a large GPU busy: two for each of 132 multiprocessors


@triton.jit
def _codes(words, rows, known, row_words, step, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes int32 [BLOCK_N, BLOCK_K] of tile `step` of the columns."""
    if 32 % BITS == 0:
        PER: tl.constexpr = 32 // BITS
        WORDS: tl.constexpr = BLOCK_K // PER
        place = rows[:, None] * row_words + step * WORDS + tl.arange(0, WORDS)[None, :]
        word = tl.load(words + place, mask=known[:, None], other=0)
        code = (word[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :]) & ((1 << BITS) - 1)
        return tl.reshape(code, (BLOCK_N, BLOCK_K))
    else:
        bit = (step * BLOCK_K + tl.arange(0, BLOCK_K)) * BITS
        shift = bit % 32
        place = rows[:, None] * row_words + (bit // 32)[None, :]
        low = tl.load(words + place, mask=known[:, None], other=0).to(tl.uint32, bitcast=True) >> shift[None, :].to(tl.uint32)
        straddles = (shift + BITS > 32)[None, :] & known[:, None]
        high = tl.load(words + place + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True) << ((32 - shift) % 32)[None, :].to(tl.uint32)
        return ((low | high) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _values(words, scales, zeros, table, zero, rows, known, row_words, groups, step, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Decoded weights float32 [BLOCK_N, BLOCK_K]; a tile lies within one group."""
    code = _codes(words, rows, known, row_words, step, BITS, BLOCK_N, BLOCK_K)
    at = rows * groups + step * BLOCK_K // GROUP
    scale = tl.load(scales + at, mask=known, other=0.0).to(tl.float32)[:, None]
    if KIND == 0:
        return (code.to(tl.float32) - zero) * scale
    elif KIND == 3:
        return tl.load(table + code) * scale
    else:
        minus = tl.load(zeros + at, mask=known, other=0.0).to(tl.float32)[:, None]
        if KIND == 1:
            return (code.to(tl.float32) - minus) * scale
        else:
            return code.to(tl.float32) * scale - minus


@triton.jit
def _product(
    x, words, scales, zeros, table, out, zero, M, N, K, row_words, groups, split,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [split, M, N]: sums of x [M, K] W^T over each program's share of the columns."""
    rows, inputs, part = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(2)
    known, given, steps = rows < N, inputs < M, K // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * steps // split, (part + 1) * steps // split):
        w = _values(words, scales, zeros, table, zero, rows, known, row_words, groups, step, BITS, KIND, GROUP, BLOCK_N, BLOCK_K)
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tile = tl.load(x + inputs[:, None] * K + columns[None, :], mask=given[:, None], other=0.0)
        sums += tl.dot(tile, tl.trans(w.to(tile.dtype)), input_precision="ieee")
    tl.store(out + (part * M + inputs[:, None]) * N + rows[None, :], sums, mask=given[:, None] & known[None, :])


@triton.jit
def _decode(words, scales, zeros, table, out, zero, N, K, row_words, groups, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, step = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    known = rows < N
    w = _values(words, scales, zeros, table, zero, rows, known, row_words, groups, step, BITS, KIND, GROUP, BLOCK_N, BLOCK_K)
    tl.store(out + rows[:, None] * K + (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :], w.to(out.dtype.element_ty), mask=known[:, None])


@triton.jit
def _product8(x, w, x_scales, w_scales, out, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [M, N] = x_scales[m] w_scales[n] sum of int8 x int8 products, in int32."""
    rows, inputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    known, given = rows < N, inputs < M
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        inside = columns < K
        a = tl.load(x + inputs[:, None] * K + columns[None, :], mask=given[:, None] & inside[None, :], other=0)
        b = tl.load(w + rows[None, :] * K + columns[:, None], mask=known[None, :] & inside[:, None], other=0)
        sums += tl.dot(a, b, out_dtype=tl.int32)
    scale = tl.load(x_scales + inputs, mask=given, other=0.0)[:, None] * tl.load(w_scales + rows, mask=known, other=0.0)[None, :]
    tl.store(out + inputs[:, None] * N + rows[None, :], (sums.to(tl.float32) * scale).to(out.dtype.element_ty), mask=given[:, None] & known[None, :])


class GpuMatrix:
    """A matrix [rows, cols] in codes on a device: y = x W^T."""

    def __init__(self, words: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, *, shape: tuple[int, int], bits: int, kind: int, zero: float, group: int) -> None:
        """words int32 [rows, ceil(cols bits / 32)]; scales and zeros (None where KIND needs none) [rows, cols / group]; table float32 [16] of KIND 3; zero: of KIND 0."""
        self.words, self.scales, self.zeros, self.table = words, scales, zeros, table
        self.shape, self.bits, self.kind, self.zero, self.group = shape, bits, kind, zero, group
        self.block = largest_tile(group)

    @property
    def nbytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (self.words, self.scales, self.zeros) if each is not None)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., cols] in float32, float16 or bfloat16 on the device; the result has its dtype."""
        flat = x.reshape(-1, self.shape[1]).contiguous()
        if len(flat) >= MANY:
            return torch.nn.functional.linear(x, self.decoded(x.dtype))
        (rows, cols), m = self.shape, len(flat)
        few = m <= FEW
        block_m, block_n = (16, 32) if few else (64, 64)
        tiles = triton.cdiv(rows, block_n) * triton.cdiv(m, block_m)
        split = max(1, min(triton.cdiv(PROGRAMS, tiles), cols // self.block // 4)) if few else 1
        sums = torch.empty(split, m, rows, dtype=torch.float32, device=x.device)
        _product[(triton.cdiv(rows, block_n), triton.cdiv(m, block_m), split)](
            flat, *self._parts(), sums, self.zero, m, rows, cols, self.words.shape[1], self.scales.shape[1], split,
            BITS=self.bits, KIND=self.kind, GROUP=self.group, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=self.block,
        )  # fmt: skip
        return (sums[0] if split == 1 else sums.sum(0)).to(x.dtype).view(*x.shape[:-1], rows)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The matrix in a dtype, on the device."""
        rows, cols = self.shape
        out = torch.empty(rows, cols, dtype=dtype, device=self.words.device)
        _decode[(triton.cdiv(rows, 32), cols // self.block)](
            *self._parts(), out, self.zero, rows, cols, self.words.shape[1], self.scales.shape[1], BITS=self.bits, KIND=self.kind, GROUP=self.group, BLOCK_N=32, BLOCK_K=self.block
        )
        return out

    def dequantize(self) -> Tensor:
        """The matrix in float32."""
        return self.decoded(torch.float32)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.words, self.scales, self.scales if self.zeros is None else self.zeros, self.scales if self.table is None else self.table


class Int8Matrix:
    """A matrix of 8-bit codes with one scale for each row, which reads inputs rounded to 8 bits with one scale for each token (W8A8): y = round(x) W^T in integers."""

    def __init__(self, codes: Tensor, scales: Tensor, act: Activation) -> None:
        """codes int8 [rows, cols], scales float32 [rows]."""
        self.codes, self.scales, self.act = codes, scales, act
        self.shape: tuple[int, int] = (codes.shape[0], codes.shape[1])

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., cols] in any floating dtype on the device; the result has its dtype."""
        flat = x.reshape(-1, self.shape[1]).float()
        scale, _ = integer.parameters(*torch.aminmax(flat, dim=-1), self.act.scheme)
        codes = integer.signed_codes(flat, scale, None, self.act.scheme).to(torch.int8)
        return matmul8(codes, self.codes, scale, self.scales, x.dtype).view(*x.shape[:-1], self.shape[0])

    def dequantize(self) -> Tensor:
        """The matrix in float32."""
        return self.codes.float() * self.scales.unsqueeze(1)


def pack_int8(qt: QuantizedTensor, act: Activation, device: torch.device) -> Int8Matrix:
    """The matrix on a device; FormatError where it or its inputs are of another kind."""
    scheme = qt.scheme
    plain = scheme.format == INT and scheme.bits == 8 and scheme.symmetric and scheme.outliers is None and qt.parts["scale"].shape == (qt.shape[0], 1)
    if not plain or act.format != INT or act.bits != 8 or not act.symmetric or act.per != "token" or act.static or act.threshold is not None:
        raise FormatError(f"{scheme.name} with inputs {act.name} is no W8A8 with a scale for each row and token.")
    codes = (qt.parts["codes"].to(torch.int16) - scheme.zero_code).to(torch.int8)
    return Int8Matrix(codes.to(device), qt.parts["scale"].float().flatten().to(device), act)


def largest_tile(group: int) -> int:
    """Columns of a tile: the largest power of two that divides the group, at most LARGEST_BLOCK; FormatError below 16, which tl.dot needs."""
    tile = min(LARGEST_BLOCK, group & -group)
    if tile < 16:
        raise FormatError(f"groups of {group} columns are no multiple of 16, which the GPU kernels need.")
    return tile


def pack_gpu(qt: QuantizedTensor, device: torch.device) -> GpuMatrix:
    """The matrix on a device. FormatError for formats that the kernels do not take, and for groups that are no multiple of 16 columns."""
    plan, (rows, cols) = plan_of(qt.scheme), qt.shape
    if plan is None or qt.scheme.outliers is not None or "g_idx" in qt.parts:
        raise FormatError(f"{qt.scheme.name} is not among the formats of the GPU kernels.")
    group = group_of(qt)
    tile = largest_tile(group)
    bits, dtype = plan.bits if plan.bits != 7 else 8, scale_dtype_of(qt)
    if 32 % bits == 0 and tile * bits % 32:
        raise FormatError(f"tiles of {tile} columns hold no whole words of codes of {bits} bits.")
    words = torch.empty(rows, packing.words_per_row(cols, bits), dtype=torch.int32)
    scales = torch.empty(rows, cols // group, dtype=dtype)
    zeros = torch.empty_like(scales, dtype=dtype if plan.kind in (NUMBERS, MINIMA) else torch.float32) if plan.kind else None
    for first, codes, scale, zero in chunks_of(qt, plan, group):
        at = slice(first, first + len(codes))
        words[at] = packing.pack(codes, bits) if bits < 8 else _bytes(codes)
        scales[at] = scale.to(dtype) if plan.table is None else (scale / plan.factor).to(dtype)
        if zeros is not None and zero is not None:
            zeros[at] = zero.to(zeros.dtype)
    kind = TABLE if plan.table is not None else (CONSTANT_ZERO, ZEROS, ZEROS, OFFSETS)[plan.kind]
    table = _table(plan, qt.scheme)
    zeros, table = (None if value is None else value.to(device) for value in (zeros, table))
    return GpuMatrix(words.to(device), scales.to(device), zeros, table, shape=(rows, cols), bits=bits, kind=kind, zero=plan.zero, group=group)


def _bytes(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, cols] as words."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).view(torch.int32)


def _table(plan: Plan, scheme: Scheme) -> Tensor | None:
    """What the 16 codes stand for, before the scale, float32."""
    if plan.table is None or scheme.format in codebook.CODES:
        return None if plan.table is None else codebook.table(scheme.format)
    return (torch.tensor(plan.table, dtype=torch.float32) - plan.zero) * plan.factor


def matmul8(x: Tensor, w: Tensor, x_scales: Tensor, w_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(x_scales) x w^T diag(w_scales): x int8 [m, k], w int8 [n, k], scales float32 [m] and [n]; sums in int32."""
    (m, k), n = x.shape, len(w)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    block_m = 16 if m <= FEW else 64
    _product8[(triton.cdiv(n, 64), triton.cdiv(m, block_m))](x.contiguous(), w.contiguous(), x_scales, w_scales, out, m, n, k, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=64)
    return out
