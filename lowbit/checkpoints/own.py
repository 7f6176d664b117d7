"""lowbit's own folders: any number format, also what no other layout holds (QuIP#, GPTQ's float zero-points, outlier channels, MXFP6, mixtures of all).

A matrix X.weight [N, K] lies as the tensors X.<part> of numerics/parts.py. config.json says what they mean:

    "quantization_config": {
        "quant_method": "lowbit", "version": 1,
        "schemes": [{"format": "e8p2", "bits": 2, "block": [1, -1], ...}],                                   fields of Scheme
        "weights": {"X.weight": {"scheme": 0, "shape": [N, K], "dtype": "bfloat16", "activation": {...}}}    activation: fields of Rounding, only where inputs are rounded
    }

The weights are in model.lowbit.safetensors (several: model.lowbit-00001-of-00003.safetensors and model.safetensors.index.lowbit.json), the names that transformers gives to the variant
"lowbit". A program that does not know the layout so finds no weights, where under the usual name transformers would warn of an unknown quant_method and go on with random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, FormatError, LowbitError, RecipeError, ShapeError
from ..numerics import parts
from ..scheme import INT, RANGES, SCALE_DTYPES, Rounding, Scheme
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

KIND = "lowbit"
VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise ShapeError when the matrix [out_features, in_features] does not go with the scheme; every scheme can be held."""
    numerics.check_shape(scheme, shape, name=name.removesuffix(".weight"))


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint in lowbit's own layout; folder must exist and be empty. Tensors are streamed by name in natural order."""
    if odd := next((name for name in checkpoint.quantized if not name.endswith(".weight")), None):
        raise CheckpointError(f"{odd}: quantized matrices are weights of modules, whose names end in .weight.")
    safetensors.write_packed(checkpoint, folder, lambda name: _stored(checkpoint, name), section(checkpoint), entries=6, shard_bytes=shard_bytes, progress=progress, variant=KIND)


def _stored(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    return {f"{name.removesuffix('weight')}{part}": value for part, value in parts.store(checkpoint.quantized[name].load()).items()}


def section(checkpoint: Checkpoint) -> dict:
    """quantization_config of config.json."""
    names = sorted(checkpoint.quantized, key=safetensors.natural_key)
    schemes = list(dict.fromkeys(checkpoint.quantized[name].scheme for name in names))
    weights: dict[str, dict] = {}
    for name in names:
        entry = checkpoint.quantized[name]
        weights[name] = {"scheme": schemes.index(entry.scheme), "shape": list(entry.shape), "dtype": str(entry.dtype).removeprefix("torch.")}
        if name in checkpoint.activations:
            weights[name]["activation"] = checkpoint.activations[name].to_dict()
    return {"quant_method": KIND, "version": VERSION, "schemes": [scheme.to_dict() for scheme in schemes], "weights": weights}


def open_folder(path: Path) -> Checkpoint:
    """Open a folder in lowbit's own layout. Raises CheckpointError for tensors that contradict their scheme, are missing or too many."""
    config = safetensors.read_json(path / "config.json")
    found = config["quantization_config"]
    if found.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {found.get('version')!r} of lowbit's layout; this lowbit reads version {VERSION}.")
    schemes, weights = _read_schemes(found.get("schemes"), path), found.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: quantization_config.weights is {weights!r}; expected an object.")
    tensors = safetensors.open_tensors(path, KIND)
    quantized, activations, used = {}, {}, set()
    for name, entry in weights.items():
        quantized[name], names = _open_weight(name, entry, schemes, tensors, path)
        used |= names
        if isinstance(entry, dict) and "activation" in entry:
            try:
                activations[name] = Rounding.from_dict(entry["activation"])
            except LowbitError as error:
                raise CheckpointError(f"{path}: {name}: {error}") from error
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    if twice := next((name for name in quantized if name in dense), None):
        raise CheckpointError(f"{path}: {twice} is there twice, dense and quantized.")
    return Checkpoint(KIND, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path), activations)


def _read_schemes(data: object, path: Path) -> list[Scheme]:
    if not isinstance(data, list):
        raise CheckpointError(f"{path}: quantization_config.schemes is {data!r}; expected a list.")
    made = []
    for entry in data:
        try:
            if not isinstance(entry, dict) or not all(test(entry[name]) for name, test in _FIELDS.items()):
                raise RecipeError("a field is of another kind")
            scheme = Scheme.from_dict(entry)
            if scheme.format not in numerics.FORMATS or (scheme.format != INT and scheme.bits != numerics.scheme_of(scheme.format).bits):
                raise RecipeError(f"no number format of this lowbit: {scheme.format!r} of {scheme.bits} bits")
        except (LowbitError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: {entry!r} is no scheme: {error}.") from error
        made.append(scheme)
    return made


def _block(value: object) -> bool:
    """[1, columns], [1, -1], [-1, -1] or [rows, 1]."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int and (side == -1 or side > 0) for side in value):
        return False
    return value[0] == 1 or value == [-1, -1] or (value[0] > 1 and value[1] == 1)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda v: isinstance(v, str), "bits": lambda v: type(v) is int, "block": _block, "symmetric": lambda v: type(v) is bool, "range": lambda v: v in RANGES,
    "scale_dtype": lambda v: v in SCALE_DTYPES, "zero_dtype": lambda v: v in ("int", "float"), "nested": lambda v: v is None or type(v) is int,
    "outliers": lambda v: v is None or type(v) is int, "outlier_bits": lambda v: type(v) is int, "act": lambda v: v is None or isinstance(v, dict),
}  # fmt: skip


def _open_weight(name: str, entry: object, schemes: list[Scheme], tensors: Mapping[str, LazyTensor], path: Path) -> tuple[LazyQuantized, set[str]]:
    place = entry.get("scheme") if isinstance(entry, dict) else None
    sides, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
    good = isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and 0 < side < 1 << 40 for side in sides)
    if not name.endswith(".weight") or type(place) is not int or not 0 <= place < len(schemes) or not good or dtype not in DTYPES:
        raise CheckpointError(f"{path}: quantization_config.weights[{name!r}] is {entry!r}; expected scheme (a place in schemes), shape [N, K] and dtype ({', '.join(DTYPES)}).")
    assert isinstance(sides, list)
    scheme, shape, prefix = schemes[place], (sides[0], sides[1]), name.removesuffix("weight")
    try:
        numerics.check_shape(scheme, shape, name=name)
        expected = parts.shapes(scheme, shape)
    except (ShapeError, RecipeError, FormatError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    for part, (size, dtypes) in expected.items():
        lazy = tensors.get(f"{prefix}{part}")
        if lazy is None and part in parts.optional(scheme):
            continue
        if lazy is None or lazy.shape != size or lazy.dtype not in dtypes:
            state = "missing" if lazy is None else f"{lazy.dtype} {list(lazy.shape)}"
            raise CheckpointError(f"{path}: {prefix}{part} is {state}; a matrix {list(shape)} in {scheme.name} needs {dtypes[0]} {list(size)}.")
    found = {part: tensors[f"{prefix}{part}"] for part in expected if f"{prefix}{part}" in tensors}

    separable = numerics.has_rows(scheme, shape[1])

    def rows(start: int, stop: int) -> QuantizedTensor:
        stop = min(stop, shape[0])
        some = {part: lazy.load() if part in parts.OF_COLUMNS or not lazy.shape or not separable else lazy.read(start, stop) for part, lazy in found.items()}
        try:
            return parts.restore(some, scheme, (stop - start, shape[1]), str(dtype))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error

    def load() -> QuantizedTensor:
        return rows(0, shape[0])

    return LazyQuantized(scheme, shape, getattr(torch, str(dtype)), load, sum(lazy.nbytes for lazy in found.values()), rows if separable else None), {f"{prefix}{part}" for part in found}
