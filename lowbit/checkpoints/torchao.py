"""torchao folders, as transformers saves and loads them (torchao 0.18): tensors without packing, and JSON in the safetensors header that says what they are.

    M._weight_qdata        int8 [N, K], codes minus 2^(b-1) (IntxUnpackedToInt8Tensor, Int8Tensor), or float8_e4m3fn, float8_e5m2 (Float8Tensor)
    M._weight_scale        [N, K / g] ([N, 1] per channel, [1, 1] per tensor)      w = (qdata - zero_point) scale in float32, cast to the model's dtype
    M._weight_zero_point   int8, or a float, the same shape                        (IntxUnpackedToInt8Tensor always, Int8Tensor sometimes)

    __metadata__: "tensor_names": a JSON list of the weights; "M.weight": {"_type": ..., "_data": {"block_size": [1, g], "dtype": ..., ...}, "_tensor_data_names": [...]}

What a matrix is stands in the metadata alone, so layers may differ. Codes of all widths take a byte each. Rounded activations and NVFP4 are not read yet, MX formats torchao does not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, RecipeError, ShapeError
from ..scheme import INT, Scheme
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

KIND = "torchao"
INTX, INT8, FLOAT8 = "IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor"
PARTS = ("qdata", "scale", "zero_point")
FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise RecipeError or ShapeError when torchao cannot hold a matrix [out_features, in_features] in this scheme."""
    layer = name.removesuffix(".weight")
    plain = scheme.outliers is None and scheme.act is None and scheme.block[0] in (1, -1)
    if not plain or not (scheme.format == INT or scheme.format in FP8.values()):
        raise RecipeError(f"{layer}: torchao cannot hold {scheme.said}; it holds integers of 2 to 8 bits and fp8, in groups along rows, per channel or per tensor, with nothing rounded but weights.")
    if scheme.format == INT and scheme.block == (-1, -1):
        raise RecipeError(f"{layer}: torchao's integers have a scale per group or channel, and {scheme.name} has one for the tensor. Use channel.")
    numerics.check_shape(scheme, shape, name=layer)
    if scheme.group_size > 0 and shape[1] % scheme.group_size:
        raise ShapeError(f"{layer}: torchao needs whole groups, and {scheme.group_size} does not divide {shape[1]}.")


def encode(qt: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, by their local names; decode is the inverse."""
    scheme = qt.scheme
    if scheme.format != INT:
        kind = next(dtype for dtype, name in FP8.items() if name == scheme.format)
        return {"qdata": qt.parts["codes"].view(kind), "scale": qt.parts["scale"].float()}
    numerics.integer.refuse_order(qt, KIND)
    half = scheme.zero_code
    signed = lambda codes: (codes.to(torch.int16) - half).to(torch.int8)
    zero = qt.parts.get("zero_point")
    if zero is None:
        stored = torch.zeros(qt.parts["scale"].shape, dtype=torch.int8)
    else:
        stored = _as_narrow(zero.float() - half, qt.parts["scale"].dtype) if scheme.zero_dtype == "float" else signed(zero)
    return {"qdata": signed(qt.parts["codes"]), "scale": qt.parts["scale"], "zero_point": stored}


def _as_narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values in another dtype if it holds them all, else as they are."""
    narrow = values.to(dtype)
    return narrow if torch.equal(narrow.float(), values) else values


def _describe(scheme: Scheme, shape: tuple[int, int], dtype: str) -> dict:
    """The metadata of a matrix."""
    block = list(shape) if scheme.block == (-1, -1) else [1, shape[1] if scheme.group_size == -1 else scheme.group_size]
    names = {"_type": "torch.dtype", "_data": dtype}
    if scheme.format == INT:
        data = {"target_dtype": {"_type": "torch.dtype", "_data": f"int{scheme.bits}"}, "block_size": block, "dtype": names, "activation_quantization": None}
        return {"_type": INTX, "_data": data, "_tensor_data_names": list(PARTS)}
    data = {"block_size": block, "mm_config": None, "act_quant_kwargs": None, "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}, "dtype": names}
    return {"_type": FLOAT8, "_data": data, "_tensor_data_names": list(PARTS[:2])}


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint as a torchao folder; folder must exist and be empty. Raises as check does, before any work."""
    safetensors.require_quantized(checkpoint, KIND)
    texts = {}
    for name in sorted(checkpoint.quantized, key=safetensors.natural_key):
        entry = checkpoint.quantized[name]
        check(entry.scheme, entry.shape, name)
        texts[name] = json.dumps(_describe(entry.scheme, entry.shape, str(entry.dtype).removeprefix("torch.")))

    def stored(name: str) -> dict[str, Tensor]:
        return {f"{name.removesuffix('weight')}_weight_{part}": value for part, value in encode(checkpoint.quantized[name].load()).items()}

    metadata = {**texts, "tensor_names": json.dumps(list(texts))}
    safetensors.write_packed(checkpoint, folder, stored, _section(checkpoint), entries=3, shard_bytes=shard_bytes, progress=progress, metadata=metadata)


def _section(checkpoint: Checkpoint) -> dict:
    """quantization_config. quant_type only names a configuration that torchao knows; the metadata says what each matrix is."""
    first = checkpoint.quantized[min(checkpoint.quantized, key=safetensors.natural_key)].scheme
    if first.format == INT:
        granularity = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}} if first.group_size == -1 else {"_type": "PerGroup", "_version": 1, "_data": {"group_size": first.group_size}}
        data = {"granularity": granularity, "weight_dtype": {"_type": "torch.dtype", "_data": f"int{first.bits}"}}
        kind = {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}
    else:
        dtype = next(str(dtype).removeprefix("torch.") for dtype, name in FP8.items() if name == first.format)
        kind = {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": dtype}}}
    return {
        "quant_method": KIND, "quant_type": {"default": kind}, "modules_to_not_convert": safetensors.dense_linears(checkpoint), "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ reading


def open_folder(path: Path) -> Checkpoint:
    """Open a torchao folder: its matrices become quantized weights, with their codes exactly as written. CheckpointError for what is not read and for tensors that contradict each other."""
    config = safetensors.read_json(path / "config.json")
    tensors, texts = safetensors.open_tensors(path), safetensors.read_metadata(path)
    quantized: dict[str, LazyQuantized] = {}
    used: set[str] = set()
    for name in _names(texts, path):
        entry = _entry(texts, name, path)
        if entry["_type"] != "Tensor":
            quantized[name], parts = _open_weight(name, entry, tensors, path)
            used |= parts
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    if left := next((name for name in dense if "._weight_" in name), None):
        raise CheckpointError(f"{path}: {left} belongs to no weight that the header describes.")
    return Checkpoint(KIND, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path))


def _names(texts: dict[str, str], path: Path) -> list[str]:
    try:
        names = json.loads(texts.get("tensor_names", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header has no tensor_names ({error}); without what torchao writes there the tensors cannot be understood.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: tensor_names in the header is {names!r}; expected a list of names.")
    return names


def _entry(texts: dict[str, str], name: str, path: Path) -> dict:
    try:
        entry = json.loads(texts.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header says nothing of {name} that is JSON ({error}).") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("_type"), str):
        raise CheckpointError(f"{path}: the header says of {name} {entry!r}; expected an object with _type.")
    return entry


def _open_weight(name: str, entry: dict, tensors: Mapping[str, LazyTensor], path: Path) -> tuple[LazyQuantized, set[str]]:
    kind, data = entry["_type"], entry.get("_data")
    if kind not in (INTX, INT8, FLOAT8) or not isinstance(data, dict) or not name.endswith(".weight"):
        raise CheckpointError(f"{path}: {name} is a {kind}; of torchao this version reads {INTX}, {INT8} and {FLOAT8} weights.")
    if data.get("act_quant_kwargs") or data.get("activation_quantization"):
        raise CheckpointError(f"{path}: {name} is to read rounded inputs, which this version does not read from torchao; without it the model would compute something else.")
    prefix = f"{name.removesuffix('weight')}_weight_"
    parts = {part: tensors[f"{prefix}{part}"] for part in PARTS if f"{prefix}{part}" in tensors}
    if missing := [part for part in PARTS[: 3 if kind == INTX else 2] if part not in parts]:
        raise CheckpointError(f"{path}: {prefix}{missing[0]} is missing. The download is incomplete.")
    shape, block, dtype = parts["qdata"].shape, data.get("block_size"), _torch_name(data.get("dtype"))
    bits = {f"int{b}": b for b in range(1, 9)}.get(_torch_name(data.get("target_dtype")), 0) if kind == INTX else 8
    good = len(shape) == 2 and 0 not in shape and isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
    if not good or bits == 0 or dtype not in FLOATS.values() or shape[1] % block[1] or block[0] not in (1, shape[0]) or (block[0] > 1 and block[1] != shape[1]):  # type: ignore[index]
        raise CheckpointError(f"{path}: {name}: codes {list(shape)} in blocks of {block!r}, {data!r}; expected [N, K], blocks [1, g] or [N, K], and a dtype.")
    assert isinstance(block, list)
    rows, columns = shape
    own_block = (-1, -1) if block[0] == rows > 1 else (1, -1 if block[1] == columns else block[1])
    side = (1, 1) if own_block == (-1, -1) else (rows, columns // block[1])
    whole = parts.get("zero_point")
    expected = {"qdata": (shape, tuple(FP8) if kind == FLOAT8 else (torch.int8,)), "scale": (side, tuple(FLOATS))}
    if whole is not None:
        expected["zero_point"] = (side, (torch.int8, *FLOATS))
    for part, (size, dtypes) in expected.items():
        if parts[part].shape != size or parts[part].dtype not in dtypes:
            raise CheckpointError(f"{path}: {prefix}{part} is {parts[part].dtype} {list(parts[part].shape)}; {kind} of {list(shape)} in blocks of {block} needs {dtypes[0]} {list(size)}.")
    scale_dtype = FLOATS[parts["scale"].dtype]
    if kind == FLOAT8:
        scheme = Scheme(FP8[parts["qdata"].dtype], 8, own_block, scale_dtype=scale_dtype)
    else:
        zero = whole.load() if whole is not None else torch.zeros(1)  # one number a group, and nothing else says whether the scheme is symmetric
        symmetric = not bool(zero.any())
        fitted = zero.is_floating_point()
        scheme = Scheme(bits=bits if fitted and not symmetric else max(bits, 2), block=own_block, symmetric=symmetric, zero_dtype="float" if fitted else "int", scale_dtype=scale_dtype)

    def load() -> QuantizedTensor:
        loaded = {part: lazy.load() for part, lazy in parts.items()}
        if not bool(torch.isfinite(loaded["scale"]).all()):
            raise CheckpointError(f"{path}: {prefix}scale holds NaN or infinity. The file is damaged.")
        try:
            return decode(loaded, scheme, (rows, columns), dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error

    return LazyQuantized(scheme, (rows, columns), getattr(torch, dtype), load, sum(lazy.nbytes for lazy in parts.values())), {f"{prefix}{part}" for part in parts}


def _torch_name(value: object) -> str:
    return str(value.get("_data")) if isinstance(value, dict) else ""


def decode(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    """The matrix that tensors of these local names stand for; their shapes were checked before."""
    if scheme.format != INT:
        return QuantizedTensor(scheme, shape, dtype, {"codes": parts["qdata"].view(torch.uint8), "scale": parts["scale"]})
    half = 2 ** (scheme.bits - 1)
    low, high = int(parts["qdata"].min()), int(parts["qdata"].max())
    if low < -half or high >= half:
        raise CheckpointError(f"a code is outside of {scheme.bits} bits ({low} to {high}).")
    decoded = {"codes": (parts["qdata"].to(torch.int16) + half).to(torch.uint8), "scale": parts["scale"]}
    if not scheme.symmetric:
        zero = parts["zero_point"]
        if zero.is_floating_point() and not bool(torch.isfinite(zero).all()):
            raise CheckpointError("a zero-point is NaN or infinite.")
        if not zero.is_floating_point() and (int(zero.min()) < -half or int(zero.max()) >= half):
            raise CheckpointError(f"a zero-point is outside of {scheme.bits} bits ({int(zero.min())} to {int(zero.max())}).")
        decoded["zero_point"] = _as_narrow(zero.float() + half, parts["scale"].dtype) if zero.is_floating_point() else (zero.to(torch.int16) + half).to(torch.uint8)
    return QuantizedTensor(scheme, shape, dtype, decoded)
