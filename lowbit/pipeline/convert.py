"""Another layout for a checkpoint that exists: the codes stay as they are."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import numerics
from ..checkpoints import Checkpoint, LazyQuantized, open_checkpoint, target
from ..checkpoints.gguf import open_file, supported, write_tokenizer
from ..errors import FormatError, JobError, RecipeError, ShapeError
from ..models import skeleton as sk
from ..models.arch import ROUTERS
from ..models.linears import find_linears, outside_matrices
from ..numerics import ggml, ggml_tables, integer
from ..progress import SILENT, Progress
from ..scheme import INT, Rounding, Scheme
from ..tensor import QuantizedTensor
from . import recipes, resources
from .card import base_of
from .job import temporary
from .locate import base_name, locate
from .output import as_stored_dense, checked, readable_errors, refuse_own_input, rounded_record, shard_bytes_of, with_rounded, write

LEGACY = {"q4_0": (4, True), "q5_0": (5, True), "q8_0": (8, True), "q4_1": (4, False), "q5_1": (5, False)}  # ggml's blocks that are integers: bits, symmetric
ALLOWED = 2.0**-10  # of a matrix's largest: a minimum rounded to float16
WHOLE = 1 << 26  # weights of a dense matrix that is compared in one piece
KEEP_BLOCKS = ("gguf", "lowbit", "safetensors")


@dataclass(frozen=True)
class Conversion:
    """What became of the quantized matrices, found by decoding both files. exact: how many are equal bit for bit; largest_difference: of the others, of the matrix's largest magnitude.

    error: squared error of those that were rounded anew (requantize), relative to the squares of what they were, mean; None where codes were kept.
    """

    path: Path
    matrices: int
    exact: int
    largest_difference: float = 0.0
    error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def statement(self) -> str:
        """In words."""
        if not self.matrices:
            return "No matrix is quantized; every tensor was copied."
        if self.error is not None:
            return f"Rounded anew: {self.matrices} matrices, relative squared error {self.error:.3g} on top of what was lost before."
        if self.exact == self.matrices:
            return f"Lossless: all {self.matrices} matrices decode to the same values, bit for bit."
        rest = f"the others within the rounding of their minima to float16 (at most {self.largest_difference:.2g} of a matrix's largest)"
        return f"{self.exact} of {self.matrices} matrices decode to the same values bit for bit, {rest}."


def convert(
    path: str | Path,
    target_name: str,
    output: str | Path,
    *,
    outside: str | None = None,
    requantize: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Conversion:
    """Write a checkpoint in another layout; quantized matrices keep their codes, and what the layout cannot hold is refused. Both files are decoded and compared afterwards.

    outside: a scheme for embedding and head ("q8_0"), which are otherwise kept. requantize: a recipe without data ("q4_k", "int4-asym-g64"), by which all quantized matrices are rounded anew where
    codes cannot be kept. max_shard_size: as in quantize. Streams tensor by tensor.
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
    source = checkpoint = checked(skeleton.checkpoint, [name for source in skeleton.sources.values() for name in source.flat()])
    if target_name == "gguf":
        supported(checkpoint.config)
    notes: list[str] = []
    around = outside_matrices(skeleton)
    if target_name not in KEEP_BLOCKS and (decoded := [name for name in around if name in checkpoint.quantized]):
        notes.append(f"Embedding and head ({', '.join(decoded)}) are decoded: {target_name} quantizes linear layers of the blocks.")
        checkpoint = _decoded(checkpoint, decoded)
    if requantize is not None:
        checkpoint = _requantized(checkpoint, requantize, target_name)
        if plain := [name for name in source.activations if name not in checkpoint.activations]:
            notes.append(f"The source rounds the inputs of {len(plain)} layers ({plain[0]}, ...); in the result they are read as they are.")
    elif target_name not in KEEP_BLOCKS:
        checkpoint = _without_blocks(checkpoint)
    if outside is not None:
        checkpoint = _round_outside(checkpoint, around, outside, target_name)
    if lost := _unsaid(checkpoint, target_name):
        raise RecipeError(f"{located} rounds the inputs of {len(lost)} layers ({lost[0]}, ...), which {target_name} would not say: the result would compute something else. Convert it to safetensors.")
    if target_name == "gptq" and checkpoint.quantized and (dense := _dense_linears(checkpoint, skeleton)):
        raise RecipeError(f"{located}: {dense[0]} is not quantized, and a GPTQ folder says of all linear layers of the blocks that they are. Use --to compressed-tensors or --to awq.")
    if kind.scale_dtype is not None:
        checkpoint = _with_scales(checkpoint, kind.scale_dtype)
    with _hinted():
        for name, entry in checkpoint.quantized.items():
            kind.check(entry.scheme, entry.shape, name.removesuffix(".weight"))
    if target_name == "safetensors" and (checkpoint.quantized or sk.stacks(skeleton)):
        checkpoint = as_stored_dense(checkpoint, skeleton)
    if checkpoint.provenance:
        checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "converted_to": target_name})
    resources.require_disk(output.absolute().parent, checkpoint.tensor_bytes, purpose="This conversion")
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch, readable_errors(output), _hinted():
        if checkpoint.kind == "gguf" and target_name != "gguf":
            checkpoint = replace(checkpoint, files=write_tokenizer(checkpoint.path, Path(scratch)))
        found: list[Conversion] = []
        compare = lambda: found.append(_compared(source, output, skeleton, set(around) if outside is not None else set(), requantize is not None, notes, progress))
        write(checkpoint, target_name, output, progress, overwrite=overwrite, base=base_of(located) or base_name(path, located), shard_bytes=shard_bytes, whole=compare)
    return found[0]


def _unsaid(checkpoint: Checkpoint, target_name: str) -> list[str]:
    """The weights whose inputs are rounded, which the target's files would not say: lowbit's own say it of quantized ones, dense folders of all."""
    if target_name == "safetensors":
        return []
    said = {name for name, entry in checkpoint.quantized.items() if target_name == "lowbit" or entry.scheme.act is not None}
    return [name for name in checkpoint.activations if name not in said]


def _dense_linears(checkpoint: Checkpoint, skeleton: sk.Skeleton) -> list[str]:
    """Weights of the blocks' linear layers that are not quantized, without routers."""
    linears = (linear for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index))
    return [linear.name for linear in linears if linear.name not in checkpoint.quantized and linear.module.rpartition(".")[2] not in ROUTERS]


@contextmanager
def _hinted() -> Iterator[None]:
    """Errors of what cannot be kept say what else could be done."""
    try:
        yield
    except (RecipeError, ShapeError, FormatError) as error:
        raise type(error)(f"{error} To round the decoded values anew instead, name a recipe: --requantize q4_k, --requantize int4-asym-g64, ...") from error


def _compared(source: Checkpoint, output: Path, skeleton: sk.Skeleton, skipped: set[str], rounded: bool, notes: list[str], progress: Progress) -> Conversion:
    """Decode the matrices of both files and compare; what was made still has its temporary name."""
    draft = temporary(output)
    made = sk.build(open_file(draft) if draft.is_file() else open_checkpoint(draft)).checkpoint
    transposed = {linear.name for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index) if linear.transposed and linear.expert is None}
    names = [name for name in source.quantized if name not in skipped]
    exact, largest, errors = 0, 0.0, []
    with progress.step("Comparing", len(names)) as advance:
        for name in names:
            difference = _Difference()
            for before, after in _both(source.quantized[name], made, name, name in transposed):
                difference.add(before, after, rounded)
            exact += difference.equal
            largest = float(np.maximum(largest, difference.largest / max(difference.scale, 1e-30)))
            errors.append(difference.error / max(difference.energy, 1e-30))
            advance(1)
    if not rounded and not largest <= ALLOWED:
        raise FormatError(f"what was made of it differs from the original by {largest:.2g} of a matrix's largest; it was not kept. Please report this.")
    return Conversion(output, len(names), exact, largest, sum(errors) / len(errors) if rounded and errors else None, tuple(notes))


@dataclass
class _Difference:
    """What was found between the rows of two matrices: equal bit for bit, the largest difference and magnitude, sums of squares of differences and values."""

    equal: bool = True
    largest: float = 0.0
    scale: float = 0.0
    error: float = 0.0
    energy: float = 0.0

    def add(self, before: Tensor, after: Tensor, squares: bool) -> None:
        self.scale = float(np.maximum(self.scale, float(before.abs().max())))  # which keeps NaN
        if squares:
            self.energy += float(before.square().sum())
        if torch.equal(before, after):
            return
        difference = (before - after).abs_()
        self.equal, self.largest = False, float(np.maximum(self.largest, float(difference.max())))
        if squares:
            self.error += float(difference.square_().sum())


def _both(before: LazyQuantized, made: Checkpoint, name: str, transposed: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a matrix and of what was made of it, float32; where that is dense, as its dtype holds them."""
    if name in made.quantized:
        yield from zip(before.values(), made.quantized[name].values(), strict=True)
        return
    whole, start = made.dense(name) if transposed or math.prod(before.shape) <= WHOLE else None, 0  # of a stack of experts, rows come with all of an expert each time
    if whole is not None and transposed:
        whole = whole.T
    for rows in before.values():
        stop = start + len(rows)
        after = made.tensors[name].read(start, stop) if whole is None else whole[start:stop]
        yield rows.to(before.dtype).float(), after.float()
        start = stop


def _decoded(checkpoint: Checkpoint, names: list[str]) -> Checkpoint:
    """The checkpoint with some of its quantized matrices as dense ones."""
    dense = {name: checkpoint.lazy(name) for name in names}
    return replace(checkpoint, tensors={**checkpoint.tensors, **dense}, quantized={name: entry for name, entry in checkpoint.quantized.items() if name not in dense})


def _without_blocks(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with ggml's legacy blocks as the integers that they are, and MXFP4 blocks as MXFP4 (which other layouts hold)."""

    def changed(name: str, entry: LazyQuantized) -> LazyQuantized:
        if entry.scheme.format == "ggml_mxfp4":
            return replace(entry, scheme=numerics.scheme_of("mxfp4"), load=lambda: _mxfp4(entry.load()), rows=None)
        if entry.scheme.format not in LEGACY:
            return entry
        bits, symmetric = LEGACY[entry.scheme.format]
        scheme = Scheme(bits=bits, block=(1, 32), symmetric=symmetric, range="full" if symmetric and bits < 8 else "textbook", scale_dtype="float16")
        return replace(entry, scheme=scheme, load=lambda: _integers(name, entry.load(), scheme), rows=None)

    return replace(checkpoint, quantized={name: changed(name, entry) for name, entry in checkpoint.quantized.items()})


def _mxfp4(qt: QuantizedTensor) -> QuantizedTensor:
    codes, exponents = ggml_tables.unpack_mxfp4(qt.parts["blocks"])
    return QuantizedTensor(numerics.scheme_of("mxfp4"), qt.shape, qt.dtype, {"codes": codes, "scale": exponents})


def _integers(name: str, qt: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """Legacy blocks as integers; FormatError where a minimum is no whole number of steps below zero."""
    codes, scale, minimum = ggml.unpack_codes(qt.scheme.format, qt.parts["blocks"])
    if minimum is None:
        return integer.from_codes(codes, scale, None, scheme, qt.dtype)
    step = scale.float()
    zero = torch.where(step == 0, 0.0, -minimum.float() / step).round().clamp_(0, scheme.max_code)
    if not torch.equal((-step * zero).half(), minimum):
        count = int(((-step * zero).half() != minimum).sum())
        raise FormatError(f"{name}: the minimum of {count} of its {qt.scheme.format} blocks is no whole number of steps below zero, so no integer zero-point says the same.")
    return integer.from_codes(codes, scale, zero.to(torch.uint8), scheme, qt.dtype)


def _requantized(checkpoint: Checkpoint, words: str, target_name: str) -> Checkpoint:
    """The checkpoint with every quantized matrix decoded and rounded to a recipe's scheme; inputs are rounded as the recipe says, else as before where the target's files say it of any scheme."""
    try:
        draft = recipes.parse(f"{words}-rtn", target_name=target_name)
    except RecipeError:  # it names an algorithm, or is wrong
        draft = recipes.parse(words, target_name=target_name)
    shapes = {name: entry.shape for name, entry in checkpoint.quantized.items()}
    dtypes = {str(entry.dtype).removeprefix("torch.") for entry in checkpoint.quantized.values()}
    recipe, _ = recipes.settle(draft, shapes, dtypes.pop() if len(dtypes) == 1 else "float32")
    recipes.one_type(recipe.mixture, f"--requantize {words}")
    if recipe.algorithm not in ("rtn", "hqq") or recipe.transforms:
        raise RecipeError(f"--requantize {words}: conversion has no data; name a number format and rtn or hqq, e.g. int4-asym-g64.")
    if recipe.scheme.act is not None and recipe.scheme.act.static:
        raise RecipeError(f"--requantize {words}: conversion has no data, from which static scales of activations come. Leave static out.")
    plans = recipes.resolve(replace(recipe, rules=(), mixture=None), shapes, {})
    own = {name: Rounding(plan.scheme.act) for name, plan in plans.items() if plan.scheme.act is not None}
    before = {name: rounding for name, rounding in checkpoint.activations.items() if name not in plans or target_name in ("safetensors", "lowbit")}
    made = with_rounded(checkpoint, plans)
    layers = {**(made.provenance.get("layers") or {}), **{name: rounded_record(plan, shapes[name]) for name, plan in plans.items()}}
    return replace(made, provenance={**made.provenance, "layers": layers}, activations={**before, **own})


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
