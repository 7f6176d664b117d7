"""What several commands share: their options, and what they do first."""

from __future__ import annotations

import os
from typing import Annotated

import typer

LAYOUTS = "compressed-tensors, gguf, gptq, awq, auto-round, bitsandbytes, hqq, aqlm, bitnet, torchao, lowbit or safetensors"
Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id (org/name) or a .gguf file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines, no progress.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda where there is one).", show_default=False)]
Dtype = Annotated[str | None, typer.Option(help="Of the computation: bfloat16, float32, float16 (default: bfloat16 where the hardware multiplies it).", show_default=False)]
EvalDtype = Annotated[str | None, typer.Option("--dtype", help="Of the computation (default: float32).", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: all cores).", min=1, show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output (only when the new one is whole).")]
CalibrationText = Annotated[str | None, typer.Option("--calibration", help='Text: a .txt or .jsonl file, "default", "self" or "dataset:NAME".', show_default=False)]
Samples = Annotated[int | None, typer.Option(help="Calibration windows (default 128).", min=1, show_default=False)]
Length = Annotated[int | None, typer.Option(help="Tokens per window (default 2048 or the model's limit).", min=2, show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a job that was stopped; the result has the same bytes.")]
Shard = Annotated[
    str | None,
    typer.Option("--max-shard-size", help="Of a file at most, such as 5GB (default: 4.5GB; of a GGUF: one file). A GGUF becomes a folder of several.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="For everything that is drawn by chance.")]


def prepare(threads: int | None) -> None:
    """Quiet libraries and the number of threads; the first thing a command that computes does."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
