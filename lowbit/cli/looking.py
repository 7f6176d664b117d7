"""Commands that look without running a model: methods, plan, inspect, doctor."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import LowbitError
from .options import Json, prepare


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
    prepare(None)
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
    prepare(None)
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


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also ask whether the Hugging Face hub answers.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine has, what lowbit uses of it, and what pip install would add.

    Example:

      lowbit doctor
    """
    prepare(None)
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
