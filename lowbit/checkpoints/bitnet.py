"""BitNet folders in transformers' own layout: ternary weights with one scale, and inputs rounded to 8 bits for each token.

    X.weight         uint8 [N / 4, K]    byte row r holds rows r, r + N / 4, r + N / 2 and r + 3 N / 4, the first in the low two bits; a field is the ternary value plus one
    X.weight_scale   [1]                 linear_class "autobitlinear": the scale, w = value * weight_scale; "bitlinear" (the default): its inverse, w = value / weight_scale

Both round their inputs (127 / max|x| of each token). Read are both. Written is "autobitlinear" with quantization_mode "offline", whose scale is the one that the weights have and which
transformers runs in the dtype of config.json; for models whose layers have biases "bitlinear" (transformers 5.23 multiplies the other's biases by the scale, too): read again, its scale is the
inverse of an inverse, within one unit of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, RecipeError, ShapeError
from ..scheme import Activation, Rounding, Scheme
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

KIND = "bitnet"
FIELDS = 4
ACT = Activation(range="textbook")  # of every BitNet layer in transformers
FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise RecipeError or ShapeError when BitNet's layout cannot hold a matrix [out_features, in_features] in this scheme."""
    layer = name.removesuffix(".weight")
    if scheme.format != "ternary" or scheme.block != (-1, -1) or scheme.outliers is not None or scheme.act != ACT:
        raise RecipeError(f"{layer}: bitnet cannot hold {scheme.said}; it holds ternary weights with one scale for the matrix and inputs rounded to 8 bits for each token (the recipe bitnet).")
    numerics.check_shape(scheme, shape, name=layer)
    if shape[0] % FIELDS:
        raise ShapeError(f"{layer}: bitnet packs four rows into one, and {shape[0]} rows are not a multiple of 4. Use --to lowbit.")


def encode(qt: QuantizedTensor, inverse: bool) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, by their local names; decode is the inverse. inverse: store the inverse of the scale."""
    slabs = qt.parts["codes"].view(FIELDS, -1, qt.shape[1])
    packed = torch.zeros_like(slabs[0])
    for place in range(FIELDS):
        packed |= slabs[place] << 2 * place
    scale = qt.parts["scale"].reshape(1)
    return {"weight": packed, "weight_scale": 1 / scale.float() if inverse else scale}


def decode(packed: Tensor, scale: Tensor, scheme: Scheme, dtype: str) -> QuantizedTensor:
    """The matrix of packed [N / 4, K] and the scale that its values are multiplied by [1]."""
    codes = torch.cat([packed >> 2 * place & 3 for place in range(FIELDS)])
    if bool((codes > 2).any()):
        raise CheckpointError("a ternary code is 3; expected 0, 1 and 2.")
    return QuantizedTensor(scheme, (len(codes), codes.shape[1]), dtype, {"codes": codes, "scale": scale.reshape(1, 1)})


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint as a BitNet folder; folder must exist and be empty. Raises as check does, before any work."""
    safetensors.require_quantized(checkpoint, KIND)
    for name, entry in checkpoint.quantized.items():
        check(entry.scheme, entry.shape, name)
    biases = any(f"{name.removesuffix('weight')}bias" in checkpoint.tensors for name in checkpoint.quantized)

    def stored(name: str) -> dict[str, Tensor]:
        return {f"{name.removesuffix('weight')}{part}": value for part, value in encode(checkpoint.quantized[name].load(), biases).items()}

    section = {
        "quant_method": KIND, "linear_class": "bitlinear" if biases else "autobitlinear", "quantization_mode": "offline",
        "modules_to_not_convert": safetensors.dense_linears(checkpoint), "use_rms_norm": False, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    safetensors.write_packed(checkpoint, folder, stored, section, entries=2, shard_bytes=shard_bytes, progress=progress)


def open_folder(path: Path) -> Checkpoint:
    """Open a BitNet folder: its matrices become quantized weights, with their codes exactly as written. CheckpointError for tensors that contradict each other."""
    config = safetensors.read_json(path / "config.json")
    section = config["quantization_config"]
    kind, mode = section.get("linear_class", "bitlinear"), section.get("quantization_mode", "offline")
    if kind not in ("bitlinear", "autobitlinear") or (kind == "autobitlinear" and mode != "offline"):
        raise CheckpointError(f"{path}: linear_class {kind!r} with quantization_mode {mode!r}; of BitNet this version reads bitlinear, and autobitlinear offline (online weights are not quantized).")
    if section.get("use_rms_norm"):
        raise CheckpointError(f"{path}: quantization_config has use_rms_norm, a norm in front of every layer that this version does not read.")
    tensors = safetensors.open_tensors(path)
    modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    quantized = {f"{module}.weight": _open_module(module, tensors, kind == "bitlinear", config, path) for module in modules}
    dense = {name: tensor for name, tensor in tensors.items() if name not in quantized and not name.endswith(".weight_scale")}
    if left := next((name for name, tensor in dense.items() if tensor.dtype == torch.uint8), None):
        raise CheckpointError(f"{path}: {left} is packed and has no weight_scale. The download is incomplete.")
    activations = {name: Rounding(ACT) for name in quantized}
    return Checkpoint(KIND, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path), activations)


def _open_module(module: str, tensors: dict[str, LazyTensor], inverse: bool, config: dict, path: Path) -> LazyQuantized:
    packed, scale = tensors.get(f"{module}.weight"), tensors[f"{module}.weight_scale"]
    if packed is None or packed.dtype != torch.uint8 or len(packed.shape) != 2 or 0 in packed.shape or scale.shape not in ((), (1,)) or scale.dtype not in FLOATS:
        found = "missing" if packed is None else f"{packed.dtype} {list(packed.shape)}"
        raise CheckpointError(f"{path}: {module}.weight is {found} and its weight_scale {scale.dtype} {list(scale.shape)}; expected uint8 [N / 4, K] and one number.")
    scale_dtype = "float32" if inverse else FLOATS[scale.dtype]  # an inverse is no number of the stored dtype
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in FLOATS.values() else scale_dtype
    scheme = Scheme("ternary", 2, (-1, -1), scale_dtype=scale_dtype, act=ACT)
    shape = (packed.shape[0] * FIELDS, packed.shape[1])

    def load() -> QuantizedTensor:
        value = scale.load().reshape(())
        if not bool(torch.isfinite(value)) or (inverse and float(value) == 0):
            raise CheckpointError(f"{path}: {module}.weight_scale is {float(value)}. The file is damaged.")
        try:
            return decode(packed.load(), 1 / value.float() if inverse else value, scheme, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {module}: {error}") from error

    return LazyQuantized(scheme, shape, getattr(torch, dtype), load, packed.nbytes + scale.nbytes)
