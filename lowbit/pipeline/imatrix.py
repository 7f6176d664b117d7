"""Importance matrices: what llama.cpp's llama-imatrix collects, from the model in its own format, streamed block by block."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.imatrix import Imatrix, from_stats, read_imatrix, write_imatrix
from ..errors import RecipeError
from ..progress import SILENT, Progress
from . import recipes, resources
from .blocks import observe, observed
from .job import Job, refuse_existing, temporary, work_folder
from .locate import load_tokenizer, locate
from .output import readable_errors, refuse_own_input
from .quantize import job_key, windows_of
from .setup import memory_estimate, set_up


@dataclass(frozen=True)
class ImatrixResult:
    """What imatrix made. entries: matrices (stacks of experts count once). tokens: of the text. unseen: matrices of experts that no token reached (the older form does not say)."""

    path: Path
    entries: int
    tokens: int
    unseen: int
    seconds: float
    peak_memory_bytes: int


def imatrix(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | None = None,
    n_samples: int | None = None,
    seq_len: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> ImatrixResult:
    """Collect the importance of every matrix of a model's blocks and write it as llama-quantize reads it.

    output: a file that ends in .gguf, or in .dat for the older form. The other arguments are those of quantize. Windows are those of llama-imatrix -c seq_len
    --chunks n_samples: the first ones of the text; where the tokenizer begins a text with BOS, this one does, and BOS replaces the first token of each window.
    """
    started, peak, output = time.monotonic(), resources.PeakMemory(), Path(output)
    if output.suffix not in (".gguf", ".dat"):
        raise RecipeError(f"the output {output} says no form of importance matrix; expected a name that ends in .gguf, or in .dat for the older form.")
    refuse_existing(output, resume=resume, overwrite=overwrite)
    draft = recipes.parse("float16-weighted-rtn", target_name="gguf")  # which asks for sum_sq of every matrix, whatever its shape
    located = locate(model, progress=progress)
    refuse_own_input(output, located)
    setup = set_up(located, draft, calibration, n_samples, seq_len, seed, device, dtype, progress)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch, readable_errors(output):
        windows = windows_of(setup, load_tokenizer(setup.checkpoint, Path(scratch)), as_llama_cpp=True)
        states = windows.ids.numel() * setup.skeleton.text_config.hidden_size * setup.dtype.itemsize
        if not (resume and work_folder(output).exists()):
            resources.require_disk(output.absolute().parent, 2 * states, purpose="This job")
        resources.require_memory(memory_estimate(setup, windows), purpose="This job")
        job = Job(output, {**job_key(setup, windows), "recipe": "imatrix"}, resume=resume, overwrite=overwrite)
        if not job.written:
            observe(setup, windows, job, peak)
            entries = from_stats(observed(setup, job), setup.checkpoint.config, {linear.name: linear.shape[1] for linears in setup.linears for linear in linears})
            source = Path(setup.recipe.calibration.source).name
            write_imatrix(Imatrix(entries, (source,), len(windows.ids), windows.ids.shape[1]), temporary(output), old=output.suffix == ".dat")
            job.finish()
            os.replace(temporary(output), output)
        job.remove()
    peak.look()
    made = read_imatrix(output).entries
    unseen = sum(int((entry.counts == 0).sum()) for entry in made.values())
    return ImatrixResult(output, len(made), windows.tokens, unseen, time.monotonic() - started, peak.peak_bytes)
