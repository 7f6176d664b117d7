"""A model on disk, opened lazily: headers are read, weights are loaded one by one when asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError
from ..scheme import Rounding, Scheme
from ..tensor import QuantizedTensor

CHUNK_BYTES = 32 << 20  # of a matrix that is worked on some rows at a time
MOST_PARTS = 1_000_000
_PARTS = re.compile(r"layer|depth|expert|block|label|stage")  # of such settings transformers makes lists as long as they say


@dataclass(frozen=True)
class LazyTensor:
    """A dense tensor that is not loaded yet. read(start, stop) gives rows of its first axis (of a scalar: all of it), in memory of their own.

    stored_bytes, stored_as: what it takes in the file and is called there, where it is a quantized type that is decoded when read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    stored_bytes: int | None = None
    stored_as: str | None = None

    def load(self) -> Tensor:
        return self.read(0, self.shape[0] if self.shape else 1)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """All rows in turn, about chunk_bytes of them at a time; nothing of an empty tensor."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, chunk_bytes * rows // max(1, self.numel * self.dtype.itemsize))
        for start in range(0, rows if self.numel else 0, step):
            yield self.read(start, min(start + step, rows))

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize if self.stored_bytes is None else self.stored_bytes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LazyQuantized:
    """A quantized matrix that is not loaded yet. dtype: of the weight it stands for. nbytes: as it lies in the file.

    rows: some of its rows, where they can be read without the others.
    """

    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    load: Callable[[], QuantizedTensor]
    nbytes: int = 0
    rows: Callable[[int, int], QuantizedTensor] | None = None

    def values(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """What the codes stand for, float32: all rows in turn, about chunk_bytes of them at a time."""
        (rows, columns), some = self.shape, self.rows
        whole = None
        if some is None:
            qt = self.load()
            some = partial(numerics.rows_of, qt)
            whole = None if numerics.has_rows(self.scheme, columns) else numerics.dequantize(qt)
        step = max(1, chunk_bytes // (4 * columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield numerics.dequantize(some(start, stop)) if whole is None else whole[start:stop]


def plain_config(config: Mapping, where: object) -> dict:
    """A config.json for transformers: without quantization and code of its own; CheckpointError for numbers of layers, experts or labels beyond all models."""
    level: list = [config]
    while level:
        pairs = [pair for part in level for pair in (part.items() if isinstance(part, Mapping) else ((None, inner) for inner in part))]
        for key, value in pairs:
            if isinstance(value, int) and value > MOST_PARTS and _PARTS.search(str(key)):
                raise CheckpointError(f"{where}: config.json says {key} = {value}; expected at most {MOST_PARTS:,}. It is damaged.")
        level = [value for _, value in pairs if isinstance(value, Mapping | list)]
    return {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any kind, under Hugging Face names.

    kind: "safetensors", "gguf", "compressed-tensors". path: the folder or file. config: the contents of config.json.
    tensors: dense tensors by checkpoint name ("model.norm.weight"); quantized: matrices by the name of the weight they replace.
    A name is in one of the two. files: tokenizer, chat template and generation_config, to be copied beside a result.
    provenance: what made it, if it says. activations: how the inputs of matrices are rounded when the model runs, by weight name. Of tied embeddings only one is stored.
    """

    kind: str
    path: Path
    config: dict
    tensors: Mapping[str, LazyTensor]
    quantized: Mapping[str, LazyQuantized] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    provenance: dict = field(default_factory=dict)
    activations: Mapping[str, Rounding] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, as if it were dense."""
        return {**{name: t.shape for name, t in self.tensors.items()}, **{name: q.shape for name, q in self.quantized.items()}}

    def dense(self, name: str) -> Tensor:
        """One weight as a dense tensor; a quantized one is decoded to the dtype it stands for, and FormatError raised where that gives NaN or infinity."""
        if name in self.tensors:
            return self.tensors[name].load()
        entry = self.quantized[name]
        return _decoded(entry.load(), entry.dtype, name)

    def lazy(self, name: str) -> LazyTensor:
        """One weight as a lazy dense tensor."""
        if name in self.tensors:
            return self.tensors[name]
        entry = self.quantized[name]
        rows = entry.rows
        if rows is not None:
            return LazyTensor(entry.shape, entry.dtype, lambda start, stop: _decoded(rows(start, stop), entry.dtype, name))
        return LazyTensor(entry.shape, entry.dtype, lambda start, stop: self.dense(name)[start:stop])

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as they lie in the file."""
        return sum(t.nbytes for t in self.tensors.values()) + sum(q.nbytes for q in self.quantized.values())


def _decoded(qt: QuantizedTensor, dtype: torch.dtype, name: str) -> Tensor:
    """The values of a matrix or of some of its rows; FormatError where dtype holds them as NaN or infinity."""
    values = numerics.dequantize(qt).to(dtype)
    numerics.refuse_bad_values(values, name)
    return values
