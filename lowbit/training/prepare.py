"""A model made ready to be trained as it will be stored, and back into packed layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import numerics
from ..checkpoints import Checkpoint
from ..errors import ModelError, RecipeError
from ..models import skeleton as sk
from ..models.quantized import QuantLinear
from ..numerics import activations, affine
from ..pipeline import recipes
from ..pipeline.recipes import LayerPlan
from ..recipe import Recipe
from ..scheme import CASTS
from ..stats import LayerStats
from ..tensor import QuantizedTensor, matrix_shape
from .modules import ActView, FakeQuantEmbedding, FakeQuantLinear
from .views import View

MARGIN = 0.45  # of a step: how far a master may lie from the value of its code at the start


def prepare(
    model: PreTrainedModel, recipe: str | Path | Recipe, *, scales: str = "learned", start: Checkpoint | None = None, target_name: str | None = None, masters: bool = True
) -> PreTrainedModel:
    """Turn a model's linear layers (and its embedding, where the recipe says so) into ones that train as the file of the recipe's target will hold them; in place.

    Each keeps its weight as the master, in float32, under its old name, and multiplies with the quantized view of it, bit for bit what the written file decodes to. scales: see
    View. start: a quantized checkpoint (of this model, of this recipe, e.g. from GPTQ) whose codes and scales training begins with; None: plain rounding.
    masters: with a start, keep each weight of the model where its code allows, and bring it to its code where not; False: begin with the decoded values.
    Raises RecipeError for a recipe that its target cannot hold, ModelError for layers that cannot be trained.
    """
    linears, outside = matrices(model)
    draft = recipes.parse(recipe, target_name=target_name)
    settled, _ = recipes.settle(draft, {f"{name}.weight": (m.out_features, m.in_features) for name, m in linears.items()}, _dtype_name(model))
    shapes = {f"{name}.weight": (m.out_features, m.in_features) for name, m in linears.items()}
    plans = recipes.resolve(settled, shapes, {f"{name}.weight": matrix_shape(m.weight.shape) for name, m in outside.items()}, model.config.to_dict())
    tied = _tied_head(model)
    views: dict[int, tuple[nn.Parameter, View]] = {}
    for parameter, plan in plans.items():
        name = parameter.removesuffix(".weight")
        module = linears.get(name) or outside[name]
        if plan.scheme.format in CASTS:
            continue
        affine.check(plan.scheme)
        begun = None if start is None else _begun(start, parameter, plan)
        weight, view = _master(module.weight, plan, begun, scales, masters)
        views[id(module.weight)] = weight, view
        _replace(model, name, module, weight, view, _rounding(plan, start, parameter))
    if tied is not None and id(tied[1].weight) in views and not isinstance(model.get_submodule(tied[0]), FakeQuantLinear):
        weight, view = views[id(tied[1].weight)]
        _replace(model, tied[0], tied[1], weight, view, None)
    model.lowbit_recipe = settled  # type: ignore[assignment]
    return model


def matrices(model: PreTrainedModel) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear | nn.Embedding]]:
    """The linear layers of the blocks and, apart, embedding and head (where it is not tied), by module name."""
    blocks = sk.find_blocks(model)
    inside = {name: module for name, module in model.named_modules() if name.startswith(f"{blocks}.")}
    for name, module in inside.items():
        if sk.is_experts(module):
            raise ModelError(f"{name}: experts in one tensor cannot be trained yet. Models without experts can.")
    linears = {name: module for name, module in inside.items() if isinstance(module, nn.Linear)}
    embedding: Any
    head: Any
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends: dict[str, Any] = {name: module for name, module in model.named_modules() if module is embedding or (module is head and head.weight is not embedding.weight)}
    return linears, ends


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _tied_head(model: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return next(name for name, module in model.named_modules() if module is head), head


def _begun(start: Checkpoint, parameter: str, plan: LayerPlan) -> QuantizedTensor:
    if parameter not in start.quantized:
        raise ModelError(f"{parameter} is not quantized in {start.path}, and the recipe quantizes it. Start from a result of the same recipe.")
    found = start.quantized[parameter].load()
    if (found.scheme.format, found.scheme.bits, found.scheme.block, found.scheme.symmetric) != (plan.scheme.format, plan.scheme.bits, plan.scheme.block, plan.scheme.symmetric):
        raise RecipeError(f"{parameter} is {found.scheme.name} in {start.path}, and {plan.scheme.name} in the recipe. Start from a result of the same recipe.")
    return found


def _master(old: Tensor, plan: LayerPlan, begun: QuantizedTensor | None, scales: str, keep: bool) -> tuple[nn.Parameter, View]:
    """The master weight and its view; with a start, such that the view is the start, value for value."""
    W = old.detach().float().clone()
    made = begun if begun is not None else numerics.quantize(W, plan.scheme)
    view = View(made, scales)
    if begun is not None or scales in ("learned", "fixed"):
        with torch.no_grad():
            W = in_cells(W, made, view) if keep else numerics.dequantize(made)
    return nn.Parameter(W), view


def in_cells(W: Tensor, start: QuantizedTensor, view: View) -> Tensor:
    """W [out, in] with each weight whose code on the start's grid is another than the start's brought towards the value that the start has for it, until it is not."""
    values = numerics.dequantize(start)
    if (moved := view(W) != values).any():
        scale = affine.flat(affine.affine(start).scale.abs().unsqueeze(-1).expand_as(affine.grouped(W, start.scheme)), start.scheme, start.shape)
        near = values + (W - values).clamp(-MARGIN * scale, MARGIN * scale)
        W = torch.where(moved, near, W)
        W = torch.where(view(W) != values, values, W)
    return W


def _rounding(plan: LayerPlan, start: Checkpoint | None, parameter: str) -> ActView | None:
    if plan.scheme.act is None:
        return None
    known = None if start is None else start.activations.get(parameter)
    if known is None and plan.scheme.act.static:
        raise RecipeError(f"{parameter}: a static scale of its inputs is found by calibration. Start from a checkpoint of this recipe (start=), or round dynamically.")
    return ActView(known or activations.settle(plan.scheme.act, LayerStats()))


def _replace(model: PreTrainedModel, name: str, module: nn.Linear | nn.Embedding, weight: nn.Parameter, view: View, act: ActView | None) -> None:
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().float())
        made: nn.Module = FakeQuantLinear(weight, bias, view, act)
    else:
        if type(module) is not nn.Embedding and not hasattr(module, "embed_scale"):
            raise ModelError(f"{name} is a {type(module).__name__}, which cannot be trained as it will be stored. Keep it with a rule.")
        made = FakeQuantEmbedding(weight, view, module.padding_idx, getattr(module, "embed_scale", None))
    made.train(module.training)
    model.set_submodule(name, made)


def quantized_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The matrices of a prepared (or converted) model as data, by parameter name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear | FakeQuantEmbedding):
            found[f"{name}.weight"] = module.view.quantized(module.weight)
        elif isinstance(module, QuantLinear):
            found[f"{name}.weight"] = module.quantized()
    return found


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Turn trained layers into packed ones (models/quantized.QuantLinear), which compute the same; embeddings take their decoded values. In place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantLinear):
            rounding = None if module.act is None else module.act.rounding()
            made = QuantLinear(module.view.quantized(module.weight), module.bias, rounding, torch.float32)
            model.set_submodule(name, made.to(module.weight.device).train(module.training))
        elif isinstance(module, FakeQuantEmbedding):
            module.weight.data = numerics.dequantize(module.view.quantized(module.weight))
    return model


def roundings(model: nn.Module) -> Mapping[str, object]:
    """How the inputs of a prepared model's layers are rounded, by parameter name."""
    return {f"{name}.weight": module.act.rounding() for name, module in model.named_modules() if isinstance(module, FakeQuantLinear) and module.act is not None}
