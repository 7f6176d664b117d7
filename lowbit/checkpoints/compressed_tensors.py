"""compressed-tensors folders, format "pack-quantized": what vLLM and transformers (with the compressed-tensors package) load.

Of a linear X [N, K] with b-bit codes and G scales a row (layout of version 0.20; https://github.com/vllm-project/compressed-tensors):

    X.weight_packed      int32 [N, ceil(K * b / 32)]   each row one LSB-first stream of codes, as numerics.packing
    X.weight_scale       [N, G]; [N, 1] per channel, [1] per tensor
    X.weight_zero_point  int32 [ceil(N * b / 32), G], packed along the rows; int8 [1], signed, per tensor; only when asymmetric
    X.weight_shape       int64 [2] = N, K

Their codes are signed, q = code - 2^(b-1), but stored with 2^(b-1) added: the stored field is lowbit's unsigned code, and so is
the zero-point's. K must be a multiple of the group size. Versions before 0.20 put 32 // b codes into a word, which differs for
3, 5, 6 and 7 bits; such files are refused.

What loads in transformers 5.23 with compressed-tensors 0.20 (run by tests/checkpoints/test_compressed_tensors.py), where D is
CompressedTensorsConfig(dequantize=True); where it says no, the reader stops, not the layout:

    symmetric, one scheme            with D and without
    asymmetric                       with D; without it 5.23 expects zero-points that are not packed
    several schemes, symmetric       without D; with it every linear is decoded by the first group: wrong values, no error
    several schemes, one asymmetric  no
    MoE, symmetric experts of one scheme (by per-expert names, w1 or gate_proj)   with D and without; the other linears as above
    MoE, asymmetric or dense experts                                              no
    MoE, experts of several schemes                                               no: the first group decodes all, no error

Without D the scales are cast to the model's dtype, so scale_dtype should be that dtype; with D the product is rounded to scale_dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, RecipeError, ShapeError
from ..numerics import packing
from ..scheme import CASTS, INT, Scheme
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

KIND = "compressed-tensors"
PACKED = "pack-quantized"
VERSION = "0.20.0"
GROUP_SIZES = (256, 128, 64, 32, 16)
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_EXPERT = re.compile(r"\.experts\.\d+\.")


def check(scheme: Scheme, shape: tuple[int, ...], name: str) -> None:
    """Raise RecipeError or ShapeError when compressed-tensors cannot hold a matrix [out_features, in_features] in this scheme."""
    layer = name.removesuffix(".weight")
    if scheme.format not in (INT, *CASTS):
        raise RecipeError(
            f"{layer}: compressed-tensors cannot hold {scheme.name}; it holds int2 to int8 and {', '.join(CASTS)}. "
            "Use one of those, --to gguf for ggml's types, or --to safetensors, which writes the decoded values."
        )
    if scheme.act is not None:
        raise RecipeError(f"{layer}: rounded activations ({scheme.name}) are not written as compressed-tensors yet. Use --to safetensors, which keeps them in its provenance.")
    if scheme.outliers is not None:
        raise RecipeError(f"{layer}: compressed-tensors has no place for outlier channels ({scheme.name}). Use --to safetensors, which writes the decoded values.")
    if scheme.format == INT and (scheme.zero_dtype != "int" or scheme.block[0] > 1):
        raise RecipeError(f"{layer}: compressed-tensors has whole zero-points and groups along rows, and {scheme.name} has not. Use --to safetensors, which writes the decoded values.")
    numerics.check_shape(scheme, shape, name=layer)
    if scheme.format != INT or scheme.group_size == -1 or shape[1] % scheme.group_size == 0:
        return
    fits = [f"g{size}" for size in GROUP_SIZES if shape[1] % size == 0] + ["channel"]
    choice = fits[0] if len(fits) == 1 else f"{', '.join(fits[:-1])} or {fits[-1]}"
    raise ShapeError(
        f"{layer}: compressed-tensors needs in_features to be a multiple of group_size, and {shape[1]} is not one of {scheme.group_size}.\n"
        f"Use {choice} (for this layer: a rule in the recipe)."
    )


def write(checkpoint: Checkpoint, folder: Path, *, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint as a compressed-tensors folder; integers are packed, casts become dense weights.

    folder must exist and be empty. Tensors are streamed one by one, by name in natural order. progress is told the bytes of each
    step. A checkpoint without integers becomes a plain folder without quantization_config. Raises as check does, before any work.
    """
    for name, entry in checkpoint.quantized.items():
        if not name.endswith(".weight"):
            raise CheckpointError(f"{name}: compressed-tensors quantizes weights of linears, whose names end in .weight.")
        check(entry.scheme, entry.shape, name)
    names = sorted([*checkpoint.tensors, *checkpoint.quantized], key=natural_key)
    with safetensors.ShardWriter(folder, entries=len(checkpoint.tensors) + len(_PARTS) * len(checkpoint.quantized)) as writer:
        for name in names:
            for key, tensor in _stored(checkpoint, name).items():
                progress(writer.add(key, tensor))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if section := quantization_config(checkpoint):
        config["quantization_config"] = section
    safetensors.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    safetensors.copy_files(checkpoint.files, folder)
    safetensors.write_text(folder / safetensors.PROVENANCE, json.dumps(checkpoint.provenance, indent=2) + "\n")


def natural_key(name: str) -> str:
    """Sorts layers.2 before layers.10."""
    return re.sub(r"\d+", lambda digits: digits.group().zfill(8), name)


def _stored(checkpoint: Checkpoint, name: str) -> dict[str, Tensor | LazyTensor]:
    if name in checkpoint.tensors:
        return {name: checkpoint.tensors[name]}
    qt = checkpoint.quantized[name].load()
    if qt.scheme.format != INT:
        return {name: qt.parts["weight"]}
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in encode(qt).items()}


def encode(qt: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for an integer matrix, by their local names; the inverse of decode."""
    per_tensor = qt.scheme.block == (-1, -1)
    scale = qt.parts["scale"]
    parts = {"weight_packed": packing.pack(qt.parts["codes"], qt.scheme.bits), "weight_scale": scale.reshape(1) if per_tensor else scale}
    if not qt.scheme.symmetric:
        zero = qt.parts["zero_point"]
        if per_tensor:
            parts["weight_zero_point"] = (zero.to(torch.int16).reshape(1) - qt.scheme.zero_code).to(torch.int8)
        else:
            parts["weight_zero_point"] = packing.pack(zero.T.contiguous(), qt.scheme.bits).T.contiguous()
    parts["weight_shape"] = torch.tensor(qt.shape, dtype=torch.int64)
    return parts


def decode(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str) -> QuantizedTensor:
    """The integer matrix that tensors of these local names stand for; shapes were checked before."""
    rows, columns = shape
    scale = parts["weight_scale"].reshape(-1, scheme.groups(columns))
    decoded = {"codes": packing.unpack(parts["weight_packed"], scheme.bits, columns), "scale": scale}
    if not scheme.symmetric:
        zero = parts["weight_zero_point"]
        if scheme.block == (-1, -1):
            decoded["zero_point"] = (zero.to(torch.int16) + scheme.zero_code).to(torch.uint8).reshape(1, 1)
        else:
            decoded["zero_point"] = packing.unpack(zero.T.contiguous(), scheme.bits, rows).T.contiguous()
    return QuantizedTensor(scheme, shape, dtype, decoded)


def quantization_config(checkpoint: Checkpoint) -> dict | None:
    """The section of config.json; None when no weight is an integer.

    One config group per distinct scheme. Its target is "Linear" when there is one scheme; with several, the exact names (a class
    name among them would win over exact names in vLLM's fused qkv_proj). Experts then get a group and a regex of their own, because
    transformers finds the experts' group by a regex that names them.
    """
    packed = [name for name, entry in checkpoint.quantized.items() if entry.scheme.format == INT]
    if not packed:
        return None
    schemes = {name.removesuffix(".weight"): _weights_args(checkpoint.quantized[name].scheme) for name in sorted(packed, key=natural_key)}
    distinct = {json.dumps(args): args for args in schemes.values()}
    if len(distinct) == 1:
        groups = [_group(["Linear"], *distinct.values())]
    else:
        members: dict[tuple[bool, str], list[str]] = {}
        for module, args in schemes.items():
            members.setdefault((bool(_EXPERT.search(module)), json.dumps(args)), []).append(module)
        ordered = sorted(members.items(), key=lambda item: item[0][0])
        groups = [_group(_expert_targets(modules, schemes) if expert else modules, distinct[key]) for (expert, key), modules in ordered]
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": PACKED,
        "global_compression_ratio": None,
        "ignore": _dense_linears(checkpoint),
        "kv_cache_scheme": None,
        "quant_method": KIND,
        "quantization_status": "compressed",
        "version": VERSION,
    }


def _weights_args(scheme: Scheme) -> dict:
    strategy = {(1, -1): "channel", (-1, -1): "tensor"}.get(scheme.block, "group")
    group_size = scheme.group_size if strategy == "group" else None
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": strategy, "group_size": group_size, "dynamic": False}


def _group(targets: list[str], weights: dict) -> dict:
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": PACKED}


def _expert_targets(modules: list[str], schemes: Mapping[str, dict]) -> list[str]:
    """One regex for all experts of a layer and projection where they share a scheme, else a regex for each expert."""
    pattern_of = {module: _EXPERT.sub(r".experts.\\d+.", module) for module in schemes}
    shared: dict[str, set[str]] = {}
    for module, pattern in pattern_of.items():
        shared.setdefault(pattern, set()).add(json.dumps(schemes[module]))
    targets = (pattern_of[m].replace(".", r"\.") if len(shared[pattern_of[m]]) == 1 else re.escape(m) for m in modules)
    return [f"re:{target}$" for target in dict.fromkeys(targets)]


def _dense_linears(checkpoint: Checkpoint) -> list[str]:
    """Modules with a matrix that stays dense, without embeddings; a head that is tied to the embedding has no tensor, yet is a linear."""
    dense = [name for name, entry in checkpoint.quantized.items() if entry.scheme.format != INT]
    dense += [name for name, tensor in checkpoint.tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2]
    modules = {name.removesuffix(".weight") for name in dense}
    if "lm_head.weight" not in checkpoint.quantized:
        modules.add("lm_head")
    return sorted((module for module in modules if not _is_embedding(module)), key=natural_key)


def _is_embedding(module: str) -> bool:
    leaf = module.rpartition(".")[2]
    return "embed" in leaf or leaf in ("wte", "wpe")


def open_folder(path: Path) -> Checkpoint:
    """Open a compressed-tensors folder: packed integers become quantized weights, with their codes exactly as written.

    The range of the schemes is "half", the library's convention; dtype is config.json's. Raises CheckpointError naming a format
    that is not pack-quantized, a tensor that is missing or too many, and one whose shape contradicts weight_shape.
    """
    config = safetensors.read_json(path / "config.json")
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {section!r}; expected an object.")
    groups = _read_groups(section, path)
    tensors = safetensors.open_tensors(path)
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    quantized = {f"{module}.weight": _open_module(module, tensors, _group_of(module, groups, path), config, path) for module in modules}
    used = {f"{module}.{part}" for module in modules for part in _PARTS}
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    _refuse_leftovers(dense, path)
    return Checkpoint(KIND, path, config, tensors=dense, quantized=quantized, files=safetensors.side_files(path), provenance=safetensors.read_provenance(path))


def _read_groups(section: dict, path: Path) -> list[tuple[list[str], Scheme]]:
    """(targets, scheme) of every config group; scale_dtype is filled in from the file later."""
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{path}: quantization_config.config_groups is {groups!r}; expected an object of groups.")
    for key in ("transform_config", "kv_cache_scheme"):
        if section.get(key):
            raise CheckpointError(
                f"{path}: quantization_config has {key}, which this version does not read; without it the model would compute something else."
            )
    sparsity = section.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{path}: quantization_config has the sparse format {sparsity!r}, which this version does not read.")
    if section.get("quantization_status", "compressed") != "compressed":
        raise CheckpointError(f"{path}: quantization_status is {section['quantization_status']!r}; expected 'compressed'.")
    return [_read_group(name, group, section.get("format"), path) for name, group in groups.items()]


def _read_group(name: str, group: dict, default_format: str | None, path: Path) -> tuple[list[str], Scheme]:
    where = f"{path}: config group {name!r}"
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(f"{where} is {group!r}; expected an object with targets and weights.")
    stored = group.get("format") or default_format
    if stored != PACKED:
        raise CheckpointError(f"{where} has the format {stored!r}; of compressed-tensors this version reads {PACKED}.")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise CheckpointError(f"{where} quantizes activations ({key}), which this version does not read.")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where} has the targets {targets!r}; expected a list of names.")
    return targets, _read_scheme(group["weights"], where)


def _read_scheme(args: dict, where: str) -> Scheme:
    bits, size, symmetric = args.get("num_bits"), args.get("group_size"), args.get("symmetric", True)
    if args.get("type", "int") != "int" or type(bits) is not int or not 2 <= bits <= 8 or type(symmetric) is not bool:
        raise CheckpointError(f"{where}: num_bits {bits!r}, type {args.get('type')!r}, symmetric {symmetric!r}; expected int of 2 to 8 bits.")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "group":
        if type(size) is not int or size < 1:
            raise CheckpointError(f"{where}: group_size is {size!r}; expected a positive number.")
        block = (1, size)
    elif strategy in ("channel", "tensor"):
        block = (1, -1) if strategy == "channel" else (-1, -1)
    else:
        raise CheckpointError(f"{where}: strategy {strategy!r} is not read; expected one of group, channel, tensor.")
    return Scheme(bits=bits, block=block, symmetric=symmetric, range="half")


def _group_of(module: str, groups: list[tuple[list[str], Scheme]], path: Path) -> Scheme:
    """The scheme of the group that targets a module: by its exact name, else by a regex, else by a class name, as the library does."""
    if len(groups) == 1:
        return groups[0][1]
    tests = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and _matches(target.removeprefix("re:"), module, path),
        lambda target: target == "Linear",
        lambda target: target.isidentifier(),
    )
    for test in tests:
        for targets, scheme in groups:
            if any(test(target) for target in targets):
                return scheme
    raise CheckpointError(f"{path}: {module} is packed, but no config group targets it.")


def _matches(pattern: str, module: str, path: Path) -> bool:
    try:
        return re.match(pattern, module) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: the target {pattern!r} is not a regular expression: {error}.") from error


def _open_module(module: str, tensors: Mapping[str, LazyTensor], scheme: Scheme, config: dict, path: Path) -> LazyQuantized:
    parts = {part: tensors[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in tensors}
    needed = [part for part in _PARTS if part != "weight_zero_point" or not scheme.symmetric]
    if missing := [part for part in needed if part not in parts]:
        raise CheckpointError(f"{path}: {module} has no {missing[0]}. The download is incomplete.")
    if extra := [part for part in (*parts, "weight") if part not in needed and f"{module}.{part}" in tensors]:
        raise CheckpointError(f"{path}: {module} has {extra[0]}, which its scheme {scheme.name} does not use.")
    shape = _read_shape(module, parts["weight_shape"], path)
    if scheme.group_size != -1 and shape[1] % scheme.group_size:
        raise CheckpointError(f"{path}: {module}: weight_shape is {list(shape)}, whose columns are not a multiple of group_size {scheme.group_size}.")
    _check_parts(module, parts, scheme, shape, path)
    scale_dtype = _FLOATS[parts["weight_scale"].dtype]
    scheme = Scheme(**{**scheme.__dict__, "scale_dtype": scale_dtype})
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in _FLOATS.values() else scale_dtype

    def load() -> QuantizedTensor:
        loaded = {part: tensor.load() for part, tensor in parts.items()}
        if not bool(torch.isfinite(loaded["weight_scale"]).all()):
            raise CheckpointError(f"{path}: {module}.weight_scale holds NaN or infinity. The file is damaged.")
        return decode(loaded, scheme, shape, dtype)

    return LazyQuantized(scheme, shape, getattr(torch, dtype), load, sum(tensor.nbytes for tensor in parts.values()))


def _read_shape(module: str, stored: LazyTensor, path: Path) -> tuple[int, int]:
    if stored.shape != (2,) or stored.dtype not in (torch.int64, torch.int32):
        raise CheckpointError(f"{path}: {module}.weight_shape is {stored.dtype} {list(stored.shape)}; expected two integers.")
    rows, columns = stored.load().tolist()
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{path}: {module}.weight_shape is {[rows, columns]}; expected positive numbers.")
    return rows, columns


def _check_parts(module: str, parts: Mapping[str, LazyTensor], scheme: Scheme, shape: tuple[int, int], path: Path) -> None:
    """Refuse tensors whose shape or dtype contradicts weight_shape, before they are used."""
    rows, columns = shape
    per_tensor, groups = scheme.block == (-1, -1), scheme.groups(columns)
    expected = {
        "weight_packed": ((rows, packing.words_per_row(columns, scheme.bits)), (torch.int32,)),
        "weight_scale": ((1,) if per_tensor else (rows, groups), tuple(_FLOATS)),
        "weight_zero_point": ((1,), (torch.int8,)) if per_tensor else ((packing.words_per_row(rows, scheme.bits), groups), (torch.int32,)),
    }
    for part, (size, dtypes) in expected.items():
        if part not in parts:
            continue
        found = parts[part]
        if found.shape != size or found.dtype not in dtypes:
            hint = " Releases before 0.20 packed this width otherwise." if part == "weight_packed" and 32 % scheme.bits else ""
            raise CheckpointError(
                f"{path}: {module}.{part} is {found.dtype} {list(found.shape)}; weight_shape {list(shape)} and {scheme.name} need {dtypes[0]} {list(size)}.{hint}"
            )


def _refuse_leftovers(names: Iterable[str], path: Path) -> None:
    for name in names:
        leaf = name.rpartition(".")[2]
        if leaf in ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "input_scale"):
            raise CheckpointError(f"{path}: {name} belongs to no packed weight, or to a layout that this version does not read.")
