"""Transforms rewrite a block without changing what it computes, so that it quantizes better: (readers, options, tie) -> a scale per channel.

Adding one is a file and an entry in TRANSFORMS. folds.py knows where a scale can be put; pipeline/transform.py puts it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import RecipeError
from ..recipe import from_dict
from .awq import AwqOptions, awq_scale
from .rotate import RotateOptions
from .smoothquant import SmoothQuantOptions, smooth_scale


@dataclass(frozen=True)
class Transform:
    """scale: see the module; None: of the whole model, applied as its weights are read (rotate.py). options: its dataclass. needs: (options) -> statistics.
    norms_only: (options) -> whether only norms take the scale (not linear layers). cost: what it takes, in words."""

    scale: Callable[..., Tensor | None] | None
    options: type
    needs: Callable[[Any], tuple[str, ...]]
    norms_only: Callable[[Any], bool]
    description: str
    cost: str


TRANSFORMS: dict[str, Transform] = {
    "awq": Transform(
        awq_scale,
        AwqOptions,
        lambda o: ("hessian", "sum_abs"),
        lambda o: False,
        "channels with large activations scaled up before rounding; ranges clipped",
        "a pass over the text, 20 roundings of each layer",
    ),
    "smoothquant": Transform(
        smooth_scale,
        SmoothQuantOptions,
        lambda o: ("absmax", "sample") if o.search else ("absmax",),
        lambda o: not o.linears,
        "activation outliers moved into the weights, for quantized activations",
        "a pass over the text",
    ),
    "rotate": Transform(None, RotateOptions, lambda o: (), lambda o: False, "the residual stream and the values in a randomized Hadamard basis, so that no channel stands out (QuaRot)", "seconds"),
}


def of_blocks(names: Iterable[str]) -> list[str]:
    """Those that rescale each block when its statistics are known; the others change the model as it is read."""
    return [name for name in names if TRANSFORMS[name].scale is not None]


def make_options(name: str, options: dict) -> Any:
    """The options of a transform from plain data; RecipeError for an unknown transform, key or value."""
    if name not in TRANSFORMS:
        raise RecipeError(f"transform {name!r} is not known; expected one of {', '.join(TRANSFORMS)}.")
    return from_dict(TRANSFORMS[name].options, options, where=f"options of {name}")
