"""The error that all algorithms lower: what a change of the weights does to a layer's outputs."""

from __future__ import annotations

import torch
from torch import Tensor


def output_energy(D: Tensor, H: Tensor) -> float:
    """tr(D H D^T): the squared output that D [out, in] makes of the calibration inputs, H [in, in]; products in bfloat16, sum in float32.

    H [groups, in, in]: one for each of so many equal groups of rows.
    """
    if H.ndim == 3:
        return sum(output_energy(rows, own) for rows, own in zip(D.tensor_split(len(H)), H, strict=True))
    return float((D.bfloat16() @ H.bfloat16()).float().mul_(D).sum())


def exact_output_energy(D: Tensor, H: Tensor) -> float:
    """The same for one H, products in the tensors' own dtype, sum in float64: for steps that are compared with each other."""
    return float((D @ H).mul_(D).sum(dtype=torch.float64))
