"""GGUF files as checkpoints: under Hugging Face names and in Hugging Face's layout when read, as llama.cpp loads them when written.

The container is in gguf_container.py, the names and keys of each architecture in gguf_arch.py, the tokenizer in gguf_tokenizer.py.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, RecipeError, ShapeError
from ..numerics import ggml, ggml_tables, integer
from ..scheme import CASTS, INT, Scheme
from ..tensor import QuantizedTensor, matrix_shape
from . import gguf_arch, gguf_mixtures, gguf_other, gguf_tokenizer, safetensors
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor
from .gguf_arch import ROPE_TENSORS, Arch, Place
from .gguf_container import STORED_TYPES, Header, Metadata, Planned, TensorInfo, pack_value, read_header, write_file, write_split

__all__ = ["check", "fallback", "open_file", "read_header", "supported", "write", "write_tokenizer"]

PROVENANCE = "lowbit.provenance"
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_DENSE_IDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_BLOCK_NAMES = {kind.type_id: name for name, kind in ggml.BLOCK_TYPES.items()}
_STANDS_FOR = "float16"  # what a quantized tensor of unknown origin is decoded to
_SCALES = ("scale", "input_scale")  # beside a matrix: a float that multiplies its outputs, and one that other devices than the CPU round its inputs by
_SAME_CODES = {"mxfp4": "ggml_mxfp4"}  # formats whose codes a block type holds unchanged
MOST_EXPERTS = 1 << 14

# llama-quantize's substitutes for a row that a type's blocks do not divide (formats.md, section 16).
_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl", "tq1_0": "q4_0", "tq2_0": "q4_0"}

# general.file_type, which programs only show: of one type throughout, and of a mixture led by it.
_FILE_TYPES = {
    "float32": (0, 0), "float16": (1, 1), "bfloat16": (32, 32), "q4_0": (2, 2), "q4_1": (3, 3), "q5_0": (8, 8), "q5_1": (9, 9),
    "q8_0": (7, 7), "q2_k": (21, 10), "q3_k": (11, 12), "q4_k": (14, 15), "q5_k": (16, 17), "q6_k": (18, 18),
    "iq4_nl": (25, 25), "iq4_xs": (30, 30), "tq1_0": (36, 36), "tq2_0": (37, 37), "ggml_mxfp4": (38, 38), "ggml_nvfp4": (39, 39),
    "q1_0": (40, 40), "q2_0": (41, 41), "iq1_s": (24, 24), "iq1_m": (31, 31), "iq2_xxs": (19, 19), "iq2_xs": (20, 28), "iq2_s": (29, 29),
    "iq3_xxs": (23, 23), "iq3_s": (26, 27),
}  # fmt: skip



def open_file(path: Path) -> Checkpoint:
    """Open a GGUF file (of a split one, any of its parts) lazily, under Hugging Face names and in Hugging Face's layout.

    Blocks become LazyQuantized, but for what is decoded to float16 when read: matrices that Hugging Face stores transposed (GPT-2) and everything in
    architectures without an entry in gguf_arch. A matrix with a scale beside it (NVFP4) is decoded to float32. files is empty: the tokenizer is inside, see write_tokenizer.
    """
    header = read_header(path)
    metadata, name = Metadata(header), header.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: the metadata lacks general.architecture; the file is not a model.")
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{path} holds no token_embd.weight; it is not a whole language model.")
    arch = gguf_arch.find_named(name, metadata)
    _refuse_counts(header, name)
    if arch is None:
        return _open_other(header, name, metadata)
    config = _config(header, arch, metadata)
    tensors: dict[str, LazyTensor] = {}
    quantized: dict[str, LazyQuantized] = {}
    for info in header.tensors.values():
        stem, _, suffix = info.name.rpartition(".")
        if info.name in ROPE_TENSORS or (suffix in _SCALES and f"{stem}.weight" in header.tensors):
            continue
        for name, entry in _entries(info, header.tensors.get(f"{stem}.scale") if suffix == "weight" else None, arch, config):
            if isinstance(entry, LazyQuantized):
                quantized[name] = entry
            else:
                tensors[name] = entry
    return Checkpoint("gguf", header.path, config, tensors, quantized, provenance=_provenance(header))


def _refuse_counts(header: Header, name: str) -> None:
    """Raise CheckpointError for more layers than tensors, and for stacks of experts that the metadata does not announce: what is read grows with both."""
    layers, experts = header.get(f"{name}.block_count", 0), header.get(f"{name}.expert_count", 0)
    for key, value, most in (("block_count", layers, len(header.tensors)), ("expert_count", experts, MOST_EXPERTS)):
        if type(value) is not int or not 0 <= value <= most:
            raise CheckpointError(f"{header.path}: {name}.{key} is {value!r}; expected a number from 0 to {most:,}, and the file has {len(header.tensors)} tensors.")


def _open_other(header: Header, name: str, metadata: Mapping) -> Checkpoint:
    """A file of an architecture without an entry in gguf_arch, decoded when read."""
    reader = gguf_other.Reader(header.path, name, metadata, header.tensors)
    tensors = {}
    for info in header.tensors.values():
        their_name, shape, arrange = reader.tensor(info.name, info.shape)
        dense = _dense(info)
        whole = lambda start, stop, dense=dense, arrange=arrange: arrange(dense.load())[start:stop]
        tensors[their_name] = dense if arrange is None else LazyTensor(shape, dense.dtype, whole, info.nbytes, dense.stored_as)
    return Checkpoint("gguf", header.path, {**reader.config, "dtype": _model_dtype(header)}, tensors, provenance=_provenance(header))


def _config(header: Header, arch: Arch, metadata: Mapping) -> dict:
    factors = [header.tensors[name] for name in ROPE_TENSORS if name in header.tensors]
    if odd := next((info for info in factors if info.type_id or len(info.shape) != 1), None):
        raise CheckpointError(f"{header.path}: {odd.name} is {list(odd.shape)} of type {STORED_TYPES[odd.type_id].name}; expected a vector of f32.")
    rope_data = {info.name: _dense(info).load() for info in factors}
    rows = header.tensors["token_embd.weight"].shape[0]
    try:
        config = gguf_arch.config_from(arch, metadata, header.tensors, rows, rope_data)
        for leaf in arch.permuted:
            gguf_arch.heads(arch, leaf, config)
    except (TypeError, ValueError, ArithmeticError, KeyError) as error:
        raise CheckpointError(f"{header.path}: its metadata has values of the wrong kind: {error}.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from error
    return {**config, "dtype": _model_dtype(header)}


def _model_dtype(header: Header) -> str:
    """The dtype of most matrices; quantized ones stand for float16."""
    counts: Counter[str] = Counter()
    for info in header.tensors.values():
        if len(info.shape) > 1:
            counts[str(_DTYPES.get(info.type_id, torch.float16)).removeprefix("torch.")] += info.nbytes
    return counts.most_common(1)[0][0] if counts else _STANDS_FOR


def _provenance(header: Header) -> dict:
    text, where = header.get(PROVENANCE, "{}"), f"{header.path}: the metadata {PROVENANCE}"
    if not isinstance(text, str):
        raise CheckpointError(f"{where} is a {type(text).__name__}; expected JSON.")
    return safetensors.checked_provenance(safetensors.parse_json(text, where), where)


def _entries(info: TensorInfo, scale: TensorInfo | None, arch: Arch, config: Mapping) -> Iterator[tuple[str, LazyTensor | LazyQuantized]]:
    """The Hugging Face tensors that one tensor of the file holds: itself, or one for each expert. scale: what lies beside it."""
    name = gguf_arch.hugging_face_name(arch, info.name)
    if "{e}" not in name:
        yield name, _entry(info, arch, config, factor=_factors(scale, 1)[0])
        return
    if len(info.shape) != 3:
        raise CheckpointError(f"tensor {info.name!r} is {list(info.shape)}; a stack of experts has three dimensions.")
    count, rows, columns = info.shape
    if count > MOST_EXPERTS:
        raise CheckpointError(f"tensor {info.name!r} is a stack of {count:,} experts; expected at most {MOST_EXPERTS:,}.")
    for expert, factor in enumerate(_factors(scale, count)):
        part = TensorInfo(info.name, info.type_id, (rows, columns), info.rows[expert * rows : (expert + 1) * rows])
        yield name.replace("{e}", str(expert)), _entry(part, arch, config, factor=factor)


def _factors(scale: TensorInfo | None, count: int) -> list[float | None]:
    """The factor of each of count matrices; None where the file has none."""
    if scale is None:
        return [None] * count
    if scale.type_id != 0 or scale.shape != (count,):
        raise CheckpointError(f"tensor {scale.name!r} is {list(scale.shape)} of type {STORED_TYPES[scale.type_id].name}; {count} f32 belong there, one for each matrix.")
    return _dense(scale).load().tolist()


def _entry(info: TensorInfo, arch: Arch, config: Mapping, *, factor: float | None) -> LazyTensor | LazyQuantized:
    stem, _, suffix = info.name.rpartition(".")
    leaf = stem.rpartition(".")[2]
    if len(info.shape) > 2 or (len(info.shape) == 1 and info.type_id not in _DTYPES):
        raise CheckpointError(f"tensor {info.name!r} is {list(info.shape)} of type {STORED_TYPES[info.type_id].name}; a matrix or a dense vector belongs there.")
    order = None
    if leaf in arch.permuted:
        order = _unpermute(info, gguf_arch.heads(arch, leaf, config))
    if leaf in arch.transposed and suffix == "weight":
        return _transposed(_dense(info, order, factor=factor))
    if leaf in arch.flat:
        info = TensorInfo(info.name, info.type_id, (1, *info.shape), info.rows.reshape(1, -1))
    if info.type_id in _BLOCK_NAMES and len(info.shape) == 2 and factor is None:
        return _quantized(info, order)
    shift = arch.norm_shift if info.name.endswith("norm.weight") else 0.0
    return _dense(info, order, shift=-shift, factor=factor)


def _unpermute(info: TensorInfo, n_heads: int) -> Tensor:
    """For each row of Hugging Face's matrix its row in the file: per head [d / 2, 2] -> [2, d / 2]."""
    rows = info.shape[0]
    if n_heads < 1 or rows % (2 * n_heads):
        raise CheckpointError(f"tensor {info.name!r} has {rows} rows, which {n_heads} heads do not divide evenly.")
    return torch.arange(rows).view(n_heads, -1, 2).transpose(1, 2).reshape(-1)


def _permute(rows: int, n_heads: int, name: str) -> Tensor:
    """The inverse of _unpermute: for each row of the file its row in Hugging Face's matrix."""
    if n_heads < 1 or rows % (2 * n_heads):
        raise CheckpointError(f"{name} has {rows} rows, which {n_heads} heads do not divide evenly; config and weights do not belong together.")
    return torch.arange(rows).view(n_heads, 2, -1).transpose(1, 2).reshape(-1)


def _bytes(info: TensorInfo, order: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows start to stop of Hugging Face's order, uint8, copied out of the file."""
    rows = info.rows[start:stop] if order is None else info.rows[order[start:stop].numpy()]
    return torch.from_numpy(np.array(rows))


def _quantized(info: TensorInfo, order: Tensor | None) -> LazyQuantized:
    name = _BLOCK_NAMES[info.type_id]
    scheme = ggml.scheme(name)

    def rows(start: int, stop: int) -> QuantizedTensor:
        blocks = _bytes(info, order, start, min(stop, info.shape[0]))
        return QuantizedTensor(scheme, (len(blocks), info.shape[1]), _STANDS_FOR, {"blocks": blocks})

    return LazyQuantized(scheme, matrix_shape(info.shape), getattr(torch, _STANDS_FOR), lambda: rows(0, info.shape[0]), info.nbytes, rows)


def _dense(info: TensorInfo, order: Tensor | None = None, *, shift: float = 0.0, factor: float | None = None) -> LazyTensor:
    """A tensor as dense values: stored ones in their own dtype, quantized ones decoded to float16; with a factor, their products in float32."""
    if info.type_id not in _DTYPES and info.type_id not in _BLOCK_NAMES:
        raise CheckpointError(f"tensor {info.name!r} is of type {STORED_TYPES[info.type_id].name}; weights are floats or blocks of them.")
    dtype = _DTYPES.get(info.type_id, getattr(torch, _STANDS_FOR)) if factor is None else torch.float32

    def read(start: int, stop: int) -> Tensor:
        stop = min(stop, info.shape[0])
        data = _bytes(info, order, start, stop)
        values = data.view(_DTYPES[info.type_id]) if info.type_id in _DTYPES else ggml.decode(data, _BLOCK_NAMES[info.type_id])
        values = (values if factor is None else values.float() * factor).to(dtype).view(stop - start, *info.shape[1:])
        return values + shift if shift else values

    return LazyTensor(info.shape, dtype, read, info.nbytes, None if info.type_id in _DTYPES else STORED_TYPES[info.type_id].name)


def _transposed(lazy: LazyTensor) -> LazyTensor:
    return LazyTensor(lazy.shape[::-1], lazy.dtype, lambda start, stop: lazy.load().T[start:stop].contiguous(), lazy.nbytes, lazy.stored_as)


def write_tokenizer(path: Path, folder: Path) -> tuple[Path, ...]:
    """Write the tokenizer inside a GGUF file, chat template included, as Hugging Face tokenizer files into folder; returns them."""
    header = read_header(path)
    tokenizer = gguf_tokenizer.rebuild(header.path, Metadata(header))
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(sorted(Path(file) for file in tokenizer.save_pretrained(folder) if Path(file).is_file()))


# ------------------------------------------------------------------------------------------------------------------ writing


def write(checkpoint: Checkpoint, path: Path, *, shard_bytes: int | None = None, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write a model as a GGUF file that llama.cpp loads; tensor by tensor, to a temporary sibling that is renamed at the end.

    shard_bytes: path is an empty folder then, and gets files model-00001-of-0000N.gguf of about that size; llama.cpp is given the first.

    Vectors, norms and routers become F32; other dense matrices keep their dtype; ggml blocks are written as they are; integers are
    packed into the block type of enough bits (see check). Quantized matrices are [out_features, in_features], also GPT-2's.
    Metadata and tokenizer come from config and files, or, of a checkpoint that is itself a GGUF, unchanged from there.
    progress is told the bytes written by each step.
    """
    supported(checkpoint.config)
    arch = gguf_arch.find(checkpoint.config)
    source = read_header(checkpoint.path) if checkpoint.kind == "gguf" else None
    config = checkpoint.config if source else gguf_arch.full_config(checkpoint.config)
    planned = _plan(checkpoint, arch, config, source)
    raw = _copied_metadata(source, planned, checkpoint.provenance) if source else _made_metadata(checkpoint, arch, config, planned)
    raw |= _importance_metadata(checkpoint.provenance)
    if checkpoint.provenance:
        raw[PROVENANCE] = pack_value("string", json.dumps(checkpoint.provenance, sort_keys=True, ensure_ascii=False))
    if shard_bytes is None:
        write_file(path, raw, planned, progress=progress)
    else:
        write_split(path, raw, planned, shard_bytes=shard_bytes, progress=progress)


def supported(config: dict) -> None:
    """Raise CheckpointError when a model of this config cannot be written (naming the known architectures) or llama.cpp would compute it differently."""
    gguf_arch.metadata(gguf_arch.find(config), gguf_arch.full_config(config))


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise ShapeError or RecipeError when GGUF cannot hold such a matrix [out_features, in_features]; the message names what fits."""
    in_features = shape[1]
    if scheme.act is not None:
        raise RecipeError(f"{name}: a GGUF file does not say how activations are rounded ({scheme.name}); llama.cpp does that its own way. Use --to safetensors, which keeps it.")
    if scheme.outliers is not None:
        raise RecipeError(f"{name}: GGUF has no place for outlier channels ({scheme.name}). Use --to safetensors, which writes the decoded values.")
    if scheme.format in CASTS:
        return
    if scheme.format != INT:
        block = _block_type(scheme.format, name).block_size
        if in_features % block:
            fits = fallback(scheme.format, in_features)
            raise ShapeError(f"{name}: {scheme.format} needs in_features to be a multiple of {block}, and {in_features} is not. Use {fits} (for this layer: a rule in the recipe).")
        return
    _int_type(scheme, name)
    if in_features % 32:
        raise ShapeError(f"{name}: GGUF stores integers in blocks of 32, and in_features = {in_features} is not a multiple of 32. Use float16 (for this layer: a rule in the recipe).")
    if scheme.group_size != -1 and scheme.group_size % 32:
        raise ShapeError(f"{name}: GGUF stores a scale for every 32 weights, and groups of {scheme.group_size} are not made of those. Use g32, g64, g128 or channel.")
    if scheme.scale_dtype != "float16":
        raise RecipeError(f"{name}: GGUF stores scales as float16, and the scheme's scale_dtype is {scheme.scale_dtype}. Quantize with --to gguf, or with scale_dtype = \"float16\" in a recipe file.")


def _block_type(type_name: str, name: str) -> ggml.BlockType:
    """The block type that holds the codes of a format other than integers unchanged."""
    type_name = _SAME_CODES.get(type_name, type_name)
    if type_name not in ggml.BLOCK_TYPES:
        raise RecipeError(f"{name}: GGUF has no type for the format {type_name!r}; it holds int (2 to 8 bits), {', '.join((*CASTS, *_SAME_CODES, *ggml.WRITTEN))}.")
    return ggml.BLOCK_TYPES[type_name]


def _int_type(scheme: Scheme, name: str) -> str:
    """The smallest block type that holds the scheme's codes unchanged."""
    if scheme.symmetric:
        return "q4_0" if scheme.bits <= 4 else "q5_0" if scheme.bits == 5 else "q8_0"
    if scheme.bits > 5:
        raise RecipeError(f"{name}: GGUF has no type for asymmetric integers of {scheme.bits} bits; int{scheme.bits}-sym and int5-asym (or fewer bits) fit.")
    return "q4_1" if scheme.bits <= 4 else "q5_1"


def fallback(type_name: str, in_features: int) -> str:
    """The type that llama-quantize takes for a row length: the type itself if its blocks divide it, else a smaller-block one, else float16."""
    if in_features % _block_type(type_name, "fallback").block_size == 0:
        return type_name
    substitute = _FALLBACKS.get(type_name)
    return substitute if substitute and in_features % 32 == 0 else "float16"


def _plan(checkpoint: Checkpoint, arch: Arch, config: Mapping, source: Header | None) -> list[Planned]:
    groups: dict[str, list[tuple[Place, str]]] = {}
    tied = config.get("tie_word_embeddings", arch.tied)
    for name in (*checkpoint.tensors, *checkpoint.quantized):
        place = gguf_arch.place(arch, name)
        if place is not None and not (place.leaf == "output" and tied):
            groups.setdefault(place.name, []).append((place, name))
    _check_complete(groups, arch, config)
    order = {leaf: i for i, leaf in enumerate((*arch.outer.values(), *arch.layer.values()))}
    ranked = sorted(groups.items(), key=lambda item: (_rank(item[1][0][0], order), item[0]))
    planned = _rope_plan(arch, config, source) + [_planned(checkpoint, arch, config, members) for _, members in ranked]
    places = {name: i for i, name in enumerate(source.tensors)} if source else {}
    return sorted(planned, key=lambda tensor: places.get(tensor.name, len(places)))


def _rank(place: Place, order: Mapping[str, int]) -> tuple:
    section = 1 if place.layer is not None else 2 if place.leaf.startswith("output") else 0
    return section, place.layer or 0, order[place.leaf]


def _rope_plan(arch: Arch, config: Mapping, source: Header | None) -> list[Planned]:
    if source:
        infos = [source.tensors[name] for name in ROPE_TENSORS if name in source.tensors]
        return [Planned(info.name, info.type_id, info.shape, (partial(_bytes, info, None, 0, len(info.rows)),)) for info in infos]
    tensors = gguf_arch.rope_tensors(arch, config)
    return [Planned(name, 0, tuple(tensor.shape), (tensor.contiguous,)) for name, tensor in tensors.items()]


def _check_complete(groups: Mapping[str, list], arch: Arch, config: Mapping) -> None:
    """Every weight that llama.cpp asks for is there, so that a wrong file fails here and not in its user's hands."""
    layers = config["n_layer" if arch.name == "gpt2" else "num_hidden_layers"]
    needed = [f"{leaf}.weight" for leaf in arch.outer.values() if leaf != "output"]
    needed += [f"blk.{i}.{leaf}.weight" for i in range(layers) for leaf in arch.layer.values()]
    missing = [name for name in needed if name not in groups]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {gguf_arch.hugging_face_name(arch, missing[0]).replace('{e}', '0')} ({len(missing)} missing in all); without it llama.cpp does not load the file.")
    surplus = [members[0][1] for members in groups.values() if (members[0][0].layer or 0) >= layers]
    if surplus:
        raise CheckpointError(f"the checkpoint holds {surplus[0]}, and the config says {layers} layers. They do not belong together.")


def _planned(checkpoint: Checkpoint, arch: Arch, config: Mapping, members: list[tuple[Place, str]]) -> Planned:
    first = members[0][0]
    if first.expert is None:
        type_id, shape, load = _piece(checkpoint, arch, config, *members[0])
        return Planned(first.name, type_id, shape, (load,))
    members = sorted(members, key=lambda member: member[0].expert or 0)
    pieces = [_piece(checkpoint, arch, config, *member) for member in members]
    if [place.expert for place, _ in members] != list(range(_n_experts(config))):
        raise CheckpointError(f"{first.name}: the checkpoint has experts {[place.expert for place, _ in members]}; the config says {_n_experts(config)}.")
    if len({piece[:2] for piece in pieces}) != 1:
        raise CheckpointError(f"{members[0][1]} and the other experts of its layer differ in shape or type; GGUF stores them as one tensor. Give them one scheme.")
    type_id, shape, _ = pieces[0]
    return Planned(first.name, type_id, (len(pieces), *shape), tuple(piece[2] for piece in pieces))


def _n_experts(config: Mapping) -> int:
    return config.get("num_local_experts") or config.get("num_experts") or 0


def _piece(checkpoint: Checkpoint, arch: Arch, config: Mapping, place: Place, name: str) -> tuple[int, tuple[int, ...], Callable[[], Tensor]]:
    """ggml type, shape and loader of one Hugging Face tensor as it lies in the file."""
    weight = place.name.endswith(".weight")
    n_heads = gguf_arch.heads(arch, place.leaf, config) if place.leaf in arch.permuted else None
    entry = checkpoint.quantized.get(name)
    if entry is not None and entry.scheme.format not in CASTS:
        check(entry.scheme, entry.shape, name)
        type_name = _int_type(entry.scheme, name) if entry.scheme.format == INT else _block_type(entry.scheme.format, name).name
        rows = lambda: _rows(_to_blocks(entry.load(), type_name), n_heads, name)
        return ggml.BLOCK_TYPES[type_name].type_id, entry.shape, rows
    dense = checkpoint.tensors[name] if entry is None else entry
    transposed = place.leaf in arch.transposed and weight and entry is None
    shape = dense.shape[::-1] if transposed else dense.shape[1:] if place.leaf in arch.flat else dense.shape
    dtype = getattr(torch, entry.scheme.format) if entry is not None else dense.dtype
    if len(shape) == 1 or not weight or place.leaf.endswith("norm") or place.leaf in ("ffn_gate_inp", "position_embd"):
        dtype = torch.float32
    if dtype not in _DENSE_IDS:
        raise CheckpointError(f"{name} is {dtype}, which GGUF does not hold as a weight; it holds {', '.join(CASTS)}.")
    shift = arch.norm_shift if place.name.endswith("norm.weight") else 0.0

    def load() -> Tensor:
        values = dense.load() if isinstance(dense, LazyTensor) else dense.load().parts["weight"]
        values = (values.T if transposed else values).to(dtype).view(shape)
        return _rows(values + shift if shift else values, n_heads, name)

    return _DENSE_IDS[dtype], tuple(shape), load


def _rows(values: Tensor, n_heads: int | None, name: str) -> Tensor:
    return values if n_heads is None else values[_permute(values.shape[0], n_heads, name)]


def _to_blocks(qt: QuantizedTensor, type_name: str) -> Tensor:
    """A quantized matrix as blocks of a type that holds its codes: the codes moved to the type's zero, scales repeated for every 32 weights."""
    if qt.scheme.format in _SAME_CODES:
        return ggml_tables.pack_mxfp4(qt.parts["codes"], qt.parts["scale"])
    if qt.scheme.format != INT:
        return qt.parts["blocks"]
    integer.refuse_order(qt, "GGUF")
    codes, rows, count = qt.parts["codes"], qt.shape[0], qt.shape[1] // 32
    scale = _per_block(qt.parts["scale"], qt.scheme, rows, count)
    if qt.scheme.symmetric:
        return ggml.pack_codes(type_name, codes + ({"q4_0": 8, "q5_0": 16, "q8_0": 128}[type_name] - qt.scheme.zero_code), scale)
    zero = _per_block(qt.parts["zero_point"], qt.scheme, rows, count)
    return ggml.pack_codes(type_name, codes, scale, (-scale.float() * zero.float()).half())


def _per_block(values: Tensor, scheme: Scheme, rows: int, count: int) -> Tensor:
    """Per-group values [rows or 1, groups] as contiguous [rows, count], one for every 32 weights."""
    if values.shape[1] > 1:
        values = values.repeat_interleave(scheme.group_size // 32, dim=1)[:, :count]
    return values.expand(rows, count).contiguous()


def _made_metadata(checkpoint: Checkpoint, arch: Arch, config: dict, planned: list[Planned]) -> dict[str, bytes]:
    """The metadata of a model that comes with config.json and tokenizer files."""
    rows = next(tensor.shape[0] for tensor in planned if tensor.name == "token_embd.weight")
    values = {
        "general.architecture": ("string", arch.name),
        "general.type": ("string", "model"),
        "general.name": ("string", checkpoint.path.name),
        **gguf_arch.metadata(arch, {**config, "vocab_size": rows}),
        "general.file_type": ("u32", _file_type(planned, checkpoint.provenance)),
        "general.quantization_version": ("u32", 2),
        **gguf_tokenizer.metadata(checkpoint.files, config, rows, where=checkpoint.path),
    }
    raw = {}
    for key, (kind, value) in values.items():
        try:
            raw[key] = pack_value(kind, value)
        except (struct.error, OverflowError, TypeError, AttributeError, UnicodeEncodeError) as error:
            raise CheckpointError(f"{checkpoint.path}: {key} is {value!r}, which a GGUF cannot hold as {kind} ({error}). Its config or tokenizer is damaged.") from error
    return raw


def _copied_metadata(source: Header, planned: list[Planned], provenance: Mapping) -> dict[str, bytes]:
    """The metadata of another GGUF, unchanged but for what describes the weights' types and the splitting of the file."""
    raw = {key: value for key, value in source.raw.items() if not key.startswith("split.") and key != PROVENANCE}
    if any(tensor.name not in source.tensors or source.tensors[tensor.name].type_id != tensor.type_id for tensor in planned):
        raw["general.file_type"] = pack_value("u32", _file_type(planned, provenance))
    raw["general.quantization_version"] = pack_value("u32", 2)
    return raw


def _importance_metadata(provenance: Mapping) -> dict[str, bytes]:
    """What llama-quantize says of the importance matrix that was used."""
    match provenance.get("imatrix"):
        case {"file": str(file), "datasets": list(datasets), "entries": int(entries), "chunks": int(chunks)} if min(entries, chunks) >= 0 and max(entries, chunks) < 1 << 32:
            values = {"file": ("string", file), "dataset": ("string", ", ".join(map(str, datasets))), "entries_count": ("u32", entries), "chunks_count": ("u32", chunks)}
            return {f"quantize.imatrix.{key}": pack_value(kind, value) for key, (kind, value) in values.items()}
    return {}


def _file_type(planned: list[Planned], provenance: Mapping) -> int:
    """general.file_type of the mixture that was asked for, else of the type that most bytes of the layers' matrices have."""
    recipe = provenance.get("recipe")
    mixture = gguf_mixtures.MIXTURES.get(str(recipe.get("mixture"))) if isinstance(recipe, Mapping) else None
    if mixture is not None:
        return mixture.file_type
    names = {**_BLOCK_NAMES, **{i: str(dtype).removeprefix("torch.") for dtype, i in _DENSE_IDS.items()}}
    sizes: Counter[str] = Counter()
    for tensor in planned:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk.") and "ffn_gate_inp" not in tensor.name:
            sizes[names[tensor.type_id]] += tensor.nbytes
    pure, mixed = _FILE_TYPES[sizes.most_common(1)[0][0]]
    return pure if len(sizes) == 1 else mixed
