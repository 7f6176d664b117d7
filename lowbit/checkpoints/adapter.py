"""Adapters as peft's save_pretrained writes them: adapter_config.json and adapter_model.safetensors.

    base_model.model.MODULE.lora_A.weight    [r, in_features]; of QA-LoRA [r, in_features / qalora_group_size]
    base_model.model.MODULE.lora_B.weight    [out_features, r]                          W + s B A,   s = alpha / r   (rslora: alpha / sqrt(r))
    base_model.model.MODULE.lora_embedding_A [r, vocabulary], lora_embedding_B [size, r]        W + s (B A)^T
    base_model.model.MODULE.base_layer.weight    a copy of an embedding that is adapted

QA-LoRA (Xu et al., arXiv:2309.14717) as peft 0.21.2 computes it: s B A (P mean of each group of x), P = in_features / qalora_group_size the number of groups. So the same number, s P / group (B A),
is added to all weights of a group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import numerics
from ..errors import CheckpointError
from . import safetensors
from .checkpoint import LazyTensor
from .patterns import Patterns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_COPY = "base_layer.weight"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Settings with which an adapter is more than W + s B A, and what each is called.
_MORE = {
    "use_dora": "DoRA, which rescales the merged weight", "modules_to_save": "whole modules that were trained beside the adapter", "lora_bias": "a bias of its own",
    "layer_replication": "replicated layers", "trainable_token_indices": "trained tokens", "target_parameters": "adapters of parameters (fused experts)", "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow's routing between adapters", "alora_invocation_tokens": "activated LoRA, which acts from a token on", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's layers",
}  # fmt: skip
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")  # init_lora_weights that change the base when training begins


@dataclass(frozen=True)
class LowRank:
    """One layer's adapter. A [r, in_features / pool], B [out_features, r]; pool: neighbouring inputs that share a number (QA-LoRA; 1: none). embedding: the weight gets the transpose."""

    A: LazyTensor
    B: LazyTensor
    scaling: float
    pool: int = 1
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is added to the weight, as the module has it: [out_features, in_features], of an embedding [vocabulary, size]."""
        rows, columns = self.B.shape[0], self.A.shape[1] * self.pool
        return (columns, rows) if self.embedding else (rows, columns)

    def delta(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of what is added to the weight, float32."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        if self.embedding:
            return (self.B.load().float() @ self.A.load().float()[:, start:stop]).T * self.scaling
        groups = self.per_group(start, stop)
        return groups if self.pool == 1 else groups.repeat_interleave(self.pool, dim=1)

    def per_group(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same with one column for each group of inputs that share a number: [rows, in_features / pool]."""
        low = self.B.read(start, self.B.shape[0] if stop is None else stop).float() @ self.A.load().float() * self.scaling
        return low if self.pool == 1 else low * (self.A.shape[1] / self.pool)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk: the low-rank parts by module name ("model.layers.0.mlp.up_proj"). copies: embeddings that lie beside them, by module name."""

    path: Path
    sha256: str
    layers: Mapping[str, LowRank]
    copies: Mapping[str, LazyTensor]

    @property
    def ranks(self) -> list[int]:
        return sorted({layer.rank for layer in self.layers.values()})


def open_adapter(path: Path) -> Adapter:
    """Open a folder of peft; reads headers, and every value once. CheckpointError for what is no LoRA adapter, contradicts itself, or is more than W + s B A."""
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} holds no {CONFIG}; expected the folder of a peft adapter (model.save_pretrained writes one).")
    config = safetensors.read_json(path / CONFIG)
    _refuse_other_kinds(config, path)
    file = path / WEIGHTS
    if not file.is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise CheckpointError(f"{path} holds its adapter as a pickle ({pickles[0]}), which lowbit never loads: a pickle can run any code. Save it again with safe_serialization=True.")
        raise CheckpointError(f"{path} holds no {WEIGHTS}. The download is incomplete.")
    stored = safetensors.open_file(safetensors.refuse_outside(file, path))
    pairs, copies = _paired(stored, file)
    rank_of, alpha_of = _Pattern(config, "rank_pattern", "r", path), _Pattern(config, "alpha_pattern", "lora_alpha", path)
    pool = _whole(config.get("qalora_group_size", 16), "qalora_group_size", path) if config.get("use_qalora") else 1
    if config.get("use_qalora") and pool < 2:
        raise CheckpointError(f"{path / CONFIG}: qalora_group_size is {pool}; expected at least 2.")
    layers = {}
    for module, (A, B, embedding) in pairs.items():
        rank = _whole(rank_of(module), "the rank", path)
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != rank or B.shape[1] != rank or not A.numel or not B.numel:
            raise CheckpointError(f"{file}: {module} has A {list(A.shape)} and B {list(B.shape)}, and the config says rank {rank}; expected [{rank}, in_features] and [out_features, {rank}].")
        alpha = alpha_of(module)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or abs(alpha) > 1e9:
            raise CheckpointError(f"{path / CONFIG}: lora_alpha of {module} is {alpha!r}; expected a number.")
        layers[module] = LowRank(A, B, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank, 1 if embedding else pool, embedding)
    for name, tensor in stored.items():
        for rows in tensor.chunks():
            numerics.refuse_bad_values(rows, f"{file}: {name}")
    with open(file, "rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return Adapter(path, digest, layers, copies)


def _refuse_other_kinds(config: Mapping, path: Path) -> None:
    where = path / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA can be merged here.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{where}: bias is {config['bias']!r}: biases were trained beside the adapter. Only adapters with bias none can be merged.")
    if found := next((key for key in _MORE if config.get(key)), None):
        raise CheckpointError(f"{where}: {found} is set: {_MORE[found]}. Only plain LoRA, rsLoRA and QA-LoRA can be merged.")
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {begun!r}, which changed the base's weights when training began, so the adapter belongs to that changed base. "
            "Save that base and give it as BASE, with init_lora_weights set to true in the config; or let peft convert the adapter (path_initial_model_for_weight_conversion)."
        )
    for key in ("use_rslora", "use_qalora"):
        if not isinstance(config.get(key, False), bool):
            raise CheckpointError(f"{where}: {key} is {config[key]!r}; expected true or false.")


def _paired(stored: Mapping[str, LazyTensor], file: Path) -> tuple[dict[str, tuple[LazyTensor, LazyTensor, bool]], dict[str, LazyTensor]]:
    """A, B and whether it is an embedding's, by module; and the copies of embeddings."""
    found: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        leaf = next((leaf for leaf in (*_LINEAR, *_EMBEDDING, _COPY) if name.endswith(f".{leaf}")), None)
        if leaf is None or not name.startswith(PREFIX):
            raise CheckpointError(f"{file}: {name!r} is no part of a LoRA adapter; expected names such as {PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight.")
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{file}: {name} is {tensor.dtype}; expected floating numbers.")
        found.setdefault(name.removeprefix(PREFIX).removesuffix(f".{leaf}"), {})[leaf] = tensor
    pairs, copies = {}, {}
    for module, parts in found.items():
        if _COPY in parts:
            copies[module] = parts.pop(_COPY)
        if set(parts) not in (set(_LINEAR), set(_EMBEDDING)):
            raise CheckpointError(f"{file}: {module} has {', '.join(parts) or _COPY} alone; expected a pair, {' and '.join(_LINEAR)}. The file is incomplete.")
        kind = _LINEAR if set(parts) == set(_LINEAR) else _EMBEDDING
        pairs[module] = (parts[kind[0]], parts[kind[1]], kind is _EMBEDDING)
    if not pairs:
        raise CheckpointError(f"{file} holds no tensors of an adapter.")
    return pairs, copies


class _Pattern:
    """A setting that rank_pattern or alpha_pattern may say anew for some modules, by the first of its expressions that matches the end of the name."""

    def __init__(self, config: Mapping, patterns: str, plain: str, path: Path) -> None:
        given = config.get(patterns) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"{path / CONFIG}: {patterns} is {given!r}; expected an object.")
        self.plain, self.expressions = config.get(plain, 8), Patterns(path / CONFIG, f"key of {patterns}")
        self.given = [(self.expressions.compiled(rf"(.*\.)?({key})$"), value) for key, value in given.items()]

    def __call__(self, module: str) -> object:
        return next((value for pattern, value in self.given if self.expressions.matches(pattern, module)), self.plain)


def _whole(value: object, what: str, path: Path) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path / CONFIG}: {what} is {value!r}; expected a positive whole number.")
    return value
