"""Blocks whose linear layers read rounded activations: hooks that put the rounding in front of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..numerics import activations
from ..scheme import Rounding
from .linears import Linear


def attach(block: nn.Module, linears: list[Linear], roundings: Mapping[str, Rounding]) -> None:
    """From now on the block's matrices read their inputs rounded, as the entry of their name says; what has none reads them as they are.

    Layers that are given the very same tensor share one rounding of it.
    """
    memory = _Memory()
    experts: dict[str, dict[tuple[str, int | None], Rounding]] = {}
    for module, rounding in {linear.module: roundings[linear.name] for linear in linears if linear.expert is None and linear.name in roundings}.items():
        block.get_submodule(module).register_forward_pre_hook(lambda _, args, rounding=rounding: (memory.rounded(args[0], rounding), *args[1:]))
    for linear in linears:
        if linear.expert is not None and linear.name in roundings:
            experts.setdefault(linear.module, {})[linear.parameter, linear.expert] = roundings[linear.name]
    for module, table in experts.items():
        owner: Any = block.get_submodule(module)
        owner.rounded = lambda parameter, expert, x, table=table: activations.fake_quantize(x, table[parameter, expert]) if (parameter, expert) in table else x


class _Memory:
    """The last tensor that was rounded, and what came of it."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.result: tuple[Rounding, Tensor] | None = None

    def rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        if self.source is not x or self.result is None or self.result[0] != rounding:
            self.source, self.result = x, (rounding, activations.fake_quantize(x, rounding))
        return self.result[1]
