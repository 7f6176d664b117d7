"""What is in a file: its tensors, their formats and sizes, its config and how it was made; from headers, without reading weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import Checkpoint, LazyQuantized, open_checkpoint, weight_files
from ..checkpoints.safetensors import natural_key
from ..errors import CheckpointError, RecipeError

CHUNK = 1 << 22  # values that are looked at together

# What a summary shows, and what config.json may call it.
_SUMMARY = {
    "layers": ("num_hidden_layers", "n_layer"), "hidden_size": ("hidden_size", "n_embd"), "intermediate_size": ("intermediate_size", "n_inner"),
    "heads": ("num_attention_heads", "n_head"), "kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"), "experts_per_token": ("num_experts_per_tok",),
    "vocabulary": ("vocab_size",), "context": ("max_position_embeddings", "n_positions"), "sliding_window": ("sliding_window",),
    "tied_embeddings": ("tie_word_embeddings",), "dtype": ("dtype", "torch_dtype"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorRow:
    """One tensor, under its Hugging Face name. format: a dtype, a scheme's name or a ggml type. bits_per_weight: with scales, as stored."""

    name: str
    format: str
    shape: tuple[int, ...]
    bits_per_weight: float
    size_bytes: int


@dataclass(frozen=True)
class FormatTotal:
    """All tensors of one format."""

    tensors: int
    weights: int
    size_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds. kind: "safetensors", "compressed-tensors" or "gguf". file_bytes: of all files with weights.

    bits_per_weight: 8 x tensor_bytes / weights. config: the facts that config.json states, by plain names. formats: by format, largest first.
    files: tokenizer and other files beside the weights. provenance: what made it, if it says.
    """

    path: Path
    kind: str
    config: dict
    tensors: tuple[TensorRow, ...]
    formats: dict[str, FormatTotal]
    weights: int
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float
    files: tuple[str, ...] = ()
    provenance: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """The values of one decoded tensor. counts[i] of them lie in edges[i] to edges[i + 1]; nan and infinite values are only in bad_values."""

    name: str
    format: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float
    mean: float
    std: float
    bad_values: int
    counts: tuple[int, ...]
    edges: tuple[float, ...]


def inspect(path: str | Path) -> Inspection:
    """Look into any file that open_checkpoint reads; only headers are read. Raises CheckpointError for one that is missing or damaged."""
    checkpoint = open_checkpoint(Path(path).expanduser())
    rows = tuple(_rows(checkpoint))
    weights, size = sum(_numel(row) for row in rows), sum(row.size_bytes for row in rows)
    return Inspection(
        path=checkpoint.path,
        kind=checkpoint.kind,
        config=summary(checkpoint.config),
        tensors=rows,
        formats=_totals(rows),
        weights=weights,
        tensor_bytes=size,
        file_bytes=sum(file.stat().st_size for file in weight_files(checkpoint.path)),
        bits_per_weight=8 * size / max(1, weights),
        files=tuple(file.name for file in checkpoint.files),
        provenance=checkpoint.provenance,
    )


def tensor_histogram(path: str | Path, name: str, bins: int = 40) -> Histogram:
    """Histogram and moments of one tensor's values, decoded. name: with or without ".weight". std: of the population."""
    if bins < 1:
        raise RecipeError(f"bins is {bins}; expected at least 1.")
    checkpoint = open_checkpoint(Path(path).expanduser())
    name = _find(checkpoint, name)
    low, high, mean, count, bad = _moments(checkpoint, name)
    left, right = (low, high) if low < high else (low - 0.5, high + 0.5)
    counts, squares = torch.zeros(bins, dtype=torch.int64), 0.0
    for values in _chunks(checkpoint, name):
        finite = values[values.isfinite()] if bad else values
        squares += (finite - mean).square().sum(dtype=torch.float64).item()
        counts += torch.histc(finite, bins, left, right).long()
    edges = torch.linspace(left, right, bins + 1, dtype=torch.float64).tolist()
    shown = next(row for row in _rows(checkpoint) if row.name == name)
    return Histogram(name, shown.format, shown.shape, low, high, mean, (squares / count) ** 0.5, bad, tuple(counts.tolist()), tuple(edges))


def _moments(checkpoint: Checkpoint, name: str) -> tuple[float, float, float, int, int]:
    """Minimum, maximum, mean and number of the finite values, and the number of the others."""
    low, high, total, count, bad = float("inf"), float("-inf"), 0.0, 0, 0
    for values in _chunks(checkpoint, name):
        finite = values[values.isfinite()]
        bad += values.numel() - finite.numel()
        if finite.numel():
            low, high = min(low, finite.min().item()), max(high, finite.max().item())
            count, total = count + finite.numel(), total + finite.sum(dtype=torch.float64).item()
    if not count:
        raise CheckpointError(f"{checkpoint.path}: {name} holds no finite value, so there is nothing to draw.")
    return low, high, total / count, count, bad


def summary(config: dict) -> dict:
    """The facts of a config.json by plain names; those that it does not state are left out."""
    inner = config.get("text_config")
    text: dict = inner if isinstance(inner, dict) else {}
    architectures = config.get("architectures")
    found = {"model_type": config.get("model_type"), "architecture": architectures[0] if isinstance(architectures, list) and architectures else None}
    for key, names in _SUMMARY.items():
        found[key] = next((place[name] for place in (text, config) for name in names if place.get(name) is not None), None)
    return {key: value for key, value in found.items() if value is not None}


def _rows(checkpoint: Checkpoint) -> Iterator[TensorRow]:
    for name in sorted(checkpoint.shapes(), key=natural_key):
        entry = checkpoint.quantized.get(name) or checkpoint.tensors[name]
        kind = entry.scheme.name if isinstance(entry, LazyQuantized) else entry.stored_as or str(entry.dtype).removeprefix("torch.")
        shape = tuple(entry.shape)
        yield TensorRow(name, kind, shape, 8 * entry.nbytes / max(1, torch.Size(shape).numel()), entry.nbytes)


def _numel(row: TensorRow) -> int:
    return torch.Size(row.shape).numel()


def _totals(rows: tuple[TensorRow, ...]) -> dict[str, FormatTotal]:
    totals: dict[str, FormatTotal] = {}
    for row in rows:
        old = totals.get(row.format, FormatTotal(0, 0, 0))
        totals[row.format] = FormatTotal(old.tensors + 1, old.weights + _numel(row), old.size_bytes + row.size_bytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1].size_bytes))


def _find(checkpoint: Checkpoint, name: str) -> str:
    known = checkpoint.shapes()
    for candidate in (name, f"{name}.weight"):
        if candidate in known:
            return candidate
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known, key=natural_key)[:3]
    raise CheckpointError(f"{checkpoint.path} holds no tensor {name}. Its tensors are called like {', '.join(near)}.")


def _chunks(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """The values as float32, some rows at a time; a quantized matrix is decoded whole."""
    entry = checkpoint.tensors.get(name)
    if entry is None:
        values = checkpoint.dense(name).reshape(-1)
        for start in range(0, len(values), CHUNK):
            yield values[start : start + CHUNK].float()
        return
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, CHUNK * rows // max(1, entry.numel))
    for start in range(0, rows, step):
        yield entry.read(start, min(start + step, rows)).reshape(-1).float()
