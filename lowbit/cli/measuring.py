"""Commands that run models to say what became of them: compare, eval, verify."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LowbitError
from .options import Device, EvalDtype, Json, Model, Seed, Threads, prepare


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
    prepare(threads)
    from ..pipeline.evaluate import compare as run
    from .console import BarProgress

    if card:
        from ..pipeline.card import refuse_unwritable

        refuse_unwritable([name for name in models if name != against])
    comparison = run(
        models, against=against, text=text, ctx=ctx, n_windows=windows, dtype=dtype, device=device, noise_floor=noise_floor, kv_bits=kv_bits, seed=seed, progress=BarProgress(quiet=as_json)
    )
    _show(comparison, as_json, html)
    if card:
        from ..pipeline.card import measured_table, write_measured

        for name, row in zip(models, comparison.rows[1:], strict=True):
            if name != against:  # the original's own card stays as it is
                write_measured(Path(name), measured_table(comparison, row))


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
    prepare(threads)
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
    prepare(None)
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
