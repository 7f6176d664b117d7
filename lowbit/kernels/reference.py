"""What the native products compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def round_inputs(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [m, cols] and scales float32 [m, cols / block] of x [m, cols]: absmax / 127 of each block; halves go to the even code."""
    blocks = x.float().view(len(x), -1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0.0)  # a number divided by a tensor would be its reciprocal, times the number
    return (blocks * inverse).round().to(torch.int8).view(x.shape), (largest / 127.0).squeeze(-1)


def matmul(W: Tensor, x: Tensor, block: int) -> Tensor:
    """round(x) W^T in float64, for W [rows, cols] and x [m, cols]."""
    codes, scales = round_inputs(x, block)
    rounded = codes.view(len(x), -1, block).double() * scales.double().unsqueeze(-1)
    return rounded.view(x.shape) @ W.double().T
