"""Another layout for a checkpoint that exists: the codes stay as they are."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints import Checkpoint, LazyQuantized, open_checkpoint, target
from ..checkpoints.gguf import supported, write_tokenizer
from ..errors import FormatError, JobError, RecipeError
from ..models import skeleton as sk
from ..models.linears import find_linears, outside_matrices
from ..progress import SILENT, Progress
from ..scheme import INT
from ..tensor import QuantizedTensor
from . import recipes, resources
from .locate import locate
from .output import as_stored_dense, readable_errors, refuse_own_input, rounded_record, shard_bytes_of, with_rounded, write


def convert(
    path: str | Path,
    target_name: str,
    output: str | Path,
    *,
    outside: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write a checkpoint in another layout; quantized matrices keep their codes (refused where the layout cannot hold them).

    outside: a scheme for embedding and head ("q8_0"), which are otherwise kept. max_shard_size: as in quantize. Streams tensor by tensor.
    """
    output = Path(output)
    shard_bytes = shard_bytes_of(max_shard_size, target_name, output)
    if output.exists() and not overwrite:
        raise JobError(f"{output} exists already. Choose another -o, or --overwrite.")
    located = locate(path, progress=progress)
    refuse_own_input(output, located)
    kind = target(target_name)
    checkpoint = open_checkpoint(located)
    skeleton = sk.build(checkpoint)
    if target_name == "gguf":
        supported(checkpoint.config)
    if outside is not None:
        checkpoint = _round_outside(checkpoint, outside_matrices(skeleton), outside, target_name)
    if target_name != "safetensors" and (lost := [name for name in checkpoint.activations if name not in checkpoint.quantized or checkpoint.quantized[name].scheme.act is None]):
        raise RecipeError(f"{located} rounds the inputs of {len(lost)} layers ({lost[0]}, ...), which {target_name} would not say: the result would compute something else. Convert it to safetensors.")
    if kind.scale_dtype is not None:
        checkpoint = _with_scales(checkpoint, kind.scale_dtype)
    for name, entry in checkpoint.quantized.items():
        kind.check(entry.scheme, entry.shape, name.removesuffix(".weight"))
    if target_name == "safetensors" and checkpoint.quantized:
        checkpoint = as_stored_dense(checkpoint, [x for index in range(len(skeleton.blocks)) for x in find_linears(skeleton, index)])
    if checkpoint.provenance:
        checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "converted_to": target_name})
    resources.require_disk(output.absolute().parent, checkpoint.tensor_bytes, purpose="This conversion")
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch, readable_errors(output):
        if checkpoint.kind == "gguf" and target_name != "gguf":
            checkpoint = replace(checkpoint, files=write_tokenizer(checkpoint.path, Path(scratch)))
        write(checkpoint, target_name, output, progress, overwrite=overwrite, shard_bytes=shard_bytes)
    return output


def _with_scales(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint with the scales of integers in the target's dtype; FormatError, when a matrix is read, where that would change one."""

    def cast(name: str, entry: LazyQuantized) -> LazyQuantized:
        if entry.scheme.format != INT or entry.scheme.scale_dtype == dtype:
            return entry
        scheme = replace(entry.scheme, scale_dtype=dtype)

        def load() -> QuantizedTensor:
            qt = entry.load()
            scale = qt.parts["scale"].to(getattr(torch, dtype))
            if not torch.equal(scale.float(), qt.parts["scale"].float()):
                raise FormatError(f"{name}: its scales in {qt.scheme.scale_dtype} cannot be written as {dtype} without loss. Quantize the original model for this target.")
            return replace(qt, scheme=scheme, parts={**qt.parts, "scale": scale})

        return replace(entry, scheme=scheme, load=load, rows=None)

    return replace(checkpoint, quantized={name: cast(name, entry) for name, entry in checkpoint.quantized.items()})


def _round_outside(checkpoint: Checkpoint, shapes: dict[str, tuple[int, int]], words: str, target_name: str) -> Checkpoint:
    recipe = recipes.parse(f"{words}-rtn" if "rtn" not in words else words).recipe
    recipes.one_type(recipe.mixture, "outside")
    recipe = replace(recipe, target=target_name, mixture=None)
    plans = recipes.resolve(replace(recipe, rules=(recipes.Rule("*", recipe.scheme, "rtn"),)), {}, shapes)
    made = with_rounded(checkpoint, plans)
    if not made.provenance:
        return made
    layers = {**made.provenance.get("layers", {}), **{name: rounded_record(plan, shapes[name]) for name, plan in plans.items()}}
    return replace(made, provenance={**made.provenance, "layers": layers})
