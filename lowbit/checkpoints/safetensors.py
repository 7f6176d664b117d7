"""Hugging Face folders of safetensors: reading one or many shards lazily, writing shards with an index.

The safetensors library checks header, offsets and sizes when a file is opened; tensors are then copied out of a read-only mapping
(its own reader for torch maps files writable, which a memory limit counts as if they were loaded). Pickled weights (pytorch_model.bin)
are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, RecipeError
from ..scheme import Rounding
from .checkpoint import Checkpoint, LazyTensor

PROVENANCE = "lowbit.json"
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
SHARD_BYTES = 4_500_000_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_folder(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors weights (dense)."""
    config = read_json(path / "config.json")
    provenance = read_provenance(path)
    return Checkpoint("safetensors", path, config, tensors=open_tensors(path), files=side_files(path), provenance=provenance, activations=_activations(provenance, path))


def _activations(provenance: dict, path: Path) -> dict[str, Rounding]:
    """How a result of lowbit rounds activations, as its provenance says."""
    layers = provenance.get("layers")
    entries = {name: layer["activation"] for name, layer in layers.items() if isinstance(layer, dict) and "activation" in layer} if isinstance(layers, dict) else {}
    try:
        return {name: Rounding.from_dict(entry) for name, entry in entries.items()}
    except RecipeError as error:
        raise CheckpointError(f"{path / PROVENANCE}: {error}") from error


def side_files(path: Path) -> tuple[Path, ...]:
    """Tokenizer, chat template and generation files of a model folder."""
    return tuple(path / name for name in SIDE_FILES if (path / name).is_file())


def read_provenance(path: Path) -> dict:
    return read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else {}


def read_json(path: Path) -> dict:
    """A JSON object from a file, or CheckpointError saying what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. A model folder holds config.json, the weights as .safetensors and a tokenizer.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}; expected an object.")
    return data


def quant_method(config: dict, path: Path) -> str | None:
    """What a config.json says that its model is quantized with; None: it is not. Raises CheckpointError for a section that is no object."""
    section = config.get("quantization_config") or {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {section!r}; expected an object.")
    return section.get("quant_method")


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a folder's shards, lazily, by name."""
    tensors: dict[str, LazyTensor] = {}
    for shard, names in _shards(path).items():
        stored = open_file(shard)
        missing = set(names or ()) - set(stored)
        if missing:
            raise CheckpointError(f"{shard}: the index lists {sorted(missing)[0]!r} in this shard, which does not hold it. The download is incomplete or mixed up.")
        tensors.update({name: stored[name] for name in names or stored})
    return tensors


def _shards(path: Path) -> Mapping[Path, list[str] | None]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: expected an object weight_map from tensor names to file names.")
        shards: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(inside(path, file), []).append(name)
        return shards
    if single.is_file():
        return {single: None}
    others = sorted(p.name for p in path.glob("*.safetensors"))
    pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
    if others:
        raise CheckpointError(f"{path} holds {', '.join(others[:3])} but no model.safetensors and no model.safetensors.index.json.")
    if pickles:
        raise CheckpointError(f"{path} holds its weights as pickles ({pickles[0]}), which lowbit never loads: a pickle can run any code. Save it as safetensors first (save_pretrained).")
    raise CheckpointError(f"{path} holds no weights: expected model.safetensors, or shards with model.safetensors.index.json.")


def inside(folder: Path, name: str) -> Path:
    """folder/name, refused when it points outside the folder."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: the index names the file {name!r}, which points outside the folder. Refused.")
    target = folder / name
    # A link inside a hub cache points to its blobs folder: that is how the cache is made, so only the name is judged.
    if not target.is_file():
        raise CheckpointError(f"{target} does not exist, but the index lists it. The download is incomplete.")
    return target


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, lazily, in the order of their names; CheckpointError for a damaged file or an unknown dtype."""
    try:
        with safe_open(path, framework="np"):  # raises on anything odd in the header
            pass
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({os.path.getsize(path):,} bytes): {error}. Download or copy it again.") from error
    first = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:first].tobytes())
    return {name: _lazy(data[first:], header[name], name, path) for name in sorted(header) if name != "__metadata__"}


def _lazy(data: np.ndarray, entry: dict, name: str, path: Path) -> LazyTensor:
    """data: the file behind its header, uint8, mapped. entry: what the header says of this tensor."""
    shape, dtype, (begin, end) = tuple(entry["shape"]), _DTYPES.get(entry["dtype"]), entry["data_offsets"]
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which lowbit does not read.")
    row = (end - begin) // shape[0] if shape and shape[0] else end - begin

    def read(start: int, stop: int) -> Tensor:
        start, stop = (min(max(0, start), shape[0]), min(stop, shape[0])) if shape else (0, 1)
        values = np.array(data[begin + start * row : begin + max(start, stop) * row])
        wanted = (max(0, stop - start), *shape[1:]) if shape else ()
        return torch.from_numpy(values).view(dtype).view(wanted) if values.size else torch.empty(wanted, dtype=dtype)

    return LazyTensor(shape, dtype, read)


class ShardWriter:
    """Streams tensors in the order given into shards of at most max_bytes, then writes the index; of lazy ones only some rows are held.

    A header stands before the data and is known only after it, so room for it is kept free: entries is the number of tensors to
    expect (an estimate; a full header only begins a new shard). Nothing has its final name before close(). Same tensors, same bytes.
    """

    def __init__(self, folder: Path, *, entries: int, max_bytes: int | None = None) -> None:
        self.folder, self.max_bytes = folder, SHARD_BYTES if max_bytes is None else max_bytes
        self._room = min(1 << 20, -(-(1024 + 256 * entries) // 8) * 8)
        self._file: BinaryIO | None = None
        self._shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """close(), or after an error only let go of the file: its name stays temporary."""
        if error is None:
            self.close()
        elif self._file:
            self._file.close()

    def add(self, name: str, tensor: Tensor | LazyTensor) -> int:
        """Append one tensor; returns its bytes."""
        size = tensor.numel * tensor.dtype.itemsize if isinstance(tensor, LazyTensor) else tensor.nbytes
        entry = len(json.dumps(name)) + 160
        if self._file and (self._offset + size > self.max_bytes or self._header_bytes + entry > self._room):
            self._finish_shard(self._file)
        file = self._file or self._start_shard()
        self._header_bytes += entry
        self.total_bytes += size
        if size % 8:  # readers want every tensor aligned to its dtype and the format allows no holes: odd sizes go last
            self._odd.append((name, tensor))
        else:
            self._write(file, name, tensor)
        self._offset += size
        return size

    def _write(self, file: BinaryIO, name: str, tensor: Tensor | LazyTensor) -> None:
        begin = self._written
        for part in tensor.chunks() if isinstance(tensor, LazyTensor) else [tensor] if tensor.numel() else []:
            file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._written += part.nbytes
        self._header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, self._written]}

    def _start_shard(self) -> BinaryIO:
        path = self.folder / f"shard-{len(self._shards):05d}.tmp"
        self._file = open(path, "wb")  # noqa: SIM115  (open until the shard is full)
        self._file.seek(8 + self._room)
        self._header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._odd: list[tuple[str, Tensor | LazyTensor]] = []
        self._header_bytes, self._offset, self._written = 256, 0, 0
        return self._file

    def _finish_shard(self, file: BinaryIO) -> None:
        for name, data in sorted(self._odd, key=lambda item: -item[1].dtype.itemsize):
            self._write(file, name, data)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        file.seek(0)
        file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._shards.append((Path(file.name), [name for name in self._header if name != "__metadata__"]))
        self._file = None

    def close(self) -> None:
        """Finish the last shard, give every file its final name and write the index if there is more than one."""
        if self._file or not self._shards:
            self._finish_shard(self._file or self._start_shard())
        count, weight_map = len(self._shards), {}
        for number, (path, names) in enumerate(self._shards, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(path, self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_text(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: to a sibling, synced, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Make sure that a file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy tokenizer, template and generation files beside the weights."""
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())


def write_packed(
    checkpoint: Checkpoint,
    folder: Path,
    stored: Callable[[str], Mapping[str, Tensor | LazyTensor]],
    section: dict | None,
    *,
    entries: int,
    shard_bytes: int | None,
    progress: Callable[[int], None],
) -> None:
    """Write a folder whose quantized matrices are several tensors each: stored(name) gives them, section is config.json's quantization_config, entries how many a matrix has.

    Tensors are streamed by name in natural order.
    """
    with ShardWriter(folder, entries=len(checkpoint.tensors) + entries * len(checkpoint.quantized), max_bytes=shard_bytes) as writer:
        for name in sorted([*checkpoint.tensors, *checkpoint.quantized], key=natural_key):
            for key, tensor in ({name: checkpoint.tensors[name]} if name in checkpoint.tensors else stored(name)).items():
                progress(writer.add(key, tensor))
    _write_side_files(checkpoint, folder, section)


def natural_key(name: str) -> str:
    """Sorts layers.2 before layers.10."""
    return re.sub(r"\d+", lambda digits: digits.group().zfill(8), name)


def _write_side_files(checkpoint: Checkpoint, folder: Path, section: dict | None) -> None:
    """config.json, tokenizer and provenance."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if section is not None:
        config["quantization_config"] = section
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    copy_files(checkpoint.files, folder)
    provenance = checkpoint.provenance
    if section is None and checkpoint.activations:  # dense weights say nothing of it: the provenance does
        layers = provenance.get("layers", {})
        provenance = {**provenance, "layers": {**layers, **{name: {**layers.get(name, {}), "activation": rounding.to_dict()} for name, rounding in checkpoint.activations.items()}}}
    write_text(folder / PROVENANCE, json.dumps(provenance, indent=2) + "\n")


def write_folder(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write every weight dense, as a plain Hugging Face folder that any program loads; quantized weights are decoded to their own dtype.

    folder must exist and be empty. shard_bytes: of a file at most (None: SHARD_BYTES). progress is told the bytes written by each step.
    """
    with ShardWriter(folder, entries=len(checkpoint.tensors) + len(checkpoint.quantized), max_bytes=shard_bytes) as writer:
        for name in (*checkpoint.tensors, *checkpoint.quantized):
            progress(writer.add(name, checkpoint.lazy(name) if name in checkpoint.tensors else checkpoint.dense(name)))
    _write_side_files(checkpoint, folder, None)
