"""Blocks whose linear layers read rounded activations: hooks that put the rounding in front of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, ModelError
from ..numerics import activations
from ..scheme import Rounding
from .linears import Linear


def attach(block: nn.Module, linears: list[Linear], roundings: Mapping[str, Rounding]) -> None:
    """From now on the block's matrices read their inputs rounded, as the entry of their name says; what has none reads them as they are.

    Layers that are given the very same tensor share one rounding of it.
    """
    memory = _Memory()
    experts: dict[str, dict[tuple[str, int | None], Rounding]] = {}
    for linear in {linear.module: linear for linear in linears if linear.expert is None and linear.name in roundings}.values():
        see = lambda _, args, name=linear.name: (memory.rounded(args[0], roundings[name], name), *args[1:])
        block.get_submodule(linear.module).register_forward_pre_hook(see)
    for linear in linears:
        if linear.expert is not None and linear.name in roundings:
            experts.setdefault(linear.module, {})[linear.parameter, linear.expert] = roundings[linear.name]
    for module, table in experts.items():
        owner: Any = block.get_submodule(module)
        owner.rounded = lambda parameter, expert, x, table=table, name=module: _rounded(x, table[parameter, expert], name) if (parameter, expert) in table else x


def _rounded(x: Tensor, rounding: Rounding, name: str) -> Tensor:
    try:
        return activations.fake_quantize(x, rounding)
    except FormatError as error:
        raise ModelError(f"{name}: {error}") from error


class _Memory:
    """The last tensor that was rounded, and what came of it."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.result: tuple[Rounding, Tensor] | None = None

    def rounded(self, x: Tensor, rounding: Rounding, name: str) -> Tensor:
        if self.source is not x or self.result is None or self.result[0] != rounding:
            self.source, self.result = x, (rounding, _rounded(x, rounding, name))
        return self.result[1]
