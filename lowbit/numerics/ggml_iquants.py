"""ggml's types whose codes are points of a grid: IQ1_S to IQ3_S, decoding only.

256 weights a block. An index stands for eight weights (four in IQ3), a point of a fixed grid; their signs are stored apart, and 16 or 32 weights share an
integer scale s. IQ1's grid has signs of its own and is shifted by 1/8 up or down instead. Bytes of each block, first to last:

    iq1_s    d f16, 32 of indices (low bits), 8 x u16: 4 times 3 high bits, s, shift                        w = d (2 s + 1) (point +- 1/8)
    iq1_m    32 of indices (low bits), 16: for each half byte 3 high bits, shift; 4 x u16: 4 times s, a     w = d (2 s + 1) (point +- 1/8)
             quarter of d f16
    iq2_xxs  d f16, 8 x (4 of indices, u32: 4 times 7 signs, s)                                             w = d (s + 1/2) / 4 point
    iq2_xs   d f16, 32 x u16: 9 of an index, 7 signs; 8: two s                                              w = d (s + 1/2) / 4 point
    iq2_s    d f16, 32 of indices (low bits), 32 of signs, 8: 4 times 2 high bits, 8: two s                 w = d (s + 1/2) / 4 point
    iq3_xxs  d f16, 64 of indices, 8 x u32: 4 times 7 signs, s                                              w = d (s + 1/2) / 2 point
    iq3_s    d f16, 64 of indices (low bits), 8 of high bits, 32 of signs, 4: two s                         w = d (2 s + 1) point

Seven signs are eight: the last makes the number of minuses even. Source: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp; the grids are taken
from gguf-py. Choosing the points needs a search of its own, which llama-quantize has.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .ggml_kquants import read_half, split_fields

_SHIFT = 0.125

# The weights that share a scale.
SHARES = {"iq1_s": 32, "iq1_m": 16, "iq2_xxs": 32, "iq2_xs": 16, "iq2_s": 16, "iq3_xxs": 32, "iq3_s": 32}


def decode_grid(blocks: Tensor, type_name: str) -> Tensor:
    """float32 [blocks, 256] of uint8 [blocks, block_bytes]."""
    index, signs, scale = _SPLIT[type_name](blocks)
    points = _grid(type_name).to(blocks.device)[index]
    if type_name.startswith("iq1"):
        return (points + _SHIFT * signs.unsqueeze(2)).view(*scale.shape, -1).mul_(scale.unsqueeze(2)).flatten(1)
    return points.view(*scale.shape, -1).mul_(scale.unsqueeze(2)).flatten(1).mul_(signs.flatten(1))


@lru_cache
def _grid(type_name: str) -> Tensor:
    """The points of a type, float32 [points, 8 or 4]."""
    from gguf import quants

    kind = getattr(quants, type_name.upper())
    kind.init_grid()
    return torch.from_numpy(kind.grid[0, 0])


# Of each block: indices [blocks, 32 or 64], signs of 1 and -1 [blocks, 32, 8] (IQ1: of the shifts, [blocks, 32]), scales float32 [blocks, groups].


def _split_iq1_s(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, low, rest = blocks.split([2, 32, 16], dim=1)
    word = _words(rest, 2)
    index = low.int() | (_fields(word, 3, 4) << 8).flatten(1)
    shift = torch.where(word & 0x8000 > 0, -1.0, 1.0).repeat_interleave(4, dim=1)
    return index, shift, read_half(d) * (2 * (word >> 12 & 7) + 1)


def _split_iq1_m(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, rest, scales = blocks.split([32, 16, 8], dim=1)
    high = _half_bytes(rest).int()
    word = _words(scales, 2)
    quarters = _half_bytes(scales)[:, 3::4]
    d = read_half(torch.stack([quarters[:, 0] | quarters[:, 1] << 4, quarters[:, 2] | quarters[:, 3] << 4], dim=1))
    shift = torch.where(high & 8 > 0, -1.0, 1.0)
    return low.int() | (high & 7) << 8, shift, d * (2 * _fields(word, 3, 4).flatten(1) + 1)


def _split_iq2_xxs(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, rest = blocks.split([2, 64], dim=1)
    parts = rest.reshape(-1, 8, 8)
    word = _words(parts[:, :, 4:].flatten(1), 4)
    return parts[:, :, :4].flatten(1).int(), _even_signs(_fields(word, 7, 4)), read_half(d) * (0.5 + (word >> 28 & 15)) * 0.25


def _split_iq2_xs(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, rest, scales = blocks.split([2, 64, 8], dim=1)
    word = _words(rest, 2)
    return word & 511, _even_signs(word >> 9), read_half(d) * (0.5 + _half_bytes(scales)) * 0.25


def _split_iq2_s(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, low, signs, high, scales = blocks.split([2, 32, 32, 8, 8], dim=1)
    index = low.int() | (_fields(high.int(), 2, 4) << 8).flatten(1)
    return index, _signs(signs), read_half(d) * (0.5 + _half_bytes(scales)) * 0.25


def _split_iq3_xxs(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, index, rest = blocks.split([2, 64, 32], dim=1)
    word = _words(rest, 4)
    return index.int(), _even_signs(_fields(word, 7, 4)), read_half(d) * (0.5 + (word >> 28 & 15)) * 0.5


def _split_iq3_s(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, low, high, signs, scales = blocks.split([2, 64, 8, 32, 4], dim=1)
    index = low.int() | (_fields(high.int(), 1, 8) << 8).flatten(1)
    return index, _signs(signs), read_half(d) * (1 + 2 * _half_bytes(scales).int())


_SPLIT = {
    "iq1_s": _split_iq1_s,
    "iq1_m": _split_iq1_m,
    "iq2_xxs": _split_iq2_xxs,
    "iq2_xs": _split_iq2_xs,
    "iq2_s": _split_iq2_s,
    "iq3_xxs": _split_iq3_xxs,
    "iq3_s": _split_iq3_s,
}


def _words(field: Tensor, size: int) -> Tensor:
    """Little-endian words of 2 or 4 bytes, int32 [blocks, words]; those of 4 keep their bits and may be negative."""
    if size == 4:
        return field.contiguous().view(torch.int32)
    return field.contiguous().view(torch.int16).int() & 0xFFFF


def _fields(word: Tensor, bits: int, count: int) -> Tensor:
    """int32 [..., count]: fields of bits from the lowest up."""
    return word.unsqueeze(-1) >> torch.arange(0, bits * count, bits, dtype=torch.int32, device=word.device) & (1 << bits) - 1


def _half_bytes(field: Tensor) -> Tensor:
    """uint8 [blocks, 2 bytes]: the low half of each byte, then its high half."""
    return split_fields(field.unsqueeze(-1), 4, 2).flatten(1)


def _even_signs(seven: Tensor) -> Tensor:
    """Signs of seven bits each, and the eighth that makes them even."""
    parity = seven ^ seven >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return _signs((seven | (parity & 1) << 7).flatten(1))


def _signs(byte: Tensor) -> Tensor:
    """-1.0 where a bit is set, else 1.0: float32 [blocks, bytes, 8]."""
    return 1.0 - 2.0 * _fields(byte.int(), 1, 8)
