"""The model card: README.md beside what lowbit writes, with the hub's metadata, what was done, what it cost, and the lines that load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoints import Checkpoint, gguf, open_checkpoint
from ..checkpoints.safetensors import read_text, write_text
from ..errors import CheckpointError, RecipeError
from ..scheme import CASTS
from .consumers import Consumer, consumer_of
from .evaluate import Comparison, Row

FILE = "README.md"
NAME = "path-to-this-model"
BEGIN, END = "<!-- lowbit: measured -->", "<!-- lowbit: end -->"
LIBRARIES = {"gguf": "gguf", "hqq": "hqq", "lowbit": "lowbit"}
OFFICIAL = {"auto-round": "autoround", "mxfp4": "mxfp4", "compressed-tensors": "compressed-tensors", "gguf": "gguf"}


def card_path(output: Path, is_file: bool) -> Path:
    """Where the card of an output lies: in the folder, or beside the file."""
    return output.with_name(f"{output.name}.{FILE}") if is_file else output / FILE


def write_card(output: Path, *, base: str, location: Path | None = None) -> None:
    """Write the card of what lies at output. base: the hub id of the original, or its name. location: where the card goes, if elsewhere."""
    write_text(location or card_path(output, output.is_file()), card_of(output, base=base))


def card_of(path: Path, *, base: str) -> str:
    """The card of a folder or a GGUF file (of any name); CheckpointError for a provenance that lowbit did not write."""
    checkpoint = gguf.open_file(path) if path.is_file() else open_checkpoint(path)
    try:
        return render(checkpoint, base=base, in_folder=path.is_dir())
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: its provenance is not what lowbit writes ({type(error).__name__}: {error}).") from error


def render(checkpoint: Checkpoint, *, base: str, in_folder: bool) -> str:
    """The card as Markdown with YAML metadata; the same for the same checkpoint, wherever it lies (NAME stands for its place, until it is pushed). in_folder: NAME is a folder, not a file."""
    consumer, provenance = consumer_of(checkpoint), checkpoint.provenance
    found = provenance.get("recipe")
    recipe: dict = found if isinstance(found, dict) else {}
    on_hub = re.fullmatch(r"[\w][\w.-]*/[\w.-]+", base) is not None
    made_here = bool(recipe) or any("scheme" in record for record in (provenance.get("layers") or {}).values())
    quantized = made_here or bool(checkpoint.quantized)
    tags = ["lowbit", *(["quantized"] if quantized else []), *([OFFICIAL.get(checkpoint.kind, checkpoint.kind)] if checkpoint.quantized else [])]
    metadata = ["---", f"library_name: {LIBRARIES.get(checkpoint.kind, 'transformers')}", "pipeline_tag: text-generation"]
    metadata += [f"base_model: {base}", *(["base_model_relation: quantized"] if quantized else [])] if on_hub else []
    metadata += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(tags)), "---"]
    link = f"[{base}](https://huggingface.co/{base})" if on_hub else base
    what = f"quantized with {' '.join(filter(None, ('lowbit', provenance.get('lowbit'))))}" if made_here else f"in the layout {checkpoint.kind}"
    title = f"# {', '.join(filter(None, (base.rpartition('/')[2], recipe.get('name'))))}\n\n{link}, {what}."
    loading = _loading(checkpoint, consumer, in_folder=in_folder)
    sections = [
        "\n".join(metadata), title, _facts(checkpoint, recipe, provenance), loading, f"{BEGIN}\n{_layer_errors(provenance)}\n{END}", _notes(provenance)
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _facts(checkpoint: Checkpoint, recipe: Mapping, provenance: Mapping) -> str:
    linears = [entry for entry in checkpoint.quantized.values() if entry.scheme.format not in CASTS]
    weights = sum(entry.shape[0] * entry.shape[1] for entry in linears)
    calibration = provenance.get("calibration")
    text = f"{calibration['windows']} windows of {calibration['length']} tokens" if isinstance(calibration, dict) and {"windows", "length"} <= calibration.keys() else "none"
    steps = [*(recipe.get("transforms") or {}), *([recipe["algorithm"]] if recipe.get("algorithm") else [])]
    rows = {
        "recipe": f"`{recipe['name']}`" if recipe.get("name") else "", "method": ", ".join(steps), "layout": checkpoint.kind,
        "number formats": ", ".join(sorted({entry.scheme.name for entry in linears})), "bits per quantized weight": f"{8 * sum(entry.nbytes for entry in linears) / weights:.3f}" if weights else "",
        "size of the tensors": f"{checkpoint.tensor_bytes / 1e6:,.1f} MB ({len(linears)} matrices quantized)", "calibration": text if recipe else "",
    }  # fmt: skip
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items() if value)])


def _loading(checkpoint: Checkpoint, consumer: Consumer, *, in_folder: bool) -> str:
    name = NAME if checkpoint.kind != "gguf" else f"{NAME}/{checkpoint.path.name}" if in_folder else f"{NAME}.gguf"
    fence = "sh" if consumer.name == "llama.cpp" else "python"
    before = "".join(f"import os\nos.environ[{key!r}] = {value!r}\n" for key, value in consumer.environment.items())
    note = f"\n\n{consumer.note}" if consumer.note else ""
    own = "\n\nlowbit itself runs it, too: `model = lowbit.load(" + json.dumps(name) + ")`." if consumer.name != "transformers" else ""
    return f"## Use\n\n`{consumer.install}`\n\n```{fence}\n{before}{consumer.lines(name)}\n```{note}{own}"


def _layer_errors(provenance: Mapping) -> str:
    records = [record for record in (provenance.get("layers") or {}).values() if isinstance(record, dict)]
    made, plain = ([record[key] for record in records if key in record] for key in ("output_error", "rtn_output_error"))
    head = "## What it lost\n\n"
    if not made:
        return f"{head}Not measured yet: `lowbit compare OUT --against MODEL --card` writes it here."
    line = f"Relative squared error of the layers' outputs on the calibration text, mean of {len(made)}: {sum(made) / len(made):.5f}"
    line += f" (plain rounding: {sum(plain) / len(plain):.5f})." if plain else "."
    return f"{head}{line} Perplexity and KL divergence: `lowbit compare OUT --against MODEL --card` writes them here."


def _notes(provenance: Mapping) -> str:
    notes = provenance.get("notes") or []
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def refuse_unwritable(names: Sequence[str]) -> None:
    """Raise RecipeError before the work where write_measured could not write later."""
    for name in names:
        if not Path(name).exists():
            raise RecipeError(f"{name} is no folder or file here, and a card is written beside the weights. Leave --card out, or measure a copy on this machine.")


def write_measured(output: Path, table: str) -> Path:
    """Put a table of what was measured into the card of an output, in the place of what stood there; returns the card."""
    path = card_path(output, output.is_file())
    if not path.is_file():
        refuse_unwritable([str(output)])
        write_card(output, base=output.name)
    text = read_text(path)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    new = f"{BEGIN}\n## What it lost\n\n{table}\n{END}"
    write_text(path, f"{before}{new}{after}" if begin and end else f"{text.rstrip()}\n\n{new}\n")
    return path


def measured_table(comparison: Comparison, row: Row) -> str:
    """What compare found of one model, as Markdown."""
    full, original = row.summaries["full"], comparison.rows[0].summaries["full"]
    interval = lambda estimate, digits: f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
    rows = [("perplexity", f"{interval(full.perplexity, 3)}; the original {original.perplexity.value:.3f}")]
    if full.kl_mean is not None and full.kl_median is not None and full.agreement is not None:
        rows += [("mean KL divergence, nats", interval(full.kl_mean, 4)), ("median KL divergence", interval(full.kl_median, 5)), ("same most likely token", interval(full.agreement, 3))]
    rows.append(("bits per weight of the whole model", f"{row.size.bits_per_weight:.3f}"))
    lines = ["| | value (95% interval) |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + f"\n\nAgainst the original, {comparison.windows} windows of {comparison.length} tokens of the {comparison.text}, every token scored, float32 (`lowbit compare`)."


def base_of(output: Path) -> str | None:
    """The base model that an output's card names, for a card that is written anew."""
    path = card_path(output, output.is_file())
    found = re.search(r"^base_model: (\S+)$", read_text(path), re.MULTILINE) if path.is_file() else None
    if found:
        return found[1]
    return None
