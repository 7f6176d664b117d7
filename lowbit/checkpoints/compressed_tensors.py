"""compressed-tensors folders: what vLLM and transformers (with the compressed-tensors package) load. The layouts of single matrices are in ct_layouts.py.

K must be a multiple of the group size. Versions before 0.20 put 32 // b codes into a word of pack-quantized, which differs for 3, 5, 6 and 7 bits; such files are refused.

What loads in transformers 5.23 with compressed-tensors 0.20 (run by tests/checkpoints/test_compressed_tensors.py), where D is
CompressedTensorsConfig(dequantize=True); where it says no, the reader stops, not the layout:

    symmetric, one scheme            with D and without
    asymmetric                       with D; without it 5.23 expects zero-points that are not packed
    several schemes, symmetric       without D; with it every linear is decoded by the first group: wrong values, no error
    several schemes, one asymmetric  no
    MoE, symmetric experts of one scheme (by per-expert names, w1 or gate_proj)   with D and without; the other linears as above
    MoE, asymmetric or dense experts                                              no
    MoE, experts of several schemes                                               no: the first group decodes all, no error
    rounded activations (int-quantized, float-quantized)                          without D; with it activations stay as they are
    nvfp4, mxfp4, mxfp8              in bfloat16, or with D

Without D the scales are cast to the model's dtype, so scale_dtype should be that dtype; with D the product is rounded to scale_dtype.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, RecipeError, ShapeError
from ..scheme import CASTS, INT, Activation, Rounding, Scheme
from ..tensor import QuantizedTensor
from . import ct_layouts, safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor
from .ct_layouts import FLOATS, FP8, LAYOUTS, PACKED, layout_of
from .patterns import Patterns

KIND = "compressed-tensors"
VERSION = "0.20.0"
GROUP_SIZES = (256, 128, 64, 32, 16)
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale")
_FAMILIES = ({PACKED, "int-quantized"}, {"float-quantized", "naive-quantized"})  # layouts whose schemes another writer may put into either
_INPUT_PARTS = ("input_scale", "input_zero_point")
_FORMATS = "int2 to int8, fp8 (E4M3 per channel or tensor), nvfp4, mxfp4, mxfp8 (E4M3)"
_EXPERT = re.compile(r"\.experts\.\d+\.")


def check(scheme: Scheme, shape: tuple[int, ...], name: str) -> None:
    """Raise RecipeError or ShapeError when compressed-tensors cannot hold a matrix [out_features, in_features] in this scheme."""
    layer = name.removesuffix(".weight")
    if scheme.format not in CASTS and layout_of(scheme) is None:
        plain = replace(scheme, act=None)
        if scheme.outliers is not None:
            raise RecipeError(f"{layer}: compressed-tensors has no place for outlier channels ({scheme.name}). Use --to safetensors, which writes the decoded values.")
        if scheme.act is not None and layout_of(plain) is not None:
            raise RecipeError(
                f"{layer}: compressed-tensors has no layout for {plain.name} with inputs rounded as {scheme.act.name}; it has integers with integers, fp8 with fp8, MX formats with MX formats, "
                "and no threshold. Use --to safetensors, which keeps the rounding in its provenance."
            )
        if scheme.format == INT:
            raise RecipeError(f"{layer}: compressed-tensors has whole zero-points and groups along rows, and {scheme.name} has not. Use --to safetensors, which writes the decoded values.")
        raise RecipeError(
            f"{layer}: compressed-tensors cannot hold {scheme.said}; it holds {_FORMATS} and {', '.join(CASTS)}. "
            "Use one of those, --to gguf for ggml's types, or --to safetensors, which writes the decoded values."
        )
    numerics.check_shape(scheme, shape, name=layer)
    if scheme.format != INT or scheme.group_size == -1 or shape[1] % scheme.group_size == 0:
        return
    fits = [f"g{size}" for size in GROUP_SIZES if shape[1] % size == 0] + ["channel"]
    choice = fits[0] if len(fits) == 1 else f"{', '.join(fits[:-1])} or {fits[-1]}"
    raise ShapeError(
        f"{layer}: compressed-tensors needs in_features to be a multiple of group_size, and {shape[1]} is not one of {scheme.group_size}.\n"
        f"Use {choice} (for this layer: a rule in the recipe)."
    )


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a checkpoint as a compressed-tensors folder; casts become dense weights.

    folder must exist and be empty. Tensors are streamed one by one, by name in natural order. progress is told the bytes of each
    step. A checkpoint with nothing but casts becomes a plain folder without quantization_config. Raises as check does, before any work.
    """
    for name, entry in checkpoint.quantized.items():
        if not name.endswith(".weight"):
            raise CheckpointError(f"{name}: compressed-tensors quantizes weights of linears, whose names end in .weight.")
        check(entry.scheme, entry.shape, name)
    safetensors.write_packed(checkpoint, folder, lambda name: _stored(checkpoint, name), quantization_config(checkpoint), entries=len(_PARTS), shard_bytes=shard_bytes, progress=progress)


def _stored(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    qt = checkpoint.quantized[name].load()
    if qt.scheme.format in CASTS:
        return {name: qt.parts["weight"]}
    parts = ct_layouts.encode(qt)
    if name in checkpoint.activations:
        parts |= ct_layouts.activation_tensors(checkpoint.activations[name])
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}


def quantization_config(checkpoint: Checkpoint) -> dict | None:
    """The section of config.json; None when no weight is quantized (casts are not).

    One config group per distinct scheme. Its target is "Linear" when there is one scheme; with several, the exact names (a class
    name among them would win over exact names in vLLM's fused qkv_proj). Experts then get a group and a regex of their own, because
    transformers finds the experts' group by a regex that names them.
    """
    packed = [name for name, entry in checkpoint.quantized.items() if entry.scheme.format not in CASTS]
    if not packed:
        return None
    schemes = {name.removesuffix(".weight"): _arguments(checkpoint.quantized[name].scheme) for name in sorted(packed, key=safetensors.natural_key)}
    distinct = {json.dumps(args): args for args in schemes.values()}
    if len(distinct) == 1:
        head = ["lm_head"] if "lm_head.weight" in packed else []  # in vLLM the head is no Linear
        groups = [_group(["Linear", *head], *distinct.values())]
    else:
        members: dict[tuple[bool, str], list[str]] = {}
        for module, args in schemes.items():
            members.setdefault((bool(_EXPERT.search(module)), json.dumps(args)), []).append(module)
        ordered = sorted(members.items(), key=lambda item: item[0][0])
        places = lambda modules: [_place(module, checkpoint.config) for module in modules]
        groups = [_group(_expert_targets(modules, schemes) if expert else places(modules), distinct[key]) for (expert, key), modules in ordered]
    formats = {group["format"] for group in groups}
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [_place(module, checkpoint.config) for module in safetensors.dense_linears(checkpoint)],
        "kv_cache_scheme": None,
        "quant_method": KIND,
        "quantization_status": "compressed",
        "version": VERSION,
    }


def _arguments(scheme: Scheme) -> dict:
    """weights, input_activations and format of a config group."""
    layout = layout_of(scheme)
    assert layout is not None
    return {"weights": LAYOUTS[layout].arguments(scheme), "input_activations": None if scheme.act is None else ct_layouts.activation_arguments(scheme.act), "format": layout}


def _group(targets: list[str], arguments: dict) -> dict:
    return {"targets": targets, "weights": arguments["weights"], "input_activations": arguments["input_activations"], "output_activations": None, "format": arguments["format"]}


def _place(module: str, config: Mapping[str, Any]) -> str:
    """A module as config.json names it: by its name; of a vision-language model by a regex, since transformers' modules have other names than its files there (model.vision_tower for vision_tower,
    model.language_model.layers for language_model.model.layers), and the library compares with both."""
    if "text_config" not in config or module == "lm_head":
        return module
    inner = module.removeprefix("model.")
    if inner.startswith("language_model."):
        return rf"re:.*language_model\.(model\.)?{re.escape(inner.removeprefix('language_model.').removeprefix('model.'))}$"
    return f"re:.*{re.escape(inner)}$"


def _expert_targets(modules: list[str], schemes: Mapping[str, dict]) -> list[str]:
    """One regex for all experts of a layer and projection where they share a scheme, else a regex for each expert."""
    pattern_of = {module: _EXPERT.sub(r".experts.\\d+.", module) for module in schemes}
    shared: dict[str, set[str]] = {}
    for module, pattern in pattern_of.items():
        shared.setdefault(pattern, set()).add(json.dumps(schemes[module]))
    targets = (pattern_of[m].replace(".", r"\.") if len(shared[pattern_of[m]]) == 1 else re.escape(m) for m in modules)
    return [f"re:{target}$" for target in dict.fromkeys(targets)]


def open_folder(path: Path) -> Checkpoint:
    """Open a compressed-tensors folder: its matrices become quantized weights, with their codes exactly as written.

    The range of integer schemes is "half", the library's convention; dtype is config.json's. Raises CheckpointError naming a format
    that is not read, a tensor that is missing or too many, and one whose shape contradicts the others.
    """
    config = safetensors.read_json(path / "config.json")
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {section!r}; expected an object.")
    targets = _Targets(_read_groups(section, path), path)
    tensors = safetensors.open_tensors(path)
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    plain = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale") and f"{name.removesuffix('_scale')}_packed" not in tensors]
    modules = [*packed, *(module for module in plain if f"{module}.weight" in tensors)]
    quantized, activations, used = {}, {}, set()
    for module in modules:
        scheme, layout = targets.find(module)
        name = f"{module}.weight"
        quantized[name] = _open_module(module, tensors, scheme, layout, config, path)
        used |= {f"{module}.{part}" for part in LAYOUTS[layout].shapes(scheme, quantized[name].shape)}
        if scheme.act is not None:
            activations[name] = _read_rounding(module, tensors, scheme.act, path)
            used |= {f"{module}.{part}" for part in _INPUT_PARTS}
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    _refuse_leftovers(dense, path)
    provenance = safetensors.read_provenance(path)
    return Checkpoint(KIND, path, config, tensors=dense, quantized=quantized, files=safetensors.side_files(path), provenance=provenance, activations=activations)


def _read_rounding(module: str, tensors: Mapping[str, LazyTensor], act: Activation, path: Path) -> Rounding:
    """The rounding of a module's inputs; of a static one with the scale that the file holds."""
    if not act.static:
        return Rounding(act)
    values = {}
    for part in _INPUT_PARTS[: 1 if act.symmetric else 2]:
        lazy = tensors.get(f"{module}.{part}")
        if lazy is None or lazy.numel != 1 or lazy.dtype.is_floating_point != (part == "input_scale"):
            raise CheckpointError(f"{path}: {module}.{part} is {'missing' if lazy is None else f'{lazy.dtype} {list(lazy.shape)}'}; a static scale of activations is one number.")
        values[part] = float(lazy.load().reshape(()).float())
    scale = values["input_scale"]
    if not (math.isfinite(scale) and scale > 0):
        raise CheckpointError(f"{path}: {module}.input_scale is {scale}; expected a positive number.")
    return Rounding(act, scale, values["input_zero_point"] + 2 ** (act.bits - 1) if not act.symmetric else 0.0)


def _read_groups(section: dict, path: Path) -> list[tuple[list[str], Scheme, str]]:
    """(targets, scheme, layout) of every config group; scale_dtype is filled in from the file later."""
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


def _read_group(name: str, group: dict, default_format: str | None, path: Path) -> tuple[list[str], Scheme, str]:
    where = f"{path}: config group {name!r}"
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(f"{where} is {group!r}; expected an object with targets and weights.")
    layout = default_format if group.get("format") is None else group["format"]
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise CheckpointError(f"{where} has the format {layout!r}; of compressed-tensors this version reads {', '.join(LAYOUTS)}.")
    if group.get("output_activations") is not None:
        raise CheckpointError(f"{where} quantizes activations (output_activations), which this version does not read.")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where} has the targets {targets!r}; expected a list of names.")
    scheme = replace(_read_scheme(group["weights"], where), act=_read_activation(group.get("input_activations"), where))
    alike = next((family for family in _FAMILIES if layout in family), {layout})
    if layout_of(replace(scheme, act=None)) not in alike or layout_of(scheme) is None:
        raise CheckpointError(f"{where}: the format {layout!r} does not go with weights {scheme.name}.")
    return targets, scheme, layout


def _read_activation(args: object, where: str) -> Activation | None:
    if args is None:
        return None
    if not isinstance(args, dict):
        raise CheckpointError(f"{where}: input_activations is {args!r}; expected an object.")
    kind, bits, strategy, dynamic, symmetric = args.get("type", "int"), args.get("num_bits"), args.get("strategy"), args.get("dynamic", False), args.get("symmetric", True)
    refused = CheckpointError(f"{where} quantizes activations (input_activations) as {args!r}, which this version does not read.")
    if kind not in ("int", "float") or type(bits) is not int or not 2 <= bits <= 8 or type(dynamic) is not bool or type(symmetric) is not bool:
        raise refused
    per = "tensor" if strategy is None and not dynamic else strategy
    formats = {("int", bits): INT, ("float", 8): "fp8_e4m3"}
    if strategy == "group" and args.get("group_size") == 32 and kind == "float" and dynamic is True:
        formats, per = {("float", 8): "mxfp8_e4m3", ("float", 4): "mxfp4"}, "token"
    found = formats.get((kind, bits))
    if found is None or per not in ("token", "tensor"):
        raise refused
    try:
        return Activation(found, bits, symmetric=symmetric, per=per, static=not dynamic)
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read_scheme(args: dict, where: str) -> Scheme:
    bits, size, symmetric, kind = args.get("num_bits"), args.get("group_size"), args.get("symmetric", True), args.get("type", "int")
    if kind not in ("int", "float") or type(bits) is not int or not 2 <= bits <= 8 or type(symmetric) is not bool or (kind == "float" and (bits not in (4, 8) or not symmetric)):
        raise CheckpointError(f"{where}: num_bits {bits!r}, type {kind!r}, symmetric {symmetric!r}; expected int of 2 to 8 bits, or symmetric float of 4 or 8.")
    strategy = args.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy in ("group", "tensor_group"):
        if type(size) is not int or size < 1:
            raise CheckpointError(f"{where}: group_size is {size!r}; expected a positive number.")
        block = (1, size)
    elif strategy in ("channel", "tensor"):
        block = (1, -1) if strategy == "channel" else (-1, -1)
    else:
        raise CheckpointError(f"{where}: strategy {strategy!r} is not read; expected one of group, channel, tensor.")
    if kind == "int":
        return Scheme(bits=bits, block=block, symmetric=symmetric, range="half")
    names = {(8, (1, -1)): "fp8_e4m3", (8, (-1, -1)): "fp8_e4m3", (8, (1, 32)): "mxfp8_e4m3", (4, (1, 32)): "mxfp4", (4, (1, 16)): "nvfp4"}
    if (bits, block) not in names:
        raise CheckpointError(f"{where}: {bits}-bit floats with strategy {strategy!r} and group_size {size!r} are not read.")
    return Scheme(names[bits, block], bits, block)


class _Targets:
    """Which group a module belongs to: by its exact name, else by a regex, else by a class name, as the library does."""

    def __init__(self, groups: list[tuple[list[str], Scheme, str]], path: Path) -> None:
        self.groups, self.path = groups, path
        self.exact: dict[str, tuple[Scheme, str]] = {}
        self.patterns: list[tuple[regex.Pattern, tuple[Scheme, str]]] = []
        self.expressions = Patterns(path, "target")
        for targets, scheme, layout in groups if len(groups) > 1 else ():
            for target in targets:
                if target.startswith("re:"):
                    self.patterns.append((self.expressions.compiled(target.removeprefix("re:")), (scheme, layout)))
                else:
                    self.exact.setdefault(target, (scheme, layout))
        self.by_class = self.exact.get("Linear") or next((found for name, found in self.exact.items() if name.isidentifier()), None)

    def find(self, module: str) -> tuple[Scheme, str]:
        if len(self.groups) == 1:
            return self.groups[0][1:]
        found = self.exact.get(module) or next((found for pattern, found in self.patterns if self.expressions.matches(pattern, module)), None) or self.by_class
        if found is None:
            raise CheckpointError(f"{self.path}: {module} is packed, but no config group targets it.")
        return found


def _open_module(module: str, tensors: Mapping[str, LazyTensor], scheme: Scheme, layout: str, config: dict, path: Path) -> LazyQuantized:
    kind = LAYOUTS[layout]
    shape = _read_shape(module, tensors, layout, path)
    if scheme.group_size != -1 and shape[1] % scheme.group_size:
        raise CheckpointError(f"{path}: {module}: its shape is {list(shape)}, whose columns are not a multiple of group_size {scheme.group_size}.")
    expected = kind.shapes(scheme, shape)
    if missing := [part for part in expected if f"{module}.{part}" not in tensors]:
        raise CheckpointError(f"{path}: {module} has no {missing[0]}. The download is incomplete.")
    if extra := [part for part in (*_PARTS, "weight") if part != "weight_global_scale" and part not in expected and f"{module}.{part}" in tensors]:
        raise CheckpointError(f"{path}: {module} has {extra[0]}, which its scheme {scheme.name} does not use.")
    parts = {part: tensors[f"{module}.{part}"] for part in expected}
    for part, (size, dtypes) in expected.items():
        if parts[part].shape != size or parts[part].dtype not in dtypes:
            hint = " Releases before 0.20 packed this width otherwise." if part == "weight_packed" and scheme.format == INT and 32 % scheme.bits else ""
            source = f"{'weight_shape' if layout == PACKED else 'the shape'} {list(shape)}"
            raise CheckpointError(f"{path}: {module}.{part} is {parts[part].dtype} {list(parts[part].shape)}; {source} and {scheme.name} need {dtypes[0]} {list(size)}.{hint}")
    stored = parts["weight_scale"].dtype
    scale_dtype = FLOATS.get(stored, scheme.scale_dtype)
    scheme = replace(scheme, scale_dtype=scale_dtype)
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in FLOATS.values() else scale_dtype

    def load() -> QuantizedTensor:
        loaded = {part: tensor.load() for part, tensor in parts.items()}
        if stored in FLOATS and not bool(torch.isfinite(loaded["weight_scale"]).all()):
            raise CheckpointError(f"{path}: {module}.weight_scale holds NaN or infinity. The file is damaged.")
        try:
            return kind.decode(loaded, scheme, shape, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {module}: {error}") from error

    return LazyQuantized(scheme, shape, getattr(torch, dtype), load, sum(tensor.nbytes for tensor in parts.values()))


def _read_shape(module: str, tensors: Mapping[str, LazyTensor], layout: str, path: Path) -> tuple[int, int]:
    """N and K of a module, from weight_shape where the layout has it, else from its codes."""
    if layout != PACKED:
        main = LAYOUTS[layout].main
        lazy = tensors.get(f"{module}.{main}")
        if lazy is None or len(lazy.shape) != 2 or 0 in lazy.shape:
            raise CheckpointError(f"{path}: {module}.{main} is {'missing' if lazy is None else list(lazy.shape)}; {layout} needs a matrix.")
        return lazy.shape[0], lazy.shape[1] * (2 if main == "weight_packed" else 1)
    stored = tensors.get(f"{module}.weight_shape")
    if stored is None:
        raise CheckpointError(f"{path}: {module} has no weight_shape. The download is incomplete.")
    if stored.shape != (2,) or stored.dtype not in (torch.int64, torch.int32):
        raise CheckpointError(f"{path}: {module}.weight_shape is {stored.dtype} {list(stored.shape)}; expected two integers.")
    rows, columns = stored.load().tolist()
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{path}: {module}.weight_shape is {[rows, columns]}; expected positive numbers.")
    return rows, columns


def _refuse_leftovers(tensors: Mapping[str, LazyTensor], path: Path) -> None:
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if leaf in ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "input_scale"):
            raise CheckpointError(f"{path}: {name} belongs to no packed weight, or to a layout that this version does not read.")
        if leaf == "weight" and tensor.dtype in (torch.int8, FP8):
            raise CheckpointError(f"{path}: {name} is {tensor.dtype} and has no weight_scale. The download is incomplete.")
