"""Transforms, applied to a block between the pass that collects its statistics and the algorithm that quantizes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.linears import Linear, get_weight, set_weight
from ..stats import LayerStats
from ..transforms import TRANSFORMS, folds, make_options, of_blocks
from ..transforms.awq import UNCLIPPED, AwqOptions, Reader, clipped
from ..transforms.folds import Fold
from .collect import InputGroup
from .layers import settle
from .recipes import LayerPlan

EXACT = 2e-2  # relative error of the block's output that a fold may make, in bfloat16


def transform_block(
    block: nn.Module, groups: list[InputGroup], plans: dict[str, LayerPlan], steps: dict[str, dict], run: Callable[[], Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Apply the recipe's transforms to a block and its groups' statistics, in place.

    run: the block on a few tokens, to see that it computes the same afterwards. Raises ModelError when it does not.
    Returns the parameters of the block that changed, float32 by name ("input_layernorm.weight"), and, by weight name, the least and the largest scale of each transform, for the provenance.
    """
    before = run()
    changed: set[str] = set()
    done: dict[str, dict] = {}
    for group in groups:
        settle(group.stats)
    for name in of_blocks(steps):
        options = make_options(name, steps[name])
        for fold in folds.find_folds(block):
            for expert in _experts(block, fold):
                scale = _scale(block, fold, expert, groups, plans, name, options)
                if scale is None:
                    continue
                changed |= folds.apply(block, fold, scale, expert)
                for group in groups:
                    if _reads(fold, group.linears[0], expert):
                        _rescale(group.stats, scale)
                        for linear in group.linears:
                            done.setdefault(linear.name, {})[name] = [float(f"{value:.4g}") for value in (scale.min(), scale.max())]
    _refuse_changed(before, run(), block)
    if "awq" in steps and (options := make_options("awq", steps["awq"])).clip:
        _clip(block, groups, plans, options)
    parameters = dict(block.named_parameters())
    return {name: parameters[name].detach().to("cpu", torch.float32) for name in sorted(changed)}, done


def _experts(block: nn.Module, fold: Fold) -> list[int | None]:
    """The experts of a fold between experts' own matrices; [None] for any other."""
    name, _, part = fold.producer.partition(":")
    return list(range(getattr(block.get_submodule(name), "num_experts", 0))) if part else [None]


def _reads(fold: Fold, linear: Linear, expert: int | None) -> bool:
    return folds.reads(fold, linear) and (expert is None or linear.expert == expert)


def _scale(block: nn.Module, fold: Fold, expert: int | None, groups: list[InputGroup], plans: dict[str, LayerPlan], name: str, options) -> Tensor | None:
    entry = TRANSFORMS[name]
    assert entry.scale is not None
    if entry.norms_only(options) and (":" in fold.producer or isinstance(block.get_submodule(fold.producer), nn.Linear)):
        return None
    readers = [
        Reader(get_weight(block, linear).float().cpu(), plans[linear.name].scheme, group.stats)
        for group in groups
        for linear in group.linears
        if _reads(fold, linear, expert) and group.stats.n_tokens
    ]
    return entry.scale(readers, options, lambda scale: folds.tie(fold, block, scale)) if readers else None


def _rescale(stats: LayerStats, scale: Tensor) -> None:
    """The statistics of x / scale."""
    inverse = 1 / scale
    for name, factor in (("sum_abs", inverse), ("absmax", inverse), ("sample", inverse), ("sum_sq", inverse.square())):
        value = getattr(stats, name)
        if value is not None:
            setattr(stats, name, value * factor)
    for product in (stats.hessian, stats.cross):
        if product is not None:
            product.mul_(inverse).mul_(inverse.unsqueeze(1))


def _clip(block: nn.Module, groups: list[InputGroup], plans: dict[str, LayerPlan], options: AwqOptions) -> None:
    for group in groups:
        for linear in group.linears:
            plan = plans[linear.name]
            if plan.algorithm == "rtn" and group.stats.hessian is not None and linear.module.rpartition(".")[2] not in UNCLIPPED:
                W = get_weight(block, linear).float().cpu()
                set_weight(block, linear, clipped(W, plan.scheme, group.stats.hessian, options))


def _refuse_changed(before: Tensor, after: Tensor, block: nn.Module) -> None:
    """Raise ModelError when a transformed block computes something else: the table of folds does not hold for this architecture."""
    error = float((after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-30))
    if not error <= EXACT:
        raise ModelError(f"{type(block).__name__}: rescaling its channels changes what it computes (relative error {error:.2g}), so transforms cannot be used with this architecture yet.")
