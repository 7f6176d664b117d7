"""Random bytes as the parts of quantized matrices: what tests and fuzzer decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lowbit import numerics
from lowbit.checkpoints import ct_layouts, gptq
from lowbit.numerics import packing
from lowbit.scheme import INT, Activation, Scheme
from lowbit.tensor import QuantizedTensor

ROWS, COLUMNS = 16, 256
LARGE = ("aqlm_1x12", "aqlm_2x12", "aqlm_1x16", "aqlm_2x16")  # whose codebooks take long to make, and are as the smaller ones
FORMATS = tuple(name for name in numerics.FORMATS if name not in LARGE)


def fill(template: Tensor, data: bytes) -> Tensor:
    """A tensor like the template whose bytes are data, over and over."""
    size = template.numel() * template.element_size()
    cycled = torch.frombuffer(bytearray((data or b"\0") * (size // max(1, len(data)) + 1))[: max(1, size)], dtype=torch.uint8)
    return cycled[:size].view(template.dtype).view(template.shape).clone()


@cache
def template(name: str, **given: object) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    return numerics.quantize(torch.randn(ROWS, COLUMNS, generator=generator), numerics.scheme_of(name, **given))


def decode_format(name: str, data: bytes) -> None:
    """Decode a matrix of a number format whose parts are any bytes (codes: as far as they fit their bits, which readers see to)."""
    sound = template(name)
    parts = {}
    for number, (key, part) in enumerate(sound.parts.items()):
        parts[key] = fill(part, data[number:] + data[:number])
        if key == "codes":
            parts[key] = parts[key].long().remainder(2 ** sound.scheme.bits if name != "ternary" else 3).to(part.dtype)
    decoded = numerics.dequantize(QuantizedTensor(sound.scheme, sound.shape, sound.dtype, parts))
    assert decoded.dtype == torch.float32 and tuple(decoded.shape) == sound.shape


def unpack_words(bits: int, count: int, data: bytes) -> None:
    """Any words are codes of so many bits, and the codes are these words again (but for bits behind the last code)."""
    words = fill(torch.empty(3, packing.words_per_row(count, bits), dtype=torch.int32), data)
    codes = packing.unpack(words, bits, count)
    assert tuple(codes.shape) == (3, count) and int(codes.max()) < 2**bits
    assert torch.equal(packing.unpack(packing.pack(codes, bits), bits, count), codes)
    if count * bits % 32 == 0:
        assert torch.equal(packing.pack(codes, bits), words)


def _schemes() -> dict[str, tuple[str, Scheme]]:
    """A scheme of each layout of compressed-tensors and of each number of bits of pack-quantized."""
    ints = {f"{ct_layouts.PACKED} {bits} {symmetric}": (ct_layouts.PACKED, Scheme(bits=bits, block=(1, 32), symmetric=symmetric)) for bits in range(2, 9) for symmetric in (True, False)}
    floats = {"float-quantized": "fp8_e4m3", "nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "mxfp8-quantized": "mxfp8_e4m3"}
    return {**ints, "int-quantized": ("int-quantized", Scheme(bits=4, block=(1, -1), act=Activation())), **{name: (name, numerics.scheme_of(fmt)) for name, fmt in floats.items()}}


SCHEMES = _schemes()


def decode_compressed(name: str, data: bytes) -> None:
    """Decode the tensors of a layout of compressed-tensors that have the right shapes and any bytes."""
    layout, scheme = SCHEMES[name]
    kind, shape = ct_layouts.LAYOUTS[layout], (ROWS, COLUMNS)
    parts = {part: fill(torch.empty(size, dtype=dtypes[0]), data[number:]) for number, (part, (size, dtypes)) in enumerate(kind.shapes(scheme, shape).items())}
    assert tuple(numerics.dequantize(kind.decode(parts, scheme, shape, "float32")).shape) == shape


def decode_gptq(bits: int, layout: str, symmetric: bool, data: bytes) -> None:
    """Decode qweight, qzeros, scales and g_idx of any bytes."""
    scheme = Scheme(bits=bits, block=(1, 32), symmetric=symmetric, scale_dtype="float16")
    sound = gptq.encode(numerics.quantize(torch.linspace(-1, 1, 32 * 64).view(32, 64), scheme), layout)
    parts = {key: fill(part, data[number:]) for number, (key, part) in enumerate(sound.items())}
    if "g_idx" in parts:
        parts["g_idx"] = parts["g_idx"] % 3 if data[:1] < b"\xf0" else parts["g_idx"]
    decoded = gptq.decode(parts, scheme, (32, 64), "float16", layout)
    assert decoded.scheme.format == INT and tuple(numerics.dequantize(decoded).shape) == (32, 64)


DECODERS: dict[str, Callable[[bytes], None]] = {
    **{f"format {name}": lambda data, name=name: decode_format(name, data) for name in FORMATS},
    **{f"words of {bits} bits": lambda data, bits=bits: unpack_words(bits, 1 + len(data) % 200, data) for bits in range(1, 9)},
    **{f"layout {name}": lambda data, name=name: decode_compressed(name, data) for name in SCHEMES},
    **{
        f"gptq {bits} {layout} {symmetric}": lambda data, bits=bits, layout=layout, symmetric=symmetric: decode_gptq(bits, layout, symmetric, data)
        for bits, layout in ((2, gptq.V1), (3, gptq.V2), (4, gptq.AWQ), (8, gptq.V1))
        for symmetric in (True, False)
    },
}
