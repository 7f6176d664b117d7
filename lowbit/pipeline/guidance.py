"""What each token's error costs the model: squared gradients of the loss at the outputs of every linear layer, by a streamed backward sweep.

A weight error dW changes a layer's output for token t by dW x_t, and the loss, to first order squared, by (g_t . dW x_t)^2 with g_t the
gradient of the loss at that output. With |g_t|^2 in place of g_t g_t^T the Hessian becomes sum |g_t|^2 x_t x_t^T: plain GPTQ's with a weight for each
token (Kim et al., "GuidedQuant", arXiv:2505.07004, eq. 7, with one group of outputs). The loss is the cross-entropy of a token drawn from the model's own
prediction: the mean of its squared gradient is the curvature of the KL divergence between the original model and a changed one (the Fisher information).

1. forward: the inputs of every step-th block are kept (step 1 where they take little room, else sqrt(depth));
2. the gradient at the final hidden states, from the model's own norm and head;
3. blocks from last to first: inputs recomputed from the nearest kept ones, the block run again with gradients, what arrives at its input passed on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.linears import Linear
from ..progress import Progress
from .collect import InputGroup
from .hidden import HiddenStates
from .job import Job
from .recipes import LayerPlan
from .resources import release_memory
from .streaming import Batch, Streamer

KEPT_BYTES = 4 << 30  # hidden states on disk up to which every block's input is kept


def sweep(streamer: Streamer, linears: list[list[Linear]], plans: dict[str, LayerPlan], job: Job, *, seed: int, progress: Progress) -> None:
    """Store for every block and module the squared norm of the loss's gradient at its output, float32 [tokens, groups of outputs], in the job's folder.

    streamer: records its calls anew. linears: of every block. Does nothing when an earlier run came to its end; one that did not is repeated.
    """
    depth = streamer.depth
    if job.has_tensors(_part(0)):
        return
    step = _step(sum(rows * length for rows, length in streamer.shapes) * streamer.hidden_size * streamer.dtype.itemsize, depth)
    with progress.step("Gradients of the loss", (2 if step == 1 else 3) * depth + 1) as advance:
        kept = _Kept(streamer, job.folder, step)
        gradients = _gradients_of_the_loss(streamer, kept.forward(advance), seed)
        advance()
        for first in range((depth - 1) // step * step, -1, -step):
            inputs = kept.segment(first, min(first + step, depth), advance)
            for index in range(min(first + step, depth) - 1, first - 1, -1):
                job.save_tensors(_part(index), _backward(streamer, index, _groups_of(linears[index], plans), inputs[index], gradients))
                release_memory()
                advance()
        kept.remove()


def _groups_of(linears: list[Linear], plans: dict[str, LayerPlan]) -> dict[str, int]:
    """The modules of a block, and into how many groups the outputs of each are divided (experts: one)."""
    groups: dict[str, int] = {}
    for linear in linears:
        options: Any = plans[linear.name].options if linear.name in plans else None
        groups[linear.module] = min(getattr(options, "guide_groups", 1), linear.shape[0]) if linear.expert is None else 1
    return groups


def weigh(groups: list[InputGroup], plans: dict[str, LayerPlan], job: Job, index: int, batches: list[Batch]) -> list[InputGroup]:
    """Give the input groups of a block the weights of their tokens: matrices that share an input share the sum of their squared gradients.

    Where groups of outputs weigh them differently, each matrix becomes an input group of its own.
    """
    stored = job.tensors(_part(index))
    masks = [batch.mask.flatten() for batch in batches if batch.mask is not None]
    mask = torch.cat(masks) if masks else None
    split = lambda group: any(getattr(plans[linear.name].options, "guide_groups", 1) > 1 and linear.expert is None for linear in group.linears)
    groups = [each for group in groups for each in ([InputGroup([linear]) for linear in group.linears] if split(group) else [group])]
    for group in groups:
        options: Any = next((plans[linear.name].options for linear in group.linears if getattr(plans[linear.name].options, "guided", False)), None)
        found = [stored[module] for module in dict.fromkeys(linear.module for linear in group.linears) if module in stored]
        if options is not None and found:
            squared = found[0] if len(found) == 1 else torch.stack([each.sum(1, keepdim=True) for each in found]).sum(0)
            weights = [token_weights(each, power=options.guide_power, cap=options.guide_cap, mask=mask) for each in squared.T]
            group.weights = weights[0] if len(weights) == 1 else torch.stack(weights, dim=1)
    return groups


def token_weights(squared: Tensor, *, power: float, cap: float, mask: Tensor | None = None) -> Tensor:
    """Weights of mean 1 from squared gradient norms [tokens]: to a power, none above cap times the mean (0: no cap)."""
    weights = squared.double().pow(power)
    real = slice(None) if mask is None else mask
    if not weights[real].mean() > 0:
        return torch.ones_like(squared)
    weights /= weights[real].mean()
    if cap:
        weights.clamp_(max=cap)
        weights /= weights[real].mean()
    return weights.float()


def _part(index: int) -> str:
    return f"loss-{index:05d}"


def kept_bytes(size: int, depth: int) -> int:
    """Disk that the sweep takes for a model of depth blocks whose hidden states have size bytes."""
    step = _step(size, depth)
    return size * (depth if step == 1 else 2 * step)


def _step(size: int, depth: int) -> int:
    """The inputs of every how many blocks are kept."""
    return 1 if size * depth <= KEPT_BYTES else math.ceil(math.sqrt(depth))


class _Kept:
    """Inputs of some blocks, on file; those between are made again when asked for."""

    def __init__(self, streamer: Streamer, folder: Path, step: int) -> None:
        self.streamer, self.folder, self.step = streamer, folder, step
        self.states: dict[int, HiddenStates] = {}
        self.files: set[Path] = set()

    def _states(self, index: int) -> HiddenStates:
        file = self.folder / f"loss-hidden-{index}.bin"
        self.files.add(file)
        return HiddenStates(self.streamer.shapes, self.streamer.hidden_size, self.streamer.dtype, file=file)

    def forward(self, advance) -> HiddenStates:
        """Run all blocks, keeping the inputs of every step-th; returns the final hidden states."""
        streamer = self.streamer
        self.states[0] = self._states(0)
        streamer.record(self.states[0])
        current = self.states[0]
        for index in range(streamer.depth):
            keep = (index + 1) % self.step == 0 and index + 1 < streamer.depth
            following = self._states(index + 1) if keep or index % self.step == 0 else current
            streamer.run(streamer.load_block(index), index, current, following)
            current = following
            if keep:
                self.states[index + 1] = current
            release_memory()
            advance()
        return current

    def segment(self, first: int, stop: int, advance) -> dict[int, HiddenStates]:
        """The inputs of blocks first to stop - 1."""
        found = {first: self.states.pop(first)}
        for index in range(first, stop - 1):
            found[index + 1] = self._states(index + 1)
            self.streamer.run(self.streamer.load_block(index), index, found[index], found[index + 1])
            advance()
        return found

    def remove(self) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


def _gradients_of_the_loss(streamer: Streamer, final: HiddenStates, seed: int) -> HiddenStates:
    """The gradient of the loss, summed over tokens, at the final hidden states."""
    gradients = HiddenStates(streamer.shapes, streamer.hidden_size, streamer.dtype)
    generator = torch.Generator().manual_seed(seed)
    for number, batch in enumerate(streamer.batches):
        hidden = final.read(number, streamer.device)
        for row in range(len(batch.ids)):
            hidden[row] = _gradient(streamer, batch, row, hidden[row : row + 1], generator)
        gradients.write(number, hidden)
    return gradients


def _gradient(streamer: Streamer, batch: Batch, row: int, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Of one sequence, hidden [1, length, hidden_size]; tokens of padding have none."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = streamer.logits_with_gradient(batch.ids[row : row + 1], hidden)[0]
    # The gradient of the cross-entropy at the logits is p - onehot(drawn token); a token is drawn where the sum of p passes a random share of it.
    gradient = logits.detach().softmax(-1)
    passed = gradient.cumsum(-1)
    share = torch.rand(len(gradient), 1, generator=generator).to(passed.device) * passed[:, -1:]
    drawn = torch.searchsorted(passed, share).clamp_(max=gradient.shape[1] - 1)
    gradient.scatter_add_(1, drawn, gradient.new_full(drawn.shape, -1.0))
    if batch.mask is not None:
        gradient[~batch.mask[row].to(gradient.device)] = 0
    logits.backward(gradient)
    assert hidden.grad is not None
    return hidden.grad[0]


def _backward(streamer: Streamer, index: int, modules: dict[str, int], inputs: HiddenStates, gradients: HiddenStates) -> dict[str, Tensor]:
    """Squared gradient norms at the outputs of a block's modules, each in so many groups; gradients at its output become those at its input."""
    block = streamer.load_block(index)
    found: dict[str, list[Tensor]] = {module: [] for module in modules}

    def watch(name: str):
        def see(_module, _args, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: found[name].append(_squared_norms(gradient.detach().float(), modules[name])))

        return see

    handles = [block.get_submodule(name).register_forward_hook(watch(name)) for name in found]
    for number in range(len(streamer.batches)):
        hidden = inputs.read(number, streamer.device).requires_grad_()
        with torch.enable_grad():
            output = streamer.run_block_with_gradient(block, index, number, hidden)
            output.backward(gradients.read(number, streamer.device))
        assert hidden.grad is not None
        gradients.write(number, hidden.grad)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _squared_norms(gradient: Tensor, groups: int) -> Tensor:
    """Of each of so many groups of the outputs, [tokens, groups]; gradient [..., out_features]."""
    parts = gradient.square().flatten(0, -2).tensor_split(groups, dim=1)
    return torch.stack([part.sum(1) for part in parts], dim=1).cpu()
