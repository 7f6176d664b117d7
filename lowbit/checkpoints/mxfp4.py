"""gpt-oss as it is published: experts in MXFP4 (quant_method "mxfp4"), all others dense.

Of the experts P = model.layers.L.mlp.experts, with E of them:

    P.gate_up_proj_blocks   uint8 [E, N, K / 32, 16]    byte j of a block holds the elements 2 j (low half) and 2 j + 1, E2M1; rows of gate and up in turn
    P.gate_up_proj_scales   uint8 [E, N, K / 32]        E8M0: 2^(s - 127)
    P.gate_up_proj_bias     [E, N]; and the same of down_proj

Expert e is read as the matrix P.gate_up_proj.e.weight [N, K] (models/skeleton.py puts the matrices of all experts into the parameter).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..numerics import scheme_of
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

KIND = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"


def open_folder(path: Path) -> Checkpoint:
    """Open a folder with experts in MXFP4: each expert's matrices become quantized weights. CheckpointError for tensors that contradict each other."""
    config = safetensors.read_json(path / "config.json")
    tensors = safetensors.open_tensors(path)
    quantized: dict[str, LazyQuantized] = {}
    stacks = [name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)]
    for stack in stacks:
        quantized |= _open_stack(stack, tensors, config, path)
    used = {f"{stack}{part}" for stack in stacks for part in (BLOCKS, SCALES)}
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    if left := next((name for name in dense if name.endswith(SCALES)), None):
        raise CheckpointError(f"{path}: {left} belongs to no blocks. The download is incomplete.")
    return Checkpoint(KIND, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path))


def _open_stack(stack: str, tensors: Mapping[str, LazyTensor], config: dict, path: Path) -> dict[str, LazyQuantized]:
    blocks, scales = tensors[f"{stack}{BLOCKS}"], tensors.get(f"{stack}{SCALES}")
    shape = blocks.shape
    good = len(shape) == 4 and 0 not in shape and shape[3] == 16 and blocks.dtype == torch.uint8
    if not good or scales is None or scales.shape != shape[:3] or scales.dtype != torch.uint8:
        found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise CheckpointError(f"{path}: {stack}{BLOCKS} is {blocks.dtype} {list(shape)} and {stack}{SCALES} {found}; expected uint8 [E, N, K / 32, 16] and uint8 [E, N, K / 32].")
    count, rows, columns = shape[0], shape[1], 32 * shape[2]
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in ("float32", "float16", "bfloat16") else "bfloat16"
    factors = scales

    def load(expert: int) -> QuantizedTensor:
        packed, scale = blocks.read(expert, expert + 1)[0], factors.read(expert, expert + 1)[0]
        if bool((scale == 255).any()):
            raise CheckpointError(f"{path}: {stack}{SCALES} holds 255, which is NaN in E8M0. The file is damaged.")
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(rows, columns)
        return QuantizedTensor(scheme_of("mxfp4"), (rows, columns), dtype, {"codes": codes, "scale": scale})

    size = (blocks.nbytes + scales.nbytes) // count
    entry = lambda expert: LazyQuantized(scheme_of("mxfp4"), (rows, columns), getattr(torch, dtype), lambda: load(expert), size)
    return {f"{stack}.{expert}.weight": entry(expert) for expert in range(count)}
