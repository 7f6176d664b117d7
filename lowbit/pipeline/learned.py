"""Block-level algorithms: all matrices of a block learned together on the error of the block's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import numerics
from ..algorithms import algorithm
from ..algorithms.autoround import Task
from ..models.linears import Linear, get_weight, set_weight
from ..stats import LayerStats
from ..tensor import QuantizedTensor
from .hidden import HiddenStates
from .layers import record_of
from .recipes import LayerPlan
from .streaming import Streamer


def learn_block(
    block: nn.Module, index: int, linears: list[Linear], plans: dict[str, LayerPlan], streamer: Streamer, source: HiddenStates, target: HiddenStates, dtypes: dict[str, str], seed: int
) -> tuple[dict[str, QuantizedTensor], dict[str, dict]]:
    """Learn the matrices of a block (of one block-level algorithm), put the decoded values into it, and say what was done.

    source: what the block reads, through the quantized blocks before it. target: what the original model has behind this block.
    """
    plan = plans[linears[0].name]
    weights = {linear.name: get_weight(block, linear).float().cpu().clone() for linear in linears}
    slots = _Slots(block, linears)

    def measured(number: int) -> Tensor:
        output = streamer.run_block_with_gradient(block, index, number, source.read(number, streamer.device))
        error = (output.float() - target.read(number, streamer.device).float()).square()
        mask = streamer.batches[number].mask
        return (error if mask is None else error[mask.to(error.device)]).mean()

    def loss(numbers: list[int]) -> float:
        total = 0.0
        for number in numbers:
            with torch.enable_grad():
                mean = measured(number) / len(numbers)
                mean.backward()
            total += float(mean.detach())
        return total

    def error() -> float:
        with torch.no_grad():
            return sum(float(measured(number)) for number in range(len(streamer.batches))) / len(streamer.batches)

    task = Task(slots.assign, loss, error, len(streamer.batches), len(streamer.batches[0].ids))
    learn: Any = algorithm(plan.algorithm).run
    try:
        made, first, least = learn(weights, {name: plans[name].scheme for name in weights}, task, plan.options, seed=seed)
    finally:
        slots.restore()
    tensors: dict[str, QuantizedTensor] = {}
    records: dict[str, dict] = {}
    for linear in linears:
        qt = made[linear.name]
        decoded = numerics.dequantize(qt)
        set_weight(block, linear, decoded)
        tensors[linear.name] = QuantizedTensor(qt.scheme, qt.shape, dtypes[linear.name], qt.parts)
        record = record_of(linear, plans[linear.name], LayerStats(), weights[linear.name], decoded, None, [])
        records[linear.name] = {**record, "block_mse": float(f"{least:.5g}"), "rtn_block_mse": float(f"{first:.5g}")}
    return tensors, records


class _Slots:
    """The places of learned weights in a block: while they are learned, a tensor with a history stands where the parameter was."""

    def __init__(self, block: nn.Module, linears: list[Linear]) -> None:
        self.block = block
        self.places: dict[tuple[str, str], list[Linear]] = {}
        for linear in linears:
            self.places.setdefault((linear.module, linear.parameter), []).append(linear)
        self.kept: dict[tuple[str, str], nn.Parameter] = {}
        for module, parameter in self.places:
            owner = block.get_submodule(module)
            self.kept[module, parameter] = getattr(owner, parameter)
            del owner._parameters[parameter]

    def assign(self, values: dict[str, Tensor]) -> None:
        """Put weights float32 [out, in] by name into the block, in its dtype and layout."""
        for (module, parameter), linears in self.places.items():
            kept: Any = self.kept[module, parameter]
            with torch.enable_grad():
                if linears[0].expert is None:
                    value = values[linears[0].name].to(kept.device, kept.dtype)
                    value = value.T if linears[0].transposed else value
                else:
                    value = self._experts(kept, linears, values)
            self.block.get_submodule(module).__dict__[parameter] = value

    @staticmethod
    def _experts(kept: Tensor, linears: list[Linear], values: dict[str, Tensor]) -> Tensor:
        """A fused parameter [experts, rows, in]; rows that are not learned stay."""
        parts = []
        for expert in range(len(kept)):
            own = sorted((linear for linear in linears if linear.expert == expert), key=lambda linear: linear.rows or (0, 0))
            if own and own[0].transposed:
                parts.append(values[own[0].name].to(kept.device, kept.dtype).T)
                continue
            rows, start = [], 0
            for linear in own:
                first, stop = linear.rows or (0, kept.shape[1])
                rows += [kept.data[expert, start:first], values[linear.name].to(kept.device, kept.dtype)]
                start = stop
            parts.append(torch.cat([*rows, kept.data[expert, start:]]))
        return torch.stack(parts)

    def restore(self) -> None:
        for (module, parameter), kept in self.kept.items():
            owner = self.block.get_submodule(module)
            owner.__dict__.pop(parameter, None)
            owner._parameters[parameter] = kept
