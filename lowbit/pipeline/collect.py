"""Statistics of what each matrix of a block multiplies, collected while the block runs.

Matrices that read the same tensor (Q, K and V; gate and up; the two halves of an expert) share one set of statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.linears import Linear
from ..numerics.activations import AVERAGING
from ..stats import Histogram, LayerStats

PANEL = 384
TOKENS = 2048
OBSERVED = {"range", "average", "histogram"}  # statistics that one infinite value would spoil
SAMPLE_TOKENS, SAMPLE_SHARE = 512, 64  # of inputs that are kept as they are: in all, and of each micro-batch


@dataclass
class InputGroup:
    """Matrices of a block that multiply the same input, and the statistics of that input.

    original: what the original model reads here for the current micro-batch (GPTAQ).
    weights: what each token counts in the Hessian, float32 [tokens of all micro-batches], mean 1 (None: all the same); [tokens, groups]: in that of each group of outputs.
    """

    linears: list[Linear]
    stats: LayerStats = field(default_factory=LayerStats)
    weights: Tensor | None = None
    original: Tensor | None = None


@dataclass
class Current:
    """The micro-batch that runs through the block just now: its mask [sequences, length] (None: all tokens are real), and which of all tokens it holds.

    of_original: its hidden states are those of the original model; inputs are then only kept, to be compared with those that follow.
    """

    mask: Tensor | None = None
    tokens: slice | None = None
    of_original: bool = False


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
        """Run the block once and return its input groups in calling order; what is never called comes last.

        The experts of a layer stand together in their own order, whichever of them this run reached.
        """
        groups: list[InputGroup] = []
        tensors: list[Tensor | None] = []  # held, so that no two inputs share an address
        placed: set[str] = set()

        def see(linears: list[Linear], x: Tensor) -> None:
            for group, tensor in zip(groups, tensors, strict=True):
                if tensor is x:
                    group.linears += [linear for linear in linears if linear not in group.linears]
                    return
            groups.append(InputGroup(list(linears)))
            tensors.append(x)

        def see_experts(linears: list[Linear], *_) -> None:
            if linears[0].module not in placed:
                placed.add(linears[0].module)
                found = list(_by_input(self._by_module[linears[0].module]).values())
                groups.extend(InputGroup(alike) for alike in found)
                tensors.extend([None] * len(found))

        with _Hooks(self.block, self._by_module, see, see_experts):
            run()
        called = {linear for group in groups for linear in group.linears}
        never = [linear for linears in self._by_module.values() for linear in linears if linear not in called]
        return groups + [InputGroup(alike) for alike in _by_input(never).values()]

    def collect(self, groups: list[InputGroup], needs: tuple[str, ...], current: Current) -> _Hooks:
        """A context in which every run of the block adds to the groups' statistics; the first matrix of each group stands for all.

        current: to be set before each run. The block's forward raises StopBlock once the last input has been seen (never with experts,
        whose calls differ from run to run).
        """
        leaders = {group.linears[0]: group for group in groups}
        last = None if any(leader.expert is not None for leader in leaders) else groups[-1]
        by_module: dict[str, list[Linear]] = {}
        for leader in leaders:
            by_module.setdefault(leader.module, []).append(leader)

        def see(linears: list[Linear], x: Tensor, tokens: Tensor | None = None) -> None:
            group = leaders[linears[0]]
            if current.of_original:
                group.original = x if linears[0].expert is None else None
                if group is last:
                    raise StopBlock
                return
            weights = None if group.weights is None else group.weights[current.tokens or slice(None)].to(x.device)
            x, weights = _real_tokens(x, weights, current.mask, tokens, linears[0])
            if OBSERVED & set(needs) and not bool(torch.isfinite(x).all()):
                raise ModelError(f"{linears[0].name}: the activations that reach it are infinite or NaN. Compute in a wider dtype (--dtype float32), or check the model.")
            accumulate(group.stats, x, needs, weights)
            if "cross" in needs and group.original is not None:
                original, _ = _real_tokens(group.original, None, current.mask, None, linears[0])
                add_cross_products(group.stats, original - x, x, weights)
                group.original = None
            if group is last:
                raise StopBlock

        return _Hooks(self.block, by_module, see, see)


def stages(groups: list[InputGroup]) -> list[list[InputGroup]]:
    """Groups that can be quantized from one run of the block: each alone, but all experts of a layer together."""
    found: dict[object, list[InputGroup]] = {}
    for place, group in enumerate(groups):
        leader = group.linears[0]
        found.setdefault(place if leader.expert is None else (leader.module, leader.parameter), []).append(group)
    return list(found.values())


def _by_input(linears: list[Linear]) -> dict[tuple, list[Linear]]:
    """Matrices by what identifies their input."""
    found: dict[tuple, list[Linear]] = {}
    for linear in linears:
        found.setdefault(linear.input_key, []).append(linear)
    return found


def _real_tokens(x: Tensor, weights: Tensor | None, mask: Tensor | None, tokens: Tensor | None, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Inputs as [tokens, in_features] without those of padding, and their weights. tokens: which ones of the micro-batch x holds (None: all, in order)."""
    x = x.reshape(-1, x.shape[-1])
    if weights is not None and tokens is not None:
        weights = weights[tokens]
    if mask is None:
        return x, weights
    keep = mask.flatten().to(x.device)
    if tokens is not None:
        keep = keep[tokens]
    if len(keep) != len(x):
        raise ModelError(f"{linear.name}: its input has {len(x)} rows for {len(keep)} tokens, so padding cannot be left out of it. Use calibration without pad.")
    return x[keep], None if weights is None else weights[keep]


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
                by_key = _by_input(linears)
                module.observe = lambda *seen, name=name, by_key=by_key: self._see_expert(by_key, name, *seen)
                self._experts.append(module)
        return self

    def _see_expert(self, by_key: dict, name: str, parameter: str, expert: int, x: Tensor, tokens: Tensor) -> None:
        if (name, parameter, expert) in by_key:
            self.see_expert(by_key[name, parameter, expert], x, tokens)

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        for module in self._experts:
            module.observe = None


def accumulate(stats: LayerStats, x: Tensor, needs: tuple[str, ...], weights: Tensor | None = None) -> None:
    """Add the tokens x [tokens, in_features] to stats; weights [tokens] or [tokens, groups]: what each counts in the Hessian."""
    if not len(x):
        return
    stats.n_tokens += len(x)
    if "sum_abs" in needs:
        total = x.float().abs().sum(0)
        stats.sum_abs = total if stats.sum_abs is None else stats.sum_abs + total
    if "sum_sq" in needs:
        total = x.float().square().sum(0)
        stats.sum_sq = total if stats.sum_sq is None else stats.sum_sq + total
    if "absmax" in needs:
        largest = x.abs().amax(0).float()
        stats.absmax = largest if stats.absmax is None else stats.absmax.maximum(largest)
    if "range" in needs or "average" in needs:
        low, high = (end.float() for end in torch.aminmax(x))
        if "range" in needs:
            stats.low = low if stats.low is None else stats.low.minimum(low)
            stats.high = high if stats.high is None else stats.high.maximum(high)
        if "average" in needs:
            stats.mean_low = low if stats.mean_low is None else stats.mean_low.lerp(low, AVERAGING)
            stats.mean_high = high if stats.mean_high is None else stats.mean_high.lerp(high, AVERAGING)
    if "histogram" in needs:
        found = Histogram.of(x)
        stats.histogram = found if stats.histogram is None else stats.histogram + found
    if "sample" in needs and (have := 0 if stats.sample is None else len(stats.sample)) < SAMPLE_TOKENS:
        some = x[:: max(1, len(x) // SAMPLE_SHARE)][: SAMPLE_TOKENS - have].float().clone()
        stats.sample = some if stats.sample is None else torch.cat([stats.sample, some])
    if "hessian" in needs:
        groups = weights.unsqueeze(1) if weights is not None and weights.ndim == 1 else weights
        if stats.hessian is None:
            shape = (x.shape[1], x.shape[1]) if weights is None or weights.ndim == 1 else (weights.shape[1], x.shape[1], x.shape[1])
            stats.hessian = torch.zeros(shape, dtype=torch.float32, device=x.device)
        if groups is None:
            add_outer_products(stats.hessian, x)
        else:
            for H, own in zip(stats.hessian.view(-1, *stats.hessian.shape[-2:]), groups.T, strict=True):
                add_outer_products(H, (x * own.sqrt().unsqueeze(1)).to(x.dtype))


def add_outer_products(H: Tensor, x: Tensor) -> None:
    """H += x^T x, in the lower panels only (see symmetrize); x [tokens, in_features] in any dtype, H float32.

    The product of half-precision inputs is made in half precision and summed in float32, never rounded back: a rounded product
    (relative error 1e-3) is not positive definite where a few inputs are far larger than the rest.
    """
    with _float32_sums(x):
        for start in range(0, len(x), TOKENS):
            transposed = x[start : start + TOKENS].T.contiguous().float()
            for i in range(0, len(transposed), PANEL):
                rows = slice(i, i + PANEL)
                H[rows, : i + PANEL] += torch.nn.functional.linear(transposed[rows], transposed[: i + PANEL])


def add_cross_products(stats: LayerStats, dx: Tensor, x: Tensor, weights: Tensor | None) -> None:
    """stats.cross += dx^T x; dx, x [tokens, in_features], weights [tokens] or None."""
    if stats.cross is None:
        stats.cross = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    dx = dx if weights is None else dx * weights.unsqueeze(1).to(dx.dtype)
    with _float32_sums(x):
        for start in range(0, len(x), TOKENS):
            rows = slice(start, start + TOKENS)
            stats.cross += torch.nn.functional.linear(dx[rows].T.contiguous().float(), x[rows].T.contiguous().float())


@contextmanager
def _float32_sums(x: Tensor) -> Iterator[None]:
    """While entered, float32 products on the CPU may read their inputs as bfloat16: exact, and fast, if that is what x [tokens, in_features] was."""
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not hasattr(setting, "fp32_precision"):  # torch before 2.9
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def symmetrize(H: Tensor) -> Tensor:
    """Mirror the lower panels of H upwards, in place."""
    for i in range(PANEL, len(H), PANEL):
        H[:i, i : i + PANEL] = H[i : i + PANEL, :i].T
    return H
