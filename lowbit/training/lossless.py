"""QA-LoRA adapters in float zero-points: w = s (c - z) + D becomes s (c - z'), z' = z - D / s, where D is one number for each group. No code changes.

Xu et al., "QA-LoRA", arXiv:2309.14717, section 3.3. Of Q4_1 and Q5_1 (w = d c + m) the minimum takes it: m' = m + D, in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..checkpoints import Checkpoint, LazyQuantized
from ..checkpoints.adapter import LowRank
from ..errors import FormatError, RecipeError
from ..numerics import ggml, integer
from ..progress import Progress
from ..scheme import INT
from ..tensor import QuantizedTensor

MINIMA = ("q4_1", "q5_1")


@dataclass(frozen=True)
class Shifted:
    """What became of the adapted matrices, found by decoding the written file. exact: how many equal base + adapter bit for bit; largest_difference: of the others, of a matrix's largest magnitude."""

    matrices: int
    exact: int
    largest_difference: float
    rounded_to: str

    @property
    def statement(self) -> str:
        if self.exact == self.matrices:
            return f"Lossless: all {self.matrices} adapted matrices decode to base + adapter, bit for bit."
        rest = f"within the rounding of their zero-points to {self.rounded_to} (at most {self.largest_difference:.2g} of a matrix's largest)"
        return f"Every code is as it was; {self.exact} of {self.matrices} adapted matrices decode to base + adapter bit for bit, the others {rest}."


def shifted(base: Checkpoint, layers: Mapping[str, LowRank]) -> Checkpoint:
    """base with adapters, by weight name, in the zero-points of its matrices when they are read. RecipeError for formats and adapters that this cannot be."""
    quantized = dict(base.quantized)
    for name, low in layers.items():
        if name not in base.quantized:
            raise RecipeError(f"{name} is not quantized in {base.path}, so it has no zero-points that could take the adapter. Leave --lossless out.")
        entry = base.quantized[name]
        size = _group(entry, name)
        if low.pool == 1:
            raise RecipeError(f"the adapter of {name} is ordinary LoRA, which changes each weight by a number of its own. Only QA-LoRA (use_qalora) goes into zero-points. Leave --lossless out.")
        if low.pool % size:
            raise RecipeError(f"the adapter of {name} has groups of {low.pool} inputs, and the groups of {entry.scheme.name} are {size} wide; expected a multiple of {size}. Leave --lossless out.")
        quantized[name] = replace(entry, load=partial(_load, entry, low, size, name), rows=None)
    return replace(base, quantized=quantized)


def _group(entry: LazyQuantized, name: str) -> int:
    """Inputs that share a float zero-point."""
    scheme = entry.scheme
    if scheme.format in MINIMA:
        return ggml.BLOCK_TYPES[scheme.format].block_size
    if scheme.format != INT or scheme.symmetric or scheme.zero_dtype != "float" or scheme.block[0] != 1 or scheme.outliers is not None:
        why = "whole zero-points" if scheme.format == INT and not scheme.symmetric and scheme.zero_dtype == "int" else "no float zero-point for each group of a row's inputs"
        raise RecipeError(f"{name} is {scheme.name}, which has {why} to take the adapter. HQQ's integers (axis 1), Q4_1 and Q5_1 can. Leave --lossless out.")
    return entry.shape[1] if scheme.block[1] == -1 else scheme.block[1]


def _load(entry: LazyQuantized, low: LowRank, size: int, name: str) -> QuantizedTensor:
    qt = entry.load()
    delta = low.per_group().repeat_interleave(low.pool // size, dim=1)
    if qt.scheme.format in MINIMA:
        codes, scale, minimum = ggml.unpack_codes(qt.scheme.format, qt.parts["blocks"])
        assert minimum is not None
        moved = (minimum.float() + delta).half()
        _refuse_infinite(moved, name)
        return replace(qt, parts={"blocks": ggml.pack_codes(qt.scheme.format, codes, scale, moved)})
    integer.refuse_order(qt, "a merge without loss")
    scale, zero = qt.parts["scale"].float(), qt.parts["zero_point"]
    if bool(((scale == 0) & (delta != 0)).any()):
        raise FormatError(f"{name}: a group has the scale 0, so its zero-point changes nothing and cannot take the adapter. Leave --lossless out.")
    moved = torch.where(delta == 0, zero.float(), zero.float() - delta / scale).to(zero.dtype)
    _refuse_infinite(moved, name)
    return replace(qt, parts={**qt.parts, "zero_point": moved})


def _refuse_infinite(moved: Tensor, name: str) -> None:
    if not bool(torch.isfinite(moved).all()):
        raise FormatError(f"{name}: with the adapter a zero-point is too large for {str(moved.dtype).removeprefix('torch.')}. Leave --lossless out.")


def compared(base: Checkpoint, made: Checkpoint, layers: Mapping[str, LowRank], output: Path, progress: Progress) -> Shifted:
    """Decode the adapted matrices of what was written and compare them with base + adapter in float32; FormatError where more than the zero-points' rounding lies between."""
    exact, largest, dtypes = 0, 0.0, set()
    with progress.step("Comparing", len(layers)) as advance:
        for name, low in layers.items():
            before, found = base.quantized[name].load(), made.quantized[name].load()
            wanted, values = numerics.dequantize(before) + low.delta(), numerics.dequantize(found)
            dtypes.add(zero_dtype := "float16" if found.scheme.format in MINIMA else found.scheme.scale_dtype)
            difference, top = (values - wanted).abs(), wanted.abs().max().clamp(min=1e-30)
            if bool((difference > _allowed(found, zero_dtype) + top * 2.0**-20).any()):
                raise FormatError(f"{output} was written, but {name} differs from base + adapter by {float(difference.max() / top):.2g} of its largest; please report this.")
            exact += torch.equal(values, wanted)
            largest = max(largest, float(difference.max() / top))
            advance(1)
    return Shifted(len(layers), exact, largest, " and ".join(sorted(dtypes)))


def _allowed(qt: QuantizedTensor, dtype: str) -> Tensor:
    """What rounding a zero-point (or minimum) to its dtype may change in each weight."""
    kind = torch.finfo(getattr(torch, dtype))
    if qt.scheme.format in MINIMA:
        minimum = ggml.unpack_codes(qt.scheme.format, qt.parts["blocks"])[2]
        assert minimum is not None
        return (minimum.float().abs() * kind.eps + kind.smallest_normal * kind.eps).repeat_interleave(32, dim=1)
    change = qt.parts["scale"].float().abs() * (qt.parts["zero_point"].float().abs() * kind.eps + kind.smallest_normal * kind.eps)
    return integer.spread(change, qt.scheme, qt.shape[1])
