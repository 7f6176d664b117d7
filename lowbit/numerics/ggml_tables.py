"""ggml's types whose codes are places in a table of values: IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0, Q2_0.

    type        block  bytes, first to last                                             w
    iq4_nl      32     d f16, 16 of codes                                               d table[code]
    iq4_xs      256    d f16, 2 of high bits of scales, 4 of low bits, 128 of codes     d (ls - 32) table[code]
    ggml_mxfp4  32     exponent e, 16 of codes                                          2^(e - 127) e2m1[code]
    ggml_nvfp4  64     4 scales UE4M3, 32 of codes                                      scale e2m1[code]
    tq1_0       256    48 of five ternary digits, 4 of four, d f16                      d (code - 1)
    tq2_0       256    64 of codes, d f16                                               d (code - 1)
    q1_0        128    d f16, 16 of codes                                               d (2 code - 1)
    q2_0        64     d f16, 16 of codes                                               d (code - 1)

IQ4_NL, IQ4_XS, TQ1_0, TQ2_0 and MXFP4 are written too, with ggml's own searches, bit for bit (ggml-quants.c: quantize_row_iq4_nl_impl,
quantize_row_tq1_0_ref, quantize_row_tq2_0_ref, quantize_row_mxfp4_ref): products and sums are taken in its order, one float32 operation after the other.
It differs where ggml's own numbers fail: an MXFP4 block whose largest magnitude is below 2^-125 gets the exponent 0 (C leaves open what ggml's cast does),
columns of no importance count a little (_LEAST_IMPORTANCE in ggml.py), and a small importance does not let products underflow.

MXFP4 and NVFP4 are called ggml_ because mxfp4 and nvfp4 are the formats of numerics/floating.py, which round halves to even. Weights that are not ternary do
not survive TQ1_0 and TQ2_0: the largest of a block is 1, and what is below half of it 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import native, threads
from .ggml_kquants import as_half, join_fields, read_half, reciprocal, signed_peak, split_fields

IQ4_VALUES = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
FP4_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)  # E2M1, doubled; ggml halves the scales
TERNARY = (-1.0, 0.0, 1.0, 2.0)  # ggml decodes the fourth code and does not write it

_IQ4_GROUP = 32
_IQ4_TRIALS = 7  # ranges of up to so many steps more and fewer than 127
_IQ4_LEAST = 1e-15  # a group whose largest magnitude is below it is zeros
# Bytes of TQ1_0 that are read together, and the ternary digits in each of them.
_DIGITS = ((32, 5), (16, 5), (4, 4))


@dataclass(frozen=True)
class TableType:
    """values: by code; levels: how many of the first are written. share: weights with one scale. codes_at: the bytes of codes in a block.

    fields: bits of a code, and the bytes over which codes are laid before the next higher bits are taken; None: ternary digits.
    scales: blocks uint8 [blocks, block_bytes] -> float32 [blocks, block_size // share].
    nearest: x in units of the scale -> uint8 codes. fit: (X float32 [blocks, block_size], importance the same or None) -> codes uint8 and the
    bytes beside them. Both are None for a type that is only read.
    """

    values: tuple[float, ...]
    share: int
    codes_at: slice
    fields: tuple[int, int] | None
    scales: Callable[[Tensor], Tensor]
    nearest: Callable[[Tensor], Tensor] | None = None
    fit: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None
    levels: int = 16

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value that is written."""
        return min(self.values[: self.levels]), max(self.values[: self.levels])


def decode_table(blocks: Tensor, type_name: str) -> Tensor:
    """float32 [blocks, block_size] of uint8 [blocks, block_bytes]."""
    kind = TABLES[type_name]
    scale = kind.scales(blocks)
    values = take(kind.values, _unpack(blocks[:, kind.codes_at], kind))
    return values.view(*scale.shape, -1).mul_(scale.unsqueeze(2)).flatten(1)


def encode_table(X: Tensor, type_name: str, importance: Tensor | None) -> Tensor:
    """Blocks uint8 [blocks, block_bytes] of X float32 [blocks, block_size]; importance, positive, of the same shape or None."""
    kind = TABLES[type_name]
    assert kind.fit is not None
    codes, beside = kind.fit(X, importance)
    return torch.cat([beside, _pack(codes, kind)] if kind.codes_at.start else [_pack(codes, kind), beside], dim=1)


def with_table_codes(type_name: str, blocks: Tensor, values: Tensor) -> Tensor:
    """blocks [blocks, block_bytes] with the codes of other values [blocks, block_size] of the table."""
    kind, blocks = TABLES[type_name], blocks.clone()
    assert kind.nearest is not None
    blocks[:, kind.codes_at] = _pack(kind.nearest(values), kind)
    return blocks


def pack_mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """MXFP4 of numerics/floating.py as blocks of the same values: codes uint8 [rows, columns], exponents uint8 [rows, columns // 32] -> uint8 [rows, row_bytes]."""
    packed = _pack(codes.view(-1, 32), TABLES["ggml_mxfp4"])
    return torch.cat([exponents.reshape(-1, 1), packed], dim=1).view(len(codes), -1)


def unpack_mxfp4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of pack_mxfp4: codes uint8 [rows, columns] and exponents uint8 [rows, columns // 32]."""
    flat = blocks.view(-1, 17)
    return _unpack(flat[:, 1:], TABLES["ggml_mxfp4"]).view(len(blocks), -1), flat[:, 0].view(len(blocks), -1).clone()


def take(values: tuple[float, ...], codes: Tensor) -> Tensor:
    """values[codes], float32."""
    return torch.tensor(values, device=codes.device)[codes.int()]


def _unpack(field: Tensor, kind: TableType) -> Tensor:
    """Codes uint8 [blocks, block_size] of their bytes [blocks, bytes]."""
    if kind.fields is None:
        return _unpack_digits(field)
    bits, width = kind.fields
    return split_fields(field.reshape(len(field), -1, width), bits, 8 // bits).flatten(1)


def _pack(codes: Tensor, kind: TableType) -> Tensor:
    """The inverse of _unpack."""
    if kind.fields is None:
        return _pack_digits(codes)
    bits, width = kind.fields
    return join_fields(codes.view(len(codes), -1, 8 // bits, width), bits).flatten(1)


def _unpack_digits(field: Tensor) -> Tensor:
    """The digits of byte / 256 in base 3: the k-th is what carries out of eight bits when the low eight bits of byte * 3^k are tripled."""
    powers = torch.tensor([[1], [3], [9], [27], [81]], dtype=torch.uint8, device=field.device)
    parts = field.split([width for width, _ in _DIGITS], dim=1)
    shifted = [(part.unsqueeze(1) * powers[:count]).flatten(1) for part, (_, count) in zip(parts, _DIGITS, strict=True)]
    return (torch.cat(shifted, dim=1).int() * 3 >> 8).to(torch.uint8)


def _pack_digits(codes: Tensor) -> Tensor:
    """The inverse: n / 243 of the number n of five digits (where there are four the fifth is 0), as the least byte / 256 that is not below it."""
    powers = torch.tensor([[81], [27], [9], [3], [1]], dtype=torch.int32, device=codes.device)
    parts = codes.int().split([width * count for width, count in _DIGITS], dim=1)
    numbers = [(part.view(len(part), count, width) * powers[:count]).sum(1) for part, (width, count) in zip(parts, _DIGITS, strict=True)]
    return ((torch.cat(numbers, dim=1) * 256 + 242) // 243).to(torch.uint8)


def _fit_ternary(X: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest magnitude is 1, and what is at least half of it; importance is not used."""
    d = X.abs().amax(1, keepdim=True)
    return _nearest_ternary(X * torch.where(d == 0, 0, d.reciprocal())), as_half(d).view(torch.uint8)


def _nearest_ternary(x: Tensor) -> Tensor:
    return 1 + (x >= 0.5).to(torch.uint8) - (x <= -0.5).to(torch.uint8)


def _fit_mxfp4(X: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest magnitude lies in 4 .. 8 of its power of two, which is found as C's log2f does; importance is not used."""
    largest = X.abs().amax(1, keepdim=True)
    # In float32, log2 of a number just below a power of two is whole already; float64 rounded once gives what the C library does.
    exponent = largest.double().log2().float().floor().clamp(min=-125) + 125
    exponent = torch.where(largest > 0, exponent, 0).to(torch.uint8)
    return _nearest_fp4(X / _power(exponent)), exponent


def _nearest_fp4(x: Tensor) -> Tensor:
    """Of two equally near the smaller magnitude; never the second zero."""
    positive = torch.tensor(FP4_VALUES[:8], device=x.device)
    code = torch.bucketize(x.abs(), (positive[:-1] + positive[1:]) / 2, out_int32=True)
    return torch.where((x < 0) & (code > 0), code + 8, code).to(torch.uint8)


def _fit_iq4_nl(X: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = _search_iq4(X, importance).view(-1, 1)
    half = as_half(scale)  # which refuses what overflowed
    return _nearest_iq4(X * reciprocal(scale)), half.view(torch.uint8)


def _fit_iq4_xs(X: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = _search_iq4(X, importance).view(len(X), -1)
    d = signed_peak(scale) / -32
    half = as_half(d)
    ls = (scale * reciprocal(d)).round_().clamp_(-32, 31)
    codes = _nearest_iq4(X.view(*scale.shape, -1) * reciprocal(d * ls).unsqueeze(2)).flatten(1)
    ls = ls.add_(32).to(torch.uint8)
    high, low = join_fields((ls >> 4).view(-1, 2, 4).transpose(1, 2), 2), join_fields((ls & 15).view(-1, 4, 2).transpose(1, 2), 4)
    return codes, torch.cat([half.view(torch.uint8), high, low], dim=1)


def _search_iq4(X: Tensor, importance: Tensor | None) -> Tensor:
    """The scale [groups] of every 32 weights of X [blocks, block_size]: of 16 ranges the one that, fitted by least squares, leaves the least weighted error."""
    if importance is None:
        W = X.square()
    else:
        square = X.square()
        spread = _ordered_sum(square.t().contiguous()) * (2 / X.shape[1])
        # torch's root of a float32 is not always the nearest one; that of a float64, rounded, is.
        W = square.add_(spread.unsqueeze(1)).double().sqrt_().float().mul_(importance)
    X, W = X.view(-1, _IQ4_GROUP), W.view(-1, _IQ4_GROUP)
    if (extension := native() if X.device.type == "cpu" else None) is not None:  # the same in C++
        found = torch.empty(len(X), device=X.device)
        extension.search_iq4(X.contiguous().numpy(), W.contiguous().numpy(), _iq4_values().numpy(), IQ4_VALUES[0], found.numpy(), threads())
        return found
    return _search_iq4_groups(X, W.t().contiguous())


def _search_iq4_groups(X: Tensor, W: Tensor) -> Tensor:
    """_search_iq4 of groups X [groups, 32] with the weights W [32, groups] of their errors, in torch: what the C++ code means, and its oracle."""
    peak = signed_peak(X).squeeze(1)
    X = X.t().contiguous()
    empty = peak.abs() < _IQ4_LEAST
    peak = torch.where(empty, 1, peak)
    # Dividends and divisors are tensors: torch would multiply a number by a reciprocal, which rounds twice.
    lowest = peak.new_tensor(IQ4_VALUES[0])
    trials = [(-peak / lowest).reciprocal(), *((lowest + step) / peak for step in range(-_IQ4_TRIALS, _IQ4_TRIALS + 1))]
    values = _iq4_values(X.device)
    best_scale = best_gain = torch.zeros_like(peak)
    terms = X.new_empty(_IQ4_GROUP, 2, X.shape[1])
    for trial, inverse in enumerate(trials):
        Q = _round_iq4(X * inverse, values)
        WQ = W * Q
        torch.mul(WQ, X, out=terms[:, 0])
        torch.mul(WQ, Q, out=terms[:, 1])
        wxq, wq2 = _ordered_sum(terms)
        better = wq2 > 0 if trial == 0 else (wq2 > 0) & (wxq * wxq > best_gain * wq2)
        scale = wxq / wq2
        best_scale, best_gain = torch.where(better, scale, best_scale), torch.where(better, scale * wxq, best_gain)
    return torch.where(empty, 0, best_scale)


def _nearest_iq4(x: Tensor) -> Tensor:
    """Of two equally near the larger value."""
    return _round_iq4(x, _iq4_codes(x.device))


def _round_iq4(x: Tensor, table: Tensor) -> Tensor:
    """What a table [513] says for each half from -128 to 128: the middles of IQ4's values are multiples of 1/2, and looking up is faster than comparing."""
    place = (x * 2).floor_().clamp_(-256, 256).add_(256).long()
    return table.index_select(0, place.view(-1)).view_as(x)


def _iq4_codes(device: torch.device) -> Tensor:
    """The code uint8 [513] of every half from -128 to 128."""
    values = torch.tensor(IQ4_VALUES, device=device)
    halves = torch.arange(-256, 257, device=device) / 2
    return torch.bucketize(halves, (values[:-1] + values[1:]) / 2, right=True).to(torch.uint8)


def _iq4_values(device: torch.device | str = "cpu") -> Tensor:
    """The value float32 [513] of every half from -128 to 128."""
    return take(IQ4_VALUES, _iq4_codes(torch.device(device)))


def _ordered_sum(terms: Tensor) -> Tensor:
    """The sum over the first axis, one term after the other as C adds; torch's own sum pairs them."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _iq4_xs_scales(blocks: Tensor) -> Tensor:
    high = split_fields(blocks[:, 2:4], 2, 4).transpose(1, 2).flatten(1)
    low = split_fields(blocks[:, 4:8], 4, 2).transpose(1, 2).flatten(1)
    return read_half(blocks[:, :2]) * ((low | high << 4).view(torch.int8) - 32)


def _power(exponent: Tensor) -> Tensor:
    """2^(e - 128), by its bits: subnormal for 0 and 1."""
    e = exponent.int()
    return torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)


def _ue4m3_scales(blocks: Tensor) -> Tensor:
    """Half of E4M3 without a sign; the top bit is not looked at, but by ggml's zero at 0x7F."""
    exponents = [max(code >> 3 & 15, 1) - 8 for code in range(256)]
    values = [0.0 if code == 0x7F else ((code >> 3 & 15 > 0) + (code & 7) / 8) * 2.0**exponent for code, exponent in enumerate(exponents)]
    return take(tuple(values), blocks[:, :4])


TABLES: dict[str, TableType] = {
    "iq4_nl": TableType(IQ4_VALUES, 32, slice(2, 18), (4, 16), lambda blocks: read_half(blocks[:, :2]), _nearest_iq4, _fit_iq4_nl),
    "iq4_xs": TableType(IQ4_VALUES, 32, slice(8, 136), (4, 16), _iq4_xs_scales, _nearest_iq4, _fit_iq4_xs),
    "ggml_mxfp4": TableType(FP4_VALUES, 32, slice(1, 17), (4, 16), lambda blocks: _power(blocks[:, :1]), _nearest_fp4, _fit_mxfp4),
    "ggml_nvfp4": TableType(FP4_VALUES, 16, slice(4, 36), (4, 8), _ue4m3_scales),
    "tq1_0": TableType(TERNARY, 256, slice(0, 52), None, lambda blocks: read_half(blocks[:, 52:]), _nearest_ternary, _fit_ternary, levels=3),
    "tq2_0": TableType(TERNARY, 256, slice(0, 64), (2, 32), lambda blocks: read_half(blocks[:, 64:]), _nearest_ternary, _fit_ternary, levels=3),
    "q1_0": TableType((-1.0, 1.0), 128, slice(2, 18), (1, 1), lambda blocks: read_half(blocks[:, :2])),
    "q2_0": TableType(TERNARY, 64, slice(2, 18), (2, 1), lambda blocks: read_half(blocks[:, :2])),
}
