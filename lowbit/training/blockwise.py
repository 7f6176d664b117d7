"""The first phase of training: one block after the other, weights and scales, on the error of the block's output.

Chen et al., "EfficientQAT", arXiv:2407.11062, section 3.2 (Block-AP). It begins where the post-training algorithm has stopped in that block, streams as quantization does and
holds one block. Inputs that are rounded per token are rounded here, too; a static scale is found after the block was trained. The first token of a window is left out of the
error: its hidden state is hundreds of times larger than the others' and would carry all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import numerics
from ..checkpoints import LazyTensor
from ..checkpoints.safetensors import open_file
from ..errors import ModelError, RecipeError
from ..models.linears import Linear, get_weight
from ..pipeline.hidden import HiddenStates
from ..pipeline.job import save_tensors
from ..pipeline.streaming import Streamer
from ..scheme import Rounding
from ..tensor import QuantizedTensor
from .modules import ActView, FakeQuantLinear, quantized
from .prepare import in_cells, to_device
from .views import View

LEAST = 1 / 20  # of the learning rates, at the end


@dataclass(frozen=True)
class BlockOptions:
    """epochs over the text; lr of the weights, lr_scales of scales (relative to where they begin) and zero-points (in codes): AdamW, both falling to a twentieth along a cosine.
    skip_first: leave the first token out of the error.

    scales: see views.View.
    """

    epochs: int = 4
    lr: float = 5e-5
    lr_scales: float = 5e-3
    skip_first: bool = True
    scales: str = "learned"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.lr < 0 or self.lr_scales < 0:
            raise RecipeError(f"block phase: epochs is {self.epochs}, lr {self.lr} and lr_scales {self.lr_scales}; expected at least 1 epoch and rates of at least 0.")


class Blockwise:
    """A pipeline.setup.Refinement. masters: the folder that gets the trained masters of each block (block-00007.safetensors)."""

    def __init__(self, options: BlockOptions, masters: Path) -> None:
        self.options, self.masters = options, masters

    def settings(self) -> dict:
        return {"method": "blockwise training", **asdict(self.options)}

    def run(
        self, index: int, block: nn.Module, original: nn.Module, linears: list[Linear], tensors: dict[str, QuantizedTensor], streamer: Streamer, source: HiddenStates, target: HiddenStates
    ) -> tuple[dict[str, QuantizedTensor], dict]:
        layers: dict[str, FakeQuantLinear] = {}
        places: dict[str, nn.Linear] = {}
        for linear in linears:
            place = block.get_submodule(linear.module)
            if type(place) is not nn.Linear:
                raise ModelError(f"{linear.name}: only plain linear layers can be trained; this one is in a {type(place).__name__}.")
            start = to_device(tensors[linear.name], place.weight.device)
            view = View(start, self.options.scales).to(place.weight.device)
            places[linear.name] = place
            with torch.no_grad():
                master = nn.Parameter(in_cells(get_weight(original, linear).float(), start, view))
            act = start.scheme.act
            layers[linear.name] = FakeQuantLinear(master, place.bias, view, None if act is None or act.static else ActView(Rounding(act)))
            block.set_submodule(linear.module, layers[linear.name])
        with torch.enable_grad():
            first, last = self._train(index, block, list(layers.values()), streamer, source, target)
        kept = last > first  # higher rates than this block bears: it stays as it began
        if not kept:
            self.masters.mkdir(parents=True, exist_ok=True)
            save_tensors({name: layer.weight.detach().cpu() for name, layer in layers.items()}, self.masters / f"block-{index:05d}.safetensors")
        made = {linear.name: tensors[linear.name] if kept else quantized(layers[linear.name], linear.name) for linear in linears}
        for linear in linears:
            place = places[linear.name]
            place.weight = nn.Parameter(numerics.dequantize(made[linear.name]).to(place.weight.dtype), requires_grad=False)
            block.set_submodule(linear.module, place)
        record = {"block_mse": float(f"{last:.5g}"), "start_block_mse": float(f"{first:.5g}")}
        return made, {**record, "kept": "the start, because the error rose"} if kept else record

    def _train(self, index: int, block: nn.Module, layers: list[FakeQuantLinear], streamer: Streamer, source: HiddenStates, target: HiddenStates) -> tuple[float, float]:
        """Train the layers; the mean error of the first and of the last epoch."""
        o, batches = self.options, streamer.batches
        scales = [parameter for layer in layers for parameter in layer.view.parameters()]
        groups = [{"params": [layer.weight for layer in layers], "lr": o.lr}, {"params": scales, "lr": o.lr_scales}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        last = o.epochs * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: LEAST + (1 - LEAST) * (1 + math.cos(math.pi * step / last)) / 2)
        generator = torch.Generator().manual_seed(o.seed + index)
        means = []
        for _ in range(o.epochs):
            total = 0.0
            for number in torch.randperm(len(batches), generator=generator).tolist():
                output = streamer.run_block_with_gradient(block, index, number, source.read(number, streamer.device))
                loss = self._error(output, target.read(number, streamer.device), batches[number].mask)
                if not bool(torch.isfinite(loss)):
                    raise ModelError(f"the error of block {index} is not finite in training. Lower the learning rates, or compute in float32.")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            means.append(total / len(batches))
        return means[0], means[-1]

    def _error(self, output: Tensor, goal: Tensor, mask: Tensor | None) -> Tensor:
        error = (output.float() - goal.float()).square()
        if self.options.skip_first:
            error, mask = error[:, 1:], None if mask is None else mask[:, 1:]
        return error.mean() if mask is None else error[mask.to(error.device)].mean()


def masters(folder: Path) -> Iterator[tuple[str, LazyTensor]]:
    """What Blockwise stored, by weight name; nothing where there is no folder."""
    for file in sorted(folder.glob("block-*.safetensors")):
        yield from open_file(file).items()
