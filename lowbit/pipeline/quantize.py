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

from .. import __version__
from ..checkpoints import Checkpoint, LazyQuantized, LazyTensor, open_checkpoint, target, weight_files
from ..errors import RecipeError
from ..progress import SILENT, Progress
from ..recipe import Recipe
from ..scheme import Rounding
from ..transforms import of_blocks
from . import recipes, resources
from .blocks import part, rewritten, run
from .calibration import Windows, calibration_windows
from .job import Job, refuse_existing, work_folder
from .locate import base_name, load_tokenizer, locate, model_name
from .output import as_stored_dense, held, readable_errors, refuse_own_input, rounded_record, shard_bytes_of, with_rounded, write
from .selfgen import self_texts
from .setup import Refinement, Setup, check_resources, refuse_damaged, set_up

log = logging.getLogger(__name__)

HASHED_MATRICES, LONGEST_ROW = 8, 1 << 20  # of a fingerprint: dense matrices whose first row counts, and numbers of a row or vector at most


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


def quantize(
    model: str | Path | transformers.PreTrainedModel | Checkpoint,
    recipe: str | Path | Recipe | None = None,
    output: str | Path | None = None,
    *,
    target_name: str | None = None,
    calibration: str | Path | None = None,
    imatrix: str | Path | None = None,
    n_samples: int | None = None,
    seq_len: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    windows: Windows | None = None,
    refinement: Refinement | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Quantize a model and write it; the model is streamed block by block and never held whole.

    model: a Hugging Face folder, a hub id, a GGUF file, a transformers model (which is saved to a temporary folder first), or a Checkpoint (whose tensors may
    be made when they are read).
    recipe: a preset, a short form ("int4-asym-g128-gptq"), a TOML file or a Recipe; None: the target's default.
    output: a new folder (or .gguf file); None: MODEL-RECIPE in the current folder. target_name: one of checkpoints.TARGETS ("compressed-tensors", "gguf", "gptq", "safetensors", ...).
    calibration, n_samples, seq_len, seed: override the recipe's. imatrix: a file with llama.cpp's importance matrix, for plain rounding without calibration.
    dtype: of the computation ("bfloat16", "float32"; None: what is fast here).
    max_shard_size: of a file, in bytes or as "5GB"; a GGUF then becomes a folder of several. None: 4.5 GB, a GGUF in one file.
    windows: the calibration windows themselves, in place of what calibration, n_samples and seq_len say.
    refinement: what is done with each block after its algorithm (lowbit.training.blockwise).
    resume: go on with a job that was stopped; the result has the bytes of an undisturbed run.
    Raises LowbitError (a subclass says of what kind) before any work on bad input; earlier results are left as they are.
    """
    started, peak = time.monotonic(), resources.PeakMemory()
    with _as_path(model, resume=resume) as path:
        draft = recipes.parse(recipe, target_name=target_name or _target_of(output))
        located = path.path if isinstance(path, Checkpoint) else locate(path, progress=progress)
        output = Path(output) if output is not None else Path(_default_name(located, draft.recipe, sharded=max_shard_size is not None))
        shard_bytes = shard_bytes_of(max_shard_size, draft.recipe.target, output)
        refuse_existing(output, resume=resume, overwrite=overwrite)
        refuse_own_input(output, located)
        setup = set_up(path if isinstance(path, Checkpoint) else located, draft, calibration, n_samples, seq_len, seed, device, dtype, progress, imatrix)
        if refinement is not None:
            setup = replace(setup, needs=tuple(sorted({*setup.needs, "reference"})), refinement=refinement)
        with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch, readable_errors(output):
            tokenizer_needed = bool(setup.needs) or setup.checkpoint.kind == "gguf"
            tokenizer = load_tokenizer(setup.checkpoint, Path(scratch)) if tokenizer_needed else None
            windows = (windows or windows_of(setup, tokenizer)) if setup.needs else None
            check_resources(setup, windows, output, resumed=resume and work_folder(output).exists())
            refuse_damaged(setup)
            job = Job(output, {**job_key(setup, windows), "max_shard_size": shard_bytes}, resume=resume, overwrite=overwrite)
            with _log_file(output):
                log.info("model %s, output %s", located, output)
                if not job.written:
                    run(setup, windows, job, peak)
                    peak.look()
                    made, base = _assemble(setup, windows, job, tokenizer), base_name(model, located)
                    write(made, setup.recipe.target, output, progress, overwrite=overwrite, base=base, shard_bytes=shard_bytes, whole=job.finish)
                job.remove()
                peak.look()
                seconds = time.monotonic() - started
                log.info("done in %.1f s, peak RssAnon %s", seconds, resources.human(peak.peak_bytes))
            provenance = open_checkpoint(output).provenance
    return Result(output, provenance, seconds, peak.peak_bytes)


@contextmanager
def _as_path(model, *, resume: bool) -> Iterator[str | Path | Checkpoint]:
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


def _default_name(path: Path, recipe: Recipe, *, sharded: bool) -> str:
    return f"{model_name(path)}-{recipe.name.removesuffix('.toml').replace('/', '_')}{'' if sharded else target(recipe.target).suffix}"


def windows_of(setup: Setup, tokenizer, *, as_llama_cpp: bool = False) -> Windows:
    """The calibration windows of a job; as_llama_cpp: the first ones, cut as llama.cpp's programs cut them."""
    calibration = setup.recipe.calibration
    texts = self_texts(setup.checkpoint, tokenizer, calibration, seed=setup.recipe.seed, progress=setup.progress) if calibration.source == "self" else None
    return calibration_windows(calibration, tokenizer, texts=texts, as_llama_cpp=as_llama_cpp, progress=setup.progress)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the config, of every tensor's name, shape and dtype, of dense vectors, and of the first rows of a few dense matrices: what the model is, for the price of reading little."""
    entries: dict[str, LazyTensor | LazyQuantized] = {**checkpoint.tensors, **checkpoint.quantized}
    described = sorted((name, list(t.shape), str(t.dtype)) for name, t in entries.items())
    found = hashlib.sha256(json.dumps([described, checkpoint.config], sort_keys=True, default=str).encode())
    dense = [lazy for _, lazy in sorted(checkpoint.tensors.items()) if lazy.numel]
    vectors, matrices = ([lazy for lazy in dense if len(lazy.shape) == rank and lazy.shape[-1] <= LONGEST_ROW] for rank in (1, 2))
    for lazy in (*vectors, *matrices[:HASHED_MATRICES]):
        found.update(lazy.read(0, lazy.numel if len(lazy.shape) == 1 else 1).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def model_key(checkpoint: Checkpoint, place: torch.device, dtype: torch.dtype) -> dict:
    """What must be the same for any job to be resumed: model, versions, machine."""
    return {
        "lowbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": fingerprint(checkpoint),
        "weights": sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weight_files(checkpoint.path)),
        "dtype": str(dtype),
        "device": place.type,
        "threads": torch.get_num_threads(),
    }


def job_key(setup: Setup, windows: Windows | None) -> dict:
    """What must be the same for a job to be resumed."""
    return {
        **model_key(setup.checkpoint, setup.device, setup.dtype),
        "recipe": setup.recipe.to_dict(),
        "refinement": setup.refinement and setup.refinement.settings(),
        **({"merged": setup.checkpoint.provenance["merged"]} if "merged" in setup.checkpoint.provenance else {}),
        "data": windows.digest if windows else setup.imatrix and setup.imatrix["sha256"],
    }


def _assemble(setup: Setup, windows: Windows | None, job: Job, tokenizer) -> Checkpoint:
    """The result as a lazy checkpoint: quantized matrices from the work folder, the rest from the model."""
    quantized: dict[str, LazyQuantized] = {}
    records: dict[str, dict] = {}
    for index in range(len(setup.skeleton.blocks)):
        quantized |= job.quantized(part(index))
        records |= job.records(part(index))
    outside = {name: setup.plans[name] for name in setup.outside if name in setup.plans}
    base = with_rounded(setup.checkpoint, outside, setup.importance)
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
    for index in range(len(setup.skeleton.blocks) if of_blocks(setup.recipe.transforms) else 0):
        for name, value in job.tensors(rewritten(index)).items():
            tensors[name] = held(value.to(setup.checkpoint.lazy(name).dtype))
    provenance = _provenance(setup, windows, records)
    activations = {name: Rounding.from_dict(record["activation"]) for name, record in records.items() if "activation" in record}
    made = replace(setup.checkpoint, tensors=tensors, quantized={**rest, **quantized, **own}, files=tuple(sorted(files)), provenance=provenance, activations=activations)
    return made if setup.recipe.target != "safetensors" else as_stored_dense(made, setup.skeleton)


def _provenance(setup: Setup, windows: Windows | None, records: dict) -> dict:
    """How the file came to be; no times and no paths, so that the same job gives the same bytes."""
    recipe = setup.recipe.to_dict()
    recipe["calibration"]["source"] = Path(setup.recipe.calibration.source).name
    return {
        "lowbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": {"architecture": type(setup.skeleton.model).__name__, "parameters": setup.skeleton.parameter_count(), "fingerprint": fingerprint(setup.checkpoint), "format": setup.checkpoint.kind},
        **({"merged": setup.checkpoint.provenance["merged"]} if "merged" in setup.checkpoint.provenance else {}),
        "recipe": recipe,
        **({"refinement": setup.refinement.settings()} if setup.refinement else {}),
        "calibration": None if windows is None else {"windows": len(windows.ids), "length": windows.ids.shape[1], "tokens": windows.tokens, "found": windows.found, "sha256": windows.digest},
        **({"imatrix": setup.imatrix} if setup.imatrix else {}),
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
