"""Importance matrices of llama.cpp: sums of squares of each matrix's input channels, in GGUF or in the older form (.dat).

A GGUF holds two float32 tensors for each matrix (or stack of experts) NAME, of which the importance is in_sum2 / counts:

    NAME.in_sum2 [matrices, in_features]    NAME.counts [matrices, 1]    (other suffixes are left alone)
    general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size (tokens of a chunk)

The older form is a stream of int32, float32 and bytes, little-endian; values are the importance times the calls:

    entries | entries times: name length, name, calls, values, float32 [values] | chunks, length, name of the text

Source: common/imatrix-loader.cpp and tools/imatrix of llama.cpp. Names are those of GGUF; of_model gives a model's weights theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..stats import LayerStats
from . import gguf_arch
from .gguf_container import Header, Planned, pack_value, read_header, write_file
from .safetensors import sync

_SUMS, _COUNTS = ".in_sum2", ".counts"
MOST_BYTES = 4_000_000_000  # of a file: a float for each input of each expert of each layer


@dataclass(frozen=True)
class Entry:
    """Of one matrix, or of a stack of experts. sums: of squares over tokens, float32 [matrices, in_features]. counts: tokens, float32 [matrices] (older form: calls, [1] for all)."""

    sums: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Imatrix:
    """entries by GGUF name. datasets: the texts. chunks, chunk_size: windows of text and tokens of each (0: not said)."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix of either form. Raises CheckpointError for a damaged file, NaN, infinity and negative values."""
    if path.exists() and (not path.is_file() or path.stat().st_size > MOST_BYTES):
        raise CheckpointError(f"{path} {f'has {path.stat().st_size:,} bytes; expected at most {MOST_BYTES:,}' if path.is_file() else 'is no file'}.")
    try:
        with open(path, "rb") as file:
            old = file.read(4) != b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.") from error
    found = _read_old(path) if old else _read_gguf(path)
    for name, entry in found.entries.items():
        values = torch.cat([entry.sums.flatten(), entry.counts])
        if not bool(torch.isfinite(values).all()) or float(values.min()) < 0:
            raise CheckpointError(f"{path}: the importance of {name} holds NaN, infinite or negative values; sums of squares are none of these. Make the file again.")
    return found


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    if header.get("general.type") != "imatrix":
        raise CheckpointError(f"{path} is a GGUF of type {header.get('general.type')!r}; expected an importance matrix (llama-imatrix, lowbit imatrix).")
    entries = {}
    for name in sorted(tensor.removesuffix(_SUMS) for tensor in header.tensors if tensor.endswith(_SUMS)):
        if name + _COUNTS not in header.tensors:
            raise CheckpointError(f"{path}: {name}{_SUMS} is there and {name}{_COUNTS} is not.")
        sums, counts = _floats(header, name + _SUMS), _floats(header, name + _COUNTS)
        if len(sums) % len(counts):
            raise CheckpointError(f"{path}: {name} has {len(sums)} sums, which its {len(counts)} counts do not divide.")
        entries[name] = Entry(sums.view(len(counts), -1), counts)
    if not entries:
        raise CheckpointError(f"{path} holds no importance (no tensor NAME{_SUMS}).")
    datasets = header.get("imatrix.datasets", [])
    numbers = [header.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size")]
    if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: imatrix.datasets, chunk_count or chunk_size is of the wrong kind ({datasets!r:.80}, {numbers}).")
    return Imatrix(entries, tuple(datasets), *numbers)


def _floats(header: Header, name: str) -> Tensor:
    info = header.tensors[name]
    if info.type_id != 0:
        raise CheckpointError(f"{header.path}: {name} is of ggml type {info.type_id}; expected float32.")
    return torch.from_numpy(np.array(info.rows).reshape(-1).view(np.float32))


def _read_old(path: Path) -> Imatrix:
    data = path.read_bytes()
    position = 0

    def take(size: int, what: str) -> bytes:
        nonlocal position
        if size < 0 or size > len(data) - position:
            raise CheckpointError(f"{path}: {what} of {size:,} bytes is announced at byte {position:,}, and the file has {len(data):,}. It is no importance matrix, or damaged.")
        position += size
        return data[position - size : position]

    def number(what: str, least: int = 0) -> int:
        value = int.from_bytes(take(4, what), "little", signed=True)
        if value < least:
            raise CheckpointError(f"{path}: {what} is {value} at byte {position - 4:,}; expected at least {least}. It is no importance matrix, or damaged.")
        return value

    def text(what: str) -> str:
        try:
            return take(number(f"the length of {what}"), what).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: {what} before byte {position:,} is not UTF-8 text: {error}.") from error

    entries: dict[str, Entry] = {}
    for _ in range(number("the number of entries", 1)):
        name, calls = text("a name"), number("the number of calls")
        values = torch.from_numpy(np.frombuffer(take(4 * number("the number of values", 1), "values"), "<f4").astype(np.float32))
        if name in entries:
            raise CheckpointError(f"{path}: {name} is there twice.")
        entries[name] = Entry(values.view(1, -1), torch.tensor([max(calls, 1)], dtype=torch.float32))
    if position == len(data):
        return Imatrix(entries)
    chunks = number("the number of chunks")
    return Imatrix(entries, (text("the name of the text"),) if position < len(data) else (), chunks)


def write_imatrix(imatrix: Imatrix, path: Path, *, old: bool = False) -> None:
    """Write an importance matrix that llama-quantize reads, as GGUF or in the older form, through a temporary sibling."""
    if not old:
        _write_gguf(imatrix, path)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(b"".join(_old(imatrix)))
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_gguf(imatrix: Imatrix, path: Path) -> None:
    values = {
        "general.type": ("string", "imatrix"),
        "imatrix.datasets": ("string[]", list(imatrix.datasets)),
        "imatrix.chunk_count": ("u32", imatrix.chunks),
        "imatrix.chunk_size": ("u32", imatrix.chunk_size),
    }
    tensors = {}
    for name, entry in sorted(imatrix.entries.items()):
        tensors[name + _SUMS], tensors[name + _COUNTS] = entry.sums, entry.counts.view(-1, 1)
    planned = [Planned(name, 0, tuple(tensor.shape), (tensor.contiguous,)) for name, tensor in tensors.items()]
    write_file(path, {key: pack_value(kind, value) for key, (kind, value) in values.items()}, planned)


def _old(imatrix: Imatrix) -> Iterable[bytes]:
    """Calls are chunks that hold the tokens; an expert without any has the importance 1, as llama-imatrix writes it."""
    ints = lambda *values: np.array(values, "<i4").tobytes()
    text = lambda value: ints(len(value.encode())) + value.encode()
    yield ints(len(imatrix.entries))
    for name, entry in sorted(imatrix.entries.items()):
        calls = max(1, -(-int(entry.counts.max()) // max(1, imatrix.chunk_size)))
        counts = entry.counts.view(-1, 1)
        mean = torch.where(counts > 0, entry.sums / counts.clamp(min=1), 1.0)
        yield text(name) + ints(calls, mean.numel()) + (mean * calls).contiguous().numpy().astype("<f4").tobytes()
    yield ints(imatrix.chunks) + text(imatrix.datasets[-1] if imatrix.datasets else "")


def of_model(imatrix: Imatrix, config: dict, shapes: Mapping[str, tuple[int, int]]) -> dict[str, LayerStats]:
    """The statistics of a model's weights, by Hugging Face name; a weight that the file does not hold has none.

    config: of the model. shapes: of its matrices [out_features, in_features]. Of an expert without tokens n_tokens is 0.
    Raises CheckpointError where lengths do not fit, and for a file of another model.
    """
    arch = gguf_arch.find(config)
    places = {name: place for name in shapes if (place := gguf_arch.place(arch, name)) is not None and place.name in imatrix.entries}
    if not places:
        raise CheckpointError(f"the importance matrix holds none of this model's weights; it has {', '.join(list(imatrix.entries)[:3])}. It belongs to another model.")
    experts = {name: 1 + max((other.expert or 0) for other in places.values() if other.name == place.name) for name, place in places.items()}
    found = {}
    for name, place in places.items():
        entry, columns, count = imatrix.entries[place.name], shapes[name][1], experts[name]
        if entry.sums.numel() != columns * count or len(entry.counts) not in (1, count):
            raise CheckpointError(
                f"the importance of {place.name} has {entry.sums.numel()} values in {len(entry.counts)} parts; this model's {name} needs {count} of {columns}. It belongs to another model."
            )
        own = place.expert or 0
        found[name] = LayerStats(n_tokens=round(float(entry.counts[own if len(entry.counts) > 1 else 0])), sum_sq=entry.sums.view(count, columns)[own])
    return found


def from_stats(stats: Mapping[str, LayerStats], config: dict, columns: Mapping[str, int]) -> dict[str, Entry]:
    """The inverse of of_model: entries of a model's weights; columns: in_features of each, for those without statistics."""
    arch = gguf_arch.find(config)
    stacks: dict[str, dict[int, str]] = {}
    for name in stats:
        place = gguf_arch.place(arch, name)
        if place is not None:
            stacks.setdefault(place.name, {})[place.expert or 0] = name
    entries = {}
    for place_name, members in stacks.items():
        ordered = [members[expert] for expert in sorted(members)]
        sums = torch.zeros(len(ordered), columns[ordered[0]])
        for row, name in zip(sums, ordered, strict=True):
            total = stats[name].sum_sq
            if total is not None:
                row.copy_(total)
        entries[place_name] = Entry(sums, torch.tensor([float(stats[name].n_tokens) for name in ordered]))
    return entries
