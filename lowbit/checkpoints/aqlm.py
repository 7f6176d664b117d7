"""AQLM folders: additive codebooks, as the authors' package and transformers load them.

    X.codes       int8 (more than 8 bits: int16) [N, K / 8, M]    two's complement: a code of 2^(b-1) and more is stored minus 2^b
    X.codebooks   float [M, 2^b, 1, 8]
    X.scales      float [N, 1, 1, 1]

w[i, 8 j + t] = scales[i] sum_m codebooks[m, codes[i, j, m], 0, t]. Read are groups of 8 inputs of one output, which all published models have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, RecipeError
from ..numerics import additive
from ..scheme import Scheme
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

KIND = "aqlm"
PARTS = ("codes", "codebooks", "scales")
FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise RecipeError or ShapeError when AQLM's layout cannot hold a matrix [out_features, in_features] in this scheme."""
    layer = name.removesuffix(".weight")
    if scheme.format not in additive.KINDS or scheme.outliers is not None or scheme.act is not None:
        known = ", ".join(kind.removeprefix("aqlm_") for kind in additive.KINDS)
        raise RecipeError(f"{layer}: aqlm cannot hold {scheme.said}; it holds additive codebooks ({known}) with nothing rounded but weights. Use a recipe such as aqlm-2x8, or another target.")
    numerics.check_shape(scheme, shape, name=layer)


def encode(qt: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, by their local names; decode is the inverse."""
    bits = additive.KINDS[qt.scheme.format][1]
    codes = additive.whole_codes(qt)
    signed = torch.where(codes >= 1 << bits - 1, codes - (1 << bits), codes)
    return {"codes": signed.to(torch.int8 if bits <= 8 else torch.int16), "codebooks": qt.parts["codebooks"].unsqueeze(2), "scales": qt.parts["scale"].view(-1, 1, 1, 1)}


def decode(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    """The matrix that tensors of these local names stand for; their shapes were checked before. Codebooks and scales of another dtype become float16."""
    bits = additive.KINDS[scheme.format][1]
    return additive.from_codes(parts["codes"].long() & (1 << bits) - 1, parts["codebooks"].squeeze(2), parts["scales"].view(-1), scheme, dtype)


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint as an AQLM folder; folder must exist and be empty. Raises as check does, before any work."""
    for name, entry in checkpoint.quantized.items():
        check(entry.scheme, entry.shape, name)
    scheme = safetensors.one_scheme(checkpoint, KIND)
    count, bits = additive.KINDS[scheme.format]
    # transformers 5 matches names of modules, the authors' models list parameters: both are written.
    dense = [name for name in checkpoint.tensors if name.endswith(".weight")]
    modules = sorted({"lm_head", *(name.removesuffix(".weight") for name in dense)}, key=safetensors.natural_key)
    section = {
        "quant_method": KIND, "in_group_size": additive.GROUP, "out_group_size": 1, "num_codebooks": count, "nbits_per_codebook": bits,
        "linear_weights_not_to_quantize": [*modules, *(f"{module}.weight" for module in modules)],
    }  # fmt: skip

    def stored(name: str) -> dict[str, Tensor]:
        return {f"{name.removesuffix('weight')}{part}": value for part, value in encode(checkpoint.quantized[name].load()).items()}

    safetensors.write_packed(checkpoint, folder, stored, section, entries=len(PARTS), shard_bytes=shard_bytes, progress=progress)


def open_folder(path: Path) -> Checkpoint:
    """Open an AQLM folder: its matrices become quantized weights, with their codes exactly as written. CheckpointError for tensors that contradict each other."""
    config = safetensors.read_json(path / "config.json")
    section = config["quantization_config"]
    name = f"aqlm_{section.get('num_codebooks')}x{section.get('nbits_per_codebook')}"
    if name not in additive.KINDS or section.get("in_group_size") != additive.GROUP or section.get("out_group_size") != 1:
        raise CheckpointError(
            f"{path}: {name.removeprefix('aqlm_')} codebooks with groups of {section.get('out_group_size')!r} x {section.get('in_group_size')!r}; of AQLM this version reads "
            f"{', '.join(kind.removeprefix('aqlm_') for kind in additive.KINDS)} with groups of 1 x 8."
        )
    tensors = safetensors.open_tensors(path)
    modules = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
    quantized = {f"{module}.weight": _open_module(module, tensors, numerics.scheme_of(name), config, path) for module in modules}
    used = {f"{module}.{part}" for module in modules for part in PARTS}
    dense = {key: tensor for key, tensor in tensors.items() if key not in used}
    if left := next((key for key in dense if key.rpartition(".")[2] in PARTS), None):
        raise CheckpointError(f"{path}: {left} belongs to no packed weight.")
    return Checkpoint(KIND, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path))


def _open_module(module: str, tensors: Mapping[str, LazyTensor], scheme: Scheme, config: dict, path: Path) -> LazyQuantized:
    found = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}
    if missing := [part for part in PARTS if part not in found]:
        raise CheckpointError(f"{path}: {module} has no {missing[0]}. The download is incomplete.")
    count, bits = additive.KINDS[scheme.format]
    stored = found["codes"].shape
    if len(stored) != 3 or 0 in stored:
        raise CheckpointError(f"{path}: {module}.codes is {list(stored)}; expected [N, K / 8, {count}].")
    rows, columns = stored[0], stored[1] * additive.GROUP
    expected = {
        "codes": ((rows, stored[1], count), (torch.int8 if bits <= 8 else torch.int16,)), "codebooks": ((count, 1 << bits, 1, additive.GROUP), tuple(FLOATS)),
        "scales": ((rows, 1, 1, 1), tuple(FLOATS)),
    }  # fmt: skip
    for part, (shape, dtypes) in expected.items():
        if found[part].shape != shape or found[part].dtype not in dtypes:
            raise CheckpointError(f"{path}: {module}.{part} is {found[part].dtype} {list(found[part].shape)}; {scheme.format} of {[rows, columns]} needs {dtypes[0]} {list(shape)}.")
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in FLOATS.values() else "float16"

    def load() -> QuantizedTensor:
        loaded = {part: lazy.load() for part, lazy in found.items()}
        for part in ("codebooks", "scales"):
            half = loaded[part].half()
            if not bool(torch.isfinite(half).all()):
                raise CheckpointError(f"{path}: {module}.{part} holds NaN, infinity or what does not fit float16.")
            if not torch.equal(half.float(), loaded[part].float()):
                raise CheckpointError(f"{path}: {module}.{part} is {loaded[part].dtype} and holds numbers that float16 would change; this version reads what float16 holds.")
        return decode(loaded, scheme, (rows, columns), dtype)

    return LazyQuantized(scheme, (rows, columns), getattr(torch, dtype), load, sum(lazy.nbytes for lazy in found.values()))
