"""NF4 and FP4: 16 fixed values times the largest magnitude of each block; with double quantization the magnitudes are 8-bit codes, too.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3; Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", arXiv:2110.02861 (the dynamic code of the second level). Codes, magnitudes and nested state are bit for bit those of
bitsandbytes (tests/oracles/make_bitsandbytes.py): a block is so many consecutive weights of the matrix read row by row, wherever its rows end.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import FormatError
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape

NESTED_BLOCK = 256

# The values of code 0 to 15. NF4: quantiles of the normal distribution, with an exact zero. FP4: sign, two bits of exponent, one of mantissa.
CODES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25, 0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -0.5, -2 / 12, -0.25),
}  # fmt: skip


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Round W [out_features, in_features] to the nearest of the format's values; the range of a block is its largest magnitude."""
    flat = W.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % scheme.block[1])).view(-1, scheme.block[1])
    absmax = blocks.abs().amax(1).float()
    if not bool(torch.isfinite(absmax).all()):
        raise FormatError("the weight holds values that are NaN or infinite.")
    scaled = blocks.float().mul_(_inverse(absmax).unsqueeze(1)).clamp_(-1, 1)
    codes = nearest(scaled, scheme.format).view(-1)[: flat.numel()].view(W.shape)
    return from_codes(codes, absmax, scheme, str(W.dtype).removeprefix("torch."))


def from_codes(codes: Tensor, absmax: Tensor, scheme: Scheme, dtype: str) -> QuantizedTensor:
    """Wrap codes uint8 [out, in] and the magnitudes float32 [blocks], which become codes themselves in a nested scheme
    (stored [out, blocks of a row] where blocks end with the rows)."""
    if scheme.nested:
        parts = {"codes": codes, **nest(absmax, scheme.nested)}
    else:
        parts = {"codes": codes, "absmax": absmax.view(len(codes), -1) if rowwise(scheme, codes.shape[1]) else absmax}
    return QuantizedTensor(scheme, matrix_shape(codes.shape), dtype, parts)


def dequantize(qt: QuantizedTensor) -> Tensor:
    """value(code) * absmax, float32 [out_features, in_features]."""
    values = table(qt.scheme.format, qt.parts["codes"].device)[qt.parts["codes"].view(-1).int()]
    count = values.numel()
    size = min(qt.scheme.block[1], count)  # one block, however long it says it is
    padded = torch.nn.functional.pad(values, (0, -count % size)).view(-1, size)
    return (padded * absmax(qt).unsqueeze(1)).view(-1)[:count].view(qt.shape)


def absmax(qt: QuantizedTensor) -> Tensor:
    """The magnitude of each block, float32 [blocks], as the consumer computes it."""
    if not qt.scheme.nested:
        return qt.parts["absmax"].view(-1)
    codes = qt.parts["absmax_codes"]
    values = dynamic_table(codes.device)[codes.int()]
    return values * qt.parts["nested_absmax"].repeat_interleave(min(qt.scheme.nested, len(codes)))[: len(codes)] + qt.parts["nested_offset"]


def nest(absmax: Tensor, size: int) -> dict[str, Tensor]:
    """Double quantization of magnitudes float32 [blocks]: their mean taken off, then 8-bit dynamic codes in blocks of size."""
    offset = absmax.mean()
    rest = absmax - offset
    padded = torch.nn.functional.pad(rest, (0, -len(rest) % size)).view(-1, size)
    peak = padded.abs().amax(1)
    scaled = padded.mul(_inverse(peak).unsqueeze(1)).clamp_(-1, 1)
    codes = _nearest_sorted(scaled, dynamic_table(absmax.device)).to(torch.uint8).view(-1)[: len(rest)]
    return {"absmax_codes": codes, "nested_absmax": peak, "nested_offset": offset}


def nearest(x: Tensor, name: str) -> Tensor:
    """The code uint8 of the value nearest to each x in [-1, 1]; halves go to the lower value. FP4 has two zeros: code 0 up to 0, code 8 above it."""
    values = table(name, x.device)
    order = torch.argsort(values, stable=True)
    middles = (values[order[:-1]] + values[order[1:]]) / 2
    return order.to(torch.uint8)[torch.bucketize(x, middles)]


def _nearest_sorted(x: Tensor, values: Tensor) -> Tensor:
    """The place in ascending values of the one nearest to each x; the lower one of two equally near."""
    above = torch.searchsorted(values, x).clamp_(1, len(values) - 1)
    below = above - 1
    return torch.where((x - values[below]).abs() <= (x - values[above]).abs(), below, above)


def _inverse(absmax: Tensor) -> Tensor:
    """1 / absmax, 0 for a block of zeros."""
    return torch.where(absmax == 0, 0, 1 / absmax)


def table(name: str, device: torch.device | None = None) -> Tensor:
    """The 16 values by code, float32."""
    return torch.tensor(CODES[name], dtype=torch.float32, device=device)


def dynamic_table(device: torch.device | None = None) -> Tensor:
    """The 256 values of the dynamic 8-bit code in ascending order, float32."""
    return torch.tensor(_dynamic_values(), dtype=torch.float32, device=device)


@lru_cache(maxsize=1)
def _dynamic_values() -> tuple[float, ...]:
    """A sign, a decimal exponent of 0 to 6 and a linear fraction with the bits that the exponent leaves (arXiv:2110.02861, section 1.3)."""
    values: list[float] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        values += (10.0 ** (exponent - 6) * means).tolist()
        values += (-(10.0 ** (exponent - 6)) * means).tolist()
    return tuple(sorted([*values, 0.0, 1.0]))


def bits(scheme: Scheme, rows: int, columns: int) -> int:
    """4 bits a weight and 32 a block; nested: 8 a block, 32 for each of NESTED_BLOCK of them, 32 for the mean."""
    blocks = -(-rows * columns // scheme.block[1])
    return rows * columns * 4 + (8 * blocks + 32 * -(-blocks // scheme.nested) + 32 if scheme.nested else 32 * blocks)


def rowwise(scheme: Scheme, columns: int) -> bool:
    """Whether blocks end with the rows and nothing is shared between them."""
    return not scheme.nested and columns % scheme.block[1] == 0
