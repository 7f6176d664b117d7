"""Packing of codes into 32-bit words: golden words of the reference libraries, inverses, refusals."""

import pytest
import torch

from lowbit.errors import FormatError, ShapeError
from lowbit.numerics import packing
from lowbit.numerics.packing import pack, unpack, words_per_row

BITS = range(1, 9)


def hexadecimal(words):
    return [f"{word & 0xFFFFFFFF:08X}" for word in words.flatten().tolist()]


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, list(range(16)), ["76543210", "FEDCBA98"]),
        (3, [j % 8 for j in range(32)], ["88FAC688", "C688FAC6", "FAC688FA"]),
        (8, [0, 127, 128, 255], ["FF807F00"]),
        (2, [3, 2, 1, 0], ["0000001B"]),
        (5, [31, 0, 0, 0, 0, 0, 31], ["C000001F", "00000007"]),
    ],
)
def test_golden_words(bits, codes, words):
    assert hexadecimal(pack(torch.tensor([codes], dtype=torch.uint8), bits)) == words


@pytest.mark.parametrize("bits", BITS)
def test_unpack_is_the_inverse_for_every_count(bits):
    generator = torch.Generator().manual_seed(bits)
    for count in range(1, 101):
        codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8, generator=generator)
        words = pack(codes, bits)
        assert words.shape == (3, words_per_row(count, bits)) and words.dtype == torch.int32
        assert torch.equal(unpack(words, bits, count), codes)
        assert torch.equal(words, packing._pack(codes, bits)) and torch.equal(packing._unpack(words, bits, count), codes)  # as in torch, whichever it was


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_and_all_zeros(bits):
    for code in (0, (1 << bits) - 1):
        codes = torch.full((2, 33), code, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 33), codes)
    assert hexadecimal(pack(torch.full((1, 32), (1 << bits) - 1, dtype=torch.uint8), bits)) == ["FFFFFFFF"] * bits


def test_words_per_row():
    assert [words_per_row(545, bits) for bits in BITS] == [18, 35, 52, 69, 86, 103, 120, 137]


def test_padding_bits_are_zero():
    assert hexadecimal(pack(torch.full((1, 3), 7, dtype=torch.uint8), 3)) == ["000001FF"]


def test_input_is_not_modified():
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    words = pack(codes, 4)
    kept = words.clone()
    unpack(words, 4, 8)
    assert torch.equal(codes, torch.arange(16, dtype=torch.uint8).view(2, 8)) and torch.equal(words, kept)


def test_refusals():
    with pytest.raises(FormatError, match="a code is 8, which does not fit 3 bits \\(at most 7\\)"):
        pack(torch.tensor([[8]], dtype=torch.uint8), 3)
    with pytest.raises(ShapeError, match="uint8 codes"):
        pack(torch.tensor([[1]], dtype=torch.int32), 3)
    with pytest.raises(ShapeError, match="9 codes of 4 bits take 2 words a row; the tensor has 1"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), 4, 9)
