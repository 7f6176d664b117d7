"""Decoding of packed matrices (numerics/parts.py) straight to the dtype that computes: codes of 1 to 8 bits times scales, or the values of a table times scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..native import native, threads
from ..numerics import codebook, floating, parts, ternary
from ..scheme import INT, Scheme
from ..tensor import QuantizedTensor

UNIT = 32  # columns


def decode(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, through: torch.dtype | None = None) -> Tensor | None:
    """The matrix [out, in] that parts.store's tensors stand for, in float32 or bfloat16: bit for bit dequantize(...).to(through).to(dtype). None where the extension does not do it."""
    if through == torch.bfloat16 and dtype == torch.float32:
        made = decode(stored, scheme, shape, through)
        return None if made is None else made.float()
    if through == torch.float16 and dtype == torch.float16:  # its own rounding twice is once
        made = decode(stored, scheme, shape, torch.float32, through)
        return None if made is None else made.half()
    codes, bits = stored.get("codes"), parts.code_bits(scheme)
    columns = shape[1]
    if native() is None or codes is None or codes.device.type != "cpu" or bits is None or bits > 8 or bits == 7 or dtype not in (torch.float32, torch.bfloat16):
        return None
    if "g_idx" in stored or scheme.outliers is not None or columns % UNIT or (group := _group(scheme, columns)) is None:
        return None
    scale, zero = _scales(stored, scheme, shape, columns // group)
    out = torch.empty(shape, dtype=dtype)
    target = out.view(torch.uint16) if dtype == torch.bfloat16 else out
    native().decode(codes.contiguous().view(torch.uint8), bits, _table(scheme, bits), scale, zero, target, threads(), "", through == torch.float16)
    return out


def _group(scheme: Scheme, columns: int) -> int | None:
    """Columns with one scale, a multiple of UNIT that divides a row; None: there is none."""
    if scheme.block[0] > 1:
        return None
    size = columns if scheme.block[1] in (-1, columns) else scheme.block[1]
    return size if size % UNIT == 0 and columns % size == 0 else None


def _scales(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], groups: int) -> tuple[Tensor, Tensor | None]:
    """Float32 [out, groups]; zero-points too, or None where a table says what codes mean."""
    rows = shape[0]
    if scheme.format in codebook.CODES:
        scale = codebook.absmax(QuantizedTensor(scheme, shape, "float32", dict(stored)))
    elif scheme.format in floating.KINDS:
        scale = floating.effective_scale(dict(stored), scheme)
    else:
        scale = stored["scale"].float()
    zero = stored["zero_point"].float().view(rows, groups).contiguous() if "zero_point" in stored else None
    return (scale.expand(rows, groups) if scale.numel() == 1 else scale.reshape(rows, groups)).contiguous(), zero


def _table(scheme: Scheme, bits: int) -> Tensor:
    codes = torch.arange(1 << bits, dtype=torch.uint8) if bits < 8 else torch.arange(256).to(torch.uint8)
    if scheme.format in codebook.CODES:
        return codebook.table(scheme.format)
    if scheme.format in floating.KINDS:
        return floating.decode(codes, floating.KINDS[scheme.format].element).float().contiguous()
    if scheme.format in ternary.KINDS:
        return codes.float() * 2 - 1 if scheme.format == "binary" else codes.float() - 1
    assert scheme.format == INT
    return codes.float() - (scheme.zero_code if scheme.symmetric else 0)


