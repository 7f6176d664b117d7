"""The error that all algorithms lower: what a change of the weights does to a layer's outputs."""

from __future__ import annotations

from torch import Tensor


def output_energy(D: Tensor, H: Tensor) -> float:
    """tr(D H D^T): the squared output that D [out, in] makes of the calibration inputs, H [in, in]; products in bfloat16, sum in float32."""
    return float((D.bfloat16() @ H.bfloat16()).float().mul_(D).sum())
