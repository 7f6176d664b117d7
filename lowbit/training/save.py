"""A trained model on its way to the file of its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .. import numerics
from ..checkpoints import Checkpoint, LazyQuantized, open_checkpoint
from ..errors import ModelError
from ..models import skeleton as sk
from ..pipeline.job import refuse_existing
from ..pipeline.locate import base_name, locate
from ..pipeline.output import held, readable_errors, refuse_own_input
from ..pipeline.output import write as write_output
from ..progress import SILENT, Progress
from ..recipe import Recipe
from ..tensor import QuantizedTensor
from .prepare import quantized_weights, roundings


def write(model: PreTrainedModel, output: str | Path, *, source: str | Path, overwrite: bool = False, progress: Progress = SILENT) -> Path:
    """Write a prepared (or converted) model as its recipe's target. source: the original model's folder, for tokenizer and config. Returns the output's path."""
    recipe: Recipe | None = getattr(model, "lowbit_recipe", None)
    if recipe is None:
        raise ModelError("this model was not prepared by lowbit.training.prepare, so no recipe says how to write it.")
    located, path = locate(source, progress=progress), Path(output)
    refuse_existing(path, resume=False, overwrite=overwrite)
    refuse_own_input(path, located)
    made = as_checkpoint(model, open_checkpoint(located), recipe.target, {"recipe": recipe.to_dict()})
    with readable_errors(path):
        write_output(made, recipe.target, path, progress, overwrite=overwrite, base=base_name(source, located))
    return path


def stored_dtypes(skeleton: sk.Skeleton, target_name: str) -> dict[str, torch.dtype]:
    """The dtype in which a target holds each parameter that is not quantized: the source's, and float32 for the vectors of a GGUF file."""
    entries = {parameter: skeleton.checkpoint.lazy(origin.flat()[0]) for parameter, origin in skeleton.sources.items() if origin.converter is None}
    return {parameter: torch.float32 if target_name == "gguf" and len(entry.shape) < 2 else entry.dtype for parameter, entry in entries.items()}


def as_checkpoint(model: PreTrainedModel, source: Checkpoint, target_name: str, provenance: dict) -> Checkpoint:
    """What model holds, under the names of source and in the dtypes that a target has for it."""
    skeleton = sk.build(source)
    dtypes = stored_dtypes(skeleton, target_name)
    source = skeleton.checkpoint
    quantized, tensors = dict(source.quantized), dict(source.tensors)
    made = quantized_weights(model)
    acts: Mapping = roundings(model)
    activations, parameters = {}, dict(model.named_parameters())
    for parameter, origin in skeleton.sources.items():
        if parameter not in made and parameter not in parameters:
            continue
        if origin.converter is not None:
            continue  # kept as it is: prepare refuses models whose layers are joined from several tensors
        name = origin.flat()[0]
        entry = source.lazy(name)
        tensors.pop(name, None)
        quantized.pop(name, None)
        if parameter in made:
            quantized[name] = _held_matrix(made[parameter], entry.dtype)
            if parameter in acts:
                activations[name] = acts[parameter]
        else:
            tensors[name] = held(parameters[parameter].detach().to(dtypes[parameter]).cpu())
    return replace(source, tensors=tensors, quantized=quantized, activations=activations, provenance=provenance)


def _held_matrix(qt: QuantizedTensor, dtype: torch.dtype) -> LazyQuantized:
    kept = replace(qt, dtype=str(dtype).removeprefix("torch."), parts={name: part.cpu() for name, part in qt.parts.items()})
    return LazyQuantized(qt.scheme, qt.shape, dtype, lambda: kept, numerics.nbytes(qt.scheme, qt.shape))
