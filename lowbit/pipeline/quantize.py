"""The main job: read a model, calibrate, quantize block by block, write what the target's programs load."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from .. import __version__, numerics
from ..algorithms import algorithm
from ..checkpoints import Checkpoint, LazyQuantized, LazyTensor, open_checkpoint, target
from ..errors import ModelError, RecipeError
from ..models import skeleton as sk
from ..models.linears import Linear, find_linears, outside_matrices
from ..models.skeleton import Skeleton
from ..progress import SILENT, Advance, Progress
from ..recipe import Calibration, Recipe
from ..scheme import CASTS
from ..tensor import QuantizedTensor
from . import guidance, recipes, resources
from .calibration import Windows, calibration_windows
from .collect import Collector, Current, InputGroup, StopBlock, stages
from .hidden import HiddenStates
from .job import Job, refuse_existing, work_folder
from .layers import quantize_group, share_scarce
from .locate import load_tokenizer, locate, model_name
from .output import as_stored_dense, dtype_name, readable_errors, refuse_own_input, rounded_record, with_rounded, write
from .recipes import LayerPlan
from .selfgen import self_texts
from .streaming import Streamer

log = logging.getLogger(__name__)
RECORD_BYTES = 4096

_Place = tuple[str, str, int | None, tuple[int, int] | None]  # of a matrix inside a block: module, parameter, expert and rows


@dataclass(frozen=True)
class Result:
    """What quantize made. path: the folder or file. provenance: recipe, data, versions and a record of every layer. seconds, peak_memory_bytes: of this run (RssAnon)."""

    path: Path
    provenance: dict
    seconds: float
    peak_memory_bytes: int

    @property
    def layers(self) -> dict[str, dict]:
        return self.provenance["layers"]


@dataclass
class _Setup:
    """Everything that is known before the first weight is loaded."""

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


def quantize(
    model: str | Path | transformers.PreTrainedModel,
    recipe: str | Path | Recipe | None = None,
    output: str | Path | None = None,
    *,
    target_name: str | None = None,
    calibration: str | Path | None = None,
    n_samples: int | None = None,
    seq_len: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Quantize a model and write it; the model is streamed block by block and never held whole.

    model: a Hugging Face folder, a hub id, a GGUF file, or a transformers model (which is saved to a temporary folder first).
    recipe: a preset, a short form ("int4-asym-g128-gptq"), a TOML file or a Recipe; None: the target's default.
    output: a new folder (or .gguf file); None: MODEL-RECIPE in the current folder. target_name: compressed-tensors, gguf or safetensors.
    calibration, n_samples, seq_len, seed: override the recipe's. dtype: of the computation ("bfloat16", "float32"; None: what is fast here).
    resume: go on with a job that was stopped; the result has the bytes of an undisturbed run.
    Raises LowbitError (a subclass says of what kind) before any work on bad input; earlier results are left as they are.
    """
    started, peak = time.monotonic(), resources.PeakMemory()
    with _as_path(model, resume=resume) as path:
        draft = recipes.parse(recipe, target_name=target_name or _target_of(output))
        located = locate(path, progress=progress)
        output = Path(output) if output is not None else Path(_default_name(located, draft.recipe))
        refuse_existing(output, resume=resume, overwrite=overwrite)
        refuse_own_input(output, located)
        setup = _set_up(located, draft, calibration, n_samples, seq_len, seed, device, dtype, progress)
        with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch, readable_errors(output):
            tokenizer_needed = bool(setup.needs) or setup.checkpoint.kind == "gguf"
            tokenizer = load_tokenizer(setup.checkpoint, Path(scratch)) if tokenizer_needed else None
            windows = _windows(setup, tokenizer) if setup.needs else None
            _check_resources(setup, windows, output, resumed=resume and work_folder(output).exists())
            _refuse_damaged(setup)
            job = Job(output, _key(setup, windows), resume=resume, overwrite=overwrite)
            with _log_file(output):
                log.info("model %s, output %s", located, output)
                if not job.written:
                    _run(setup, windows, job, peak)
                    peak.look()
                    write(_assemble(setup, windows, job, tokenizer), setup.recipe.target, output, progress, overwrite=overwrite, whole=job.finish)
                job.remove()
                peak.look()
                seconds = time.monotonic() - started
                log.info("done in %.1f s, peak RssAnon %s", seconds, resources.human(peak.peak_bytes))
            provenance = open_checkpoint(output).provenance
    return Result(output, provenance, seconds, peak.peak_bytes)


@contextmanager
def _as_path(model, *, resume: bool) -> Iterator[str | Path]:
    if not isinstance(model, transformers.PreTrainedModel):
        yield model
        return
    if resume:
        raise RecipeError("a job on a model in memory cannot be resumed: nothing says that it is the same. Save the model and give its folder.")
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        source = Path(model.config._name_or_path)
        path = Path(folder) / (source.name or model.config.model_type)
        model.save_pretrained(path)
        if model.config._name_or_path and source.is_dir():
            for file in open_checkpoint(source).files:
                shutil.copy(file, path)
        yield path


def _target_of(output: str | Path | None) -> str | None:
    """An output called .gguf says what is wanted."""
    return "gguf" if output is not None and str(output).endswith(".gguf") else None


def _default_name(path: Path, recipe: Recipe) -> str:
    return f"{model_name(path)}-{recipe.name.removesuffix('.toml').replace('/', '_')}{target(recipe.target).suffix}"


def _set_up(path, draft, calibration, n_samples, seq_len, seed, device, dtype, progress) -> _Setup:
    checkpoint = open_checkpoint(path)
    skeleton = sk.build(checkpoint)
    linears = [find_linears(skeleton, index) for index in range(len(skeleton.blocks))]
    shapes = {linear.name: linear.shape for block in linears for linear in block}
    if not shapes:
        raise ModelError(f"{type(skeleton.model).__name__}: its blocks hold no linear layer that lowbit knows.")
    outside = outside_matrices(skeleton)
    recipe, notes = recipes.settle(draft, shapes, dtype_name(checkpoint, next(iter(shapes))))
    if recipe.target == "compressed-tensors" and any(linear.transposed for block in linears for linear in block):
        raise ModelError(
            f"{type(skeleton.model).__name__} keeps its weights in Conv1D layers, which no program reads from compressed-tensors. Write it with --to gguf or --to safetensors."
        )
    if any(name in checkpoint.quantized for name in shapes):
        notes.append("This checkpoint is quantized already; what is lost comes on top of what was lost before.")
    if skeleton.unused:
        some = ", ".join(skeleton.unused[:3]) + (", ..." if len(skeleton.unused) > 3 else "")
        notes.append(f"{type(skeleton.model).__name__} does not use {len(skeleton.unused)} tensors of the checkpoint, which are left out: {some}.")
    for note in notes:
        progress.note(note)
    recipe = replace(recipe, seed=recipe.seed if seed is None else seed, calibration=_override(recipe.calibration, skeleton, calibration, n_samples, seq_len))
    if recipe.target == "gguf":
        from ..checkpoints.gguf import supported

        supported(checkpoint.config)
    plans = recipes.resolve(recipe, shapes, outside)
    embedding = next(iter(outside), None)
    if recipe.target == "compressed-tensors" and embedding in plans and plans[embedding].scheme.format not in CASTS:
        raise RecipeError(f"a rule quantizes the embedding {embedding}, which no program reads from compressed-tensors. Leave it out, or write --to gguf.")
    if not plans:
        raise RecipeError(f"recipe {recipe.name!r} quantizes nothing in this model: its rules keep every layer.")
    needs = tuple(sorted({need for name, plan in plans.items() if name in shapes for need in algorithm(plan.algorithm).needs(plan.options)}))
    chosen = resources.choose_device(device)
    return _Setup(checkpoint, skeleton, recipe, plans, linears, outside, needs, chosen, resources.choose_dtype(dtype, chosen), progress, notes)


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


def _windows(setup: _Setup, tokenizer) -> Windows:
    calibration = setup.recipe.calibration
    texts = self_texts(setup.checkpoint, tokenizer, calibration, seed=setup.recipe.seed, progress=setup.progress) if calibration.source == "self" else None
    return calibration_windows(calibration, tokenizer, texts=texts, progress=setup.progress)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of every tensor's name, shape and dtype and of the config: what the model is, without reading its weights."""
    entries: dict[str, LazyTensor | LazyQuantized] = {**checkpoint.tensors, **checkpoint.quantized}
    described = sorted((name, list(t.shape), str(t.dtype)) for name, t in entries.items())
    return hashlib.sha256(json.dumps([described, checkpoint.config], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _key(setup: _Setup, windows: Windows | None) -> dict:
    """What must be the same for a job to be resumed."""
    weights = [p for p in (setup.checkpoint.path.iterdir() if setup.checkpoint.path.is_dir() else [setup.checkpoint.path]) if p.suffix in (".safetensors", ".gguf")]
    return {
        "lowbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": fingerprint(setup.checkpoint),
        "weights": sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weights),
        "recipe": setup.recipe.to_dict(),
        "data": windows.digest if windows else None,
        "dtype": str(setup.dtype),
        "device": setup.device.type,
        "threads": torch.get_num_threads(),
    }


def _check_resources(setup: _Setup, windows: Windows | None, output: Path, *, resumed: bool) -> None:
    quantized = sum(numerics.nbytes(plan.scheme, shape) for plan, shape in _planned_shapes(setup))
    kept = sum(t.nbytes for name, t in setup.checkpoint.tensors.items() if name not in setup.plans)
    hidden = 0 if windows is None else 2 * windows.ids.numel() * setup.skeleton.text_config.hidden_size * setup.dtype.itemsize
    beside = sum(file.stat().st_size for file in setup.checkpoint.files) + 2 * RECORD_BYTES * len(setup.plans)
    disk = 2 * quantized + kept + hidden + beside  # the work folder and the output exist side by side for a while
    if not resumed:
        resources.require_disk(output.absolute().parent, disk, purpose="This job")
    resources.require_memory(memory_estimate(setup, windows), purpose="This job")


def _refuse_damaged(setup: _Setup) -> None:
    """Raise FormatError when a weight outside the blocks holds NaN or infinity; those in the blocks are looked at when they are loaded."""
    prefix = f"{setup.skeleton.blocks_name}."
    inside = {name for parameter, source in setup.skeleton.sources.items() if parameter.startswith(prefix) for name in source.flat()}
    for name, lazy in setup.checkpoint.tensors.items():
        if name in inside or not lazy.dtype.is_floating_point:
            continue
        for rows in lazy.chunks():
            numerics.refuse_bad_values(rows, name)


def _planned_shapes(setup: _Setup):
    shapes = {linear.name: linear.shape for block in setup.linears for linear in block} | setup.outside
    return [(plan, shapes[name]) for name, plan in setup.plans.items()]


def memory_estimate(setup: _Setup, windows: Windows | None) -> int:
    """Bytes that the job will hold at its peak: a block in the compute dtype, its Hessians, and the largest matrix several times in float32."""
    block = max(setup.skeleton.block_bytes(i, setup.dtype) for i in range(len(setup.skeleton.blocks)))
    largest = max(linear.shape[0] * linear.shape[1] for block_linears in setup.linears for linear in block_linears) * 4
    if windows is None:
        return largest * 5
    squares = [{linear.input_key: 4 * linear.shape[1] ** 2 for linear in linears} for linears in setup.linears]
    hessians = max(sum(inputs.values()) + 6 * max(inputs.values(), default=0) for inputs in squares) if "hessian" in setup.needs else 0  # six copies while one is factorized
    return 2 * block + hessians + 8 * largest


def _run(setup: _Setup, windows: Windows | None, job: Job, peak: resources.PeakMemory) -> None:
    """Quantize every block that is not done yet."""
    depth = len(setup.skeleton.blocks)
    first = next((i for i in range(depth) if not job.done(_part(i))), depth)
    if first:
        setup.progress.note(f"Going on at block {first + 1} of {depth}." if first < depth else "All blocks are done; writing.")
    if windows is None:
        _run_without_data(setup, job, first, peak)
        return
    if first == depth:
        return
    streamer = Streamer(setup.skeleton, windows.batches(), dtype=setup.dtype, device=setup.device)

    def states(block: int, *, must_exist: bool = False) -> HiddenStates:
        return HiddenStates(streamer.shapes, streamer.hidden_size, setup.dtype, file=job.hidden_file(block), must_exist=must_exist)

    if "loss" in setup.needs:
        guidance.sweep(streamer, setup.linears, job, seed=setup.recipe.seed, progress=setup.progress)
    source = states(first, must_exist=first > 0)
    streamer.record(source if first == 0 else None)
    worker = _BlockWorker(setup, streamer, peak, job)
    with setup.progress.step("Quantizing blocks", depth * worker.steps_per_block) as advance:
        advance(first * worker.steps_per_block)
        for index in range(first, depth):
            goal = states(index + 1)
            tensors, records = worker.run(index, source, goal if index + 1 < depth else None, advance)
            goal.sync()
            job.save(_part(index), tensors, records)
            resources.release_memory()
            source = goal
            peak.look()
            log.info("block %d of %d done, RssAnon %s", index + 1, depth, resources.human(peak.peak_bytes))


def _part(index: int) -> str:
    return f"block-{index:05d}"


def _run_without_data(setup: _Setup, job: Job, first: int, peak: resources.PeakMemory) -> None:
    """Algorithms that need no statistics: every matrix on its own, no forward pass."""
    with setup.progress.step("Quantizing blocks", len(setup.linears)) as advance:
        advance(first)
        for index in range(first, len(setup.linears)):
            block = sk.load_module(setup.skeleton, setup.skeleton.block_name(index), torch.float32, setup.device)
            tensors: dict[str, QuantizedTensor] = {}
            records: dict[str, dict] = {}
            for linear in setup.linears[index]:
                made, record = quantize_group(block, InputGroup([linear]), setup.plans, _dtypes(setup, [linear]))
                tensors |= made
                records |= record
            job.save(_part(index), tensors, records)
            resources.release_memory()
            peak.look()
            advance()


def _dtypes(setup: _Setup, linears: list[Linear]) -> dict[str, str]:
    return {linear.name: dtype_name(setup.checkpoint, linear.name) for linear in linears}


class _BlockWorker:
    """Quantizes one block after the other: passes that collect statistics, the algorithm, a pass through the quantized block."""

    def __init__(self, setup: _Setup, streamer: Streamer, peak: resources.PeakMemory, job: Job) -> None:
        self.setup, self.streamer, self.peak, self.job = setup, streamer, peak, job
        self._plans: dict[tuple[_Place, ...], list[list[_Place]]] = {}  # input groups of blocks that look alike
        self.steps_per_block = 2 * len(streamer.batches)

    def run(self, index: int, source: HiddenStates, goal: HiddenStates | None, advance: Advance) -> tuple[dict[str, QuantizedTensor], dict[str, dict]]:
        setup, streamer = self.setup, self.streamer
        block = streamer.load_block(index)
        linears = [linear for linear in setup.linears[index] if linear.name in setup.plans]
        collector = Collector(block, linears)
        groups = self._groups(collector, linears, index, block, source) if linears else []
        if "loss" in setup.needs:
            guidance.weigh(groups, setup.plans, self.job, index, streamer.batches)
        turns = stages(groups) if setup.recipe.true_sequential else [groups] if groups else []
        tensors: dict[str, QuantizedTensor] = {}
        records: dict[str, dict] = {}
        for number, stage in enumerate(turns):
            self._collect(collector, stage, index, block, source, advance if number == 0 else lambda n=1: None)
            notes = share_scarce(stage)
            for group in stage:
                made, record = quantize_group(block, group, setup.plans, _dtypes(setup, group.linears))
                for name in record.keys() & notes.keys():
                    record[name]["notes"] = [*record[name].get("notes", []), notes[name]]
                tensors |= made
                records |= record
                self.peak.look()
                group.stats.hessian = None
                resources.release_memory()
        if goal is not None:
            streamer.run(block, index, source, goal, tick=advance)
        else:
            advance(len(streamer.batches))
        return tensors, records

    def _collect(self, collector: Collector, stage: list[InputGroup], index: int, block, source: HiddenStates, advance: Advance) -> None:
        current, start = Current(), 0
        with collector.collect(stage, self.setup.needs, current):
            for number, batch in enumerate(self.streamer.batches):
                current.mask, current.tokens = batch.mask, slice(start, start + batch.ids.numel())
                start = current.tokens.stop
                with suppress(StopBlock):
                    self.streamer.run_block(block, index, number, source.read(number, self.streamer.device))
                advance(1)

    def _groups(self, collector: Collector, linears: list[Linear], index: int, block, source: HiddenStates) -> list[InputGroup]:
        """Input groups in calling order; found once per kind of block by running it on one micro-batch."""
        shape = tuple((linear.module, linear.parameter, linear.expert, linear.rows) for linear in linears)
        by_place = dict(zip(shape, linears, strict=True))
        if shape not in self._plans:
            found = collector.discover(lambda: self.streamer.run_block(block, index, 0, source.read(0, self.streamer.device)))
            self._plans[shape] = [[(x.module, x.parameter, x.expert, x.rows) for x in group.linears] for group in found]
        return [InputGroup([by_place[place] for place in group]) for group in self._plans[shape]]


def _assemble(setup: _Setup, windows: Windows | None, job: Job, tokenizer) -> Checkpoint:
    """The result as a lazy checkpoint: quantized matrices from the work folder, the rest from the model."""
    quantized: dict[str, LazyQuantized] = {}
    records: dict[str, dict] = {}
    for index in range(len(setup.skeleton.blocks)):
        quantized |= job.quantized(_part(index))
        records |= job.records(_part(index))
    outside = {name: setup.plans[name] for name in setup.outside if name in setup.plans}
    base = with_rounded(setup.checkpoint, outside)
    records |= {name: rounded_record(plan, setup.outside[name]) for name, plan in outside.items()}
    own = {name: base.quantized[name] for name in outside}
    kept = {**setup.checkpoint.tensors, **{n: setup.checkpoint.lazy(n) for n in setup.checkpoint.quantized}} if setup.checkpoint.kind != "gguf" else setup.checkpoint.tensors
    tensors = {name: t for name, t in kept.items() if name not in quantized and name not in own and name not in setup.skeleton.unused}
    rest = {name: q for name, q in setup.checkpoint.quantized.items() if name not in quantized and name not in own and name not in tensors}
    files = setup.checkpoint.files
    if setup.checkpoint.kind == "gguf" and tokenizer is not None:
        files = tuple(Path(tokenizer.name_or_path, f).absolute() for f in os.listdir(tokenizer.name_or_path) if f != "config.json")
        if setup.recipe.target != "gguf":
            tensors |= {name: setup.checkpoint.lazy(name) for name in rest}
            rest = {}
    provenance = _provenance(setup, windows, records)
    made = replace(setup.checkpoint, tensors=tensors, quantized={**rest, **quantized, **own}, files=tuple(sorted(files)), provenance=provenance)
    return made if setup.recipe.target != "safetensors" else as_stored_dense(made, [x for block in setup.linears for x in block])


def _provenance(setup: _Setup, windows: Windows | None, records: dict) -> dict:
    """How the file came to be; no times and no paths, so that the same job gives the same bytes."""
    recipe = setup.recipe.to_dict()
    recipe["calibration"]["source"] = Path(setup.recipe.calibration.source).name
    return {
        "lowbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": {"architecture": type(setup.skeleton.model).__name__, "parameters": setup.skeleton.parameter_count(), "fingerprint": fingerprint(setup.checkpoint), "format": setup.checkpoint.kind},
        "recipe": recipe,
        "calibration": None if windows is None else {"windows": len(windows.ids), "length": windows.ids.shape[1], "tokens": windows.tokens, "found": windows.found, "sha256": windows.digest},
        "compute_dtype": str(setup.dtype).removeprefix("torch."),
        "notes": setup.notes,
        "layers": records,
    }


@contextmanager
def _log_file(output: Path) -> Iterator[None]:
    """Times and paths go to OUT.log beside the output."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    handler = _LogHandler(output.with_name(output.name + ".log"), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("lowbit")
    previous = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous)
        with suppress(OSError):
            handler.close()


class _LogHandler(logging.FileHandler):
    """A log that is silent when it cannot be written: the work itself says that the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging calls it so)
        pass
