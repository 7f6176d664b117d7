"""What training minimises: the KL divergence of a model's predictions to the original's, cross-entropy, or a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 23  # logits that are worked on at once in float32


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) over positions, in nats; logits [..., vocabulary] of any dtype, gradients to student.

    The gradient is made with the value, in the memory of student: only use both once.
    """
    return _Divergence.apply(student, teacher)


class _Divergence(torch.autograd.Function):
    """KL of softmaxes; its gradient at the logits is (q - p) / positions."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        flat, goal = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        step = max(1, CHUNK_NUMBERS // flat.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(flat), step)):
            q, p = flat[rows].float().log_softmax(-1), goal[rows].float().log_softmax(-1)
            chance = p.exp()
            total += (p.sub_(q)).mul_(chance).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[rows] = q.exp_().sub_(chance).div_(len(flat)).to(gradient.dtype)
        ctx.shape = student.shape
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return (total / len(flat)).float()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.to(gradient.dtype)).view(ctx.shape), None


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean of -log p(next token), in nats; logits [batch, length, vocabulary], ids [batch, length]."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
