"""The container of GGUF files, version 3: its header, read and written; what the tensors mean is in gguf.py.

    "GGUF"  u32 version  u64 n_tensors  u64 n_kv
    n_kv times       string key, u32 type, value          string: u64 bytes, UTF-8; array: u32 type, u64 count, values
    n_tensors times  string name, u32 n_dims, u64 dims (fastest first), u32 ggml type, u64 offset
    zeros up to general.alignment (32), then the tensors, each padded to it

A model may lie in several files, NAME-00001-of-0000N.gguf: the first has the metadata, each says split.no (from 0), split.count and
split.tensors.count (of all together).

Files are memory-mapped; the header is checked against the file's size before anything is read by it. Metadata is kept as the bytes
in the file and decoded when asked for, so that copying it changes nothing. Specification: ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, RecipeError
from ..numerics.ggml import BLOCK_TYPES

_MAGIC = b"GGUF"
_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MOST_PARTS = 65_535  # split.count is u16
HEADER_BYTES, STRINGS = 1 << 27, 1 << 22  # of a header and of an array in it; 260,000 tokens with 510,000 merges take 16 MB
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPE_IDS = {"u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": _STRING}


@dataclass(frozen=True)
class StoredType:
    """A tensor type of ggml: its name, the elements of a block, and its bytes."""

    name: str
    block_size: int
    block_bytes: int


# By ggml's number.
STORED_TYPES: dict[int, StoredType] = {
    0: StoredType("f32", 1, 4), 1: StoredType("f16", 1, 2), 30: StoredType("bf16", 1, 2), 28: StoredType("f64", 1, 8),
    24: StoredType("i8", 1, 1), 25: StoredType("i16", 1, 2), 26: StoredType("i32", 1, 4), 27: StoredType("i64", 1, 8),
    **{kind.type_id: StoredType(kind.name, kind.block_size, kind.block_bytes) for kind in BLOCK_TYPES.values()},
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. shape: in torch's order. rows: its bytes, uint8 [first axis (or all rows of a stack), row bytes], memory-mapped."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    rows: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.rows.size


@dataclass(frozen=True)
class Planned:
    """One tensor to write. shape: in torch's order. load gives its bytes in pieces (one per expert of a stack)."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    load: tuple[Callable[[], Tensor], ...]

    @property
    def nbytes(self) -> int:
        kind = STORED_TYPES[self.type_id]
        return math.prod(self.shape) // kind.block_size * kind.block_bytes


@dataclass(frozen=True)
class Header:
    """A GGUF file without its weights. raw: each key's type and value as bytes of the file."""

    path: Path
    raw: Mapping[str, bytes]
    tensors: Mapping[str, TensorInfo]

    def get(self, key: str, default=None):
        """The value of a key, decoded."""
        if key not in self.raw:
            return default
        try:
            return decode_value(self.raw[key])
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: the metadata {key} is not UTF-8 text: {error}.") from error


class Metadata(Mapping):
    """A header's metadata as a mapping that decodes on demand."""

    def __init__(self, header: Header) -> None:
        self._header = header

    def __getitem__(self, key: str):
        if key not in self._header.raw:
            raise KeyError(key)
        return self._header.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.raw)

    def __len__(self) -> int:
        return len(self._header.raw)


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; the parts of a split file become one, whichever is named. Raises CheckpointError for a damaged file."""
    files = parts_of(path)
    if not _PART.fullmatch(path.name):
        header = _read_part(path)
        if (header.get("split.count") or 1) != 1:
            raise CheckpointError(f"{path} is one part of {header.get('split.count')}; give the parts their names back (NAME-00001-of-0000N.gguf).")
        return header
    if path not in files:
        raise CheckpointError(f"{path}: there is no such part of {len(files)} files; the parts of a split GGUF are called NAME-00001-of-0000N.gguf, ..., NAME-0000N-of-0000N.gguf.")
    parts = [_read_part(file) for file in files]
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for key, named in (("split.no", number), ("split.count", len(parts))):
            said = part.get(key)
            if said is not None and said != named and not (len(parts) == 1 and said == 0):
                raise CheckpointError(f"{part.path}: {key} is {said!r}, and by its name it would be {named}. The parts do not belong together, or were renamed.")
    for part in parts:
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(f"{part.path}: tensor {min(twice)!r} is in an earlier part of the split file too.")
        tensors.update(part.tensors)
    expected = parts[0].get("split.tensors.count")
    if expected is not None and expected != len(tensors):
        raise CheckpointError(f"{path}: the parts of the split file hold {len(tensors)} tensors together; the first one says {expected}.")
    return Header(parts[0].path, parts[0].raw, tensors)


def parts_of(path: Path) -> list[Path]:
    """The files of a model in GGUF, by any of them: path itself, or of a split one all parts in order (whether they are there or not)."""
    match = _PART.fullmatch(path.name)
    return [path] if not match else [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]


def _read_part(path: Path) -> Header:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path} has {size} bytes; a GGUF file begins with 24. The download is incomplete.")
    data = np.memmap(path, mode="r", dtype=np.uint8)
    try:
        return _parse(path, data)
    except (struct.error, OverflowError) as error:
        raise CheckpointError(f"{path} ends in the middle of its header ({size:,} bytes). The download is incomplete.") from error


def _parse(path: Path, data: np.ndarray) -> Header:
    view = data.data
    if bytes(view[:4]) != _MAGIC:
        raise CheckpointError(f"{path} does not begin with GGUF but with {bytes(view[:4])!r}; it is not a GGUF file.")
    version, n_tensors, n_values = struct.unpack_from("<IQQ", view, 4)
    if version not in (2, 3):
        big = version & 0xFFFF == 0
        raise CheckpointError(f"{path} is {'a big-endian GGUF' if big else f'GGUF version {version}'}; little-endian files of version 2 and 3 are read.")
    if 13 * n_values + 25 * n_tensors > len(data):
        raise CheckpointError(f"{path} says it has {n_tensors:,} tensors and {n_values:,} metadata values, more than {len(data):,} bytes can hold. It is damaged.")
    cursor = _Cursor(path, view[:HEADER_BYTES], 24)
    raw = {}
    for _ in range(n_values):
        key, value = cursor.text(), cursor.value()
        if key in raw:
            raise CheckpointError(f"{path}: the metadata {key!r} is there twice.")
        raw[key] = value
    infos = [cursor.tensor() for _ in range(n_tensors)]
    header = Header(path, raw, {})
    alignment = header.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}; expected a power of two.")
    tensors = _place(path, data, infos, start=-(-cursor.position // alignment) * alignment, alignment=alignment)
    return Header(path, raw, tensors)


class _Cursor:
    """Reads a header front to back, never beyond the file."""

    def __init__(self, path: Path, view: memoryview, position: int) -> None:
        self.path, self.view, self.position = path, view, position

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.view, self.position)
        self.position += struct.calcsize(code)
        return value

    def skip(self, size: int) -> None:
        if size > len(self.view) - self.position:
            end = f"the file ends at {len(self.view):,}" if len(self.view) < HEADER_BYTES else f"a header has at most {HEADER_BYTES:,}"
            raise CheckpointError(f"{self.path}: {size:,} bytes are announced at byte {self.position:,} and {end}. It is truncated or damaged.")
        self.position += size

    def text(self) -> str:
        size = self.number("Q")
        start = self.position
        self.skip(size)
        try:
            return str(self.view[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a name at byte {start:,} is not UTF-8 text: {error}.") from error

    def value(self) -> bytes:
        """A value with its type, as bytes."""
        start = self.position
        kind = self.number("I")
        if kind == _ARRAY:
            self._skip_array()
        elif kind == _STRING:
            self.skip(self.number("Q"))
        else:
            self.skip(self._size(kind))
        return bytes(self.view[start : self.position])

    def _size(self, kind: int) -> int:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: unknown type {kind} of metadata at byte {self.position:,}.")
        return struct.calcsize(_SCALARS[kind])

    def _skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind != _STRING:
            self.skip(count * self._size(kind))
            return
        if 8 * count > len(self.view) - self.position or count > STRINGS:
            raise CheckpointError(f"{self.path}: an array of {count:,} strings is announced at byte {self.position:,}, more than the file can hold. It is damaged.")
        view, position, length = self.view, self.position, struct.Struct("<Q").unpack_from
        for _ in range(count):
            position += 8 + length(view, position)[0]
        self.position = position
        self.skip(0) if position <= len(view) else self._beyond()

    def _beyond(self) -> None:
        raise CheckpointError(f"{self.path}: a string of the metadata reaches beyond the end of the file. It is truncated or damaged.")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape in torch's order, ggml type and offset."""
        name, n_dims = self.text(), self.number("I")
        if not 1 <= n_dims <= 4:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {n_dims} dimensions; ggml knows 1 to 4.")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.number("I"), self.number("Q")


def _place(path: Path, data: np.ndarray, infos: list, *, start: int, alignment: int) -> dict[str, TensorInfo]:
    """Check that every tensor lies inside of the file, and map it."""
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, shape, type_id, offset in infos:
        where = f"{path}: tensor {name!r}"
        if name in tensors:
            raise CheckpointError(f"{where} is there twice.")
        if type_id not in STORED_TYPES:
            raise CheckpointError(f"{where} is of ggml type {type_id}, which this version does not know.")
        block, block_bytes = STORED_TYPES[type_id].block_size, STORED_TYPES[type_id].block_bytes
        if min(shape) < 1 or shape[-1] % block:
            raise CheckpointError(f"{where} is {list(shape)}; type {STORED_TYPES[type_id].name} needs rows of a multiple of {block}.")
        if offset % alignment:
            raise CheckpointError(f"{where} begins at offset {offset}, which is not a multiple of {alignment}. The file is damaged.")
        row_bytes = shape[-1] // block * block_bytes
        rows, begin = math.prod(shape[:-1]), start + offset
        size = rows * row_bytes
        if begin + size > len(data):
            raise CheckpointError(f"{where} ends at byte {begin + size:,} and the file at {len(data):,}. It is truncated or damaged.")
        spans.append((begin, begin + size, name))
        flat = data[begin : begin + size]
        tensors[name] = TensorInfo(name, type_id, shape, flat.reshape(rows, row_bytes) if len(shape) > 1 else flat.reshape(shape[0] // block, block_bytes))
    for (_, end, name), (begin, _, other) in pairwise(sorted(spans)):
        if begin < end:
            raise CheckpointError(f"{path}: the tensors {name!r} and {other!r} lie on the same bytes. The file is damaged.")
    return tensors


def decode_value(raw: bytes):
    (kind,) = struct.unpack_from("<I", raw)
    if kind == _STRING:
        return raw[12:].decode()
    if kind != _ARRAY:
        return struct.unpack_from("<" + _SCALARS[kind], raw, 4)[0]
    kind, count = struct.unpack_from("<IQ", raw, 4)
    if kind != _STRING:
        return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", raw, 16))
    texts, position = [], 16
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", raw, position)
        texts.append(raw[position + 8 : position + 8 + size].decode())
        position += 8 + size
    return texts





def pack_value(kind: str, value: Any) -> bytes:
    """A metadata value with its type, as bytes of the file."""
    if kind.endswith("[]"):
        return struct.pack("<IIQ", _ARRAY, _TYPE_IDS[kind[:-2]], len(value)) + b"".join(pack_value(kind[:-2], item)[4:] for item in value)
    if kind == "string":
        data = value if isinstance(value, bytes) else value.encode()
        return struct.pack("<IQ", _STRING, len(data)) + data
    return struct.pack("<I" + _SCALARS[_TYPE_IDS[kind]], _TYPE_IDS[kind], value)


def write_file(path: Path, raw: Mapping[str, bytes], tensors: Sequence[Planned], *, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a GGUF file, tensor by tensor, to a temporary sibling that is renamed at the end; raw: its metadata. progress is told the bytes of each tensor."""
    alignment = decode_value(raw["general.alignment"]) if "general.alignment" in raw else 32
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header_bytes(raw, tensors, alignment))
            for tensor in tensors:
                _write_tensor(file, tensor, alignment)
                progress(tensor.nbytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_split(folder: Path, raw: Mapping[str, bytes], tensors: Sequence[Planned], *, shard_bytes: int, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write model-00001-of-0000N.gguf, ... into folder, each with at most shard_bytes of tensors, or with a single one that is larger; see write_file."""
    parts: list[list[Planned]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if parts[-1] and tensor.nbytes > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(tensor)
        room -= tensor.nbytes
    if len(parts) > _MOST_PARTS:
        raise RecipeError(f"shards of {shard_bytes:,} bytes would be {len(parts):,} files, and a GGUF has at most {_MOST_PARTS:,}. Take a larger --max-shard-size.")
    shared = {key: raw[key] for key in ("general.alignment",) if key in raw}
    for number, part in enumerate(parts):
        split = {"split.no": ("u16", number), "split.count": ("u16", len(parts)), "split.tensors.count": ("i32", len(tensors))}
        values = {**(raw if number == 0 else shared), **{key: pack_value(kind, value) for key, (kind, value) in split.items()}}
        write_file(folder / f"model-{number + 1:05d}-of-{len(parts):05d}.gguf", values, part, progress=progress)


def _write_tensor(file, tensor: Planned, alignment: int) -> None:
    written = 0
    for load in tensor.load:
        data = load().contiguous().reshape(-1).view(torch.uint8).numpy()
        file.write(data.data)
        written += data.nbytes
    if written != tensor.nbytes:
        raise CheckpointError(f"{tensor.name}: {written:,} bytes were loaded and {tensor.nbytes:,} expected for {list(tensor.shape)}; the weight has another shape than announced.")
    file.write(bytes(-written % alignment))


def header_bytes(raw: Mapping[str, bytes], tensors: Sequence[Planned], alignment: int) -> bytes:
    """Everything before the first tensor's bytes."""
    parts = [_MAGIC, struct.pack("<IQQ", 3, len(tensors), len(raw))]
    parts += [pack_value("string", key)[4:] + value for key, value in raw.items()]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts.append(pack_value("string", tensor.name)[4:] + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type_id, offset))
        offset += -(-tensor.nbytes // alignment) * alignment
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)
