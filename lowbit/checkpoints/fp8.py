"""Models published in fine-grained FP8 (quant_method "fp8": DeepSeek-V3, Qwen3-FP8 and others), read as dense weights.

    X.weight             float8_e4m3fn [N, K]
    X.weight_scale_inv   float32 (also bfloat16, E8M0, or E8M0 as uint8) [ceil(N / r), ceil(K / c)], blocks of weight_block_size [r, c]; without it one number.
                         Despite its name a factor: w = q * scale_inv
    X.activation_scale   of static activations; not used: weights are what is read, inputs stay as they are (as transformers does without a GPU)

A block at the end of a side that its size does not divide is shorter. Decoding is in float32, then rounded to the dtype of config.json, as transformers does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import safetensors
from .checkpoint import Checkpoint, LazyTensor

KIND = "fp8"
SCALES = (".weight_scale_inv", ".activation_scale")
DTYPES = ("float32", "float16", "bfloat16")


def open_folder(path: Path) -> Checkpoint:
    """Open a fine-grained FP8 folder: its matrices are decoded when they are read. CheckpointError for tensors that contradict each other."""
    config = safetensors.read_json(path / "config.json")
    block = config["quantization_config"].get("weight_block_size")
    good = isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
    if block is not None and not good:
        raise CheckpointError(f"{path}: weight_block_size is {block!r}; expected two positive numbers, or null.")
    tensors = safetensors.open_tensors(path)
    dense: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            dense[name] = _open(name, tensors, block, config, path)
        elif not name.endswith(SCALES):
            dense[name] = tensor
    if left := next((name for name in tensors if name.endswith(SCALES[0]) and tensors.get(name.removesuffix("_scale_inv")) is dense.get(name.removesuffix("_scale_inv"))), None):
        raise CheckpointError(f"{path}: {left} belongs to no weight in FP8.")
    return Checkpoint(KIND, path, config, dense, {}, safetensors.side_files(path), safetensors.read_provenance(path))


def _open(name: str, tensors: Mapping[str, LazyTensor], block: list[int] | None, config: dict, path: Path) -> LazyTensor:
    weight, scale = tensors[name], tensors.get(f"{name}_scale_inv")
    if scale is None or len(weight.shape) != 2 or 0 in weight.shape:
        raise CheckpointError(f"{path}: {name} is FP8 {list(weight.shape)} and {'has no' if scale is None else 'has'} weight_scale_inv; expected a matrix with its scales.")
    (rows, columns), size = weight.shape, block or list(weight.shape)
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    fits = scale.shape == grid if block else scale.numel == 1
    if not fits or scale.dtype not in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8):
        raise CheckpointError(f"{path}: {name}_scale_inv is {scale.dtype} {list(scale.shape)}; {[rows, columns]} in blocks of {size} needs float32 {list(grid)}.")
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(named) if named in DTYPES else "bfloat16")
    factors = scale

    def read(start: int, stop: int) -> Tensor:
        values = weight.read(start, stop).float()
        stored = factors.load().reshape(grid)
        exact = torch.ldexp(torch.ones(grid), stored.int() - 127) if stored.dtype == torch.uint8 else stored.float()
        if not bool(torch.isfinite(exact).all()):
            raise CheckpointError(f"{path}: {name}_scale_inv holds NaN or infinity. The file is damaged.")
        wide = exact.repeat_interleave(min(size[1], columns), dim=1)[:, :columns]
        return values.mul_(wide[torch.arange(start, min(stop, rows)) // size[0]]).to(dtype)

    return LazyTensor(weight.shape, dtype, read, weight.nbytes + scale.nbytes, stored_as=f"fp8-{size[0]}x{size[1]}" if block else "fp8-tensor")
