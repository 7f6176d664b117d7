"""HQQ folders: integers with float zero-points, as hqq's save_to_safetensors and transformers 4 have them (transformers 5.23 and vLLM 0.33 do not read them).

Of a linear X [N, K] there is no X.weight but the state of one HQQLinear. With groups of g, axis 1: the matrix as [N K / g, g], a scale for each row; axis 0: as [g, N K / g], one for each column.

    X.W_q          uint8 [R b / 8, C]      rows R of that matrix in slabs: with 4 bits row i in the high half and row i + R / 2 in the low half of byte row i, with 2 bits
                                           (1 bit) quarters (eighths), the first highest.
                                           3 bits: int32 [ceil(R / 10), C], tenths of the rows, the first at bit 27, the last at bit 0
    X.scale        [R, 1] or [1, C]        w = (code - zero) scale, computed in their dtype
    X.zero         the same shape          any number
    X.nbits, .group_size, .axis, .shape, .packing, .unpack_view_dtype, .compute_dtype and nine flags: small tensors, texts as ASCII codes
"""

from __future__ import annotations

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

KIND = "hqq"
PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
FLAGS = {
    "view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1, "stores_quant_config": 1, "channel_wise": 1, "optimize": 1, "round_zero": 0,
}  # fmt: skip
TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
PARTS = ("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", *TEXTS, *FLAGS)
FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise RecipeError or ShapeError when HQQ's layout cannot hold a matrix [out_features, in_features] in this scheme."""
    layer = name.removesuffix(".weight")
    if scheme.format != INT or scheme.bits not in PACKING or scheme.symmetric or scheme.zero_dtype != "float" or scheme.outliers is not None or scheme.act is not None:
        raise RecipeError(
            f"{layer}: hqq cannot hold {scheme.said}; it holds integers of 1, 2, 3, 4 or 8 bits with float zero-points (the algorithm hqq makes them), with nothing rounded but weights. "
            "Use a recipe such as int4-asym-g64-hqq, or another target."
        )
    numerics.check_shape(scheme, shape, name=layer)
    size, columns = _group(scheme, shape), shape[1]
    rows = size if scheme.block[0] > 1 else shape[0] * columns // size
    if scheme.block == (-1, -1) or size % 8 or columns % (size if scheme.block[0] == 1 else 1) or rows % (8 // scheme.bits if scheme.bits != 3 else 1):
        raise ShapeError(f"{layer}: hqq needs whole groups of a multiple of 8, and rows that fill its bytes; {list(shape)} with {scheme.name} is not that. Use --to lowbit.")


def _group(scheme: Scheme, shape: tuple[int, int]) -> int:
    return scheme.block[0] if scheme.block[0] > 1 else shape[1] if scheme.block[1] == -1 else scheme.block[1]


def encode(qt: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, by their local names; decode is the inverse."""
    scheme, axis = qt.scheme, 0 if qt.scheme.block[0] > 1 else 1
    size = _group(scheme, qt.shape)
    codes = qt.parts["codes"].reshape(size, -1) if axis == 0 else qt.parts["codes"].reshape(-1, size)
    side = (1, -1) if axis == 0 else (-1, 1)
    scale = qt.parts["scale"]
    texts = (PACKING[scheme.bits], "torch.int32" if scheme.bits == 3 else "torch.uint8", str(scale.dtype))
    return {
        "W_q": _pack(codes, scheme.bits), "scale": scale.reshape(side), "zero": qt.parts["zero_point"].reshape(side),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in (("nbits", scheme.bits), ("group_size", size), ("axis", axis))},
        "shape": torch.tensor(qt.shape, dtype=torch.int64), **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in zip(TEXTS, texts, strict=True)},
        **{name: torch.tensor(value, dtype=torch.uint8) for name, value in FLAGS.items()},
    }  # fmt: skip


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Slabs of rows in the fields of a byte (3 bits: of a 32-bit word), the first one highest."""
    if bits == 8:
        return codes
    count, dtype = (10, torch.int32) if bits == 3 else (8 // bits, torch.uint8)
    slabs = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % count)).to(dtype).view(count, -1, codes.shape[1])
    packed = torch.zeros_like(slabs[0])
    for place in range(count):
        packed |= slabs[place] << bits * (count - 1 - place)
    return packed


def _unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of _pack."""
    if bits == 8:
        return packed
    count = 10 if bits == 3 else 8 // bits
    return torch.cat([(packed >> bits * (count - 1 - place) & (1 << bits) - 1).to(torch.uint8) for place in range(count)])[:rows]


def decode(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    """The matrix that W_q, scale and zero stand for; their shapes were checked before."""
    size = _group(scheme, shape)
    codes = _unpack(parts["W_q"], scheme.bits, size if scheme.block[0] > 1 else shape[0] * shape[1] // size).reshape(shape)
    side = (-1, 1) if scheme.block[0] > 1 else (shape[0], -1)
    return QuantizedTensor(scheme, shape, dtype, {"codes": codes, "scale": parts["scale"].reshape(side), "zero_point": parts["zero"].reshape(side)})


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint as an HQQ folder; folder must exist and be empty. Raises as check does, before any work."""
    safetensors.require_quantized(checkpoint, KIND)
    for name, entry in checkpoint.quantized.items():
        check(entry.scheme, entry.shape, name)

    def stored(name: str) -> dict[str, Tensor]:
        return {f"{name.removesuffix('weight')}{part}": value for part, value in encode(checkpoint.quantized[name].load()).items()}

    safetensors.write_packed(checkpoint, folder, stored, _section(checkpoint), entries=len(PARTS), shard_bytes=shard_bytes, progress=progress)


def _section(checkpoint: Checkpoint) -> dict:
    """quantization_config: one set of parameters, or (as transformers calls layers) one for each tag, a name without "model", "layers" and numbers."""
    tags: dict[str, dict] = {}
    for name in sorted(checkpoint.quantized, key=safetensors.natural_key):
        entry = checkpoint.quantized[name]
        axis, size = (0 if entry.scheme.block[0] > 1 else 1), _group(entry.scheme, entry.shape)
        weights = {"nbits": entry.scheme.bits, "channel_wise": True, "group_size": size, "optimize": True, "round_zero": False, "axis": axis, "view_as_float": False}
        tag = ".".join(word for word in name.removesuffix(".weight").split(".") if word not in ("model", "layers") and not word.isnumeric())
        tags[tag] = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    whole = list(tags.values())
    alike = all(one == whole[0] for one in whole) and safetensors.dense_linears(checkpoint) == ["lm_head"]  # one set is for all linear layers, tags are for those named
    return {"quant_method": KIND, "quant_config": whole[0] if alike else tags, "skip_modules": ["lm_head"]}


# ------------------------------------------------------------------------------------------------------------------ reading


def is_one(path: Path) -> bool:
    """Whether a folder whose config says nothing of it holds HQQ's tensors: hqq's own save_to_safetensors writes such ones."""
    return any(name.endswith(".W_q") for name in safetensors.open_tensors(path))


def open_folder(path: Path) -> Checkpoint:
    """Open an HQQ folder: its matrices become quantized weights, with their codes exactly as written. CheckpointError for tensors that contradict each other."""
    config = safetensors.read_json(path / "config.json")
    tensors = safetensors.open_tensors(path)
    modules = [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]
    quantized = {f"{module}.weight": _open_module(module, tensors, config, path) for module in modules}
    used = {f"{module}.{part}" for module in modules for part in PARTS}
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    if left := next((name for name in dense if name.rpartition(".")[2] in PARTS), None):
        raise CheckpointError(f"{path}: {left} belongs to no packed weight.")
    return Checkpoint(KIND, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path))


def _open_module(module: str, tensors: Mapping[str, LazyTensor], config: dict, path: Path) -> LazyQuantized:
    found = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}
    if missing := [part for part in PARTS if part not in found]:  # hqq itself asks for all of them
        raise CheckpointError(f"{path}: {module} has no {missing[0]}. The download is incomplete, or hqq wrote it without its encoded state.")
    bits, size, axis = (_number(found[part], f"{module}.{part}", path) for part in ("nbits", "group_size", "axis"))
    sides = found["shape"].load().tolist() if found["shape"].dtype == torch.int64 and found["shape"].shape == (2,) else []
    if len(sides) != 2 or not all(0 < side < 1 << 40 for side in sides) or bits not in PACKING or axis not in (0, 1) or not 0 < size <= sides[0] * sides[1]:
        raise CheckpointError(f"{path}: {module} has shape {sides}, {bits} bits, groups of {size} along axis {axis}; expected [N, K], 1, 2, 3, 4 or 8 bits and axis 0 or 1.")
    rows, columns = sides
    expected = (PACKING[bits], "torch.int32" if bits == 3 else "torch.uint8", str(found["scale"].dtype))
    for part, text in zip(TEXTS, expected, strict=True):
        lazy = found[part]
        if len(lazy.shape) != 1 or lazy.dtype != torch.uint8 or lazy.numel != len(text) or bytes(lazy.load().tolist()) != text.encode():
            raise CheckpointError(f"{path}: {module}.{part} is not {text!r} in ASCII codes, which {bits} bits with scales in {found['scale'].dtype} have.")
    flags = {name: _number(found[name], f"{module}.{name}", path) for name in FLAGS}
    if flag := next((name for name in ("view_as_float", "quant_scale", "quant_zero") if flags[name]), None):
        raise CheckpointError(f"{path}: {module} has {flag} set, which this version does not read.")
    if (columns if axis == 1 else rows * columns) % size:
        raise CheckpointError(f"{path}: {module}: groups of {size} along axis {axis} do not divide {[rows, columns]}, which this version does not read.")
    count = rows * columns // size
    height, width = (count, size) if axis == 1 else (size, count)
    packed = (-(-height // 10), torch.int32) if bits == 3 else (height * bits // 8, torch.uint8)
    side = (count, 1) if axis == 1 else (1, count)
    for part, shape, dtypes in (("W_q", (packed[0], width), (packed[1],)), ("scale", side, tuple(FLOATS)), ("zero", side, (found["scale"].dtype,))):
        if found[part].shape != shape or found[part].dtype not in dtypes:
            needed = f"{bits} bits of {[rows, columns]} in groups of {size} along axis {axis} need {dtypes[0]} {list(shape)}"
            raise CheckpointError(f"{path}: {module}.{part} is {found[part].dtype} {list(found[part].shape)}; {needed}.")
    block = (size, 1) if axis == 0 and size > 1 else (1, size if size < columns else -1)
    scheme = Scheme(bits=bits, block=block, symmetric=False, zero_dtype="float", scale_dtype=FLOATS[found["scale"].dtype])
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in FLOATS.values() else scheme.scale_dtype

    def load() -> QuantizedTensor:
        loaded = {part: found[part].load() for part in ("W_q", "scale", "zero")}
        if not all(bool(torch.isfinite(loaded[part]).all()) for part in ("scale", "zero")):
            raise CheckpointError(f"{path}: {module}: its scales or zero-points hold NaN or infinity. The file is damaged.")
        return decode(loaded, scheme, (rows, columns), dtype)

    return LazyQuantized(scheme, (rows, columns), getattr(torch, dtype), load, sum(lazy.nbytes for lazy in found.values()))


def _number(lazy: LazyTensor, name: str, path: Path) -> int:
    if lazy.shape != () or lazy.dtype not in (torch.int32, torch.int64, torch.uint8):
        raise CheckpointError(f"{path}: {name} is {lazy.dtype} {list(lazy.shape)}; expected one whole number (1.58 bits are not read).")
    return int(lazy.load().reshape(()))
