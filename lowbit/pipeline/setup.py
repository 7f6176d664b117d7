"""Everything that is known of a quantize job before the first weight is loaded, and what is refused then."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .. import numerics
from ..algorithms import algorithm
from ..algorithms.rtn import RtnOptions
from ..checkpoints import Checkpoint, open_checkpoint
from ..checkpoints.imatrix import of_model, read_imatrix
from ..errors import ModelError, RecipeError
from ..models import skeleton as sk
from ..models.linears import Linear, find_linears, outside_matrices
from ..models.skeleton import Skeleton
from ..progress import Progress
from ..recipe import Calibration, Recipe
from ..scheme import CASTS
from ..stats import LayerStats
from ..tensor import QuantizedTensor
from ..transforms import TRANSFORMS, of_blocks
from ..transforms import make_options as make_transform_options
from ..transforms.rotate import rotate
from . import guidance, recipes, resources
from .calibration import Windows
from .hidden import HiddenStates
from .output import dtype_name
from .recipes import LayerPlan
from .streaming import Streamer

RECORD_BYTES = 4096


class Refinement(Protocol):
    """What is done with a block after its algorithm, on the error of its output against the original's."""

    def settings(self) -> dict:
        """What must be the same for a job to be resumed; part of the provenance."""

    def run(
        self, index: int, block: nn.Module, original: nn.Module, linears: list[Linear], tensors: dict[str, QuantizedTensor], streamer: Streamer, source: HiddenStates, target: HiddenStates
    ) -> tuple[dict[str, QuantizedTensor], dict]:
        """Better tensors for the matrices of block (which holds their decoded values, and must in the end), and what to add to the records of each.

        original: the same block as the model has it. source: what the quantized block reads; target: what the original model has behind it.
        """


@dataclass
class Setup:
    """Everything that is known before the first weight is loaded.

    importance: statistics by weight name from an importance matrix, which then are not collected; imatrix: what provenance says of it.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    plans: dict[str, LayerPlan]
    linears: list[list[Linear]]
    outside: dict[str, tuple[int, int]]
    needs: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    notes: list[str]
    importance: dict[str, LayerStats] = field(default_factory=dict)
    imatrix: dict | None = None
    refinement: Refinement | None = None


def set_up(path, draft, calibration, n_samples, seq_len, seed, device, dtype, progress, imatrix=None) -> Setup:
    """Open the model's headers (path may be a Checkpoint) and resolve the recipe (a Draft) against them; the other arguments are quantize's. Raises LowbitError for what cannot be."""
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    rounded = bool(checkpoint.activations)
    checkpoint = replace(checkpoint, activations={})
    skeleton = sk.build(checkpoint)
    checkpoint = skeleton.checkpoint
    linears = [find_linears(skeleton, index) for index in range(len(skeleton.blocks))]
    shapes = {linear.name: linear.shape for block in linears for linear in block}
    if not shapes:
        raise ModelError(f"{type(skeleton.model).__name__}: its blocks hold no linear layer that lowbit knows.")
    outside = outside_matrices(skeleton)
    recipe, notes = recipes.settle(draft, shapes, dtype_name(checkpoint, next(iter(shapes))))
    recipe = replace(recipe, seed=recipe.seed if seed is None else seed)
    for name, given in recipe.transforms.items():
        make_transform_options(name, given)  # which checks them
    if "rotate" in recipe.transforms:
        own_head = not getattr(skeleton.config, "tie_word_embeddings", False)
        checkpoint = rotate(skeleton, make_transform_options("rotate", recipe.transforms["rotate"]), seed=recipe.seed)
        skeleton = sk.build(checkpoint)
        outside = outside_matrices(skeleton)
        if not own_head and len(outside) > 1:
            notes.append("The head was tied to the embedding; rotated, it is a tensor of its own (it takes the weight of the final norm).")
    packed = recipe.target not in ("gguf", "safetensors", "lowbit")
    if packed and any(linear.transposed for block in linears for linear in block):
        raise ModelError(
            f"{type(skeleton.model).__name__} keeps its weights in Conv1D layers or in one tensor for all experts, which no program reads from {recipe.target}. "
            "Write it with --to lowbit, --to gguf or --to safetensors."
        )
    if rounded:
        notes.append("This checkpoint rounds the inputs of its layers. That is dropped: the recipe alone says what is rounded now.")
    if any(name in checkpoint.quantized for name in shapes):
        notes.append("This checkpoint is quantized already; what is lost comes on top of what was lost before.")
    if skeleton.unused:
        some = ", ".join(skeleton.unused[:3]) + (", ..." if len(skeleton.unused) > 3 else "")
        notes.append(f"{type(skeleton.model).__name__} does not use {len(skeleton.unused)} tensors of the checkpoint, which are left out: {some}.")
    for note in notes:
        progress.note(note)
    recipe = replace(recipe, calibration=_override(recipe.calibration, skeleton, calibration, n_samples, seq_len))
    if recipe.target == "gguf":
        from ..checkpoints.gguf import supported

        supported(checkpoint.config)
    if imatrix is not None:
        recipe = recipes.weighted(recipe)
    plans = recipes.resolve(recipe, shapes, outside, checkpoint.config)
    importance, said = ({}, None) if imatrix is None else _read_importance(Path(imatrix), checkpoint, {**shapes, **outside})
    if imatrix is not None:
        plans = {name: _weighed(plan, name in importance, name in outside) for name, plan in plans.items()}
    embedding = next(iter(outside), None)
    if packed and embedding in plans and plans[embedding].scheme.format not in CASTS:
        raise RecipeError(f"a rule quantizes the embedding {embedding}, which no program reads from {recipe.target}. Leave it out, or write --to gguf.")
    plain = [name for name, plan in plans.items() if name in shapes and plan.scheme.format == "q2_k" and plan.algorithm == "rtn" and not getattr(plan.options, "weighted", False)]
    if recipe.mixture == "q2_k_s" and plain:
        raise RecipeError(f"q2_k_s leaves {len(plain)} matrices in Q2_K, which are garbage without importance (llama-quantize refuses it, too). Use q2_k_s-weighted, q2_k_s-gptq, --imatrix, or q2_k.")
    if not plans:
        raise RecipeError(f"recipe {recipe.name!r} quantizes nothing in this model: its rules keep every layer.")
    needs = {need for name, plan in plans.items() if name in shapes for need in algorithm(plan.algorithm).needs(plan.options)}
    needs |= {need for name, given in recipe.transforms.items() for need in TRANSFORMS[name].needs(make_transform_options(name, given))}
    if imatrix is not None:
        needs -= {"sum_sq"}
        if needs or calibration is not None:
            why = f"this recipe collects statistics of its own ({', '.join(sorted(needs))})" if needs else "calibration text would not be read"
            raise RecipeError(f"an importance matrix is for plain rounding without calibration, and {why}. Leave one of the two out, or take a recipe such as q4_k_m.")
    learned = next((plan.algorithm for plan in plans.values() if algorithm(plan.algorithm).level == "block"), None)
    if learned is not None and (steps := of_blocks(recipe.transforms)):
        raise RecipeError(f"{learned} learns a block as it is, and {', '.join(steps)} rescales it from its statistics; take one of them.")
    if any(plan.scheme.act is not None and plan.scheme.act.static for plan in plans.values()):
        needs.add("observe")  # which nothing collects, but the text is needed
    if "cross" in needs and recipe.true_sequential:
        raise RecipeError("gptq's alpha compares a block with the original one, and true_sequential changes it in between; take one of them.")
    chosen = resources.choose_device(device)
    return Setup(checkpoint, skeleton, recipe, plans, linears, outside, tuple(sorted(needs)), chosen, resources.choose_dtype(dtype, chosen), progress, notes, importance, said)


def _read_importance(path: Path, checkpoint: Checkpoint, shapes: dict[str, tuple[int, int]]) -> tuple[dict[str, LayerStats], dict]:
    """The statistics in an importance matrix by weight name, and what to say of the file (its name, not its place)."""
    found = read_imatrix(path)
    said = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "entries": len(found.entries), "chunks": found.chunks}
    return of_model(found, checkpoint.config, shapes), {**said, "datasets": [Path(name).name for name in found.datasets]}


def _weighed(plan: LayerPlan, known: bool, outside: bool) -> LayerPlan:
    """A plan weighted by an importance matrix that does or does not know its weight (those of embedding and head are usually left out)."""
    if not isinstance(plan.options, RtnOptions):
        return plan
    notes = plan.notes if known or outside else (*plan.notes, "the importance matrix does not hold it: all inputs count the same")
    return replace(plan, options=replace(plan.options, weighted=known), notes=notes)


def _override(base: Calibration, skeleton: Skeleton, source, n_samples, seq_len) -> Calibration:
    limit = getattr(skeleton.text_config, "max_position_embeddings", None) or 2048
    made = replace(
        base,
        source=str(source) if source is not None else base.source,
        n_samples=n_samples if n_samples is not None else base.n_samples,
        seq_len=seq_len if seq_len is not None else min(base.seq_len, limit),
    )
    if made.seq_len > limit:
        raise ModelError(f"seq_len is {made.seq_len}, and this model takes at most {limit} tokens.")
    return made


def check_resources(setup: Setup, windows: Windows | None, output: Path, *, resumed: bool) -> None:
    """Raise ResourceError when the disk or the memory will not do."""
    quantized = sum(numerics.nbytes(plan.scheme, shape) for plan, shape in _planned_shapes(setup))
    kept = sum(t.nbytes for name, t in setup.checkpoint.tensors.items() if name not in setup.plans)
    states = 0 if windows is None else windows.ids.numel() * setup.skeleton.text_config.hidden_size * setup.dtype.itemsize
    hidden = (4 if "reference" in setup.needs else 2) * states
    if "loss" in setup.needs:
        hidden += guidance.kept_bytes(states, len(setup.skeleton.blocks))
    beside = sum(file.stat().st_size for file in setup.checkpoint.files) + 2 * RECORD_BYTES * len(setup.plans)
    dense = sum(setup.checkpoint.lazy(name).numel * setup.checkpoint.lazy(name).dtype.itemsize for name in setup.plans)
    written = dense if setup.recipe.target == "safetensors" else quantized
    disk = quantized + written + kept + hidden + beside  # the work folder and the output exist side by side for a while
    if not resumed:
        resources.require_disk(output.absolute().parent, disk, purpose="This job")
    resources.require_memory(memory_estimate(setup, windows), purpose="This job")


def refuse_damaged(setup: Setup) -> None:
    """Raise FormatError when a weight outside the blocks holds NaN or infinity; those in the blocks are looked at when they are loaded."""
    prefix = f"{setup.skeleton.blocks_name}."
    inside = {name for parameter, source in setup.skeleton.sources.items() if parameter.startswith(prefix) for name in source.flat()}
    for name, lazy in setup.checkpoint.tensors.items():
        if name in inside or not lazy.dtype.is_floating_point:
            continue
        for rows in lazy.chunks():
            numerics.refuse_bad_values(rows, name)


def _planned_shapes(setup: Setup):
    shapes = {linear.name: linear.shape for block in setup.linears for linear in block} | setup.outside
    return [(plan, shapes[name]) for name, plan in setup.plans.items()]


def _hessian_bytes(linears: list[Linear], plans: dict[str, LayerPlan]) -> dict[object, int]:
    """Of a block's Hessians by input; with groups of outputs every matrix has its own, so many of them."""
    found: dict[object, int] = {}
    for linear in linears:
        groups = getattr(plans[linear.name].options, "guide_groups", 1) if linear.name in plans and linear.expert is None else 1
        found[linear.name if groups > 1 else linear.input_key] = 4 * min(groups, linear.shape[0]) * linear.shape[1] ** 2
    return found


def memory_estimate(setup: Setup, windows: Windows | None) -> int:
    """Bytes that the job will hold at its peak: a block in the compute dtype, its Hessians, and the largest matrix several times in float32."""
    block = max(setup.skeleton.block_bytes(i, setup.dtype) for i in range(len(setup.skeleton.blocks)))
    largest = max(linear.shape[0] * linear.shape[1] for block_linears in setup.linears for linear in block_linears) * 4
    if windows is None:
        return largest * 5
    squares = [_hessian_bytes(linears, setup.plans) for linears in setup.linears]
    hessians = max(sum(inputs.values()) + 6 * max(inputs.values(), default=0) for inputs in squares) if "hessian" in setup.needs else 0  # six copies while one is factorized
    hessians *= 2 if "cross" in setup.needs else 1
    learned = [[x.shape[0] * x.shape[1] for x in linears if x.name in setup.plans and algorithm(setup.plans[x.name].algorithm).level == "block"] for linears in setup.linears]
    return 2 * block + hessians + 8 * largest + 10 * 4 * max(sum(sizes) for sizes in learned)  # weight, shift, their gradients, values, the best so far
