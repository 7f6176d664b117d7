"""Dense bit packing: codes of b bits as one LSB-first stream in 32-bit little-endian words.

    4 bits   word 0 = c0 | c1<<4 | c2<<8 | ... | c7<<28
    3 bits   word 0 = c0 | c1<<3 | ... | c9<<27 | (c10 & 3)<<30     word 1 = c10>>2 | c11<<1 | ...

The stream of GPTQ's 3-bit layout and of compressed-tensors' pack-quantized (0.20) is this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..native import native, threads

WORD = 32


def words_per_row(count: int, bits: int) -> int:
    """32-bit words that hold count codes of the given bits."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [rows, count], each below 2^bits, into int32 [rows, ceil(count * bits / 32)]."""
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ShapeError(f"pack takes uint8 codes [rows, count]; got {codes.dtype} {list(codes.shape)}.")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise FormatError(f"a code is {int(codes.max())}, which does not fit {bits} bits (at most {(1 << bits) - 1}).")
    rows, count = codes.shape
    if (extension := native() if codes.device.type == "cpu" and codes.numel() else None) is not None:
        made = torch.empty(rows, words_per_row(count, bits), dtype=torch.int32, device=codes.device)
        extension.pack_words(codes.contiguous().numpy(), bits, made.numpy(), False, threads())
        return made
    return _pack(codes, bits)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """pack in torch, on any device: what the C++ code means, and its oracle."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % WORD)).view(rows, -1, WORD)
    words = torch.zeros(rows, padded.shape[1], bits, dtype=torch.int32, device=codes.device)
    for j in range(WORD):
        word, shift = divmod(j * bits, WORD)
        code = padded[:, :, j].to(torch.int32)
        words[:, :, word] |= code << shift
        if shift + bits > WORD:
            words[:, :, word + 1] |= code >> (WORD - shift)
    return words.view(rows, -1)[:, : words_per_row(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack: int32 [rows, words] to uint8 [rows, count]."""
    rows, stored = words.shape
    if stored != words_per_row(count, bits):
        raise ShapeError(f"{count} codes of {bits} bits take {words_per_row(count, bits)} words a row; the tensor has {stored}.")
    if (extension := native() if words.device.type == "cpu" and words.dtype == torch.int32 and words.numel() else None) is not None:
        made = torch.empty(rows, count, dtype=torch.uint8, device=words.device)
        extension.pack_words(made.numpy(), bits, words.contiguous().numpy(), True, threads())
        return made
    return _unpack(words, bits, count)


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """unpack in torch, on any device."""
    rows, stored = words.shape
    padded = torch.nn.functional.pad(words, (0, -stored % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, padded.shape[1], WORD, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for j in range(WORD):
        word, shift = divmod(j * bits, WORD)
        # >> on int32 keeps the sign: mask off what it drags in before the rest of a straddling code is added.
        code = (padded[:, :, word] >> shift) & (mask if shift + bits <= WORD else (1 << (WORD - shift)) - 1)
        if shift + bits > WORD:
            code = code | ((padded[:, :, word + 1] << (WORD - shift)) & mask)
        codes[:, :, j] = code.to(torch.uint8)
    return codes.view(rows, -1)[:, :count].contiguous()
