"""A quantized weight as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .scheme import Scheme


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized matrix; numerics.dequantize gives it back.

    shape: (out_features, in_features). dtype: of the original weight, "float32", "float16" or "bfloat16".
    parts, by format:
        int    codes uint8 [out, in]; scale [out or 1, groups] in scheme.scale_dtype; zero_point uint8 [out or 1, groups] when asymmetric.
               w = scale * (code - zero_point), zero_point = 2^(b-1) when symmetric. g_idx int32 [in], of checkpoints in act-order: the group of each column.
        casts  weight [out, in]
        ggml   blocks uint8 [out, bytes per row]
    """

    scheme: Scheme
    shape: tuple[int, int]
    dtype: str
    parts: dict[str, Tensor]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a matrix, as the two numbers that it is."""
    rows, columns = shape
    return rows, columns
