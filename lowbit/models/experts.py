"""Mixtures of experts: the forward of transformers 5's fused experts, expert by expert, so that what each one sees can be counted.

Module hooks cannot catch an expert's inputs (the experts are one three-dimensional parameter); transformers lets a function be
registered under a name instead, and a model set to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import ModelError

EXPERTS_IMPLEMENTATION = "lowbit"


class FusedExperts(Protocol):
    """What experts_forward uses of transformers' modules. down_proj: [experts, hidden, intermediate], transposed [experts, intermediate, hidden]."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    down_proj: Tensor
    act_fn: Callable[[Tensor], Tensor]

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor: ...


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a set of fused experts that this driver runs."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "num_experts") and isinstance(down, nn.Parameter) and down.ndim == 3


def check_experts(module: nn.Module, name: str) -> None:
    """Raise ModelError for a layout of experts that is not handled."""
    if not hasattr(module, "has_bias"):  # not one of those that take a registered function
        raise ModelError(f"{name}: {type(module).__name__} runs its experts itself, so what each of them sees cannot be told apart.")
    if module.has_post_expert_norm:
        raise ModelError(f"{name}: experts with a norm of their own are not handled yet ({type(module).__name__}).")


def experts_forward(self: FusedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run every expert on the tokens routed to it.

    hidden_states [tokens, hidden]; top_k_index, top_k_weights [tokens, k]. self.observe(parameter, expert, x, token), when set, is shown
    the inputs of each expert's matrices: x [tokens of this expert, in_features], and which tokens they are. self.rounded(parameter, expert, x), when set,
    gives what they read instead.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    observe, rounded = getattr(self, "observe", None), getattr(self, "rounded", None)
    result = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in range(self.num_experts):
        token, place = torch.where(top_k_index == expert)
        if not len(token):
            continue
        x = hidden_states[token]
        if observe is not None:
            observe(up_name, expert, x, token)
        if rounded is not None:
            x = rounded(up_name, expert, x)
        x = _linear(self, x, up_name, expert)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        if observe is not None:
            observe("down_proj", expert, x, token)
        if rounded is not None:
            x = rounded("down_proj", expert, x)
        x = _linear(self, x, "down_proj", expert) * top_k_weights[token, place, None]
        result.index_add_(0, token, x.float())
    return result.to(hidden_states.dtype)


def _linear(experts: FusedExperts, x: Tensor, parameter: str, expert: int) -> Tensor:
    """One expert's layer: x [tokens, in] to [tokens, out]."""
    weight = getattr(experts, parameter)[expert]
    bias = getattr(experts, f"{parameter}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(x, weight.T if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
