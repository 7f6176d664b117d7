"""GPTQ, AWQ and AutoRound folders: integers of 2, 3, 4 or 8 bits whose words run along the columns of the transposed matrix.

Of a linear X [N, K] with b-bit codes and groups of g columns:

    X.qweight   int32 [K b / 32, N]     each output's codes as one LSB-first stream down a column (AWQ: [K, N / 8], eight outputs in a word)
    X.qzeros    int32 [G, N b / 32]     zero-points, along the outputs; v1 stores zero_point - 1, v2 and AWQ the zero-point itself
    X.scales    float16 [G, N]          (bfloat16 and float32 are read, too)
    X.g_idx     int32 [K]               the group of each input channel: k // g, or anything for act-order (desc_act)

AWQ ("gemm") has 4 bits, no g_idx, and puts outputs 0 2 4 6 1 3 5 7 of each eight into nibbles 0 to 7. AutoRound's folders hold one of the three, as packing_format says. Symmetric
layers have zero-points, too: 2^(b-1).

Written are v1 for symmetric schemes (which every reader knows) and v2 for asymmetric ones (v1 has no place for a zero-point of 0: its neighbours would change).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError, RecipeError, ShapeError
from ..numerics import integer, packing
from ..scheme import CASTS, INT, Scheme
from ..tensor import QuantizedTensor
from . import safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor

BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
V1, V2, AWQ = "gptq", "gptq_v2", "awq"
PACKING_FORMATS = {
    "auto_round:auto_gptq": V1, "auto_round:gptq": V1, "auto_round": V2, "auto_round:gptqmodel": V2, "auto_round:auto_awq": AWQ, "auto_round:awq": AWQ,
}  # fmt: skip
SCALES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def check(kind: str) -> Callable[[Scheme, tuple[int, int], str], None]:
    """The check of a target: raises RecipeError or ShapeError when it cannot hold a matrix [out_features, in_features] in a scheme."""

    def run(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        layer = name.removesuffix(".weight")
        if scheme.format in CASTS:
            raise RecipeError(f"{layer}: {kind} packs every linear layer of the blocks, and this one is to be {scheme.name}. Use --to compressed-tensors for mixtures.")
        bits = (4,) if kind == "awq" else BITS
        if scheme.format != INT or scheme.bits not in bits or scheme.zero_dtype != "int" or scheme.block[0] != 1 or scheme.outliers is not None or scheme.act is not None:
            raise RecipeError(
                f"{layer}: {kind} cannot hold {scheme.said}; it holds integers of {', '.join(map(str, bits))} bits in groups along rows or one scale per channel, with nothing rounded but weights. "
                "Use --to compressed-tensors, or --to safetensors, which writes the decoded values."
            )
        if scheme.scale_dtype != "float16":
            raise RecipeError(f'{layer}: {kind} stores scales in float16, and the recipe says {scheme.scale_dtype}. Leave scale_dtype out, or write scale_dtype = "float16".')
        numerics.check_shape(scheme, shape, name=layer)
        rows, columns = shape
        if rows % 32 or columns % 32 or (scheme.group_size > 0 and columns % scheme.group_size):
            raise ShapeError(f"{layer}: {kind} needs both sides to be multiples of 32 and whole groups, and {list(shape)} with {scheme.name} is not that. Use --to compressed-tensors.")

    return run


def encode(qt: QuantizedTensor, layout: str) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, by their local names; the inverse of decode. layout: V1, V2 or AWQ."""
    bits, columns = qt.scheme.bits, qt.shape[1]
    scale = qt.parts["scale"].T.contiguous()
    zero = torch.full(scale.shape, qt.scheme.zero_code, dtype=torch.uint8) if qt.scheme.symmetric else qt.parts["zero_point"].T.contiguous()
    if layout == AWQ:
        codes = qt.parts["codes"].T.contiguous()
        return {"qweight": packing.pack(_awq(codes, AWQ_ORDER), 4), "qzeros": packing.pack(_awq(zero, AWQ_ORDER), 4), "scales": scale}
    if layout == V1:
        zero = (zero.to(torch.int16) - 1 & (1 << bits) - 1).to(torch.uint8)
    index = qt.parts.get("g_idx")
    groups = torch.arange(columns, dtype=torch.int32) // (columns if qt.scheme.group_size == -1 else qt.scheme.group_size) if index is None else index
    return {"qweight": packing.pack(qt.parts["codes"], bits).T.contiguous(), "qzeros": packing.pack(zero, bits), "scales": scale, "g_idx": groups.to(torch.int32)}


def decode(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: str, layout: str) -> QuantizedTensor:
    """The integer matrix that tensors of these local names stand for; their shapes were checked before."""
    bits, (rows, columns) = scheme.bits, shape
    back = tuple(AWQ_ORDER.index(i) for i in range(8))
    if layout == AWQ:
        codes = _awq(packing.unpack(parts["qweight"], 4, rows), back).T.contiguous()
        zero = _awq(packing.unpack(parts["qzeros"], 4, rows), back).T.contiguous()
    else:
        codes = packing.unpack(parts["qweight"].T.contiguous(), bits, columns)
        zero = packing.unpack(parts["qzeros"], bits, rows).T.contiguous()
        if layout == V1:
            zero = (zero.to(torch.int16) + 1 & (1 << bits) - 1).to(torch.uint8)
    decoded = {"codes": codes, "scale": parts["scales"].T.contiguous()}
    if scheme.symmetric:
        if not bool((zero == scheme.zero_code).all()):
            raise CheckpointError(f"its zero-points are {int(zero.min())} to {int(zero.max())}, and the config says that it is symmetric ({scheme.zero_code}).")
    else:
        decoded["zero_point"] = zero
    if "g_idx" in parts:
        size = columns if scheme.group_size == -1 else scheme.group_size
        index = parts["g_idx"].to(torch.int32)
        if int(index.min()) < 0 or int(index.max()) >= len(parts["scales"]):
            raise CheckpointError(f"g_idx reaches from {int(index.min())} to {int(index.max())}; there are {len(parts['scales'])} groups.")
        if not torch.equal(index, torch.arange(columns, dtype=torch.int32) // size):
            decoded["g_idx"] = index
    return QuantizedTensor(scheme, shape, dtype, decoded)


def _awq(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """The columns of each eight in another order."""
    return values.view(len(values), -1, 8)[..., list(order)].reshape(values.shape)


# ------------------------------------------------------------------------------------------------------------------ writing


def write(kind: str) -> Callable[..., None]:
    """The writer of a target: "gptq", "awq" or "auto-round"."""

    def run(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
        for name, entry in checkpoint.quantized.items():
            check(kind)(entry.scheme, entry.shape, name)
        scheme = safetensors.one_scheme(checkpoint, kind)
        as_awq = kind == "awq" or (kind == "auto-round" and scheme.bits == 4 and not scheme.symmetric)  # AutoRound itself packs those so
        layout = AWQ if as_awq else V1 if scheme.symmetric else V2
        names = ("qweight", "qzeros", "scales") if kind != "gptq" else PARTS
        section = _section(kind, scheme, layout, safetensors.dense_linears(checkpoint))

        def stored(name: str) -> dict[str, Tensor | LazyTensor]:
            qt = checkpoint.quantized[name].load()
            if kind != "gptq":
                integer.refuse_order(qt, kind)
            elif "g_idx" in qt.parts:  # without desc_act readers may take groups of neighbours; config.json is written after the tensors
                section.update(desc_act=True, static_groups=False)
            parts = encode(qt, layout)
            return {f"{name.removesuffix('weight')}{part}": parts[part] for part in names}

        safetensors.write_packed(checkpoint, folder, stored, section, entries=len(names), shard_bytes=shard_bytes, progress=progress)
        if kind == "gptq":  # GPTQModel's own copy of the section
            safetensors.write_text(folder / "quantize_config.json", json.dumps(section, indent=2) + "\n")

    return run


def _section(kind: str, scheme: Scheme, layout: str, dense: list[str]) -> dict:
    """quantization_config of config.json. dense: linear layers that are not packed."""
    common, kept = {"bits": scheme.bits, "group_size": scheme.group_size}, [name for name in dense if name != "lm_head"]
    if kind == "awq":
        # "zero_point" says that zero-points are stored, which they are in any case; without it vLLM takes a slow kernel. "sym" is ours, to read the scheme back.
        return {"quant_method": "awq", **common, "zero_point": True, "sym": scheme.symmetric, "version": "gemm", "modules_to_not_convert": kept or None}
    if kind == "auto-round":
        packing_format = {V1: "auto_round:auto_gptq", V2: "auto_round", AWQ: "auto_round:auto_awq"}[layout]
        extra = {"extra_config": {name: {"bits": 16} for name in kept}} if kept else {}
        return {"quant_method": "auto-round", "packing_format": packing_format, **common, "sym": scheme.symmetric, "data_type": "int", "autoround_version": "0.16.1", **extra}
    return {
        "quant_method": "gptq", **common, "sym": scheme.symmetric, "desc_act": False, "checkpoint_format": layout, "format": layout, "damp_percent": 0.01, "true_sequential": False,
        "static_groups": True, "lm_head": False, "pack_dtype": "int32", "meta": {"quantizer": ["lowbit"]},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ reading


def open_folder(path: Path) -> Checkpoint:
    """Open a GPTQ, AWQ or AutoRound folder: its matrices become quantized weights, with their codes exactly as written.

    Raises CheckpointError naming a layout that is not read, a tensor that is missing, and one whose shape contradicts the others.
    """
    config = safetensors.read_json(path / "config.json")
    section = config["quantization_config"]
    method = section["quant_method"]
    layout = _layout(section, method, path)
    tensors = safetensors.open_tensors(path)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    extra = section.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(value, dict) for value in extra.values()):
        raise CheckpointError(f"{path}: extra_config is {extra!r}; expected an object of objects.")
    quantized = {f"{module}.weight": _open_module(module, tensors, {**section, **extra.get(module, {})}, layout, config, path) for module in modules}
    used = {f"{module}.{part}" for module in modules for part in PARTS}
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    if left := next((name for name in dense if name.rpartition(".")[2] in PARTS), None):
        raise CheckpointError(f"{path}: {left} belongs to no packed weight.")
    return Checkpoint(method, path, config, dense, quantized, safetensors.side_files(path), safetensors.read_provenance(path))


def _layout(section: dict, method: str, path: Path) -> str:
    if method == "awq":
        if str(section.get("version", "gemm")).lower() != "gemm":
            raise CheckpointError(f"{path}: AWQ in the layout {section['version']!r}; of AWQ this version reads gemm.")
        return AWQ
    if method == "auto-round":
        name = section.get("packing_format", "auto_round:gptq")
        if not isinstance(name, str) or name not in PACKING_FORMATS:
            raise CheckpointError(f"{path}: packing_format is {name!r}; of AutoRound this version reads {', '.join(PACKING_FORMATS)}.")
        if section.get("data_type", "int") != "int":
            raise CheckpointError(f"{path}: data_type is {section['data_type']!r}; of AutoRound this version reads int.")
        return PACKING_FORMATS[name]
    name = section.get("checkpoint_format") or section.get("format") or V1
    if name not in (V1, V2):
        raise CheckpointError(f"{path}: the GPTQ layout is {name!r}; this version reads {V1} and {V2}.")
    if section.get("dynamic"):
        raise CheckpointError(f"{path}: quantization_config has dynamic overrides, which this version does not read.")
    return name


def _open_module(module: str, tensors: Mapping[str, LazyTensor], section: dict, layout: str, config: dict, path: Path) -> LazyQuantized:
    bits, size, symmetric = section.get("bits"), section.get("group_size", -1), section.get("sym", layout != AWQ)
    if layout == AWQ and "zero_point" in section and "sym" not in section:  # what is stored are zero-points in any case
        symmetric = not section["zero_point"] if type(section["zero_point"]) is bool else section["zero_point"]
    if type(bits) is not int or bits not in (BITS if layout != AWQ else (4,)) or type(size) is not int or (size < 1 and size != -1) or type(symmetric) is not bool:
        raise CheckpointError(f"{path}: {module}: bits {bits!r}, group_size {size!r}, symmetric {symmetric!r}; expected 2, 3, 4 or 8 bits (AWQ: 4) and a group_size of -1 or more than 0.")
    parts = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors and not (layout == AWQ and part == "g_idx")}
    if missing := [part for part in PARTS[:3] if part not in parts]:
        raise CheckpointError(f"{path}: {module} has no {missing[0]}. The download is incomplete.")
    stored = parts["qweight"].shape
    if len(stored) != 2 or 0 in stored:
        raise CheckpointError(f"{path}: {module}.qweight is {list(stored)}; expected a matrix.")
    columns, rows = (stored[0], stored[1] * 8) if layout == AWQ else (stored[0] * 32 // bits, stored[1])
    size = size if 0 < size < columns else -1
    groups = 1 if size == -1 else -(-columns // size)
    expected = {
        "qweight": ((columns, rows // 8) if layout == AWQ else (packing.words_per_row(columns, bits), rows), (torch.int32,)),
        "qzeros": ((groups, packing.words_per_row(rows, bits)), (torch.int32,)), "scales": ((groups, rows), tuple(SCALES)), "g_idx": ((columns,), (torch.int32, torch.int64)),
    }  # fmt: skip
    for part, lazy in parts.items():
        shape, dtypes = expected[part]
        if lazy.shape != shape or lazy.dtype not in dtypes:
            raise CheckpointError(f"{path}: {module}.{part} is {lazy.dtype} {list(lazy.shape)}; a matrix {[rows, columns]} of {bits} bits in groups of {size} needs {dtypes[0]} {list(shape)}.")
    scheme = Scheme(bits=bits, block=(1, size), symmetric=symmetric, scale_dtype=SCALES[parts["scales"].dtype])
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in SCALES.values() else scheme.scale_dtype

    def load() -> QuantizedTensor:
        loaded = {part: tensor.load() for part, tensor in parts.items()}
        if not bool(torch.isfinite(loaded["scales"]).all()):
            raise CheckpointError(f"{path}: {module}.scales holds NaN or infinity. The file is damaged.")
        try:
            return decode(loaded, scheme, (rows, columns), dtype, layout)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {module}: {error}") from error

    return LazyQuantized(scheme, (rows, columns), getattr(torch, dtype), load, sum(tensor.nbytes for tensor in parts.values()))
