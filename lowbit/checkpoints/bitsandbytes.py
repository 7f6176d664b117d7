"""bitsandbytes folders: NF4 and FP4 with and without double quantization, and LLM.int8()'s int8, as transformers saves and loads them.

Of a linear X [N, K], 4 bits:

    X.weight                                      uint8 [ceil(N K / 2), 1]    codes of the matrix read row by row, the first of two in the high half of a byte
    X.weight.absmax                               float32 [blocks]; uint8 with double quantization
    X.weight.quant_map                            float32 [16]                the value of each code
    X.weight.nested_absmax, .nested_quant_map     float32 [ceil(blocks / 256)], [256]      (double quantization)
    X.weight.quant_state.bitsandbytes__nf4        uint8                       JSON: quant_type, blocksize, dtype, shape, and nested_blocksize, nested_dtype, nested_offset

8 bits:

    X.weight  int8 [N, K]    X.SCB  float32 [N], the largest magnitude of each row: w = code * SCB / 127    X.weight_format  uint8 [], 0
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, RecipeError
from ..numerics import codebook, integer
from ..scheme import CASTS, INT, Activation, Rounding, Scheme
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

KIND = "bitsandbytes"
STATE = "quant_state.bitsandbytes__"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
THRESHOLD = 6.0
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise RecipeError when bitsandbytes cannot hold a matrix [out_features, in_features] in this scheme."""
    layer = name.removesuffix(".weight")
    if scheme.format in CASTS:
        raise RecipeError(f"{layer}: bitsandbytes packs every linear layer of the blocks, and this one is to be {scheme.name}. Use --to compressed-tensors for mixtures.")
    four = scheme.format in codebook.CODES and scheme.block[1] in BLOCKS and scheme.nested in (None, codebook.NESTED_BLOCK) and scheme.act is None
    # What is stored is max|x|: scales of other ranges do not come back bit for bit.
    eight = scheme.format == INT and scheme.bits == 8 and scheme.symmetric and scheme.block == (1, -1) and scheme.scale_dtype == "float32" and scheme.range == "textbook"
    if scheme.outliers is not None or not (four or (eight and (scheme.act is None or scheme.act == Activation(range="textbook", threshold=THRESHOLD)))):
        raise RecipeError(
            f"{layer}: bitsandbytes cannot hold {scheme.said}; it holds nf4 and fp4 in blocks of {', '.join(map(str, BLOCKS))} (with dq or without), and LLM.int8() (llm-int8). "
            "Use one of those, or --to safetensors, which writes the decoded values."
        )
    numerics.check_shape(scheme, shape, name=layer)


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint as a bitsandbytes folder; folder must exist and be empty. Raises as check does, before any work."""
    for name, entry in checkpoint.quantized.items():
        check(entry.scheme, entry.shape, name)
    scheme = safetensors.one_scheme(checkpoint, KIND)
    encode = _encode8 if scheme.format == INT else _encode4
    stored = lambda name: encode(checkpoint.quantized[name].load(), name.removesuffix(".weight"))
    section = _section(scheme, safetensors.dense_linears(checkpoint))
    safetensors.write_packed(checkpoint, folder, stored, section, entries=6, shard_bytes=shard_bytes, progress=progress)


def _section(scheme: Scheme, dense: list[str]) -> dict:
    four = scheme.format != INT
    return {
        "quant_method": KIND, "load_in_4bit": four, "load_in_8bit": not four, "_load_in_4bit": four, "_load_in_8bit": not four, "bnb_4bit_quant_type": scheme.format if four else "fp4",
        "bnb_4bit_use_double_quant": scheme.nested is not None, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": THRESHOLD,
        "llm_int8_skip_modules": dense, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
    }  # fmt: skip


def _encode4(qt: QuantizedTensor, module: str) -> dict[str, Tensor]:
    codes = qt.parts["codes"].flatten()
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    state: dict[str, object] = {"quant_type": qt.scheme.format, "blocksize": qt.scheme.block[1], "dtype": qt.dtype, "shape": list(qt.shape)}
    parts = {"": (codes[::2] << 4 | codes[1::2]).unsqueeze(1), ".quant_map": codebook.table(qt.scheme.format)}
    if qt.scheme.nested:
        state |= {"nested_blocksize": qt.scheme.nested, "nested_dtype": "float32", "nested_offset": float(qt.parts["nested_offset"])}
        parts |= {".absmax": qt.parts["absmax_codes"], ".nested_absmax": qt.parts["nested_absmax"], ".nested_quant_map": codebook.dynamic_table()}
    else:
        parts[".absmax"] = qt.parts["absmax"].flatten()
    parts[f".{STATE}{qt.scheme.format}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{module}.weight{part}": tensor for part, tensor in parts.items()}


def _encode8(qt: QuantizedTensor, module: str) -> dict[str, Tensor]:
    codes = (qt.parts["codes"].to(torch.int16) - qt.scheme.zero_code).to(torch.int8)
    return {f"{module}.weight": codes, f"{module}.SCB": qt.parts["scale"].float().flatten() * 127, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}


# ------------------------------------------------------------------------------------------------------------------ reading


def open_folder(path: Path) -> Checkpoint:
    """Open a bitsandbytes folder: its matrices become quantized weights, with their codes exactly as written. CheckpointError for tensors that contradict each other."""
    config = safetensors.read_json(path / "config.json")
    section = config["quantization_config"]
    tensors = safetensors.open_tensors(path)
    quantized: dict[str, LazyQuantized] = {}
    activations: dict[str, Rounding] = {}
    used: set[str] = set()
    threshold = section.get("llm_int8_threshold", THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold) or threshold < 0:
        raise CheckpointError(f"{path}: llm_int8_threshold is {threshold!r}; expected a number of 0 or more.")
    for name in tensors:
        if f".weight.{STATE}" in name:
            weight = name[: name.index(f".{STATE}")]
            quantized[weight], parts = _open4(weight, name, tensors, path)
            used |= parts
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            quantized[weight] = _open8(weight, tensors, config, path)
            used |= {weight, name, f"{weight}_format"}
            activations[weight] = Rounding(Activation(range="textbook", threshold=float(threshold) or None))
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    if left := next((name for name in dense if ".weight." in name or name.endswith(".weight_format")), None):
        raise CheckpointError(f"{path}: {left} belongs to no packed weight.")
    return Checkpoint(KIND, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path), activations)


def _open4(weight: str, name: str, tensors: Mapping[str, LazyTensor], path: Path) -> tuple[LazyQuantized, set[str]]:
    state = _read_state(tensors[name], name, path)
    fmt, size, (rows, columns), dtype, nested = state["quant_type"], state["blocksize"], state["shape"], state["dtype"], state.get("nested_blocksize")
    blocks = -(-rows * columns // size)
    expected = {"": ((-(-rows * columns // 2), 1), torch.uint8), ".absmax": ((blocks,), torch.uint8 if nested else torch.float32), ".quant_map": ((16,), torch.float32)}
    if nested:
        expected |= {".nested_absmax": ((-(-blocks // nested),), torch.float32), ".nested_quant_map": ((256,), torch.float32)}
    for part, (shape, kind) in expected.items():
        lazy = tensors.get(f"{weight}{part}")
        if lazy is None or lazy.shape != shape or lazy.dtype != kind:
            found = "missing" if lazy is None else f"{lazy.dtype} {list(lazy.shape)}"
            raise CheckpointError(f"{path}: {weight}{part} is {found}; a matrix {[rows, columns]} of {fmt} in blocks of {size} needs {kind} {list(shape)}.")
    parts = {part: tensors[f"{weight}{part}"] for part in expected}
    scheme = Scheme(fmt, 4, (1, size), nested=nested)

    def load() -> QuantizedTensor:
        loaded = {part: lazy.load() for part, lazy in parts.items()}
        tables = [(".quant_map", codebook.table(fmt)), *([(".nested_quant_map", codebook.dynamic_table())] if nested else [])]
        for part, table in tables:
            if not torch.equal(loaded[part], table):
                raise CheckpointError(f"{path}: {weight}{part} is not the table of {fmt}, so its codes mean something else.")
        packed = loaded[""].flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: rows * columns].view(rows, columns)
        magnitudes = [value for part, value in loaded.items() if part.endswith("absmax") and value.is_floating_point()]
        if not all(bool(torch.isfinite(value).all()) for value in magnitudes):
            raise CheckpointError(f"{path}: {weight}.absmax holds NaN or infinity. The file is damaged.")
        if nested:
            made = {"codes": codes, "absmax_codes": loaded[".absmax"], "nested_absmax": loaded[".nested_absmax"], "nested_offset": torch.tensor(state["nested_offset"])}
            return QuantizedTensor(scheme, (rows, columns), dtype, made)
        return codebook.from_codes(codes, loaded[".absmax"], scheme, dtype)

    return LazyQuantized(scheme, (rows, columns), FLOATS[dtype], load, sum(lazy.nbytes for lazy in parts.values())), {name, *(f"{weight}{part}" for part in expected)}


def _read_state(lazy: LazyTensor, name: str, path: Path) -> dict:
    """The JSON beside a 4-bit weight, checked."""
    try:
        if lazy.dtype != torch.uint8 or len(lazy.shape) != 1 or lazy.numel > 4096:
            raise ValueError(f"{lazy.dtype} {list(lazy.shape)}")
        state = safetensors.parse_json(bytes(lazy.load().tolist()).decode(), name)
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {name} is not the JSON that bitsandbytes writes ({error}).") from error
    whole = lambda value, least: type(value) is int and least <= value <= 1 << 40
    shape, nested = state.get("shape"), state.get("nested_blocksize")
    good = (
        isinstance(shape, list) and len(shape) == 2 and all(whole(side, 1) for side in shape) and state.get("quant_type") in tuple(codebook.CODES) and state.get("dtype") in tuple(FLOATS)
        and whole(state.get("blocksize"), 2) and (nested is None or (whole(nested, 2) and isinstance(state.get("nested_offset"), float) and math.isfinite(state["nested_offset"])))
    )  # fmt: skip
    if not good or not name.endswith(f"{STATE}{state['quant_type']}"):
        raise CheckpointError(f"{path}: {name} says {state!r}; expected quant_type, blocksize, dtype, shape [N, K], and with double quantization nested_blocksize and nested_offset.")
    return state


def _open8(weight: str, tensors: Mapping[str, LazyTensor], config: dict, path: Path) -> LazyQuantized:
    codes, peaks = tensors.get(weight), tensors[f"{weight.removesuffix('weight')}SCB"]
    if codes is None or codes.dtype != torch.int8 or len(codes.shape) != 2 or 0 in codes.shape or peaks.shape != codes.shape[:1] or peaks.dtype != torch.float32:
        found = "missing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
        raise CheckpointError(f"{path}: {weight} is {found} and its SCB {peaks.dtype} {list(peaks.shape)}; expected int8 [N, K] and float32 [N].")
    stored = tensors.get(f"{weight}_format")
    if stored is not None and (stored.numel != 1 or stored.load().item() != 0):
        raise CheckpointError(f"{path}: {weight}_format is {stored.load().tolist() if stored.numel == 1 else list(stored.shape)}; of LLM.int8() this version reads format 0, by rows.")
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in tuple(FLOATS) else "float32"
    shape, scheme = (codes.shape[0], codes.shape[1]), Scheme(bits=8, block=(1, -1), range="textbook", act=Activation(range="textbook", threshold=THRESHOLD))

    def load() -> QuantizedTensor:
        scale = peaks.load().unsqueeze(1) / 127
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(f"{path}: {weight.removesuffix('weight')}SCB holds NaN or infinity. The file is damaged.")
        return integer.from_codes((codes.load().to(torch.int16) + 128).to(torch.uint8), scale, None, scheme, dtype)

    return LazyQuantized(scheme, shape, FLOATS[dtype], load, codes.nbytes + peaks.nbytes)
