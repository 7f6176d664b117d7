"""Hugging Face folders of safetensors: reading one or many shards lazily, writing shards with an index.

The safetensors library checks header, offsets and sizes when a file is opened; tensors are then copied out of a read-only mapping
(its own reader for torch maps files writable, which a memory limit counts as if they were loaded). Pickled weights (pytorch_model.bin)
are refused, and links that lead out of the folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, RecipeError
from ..scheme import CASTS, Rounding, Scheme
from .checkpoint import Checkpoint, LazyTensor

PROVENANCE = "lowbit.json"
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
SHARD_BYTES = 4_500_000_000
JSON_BYTES, JSON_PARTS, JSON_DEPTH = 64_000_000, 2_000_000, 100  # the largest tokenizer.json has 35 MB and 800,000 parts
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
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
    return tuple(refuse_outside(path / name, path) for name in SIDE_FILES if (path / name).is_file())


def read_provenance(path: Path) -> dict:
    return checked_provenance(read_json(path / PROVENANCE), path / PROVENANCE) if (path / PROVENANCE).is_file() else {}


def checked_provenance(data: dict, where: object) -> dict:
    """Provenance that has objects where lowbit writes them; CheckpointError otherwise."""
    layers = data.get("layers", {})
    parts = {"recipe": data.get("recipe", {}), "layers": layers, **(layers if isinstance(layers, dict) else {})}
    for key, value in parts.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: {key} of the provenance is {value!r}; expected an object.")
    return data


def read_json(path: Path) -> dict:
    """A JSON object from a file, or CheckpointError saying what is wrong with it."""
    return parse_json(read_text(path), path)


def parse_json(text: str, where: object) -> dict:
    """A JSON object of at most JSON_PARTS objects and lists, nested at most JSON_DEPTH deep (Python's own functions recurse); CheckpointError otherwise."""
    if text.count("{") + text.count("[") > JSON_PARTS:
        raise CheckpointError(f"{where} holds more than {JSON_PARTS:,} objects and lists, which no program writes. It is damaged.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} holds a JSON {type(data).__name__}; expected an object.")
    if "\\ud" in text.lower() and not _is_text(data):
        raise CheckpointError(f"{where} holds half of a surrogate pair, which is no character.")
    level: list = [data]
    for _ in range(JSON_DEPTH):
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part) if isinstance(inner, dict | list)]
    if level:
        raise CheckpointError(f"{where} is nested more than {JSON_DEPTH} deep, which no program writes. It is damaged.")
    return data


def _is_text(data: dict) -> bool:
    try:
        return bool(json.dumps(data, ensure_ascii=False).encode())
    except (UnicodeEncodeError, RecursionError):
        return False


def read_text(path: Path) -> str:
    """A text file of a model folder: UTF-8, at most JSON_BYTES. CheckpointError for one that is missing, no plain file, or outside of its folder."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. A model folder holds config.json, the weights as .safetensors and a tokenizer.")
    if not path.is_file() or path.stat().st_size > JSON_BYTES:
        what = f"has {path.stat().st_size:,} bytes; expected at most {JSON_BYTES:,}" if path.is_file() else "is no file"
        raise CheckpointError(f"{path} {what}.")
    try:
        return refuse_outside(path, path.parent).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from error


def refuse_outside(file: Path, folder: Path) -> Path:
    """The file itself; CheckpointError for a link that leads out of the model's folder (in the hub's cache links lead to its blobs)."""
    home, real = folder.resolve(), file.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{file} is a link that leads out of the folder, to {real}. Refused: put the file itself there.")
    return file


def quant_method(config: dict, path: Path) -> str | None:
    """What a config.json says that its model is quantized with; None: it is not. Raises CheckpointError for a section that does not say it."""
    section = config.get("quantization_config")
    if section is None or section == {}:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {section!r}; expected an object.")
    if not isinstance(section.get("quant_method"), str):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config has the quant_method {section.get('quant_method')!r}; expected the name of a method.")
    return section["quant_method"]


def open_tensors(path: Path, variant: str = "") -> dict[str, LazyTensor]:
    """All tensors of a folder's shards, lazily, by name. variant: in transformers' sense, of the weights' file names."""
    tensors: dict[str, LazyTensor] = {}
    for shard, names in _shards(path, variant).items():
        stored = open_file(shard)
        missing = set(names or ()) - set(stored)
        if missing:
            raise CheckpointError(f"{shard}: the index lists {sorted(missing)[0]!r} in this shard, which does not hold it. The download is incomplete or mixed up.")
        tensors.update({name: stored[name] for name in names or stored})
    return tensors


def weight_names(variant: str = "") -> tuple[str, str]:
    """The name of a folder's only weights file, and of the index of several, as transformers names them."""
    mark = f".{variant}" if variant else ""
    return f"model{mark}.safetensors", f"model.safetensors.index{mark}.json"


def _shards(path: Path, variant: str) -> Mapping[Path, list[str] | None]:
    single, index = (path / name for name in weight_names(variant))
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: expected an object weight_map from tensor names to file names.")
        shards: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(inside(path, file), []).append(name)
        return shards
    if single.is_file():
        return {refuse_outside(single, path): None}
    others = sorted(p.name for p in path.glob("*.safetensors"))
    pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
    if others:
        raise CheckpointError(f"{path} holds {', '.join(others[:3])} but no {single.name} and no {index.name}.")
    if pickles:
        raise CheckpointError(f"{path} holds its weights as pickles ({pickles[0]}), which lowbit never loads: a pickle can run any code. Save it as safetensors first (save_pretrained).")
    raise CheckpointError(f"{path} holds no weights: expected {single.name}, or shards with {index.name}.")


def inside(folder: Path, name: str) -> Path:
    """folder/name, refused when it points outside the folder."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: the index names the file {name!r}, which points outside the folder. Refused.")
    target = folder / name
    if not target.is_file():
        raise CheckpointError(f"{target} does not exist, but the index lists it. The download is incomplete.")
    return refuse_outside(target, folder)


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, lazily, in the order of their names; CheckpointError for a damaged file or an unknown dtype."""
    try:
        with safe_open(path, framework="np"):  # raises on anything odd in the header
            pass
        data = np.memmap(path, dtype=np.uint8, mode="r")
        first = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = _header(data[8:first].tobytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({os.path.getsize(path):,} bytes): {error}. Download or copy it again.") from error
    return {name: _lazy(data[first:], header[name], name, path) for name in sorted(header)}


def _header(text: bytes) -> dict[str, dict]:
    """The entries of a header by name; ValueError for what the library lets pass."""
    pairs = [(name, entry) for name, entry in json.loads(text, object_pairs_hook=tuple) if name != "__metadata__"]
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"the tensor {twice[0]!r} is there twice")
    if odd := [name for name, entry in pairs if not isinstance(entry, tuple)]:
        raise ValueError(f"the entry of {odd[0]!r} is no object")
    return {name: dict(entry) for name, entry in pairs}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors, __metadata__, of all shards of a folder together."""
    found: dict[str, str] = {}
    for shard in _shards(path, ""):
        try:
            with safe_open(shard, framework="np") as file:
                found.update(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is not a whole safetensors file: {error}. Download or copy it again.") from error
    return found


def _lazy(data: np.ndarray, entry: dict, name: str, path: Path) -> LazyTensor:
    """data: the file behind its header, uint8, mapped. entry: what the header says of this tensor."""
    shape, dtype, (begin, end) = tuple(entry["shape"]), _DTYPES.get(entry["dtype"]), entry["data_offsets"]
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which lowbit does not read.")
    if max(shape, default=0) >= 1 << 63:  # beside a zero anything else adds up
        raise CheckpointError(f"{path}: tensor {name!r} has the shape {list(shape)}. It is damaged.")
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

    def __init__(self, folder: Path, *, entries: int, max_bytes: int | None = None, variant: str = "", metadata: Mapping[str, str] | None = None) -> None:
        self.folder, self.max_bytes, self.variant = folder, SHARD_BYTES if max_bytes is None else max_bytes, variant
        self._metadata = {"format": "pt", **(metadata or {})}
        self._room = min(1 << 20, -(-(1024 + 256 * entries) // 8) * 8) + -(-len(json.dumps({"__metadata__": self._metadata})) // 8) * 8
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
        file = self._file or self._start_shard(entry)
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

    def _start_shard(self, entry: int = 0) -> BinaryIO:
        """entry: bytes of the first tensor's place in the header."""
        path = self.folder / f"shard-{len(self._shards):05d}.tmp"
        self._file = open(path, "wb")  # noqa: SIM115  (open until the shard is full)
        self._room = max(self._room, -(-(256 + entry) // 8) * 8)
        self._file.seek(8 + self._room)
        self._header: dict[str, dict] = {"__metadata__": dict(self._metadata)}
        self._odd: list[tuple[str, Tensor | LazyTensor]] = []
        self._header_bytes, self._offset, self._written = 256 + len(json.dumps(self._header)), 0, 0
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
        single, index_name = weight_names(self.variant)
        for number, (path, names) in enumerate(self._shards, start=1):
            final = single if count == 1 else f"{single.removesuffix('.safetensors')}-{number:05d}-of-{count:05d}.safetensors"
            os.replace(path, self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_text(self.folder / index_name, json.dumps(index, indent=2, sort_keys=True) + "\n")


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
        shutil.copyfile(file, folder / file.name)


def write_packed(
    checkpoint: Checkpoint,
    folder: Path,
    stored: Callable[[str], Mapping[str, Tensor | LazyTensor]],
    section: dict | None,
    *,
    entries: int,
    shard_bytes: int | None,
    progress: Callable[[int], None],
    variant: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a folder whose quantized matrices are several tensors each: stored(name) gives them, section is config.json's quantization_config, entries how many a matrix has.

    Tensors are streamed by name in natural order.
    """
    packed = sum(entry.scheme.format not in CASTS for entry in checkpoint.quantized.values())  # a cast is one tensor
    with ShardWriter(folder, entries=len(checkpoint.shapes()) + (entries - 1) * packed, max_bytes=shard_bytes, variant=variant, metadata=metadata) as writer:
        for name in sorted([*checkpoint.tensors, *checkpoint.quantized], key=natural_key):
            for key, tensor in ({name: checkpoint.tensors[name]} if name in checkpoint.tensors else stored(name)).items():
                progress(writer.add(key, tensor))
    _write_side_files(checkpoint, folder, section)


def require_quantized(checkpoint: Checkpoint, target: str) -> None:
    """RecipeError where nothing is quantized, for layouts that say of every linear layer that it is."""
    if not checkpoint.quantized:
        raise RecipeError(f"{target} says of all linear layers that they are quantized, and nothing in this checkpoint is. Quantize it first, or use --to safetensors.")


def one_scheme(checkpoint: Checkpoint, target: str) -> Scheme:
    """The scheme of all quantized matrices; RecipeError where there are several, for layouts that hold one."""
    require_quantized(checkpoint, target)
    schemes = {entry.scheme for entry in checkpoint.quantized.values()}
    if len(schemes) != 1:
        names = ", ".join(sorted(scheme.name for scheme in schemes))
        raise RecipeError(f"{target} holds one scheme for all layers, and this has {len(schemes)}: {names}. Use --to compressed-tensors or --to lowbit for mixtures.")
    return schemes.pop()


def dense_linears(checkpoint: Checkpoint) -> list[str]:
    """Modules with a matrix that stays dense, without embeddings; a head that is tied to the embedding has no tensor, yet is a linear."""
    dense = [name for name, entry in checkpoint.quantized.items() if entry.scheme.format in CASTS]
    dense += [name for name, tensor in checkpoint.tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2]
    modules = {name.removesuffix(".weight") for name in dense}
    if "lm_head.weight" not in checkpoint.quantized:
        modules.add("lm_head")
    return sorted((module for module in modules if not _is_embedding(module)), key=natural_key)


def _is_embedding(module: str) -> bool:
    leaf = module.rpartition(".")[2]
    return "embed" in leaf or leaf in ("wte", "wpe")


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

    folder must exist and be empty. Tensors are streamed by name in natural order. shard_bytes: of a file at most (None: SHARD_BYTES). progress is told the bytes written by each step.
    """
    with ShardWriter(folder, entries=len(checkpoint.tensors) + len(checkpoint.quantized), max_bytes=shard_bytes) as writer:
        for name in sorted([*checkpoint.tensors, *checkpoint.quantized], key=natural_key):
            progress(writer.add(name, checkpoint.lazy(name) if name in checkpoint.tensors else checkpoint.dense(name)))
    _write_side_files(checkpoint, folder, None)
