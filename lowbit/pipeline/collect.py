"""Statistics of what each matrix of a block multiplies, collected while the block runs.

Matrices that read the same tensor (Q, K and V; gate and up; the two halves of an expert) share one set of statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.linears import Linear
from ..stats import LayerStats

PANEL = 2048
TOKENS = 2048


@dataclass
class InputGroup:
    """Matrices of a block that multiply the same input. stage: its place in the order in which the block asks for inputs."""

    linears: list[Linear]
    stats: LayerStats = field(default_factory=LayerStats)


class StopBlock(Exception):
    """Everything that was wanted from this run of the block has been seen."""


class Collector:
    """Shows the inputs of a block's matrices to their statistics while it is entered.

    Groups are discovered by a run: which matrices were given the very same tensor, in the order of the calls.
    """

    def __init__(self, block: nn.Module, linears: list[Linear]) -> None:
        self.block = block
        self._by_module: dict[str, list[Linear]] = {}
        for linear in linears:
            self._by_module.setdefault(linear.module, []).append(linear)

    def discover(self, run) -> list[InputGroup]:
        """Run the block once and return its input groups in calling order; experts that no token reached come last."""
        groups: list[InputGroup] = []
        tensors: list[Tensor] = []  # held, so that no two inputs share an address
        by_key: dict[tuple, InputGroup] = {}

        def see(linears: list[Linear], x: Tensor) -> None:
            for group, tensor in zip(groups, tensors, strict=True):
                if tensor is x:
                    group.linears += [linear for linear in linears if linear not in group.linears]
                    return
            groups.append(InputGroup(list(linears)))
            tensors.append(x)

        with _Hooks(self.block, self._by_module, see, lambda linears, x: self._see_expert(by_key, groups, tensors, linears, x)):
            run()
        for linears in self._by_module.values():
            for linear in linears:
                if linear.expert is not None and linear.input_key not in by_key:
                    self._see_expert(by_key, groups, tensors, [other for other in linears if other.input_key == linear.input_key], None)
        return groups

    @staticmethod
    def _see_expert(by_key, groups, tensors, linears, x) -> None:
        key = linears[0].input_key
        if key not in by_key:
            by_key[key] = InputGroup(list(linears))
            groups.append(by_key[key])
            tensors.append(None)

    def collect(self, groups: list[InputGroup], needs: tuple[str, ...], masks: list[Tensor | None]) -> _Hooks:
        """A context in which every run of the block adds to the groups' statistics; the first matrix of each group stands for all.

        masks: a one-element list holding the current micro-batch's token mask [sequences, length] (or None). The block's forward raises
        StopBlock once the last input has been seen (never with experts, whose calls differ from run to run).
        """
        leaders = {group.linears[0]: group for group in groups}
        last = None if any(leader.expert is not None for leader in leaders) else groups[-1]
        by_module: dict[str, list[Linear]] = {}
        for leader in leaders:
            by_module.setdefault(leader.module, []).append(leader)

        def see(linears: list[Linear], x: Tensor) -> None:
            group = leaders[linears[0]]
            accumulate(group.stats, _tokens(x, masks[0]), needs)
            if group is last:
                raise StopBlock

        return _Hooks(self.block, by_module, see, see)


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs as [tokens, in_features], padding left out."""
    if mask is not None and x.ndim == 3:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])


class _Hooks:
    """Forward pre-hooks on linear modules and observers on experts, removed on exit."""

    def __init__(self, block: nn.Module, by_module: dict[str, list[Linear]], see, see_expert) -> None:
        self.block, self.by_module, self.see, self.see_expert = block, by_module, see, see_expert
        self._handles: list = []
        self._experts: list[nn.Module] = []

    def __enter__(self):
        for name, linears in self.by_module.items():
            module = self.block.get_submodule(name)
            if linears[0].expert is None:
                self._handles.append(module.register_forward_pre_hook(lambda _, args, linears=linears: self.see(linears, args[0])))
            else:
                by_key: dict[tuple, list[Linear]] = {}
                for linear in linears:
                    by_key.setdefault(linear.input_key, []).append(linear)
                module.observe = lambda *seen, name=name, by_key=by_key: self._see_expert(by_key, name, *seen)
                self._experts.append(module)
        return self

    def _see_expert(self, by_key: dict, name: str, parameter: str, expert: int, x: Tensor) -> None:
        if (name, parameter, expert) in by_key:
            self.see_expert(by_key[name, parameter, expert], x)

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        for module in self._experts:
            module.observe = None


def accumulate(stats: LayerStats, x: Tensor, needs: tuple[str, ...]) -> None:
    """Add the tokens x [tokens, in_features] to stats."""
    if not len(x):
        return
    stats.n_tokens += len(x)
    if "sum_sq" in needs:
        total = x.float().square().sum(0)
        stats.sum_sq = total if stats.sum_sq is None else stats.sum_sq + total
    if "absmax" in needs:
        largest = x.abs().amax(0).float()
        stats.absmax = largest if stats.absmax is None else stats.absmax.maximum(largest)
    if "hessian" in needs:
        if stats.hessian is None:
            stats.hessian = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        add_outer_products(stats.hessian, x)


def add_outer_products(H: Tensor, x: Tensor) -> None:
    """H += x^T x, in the lower panels only (see symmetrize); x [tokens, in_features] in any dtype, H float32.

    A bfloat16 product sums in float32 but rounds its result, so it is taken over TOKENS at a time and added up in float32: relative
    error about 1e-3 at 32,768 tokens, less than the 1% damping by far.
    """
    for start in range(0, len(x), TOKENS):
        transposed = x[start : start + TOKENS].T.contiguous()
        for i in range(0, len(transposed), PANEL):
            rows = slice(i, i + PANEL)
            H[rows, : i + PANEL] += torch.nn.functional.linear(transposed[rows], transposed[: i + PANEL])


def symmetrize(H: Tensor) -> Tensor:
    """Mirror the lower panels of H upwards, in place."""
    for i in range(PANEL, len(H), PANEL):
        H[:i, i : i + PANEL] = H[i : i + PANEL, :i].T
    return H
