"""A model made ready to be trained as it will be stored, and back into packed layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from ..scheme import CASTS, INT
from ..stats import LayerStats
from ..tensor import QuantizedTensor, matrix_shape
from .modules import ActView, FakeQuantEmbedding, FakeQuantLinear, quantized
from .views import View

ROUNDING = {  # targets that round zero-points on the way, so that the file would not be what was trained
    "gguf": "as a scale and a minimum in float16, which rounds the zero-points that were trained. Train a type that GGUF has, such as q4_1 or q4_k, or symmetric integers.",
    "torchao": "with zero-points moved by half of the range, which rounds them. Write --to hqq or --to lowbit, and convert the result.",
}
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
    shapes = {f"{name}.weight": (m.out_features, m.in_features) for name, m in linears.items()}
    settled, _ = recipes.settle(draft, shapes, _dtype_name(model))
    plans = recipes.resolve(settled, shapes, {f"{name}.weight": matrix_shape(m.weight.shape) for name, m in outside.items()}, model.config.to_dict())
    refuse_untrainable(settled, plans)
    tied = _tied_head(model)
    views: dict[int, tuple[nn.Parameter, View]] = {}
    for parameter, plan in plans.items():
        name = parameter.removesuffix(".weight")
        module = linears.get(name) or outside[name]
        if plan.scheme.format in CASTS:
            continue
        begun = None if start is None else _begun(start, parameter, plan)
        weight, view = _master(module.weight, plan, begun, scales, masters)
        views[id(module.weight)] = weight, view
        _replace(model, name, module, weight, view, _rounding(plan, start, parameter))
    if tied is not None and id(tied[1].weight) in views and not isinstance(model.get_submodule(tied[0]), FakeQuantLinear):
        weight, view = views[id(tied[1].weight)]
        _replace(model, tied[0], tied[1], weight, view, None, tied=True)
    model.lowbit_recipe = settled  # type: ignore[assignment]
    return model


def refuse_untrainable(recipe: Recipe, plans: Mapping[str, LayerPlan]) -> None:
    """Raise RecipeError for a recipe whose result cannot be what training works on."""
    if recipe.transforms:
        steps = ", ".join(recipe.transforms)
        raise RecipeError(f"{recipe.name} rewrites the model ({steps}), and training begins with the weights as they are. Leave that out; training learns more than it gives.")
    if recipe.target == "safetensors":
        raise RecipeError("the target safetensors holds dense weights and no codes. Train for a layout that keeps codes (--to lowbit holds all), and convert the result.")
    for name, plan in plans.items():
        if plan.scheme.format in CASTS:
            continue
        try:
            affine.check(plan.scheme)
        except RecipeError as error:
            raise RecipeError(f"{name.removesuffix('.weight')}: {error}") from error
        asymmetric = plan.scheme.format == INT and not plan.scheme.symmetric
        if asymmetric and recipe.target in ROUNDING and (recipe.target == "gguf" or plan.scheme.zero_dtype == "float"):
            raise RecipeError(f"{name.removesuffix('.weight')}: {recipe.target} stores {plan.scheme.name} {ROUNDING[recipe.target]}")
    if all(plan.scheme.format in CASTS for plan in plans.values()):
        raise RecipeError(f"{recipe.name} quantizes nothing that is trained: name a number format, such as int4-asym-g64.")


def matrices(model: PreTrainedModel) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear | nn.Embedding]]:
    """The linear layers of the blocks and, apart, embedding and head (where it is not tied), by module name."""
    blocks = sk.find_blocks(model)
    inside = {name: module for name, module in model.named_modules() if name.startswith(f"{blocks}.")}
    for name, module in inside.items():
        if sk.is_experts(module):
            raise ModelError(f"{name}: experts in one tensor cannot be trained yet. Models without experts can.")
    linears = {name: module for name, module in inside.items() if isinstance(module, nn.Linear)}
    if not linears:
        raise ModelError(f"{type(model).__name__}: its blocks hold no plain linear layer (GPT-2 keeps its weights in Conv1D layers), so it cannot be trained as it will be stored.")
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
    made = to_device(begun if begun is not None else numerics.quantize(W, plan.scheme), W.device)
    view = View(made, scales)
    if begun is not None or scales in ("learned", "fixed"):
        with torch.no_grad():
            W = in_cells(W, made, view) if keep else numerics.dequantize(made)
    return nn.Parameter(W), view


def to_device(qt: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """The tensor with its parts on a device."""
    return replace(qt, parts={name: part.to(device) for name, part in qt.parts.items()})


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


def _replace(model: PreTrainedModel, name: str, module: nn.Linear | nn.Embedding, weight: nn.Parameter, view: View, act: ActView | None, *, tied: bool = False) -> None:
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().float())
        made: nn.Module = FakeQuantLinear(weight, bias, view, act, tied=tied)
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
            found[f"{name}.weight"] = quantized(module, f"{name}.weight")
        elif isinstance(module, QuantLinear):
            found[f"{name}.weight"] = module.quantized()
    return found


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Turn trained layers into packed ones (models/quantized.QuantLinear), which compute the same; embeddings take their decoded values. In place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantLinear):
            rounding = None if module.act is None else module.act.rounding()
            made = QuantLinear(quantized(module, f"{name}.weight"), module.bias, rounding, torch.float32)
            model.set_submodule(name, made.to(module.weight.device).train(module.training))
        elif isinstance(module, FakeQuantEmbedding):
            module.weight.data = numerics.dequantize(quantized(module, f"{name}.weight"))
    return model


def roundings(model: nn.Module) -> Mapping[str, object]:
    """How the inputs of a prepared model's layers are rounded, by parameter name."""
    return {f"{name}.weight": module.act.rounding() for name, module in model.named_modules() if isinstance(module, FakeQuantLinear) and module.act is not None}
