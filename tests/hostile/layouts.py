"""A small sound model in every layout that lowbit reads, and the ways in which any of them can be damaged.

A layout is one entry of FOLDERS: a function that makes a sound folder. Tests and fuzzer then run on it by themselves.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import numerics
from lowbit.checkpoints import Checkpoint, LazyQuantized, LazyTensor, target
from lowbit.scheme import Activation, Rounding, Scheme

SIDE, ROWS = 64, 288
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": ROWS, "hidden_size": SIDE, "intermediate_size": SIDE, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": "float16",
}  # fmt: skip
LINEARS = tuple(f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
PACKED = (LINEARS[0], LINEARS[6])  # the matrices that are quantized here; the others stay dense
NORMS = ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight", "model.norm.weight")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights() -> dict[str, Tensor]:
    """A Llama of one layer, float16."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(ROWS if name in (EMBEDDING, HEAD) else SIDE, SIDE, generator=generator) / 8 for name in (EMBEDDING, *LINEARS, HEAD)}
    return {name: tensor.half() for name, tensor in {**made, **{name: torch.ones(SIDE) for name in NORMS}}.items()}


def tokenizer() -> dict:
    """A tokenizer.json: bytes, one merge, an end token."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "th", "<|end|>"])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "added_tokens": [{"id": vocabulary["<|end|>"], "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": vocabulary, "merges": [["t", "h"]]},
    }  # fmt: skip


def add_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))
    return folder


def dense(folder: Path) -> Path:
    """The model as a plain folder with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return add_tokenizer(folder)


def packed(folder: Path, target_name: str, scheme: Scheme) -> Path:
    """The model with the matrices of PACKED in a scheme, as lowbit writes it for a target."""
    kept = weights()
    made = {name: numerics.quantize(kept.pop(name).float(), scheme) for name in PACKED}
    act = scheme.act
    rounding = None if act is None else Rounding(act, 0.05 if act.static else None, 3.0 if act.static and not act.symmetric else 0.0)
    checkpoint = Checkpoint(
        "safetensors", folder, CONFIG,
        {name: LazyTensor(tuple(t.shape), t.dtype, lambda start, stop, t=t: t[start:stop]) for name, t in kept.items()},
        {name: LazyQuantized(qt.scheme, qt.shape, torch.float16, lambda qt=qt: qt) for name, qt in made.items()},
        activations={} if rounding is None else dict.fromkeys(made, rounding),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    target(target_name).write(checkpoint, folder)
    return folder


def from_oracle(folder: Path, name: str, variant: str) -> Path:
    """A folder as another package wrote it, of tests/oracles."""
    stored, prefix = Path(__file__).parents[1] / "oracles" / f"{name}.safetensors", f"{variant}.file."
    with safe_open(stored, "pt") as file:
        texts = json.loads(file.metadata()["texts"])[variant]
        tensors = {key.removeprefix(prefix).removeprefix("shared."): file.get_tensor(key) for key in file.keys() if key.startswith((prefix, "shared."))}  # noqa: SIM118  (no mapping)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata=texts["metadata"])
    (folder / "config.json").write_text(json.dumps(texts["config"]))
    return folder


def _ints(bits: int, *, symmetric: bool = True, block: tuple[int, int] = (1, 32), scale_dtype: str = "float16", act: Activation | None = None) -> Scheme:
    return Scheme(bits=bits, block=block, symmetric=symmetric, scale_dtype=scale_dtype, act=act)


# Makers of sound folders, by name.
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "dense": dense,
    **{
        name: partial(packed, target_name=target_name, scheme=scheme)
        for name, target_name, scheme in (
            ("pack-quantized", "compressed-tensors", _ints(4, symmetric=False)),
            ("pack-quantized-tensor", "compressed-tensors", _ints(3, symmetric=False, block=(-1, -1))),
            ("int-quantized", "compressed-tensors", _ints(8, block=(1, -1), act=Activation())),
            ("int-quantized-static", "compressed-tensors", _ints(4, symmetric=False, act=Activation(symmetric=False, per="tensor", static=True))),
            ("float-quantized", "compressed-tensors", numerics.scheme_of("fp8_e4m3", act=Activation("fp8_e4m3"))),
            ("nvfp4", "compressed-tensors", numerics.scheme_of("nvfp4")),
            ("mxfp4", "compressed-tensors", numerics.scheme_of("mxfp4")),
            ("mxfp8", "compressed-tensors", numerics.scheme_of("mxfp8_e4m3")),
            ("gptq-v1", "gptq", _ints(4)),
            ("gptq-v2", "gptq", _ints(3, symmetric=False)),
            ("awq", "awq", _ints(4, symmetric=False)),
            ("auto-round", "auto-round", _ints(2)),
            ("bitsandbytes-nf4", "bitsandbytes", Scheme("nf4", 4, (1, 64), nested=256)),
            ("bitsandbytes-fp4", "bitsandbytes", Scheme("fp4", 4, (1, 64))),
            ("bitsandbytes-int8", "bitsandbytes", replace(_ints(8, block=(1, -1), scale_dtype="float32"), range="textbook", act=Activation(range="textbook", threshold=6.0))),
            ("hqq-4", "hqq", replace(_ints(4, symmetric=False), zero_dtype="float")),
            ("hqq-3-axis-0", "hqq", replace(_ints(3, symmetric=False, block=(32, 1)), zero_dtype="float")),
            ("aqlm", "aqlm", numerics.scheme_of("aqlm_2x8")),
            ("bitnet", "bitnet", replace(numerics.scheme_of("ternary"), act=Activation(range="textbook"))),
            ("torchao-int", "torchao", _ints(4, symmetric=False)),
            ("torchao-fp8", "torchao", numerics.scheme_of("fp8_e4m3")),
            ("lowbit-int", "lowbit", replace(_ints(5, symmetric=False), outliers=2, outlier_bits=8)),
            ("lowbit-nf4", "lowbit", Scheme("nf4", 4, (1, 64), nested=256)),
            ("lowbit-e8p", "lowbit", numerics.scheme_of("e8p3")),
            ("lowbit-ternary", "lowbit", numerics.scheme_of("ternary")),
            ("lowbit-aqlm", "lowbit", numerics.scheme_of("aqlm_1x8")),
            ("lowbit-mxfp6", "lowbit", numerics.scheme_of("mxfp6_e2m3", act=Activation("mxfp8_e4m3"))),
        )
    },
    **{
        f"{name}-{variant}": partial(from_oracle, name=name, variant=variant)
        for name, variant in (("fp8", "blocks"), ("fp8", "tensor"), ("mxfp4", "gpt-oss"), ("bitnet", "bitlinear"), ("torchao", "weights"))
    },
}


def module_of(tensors: dict[str, Tensor]) -> list[str]:
    """The tensors of one quantized matrix (or stack of them)."""
    return [name for name in tensors if name.startswith(PACKED[0].removesuffix("weight"))] if "model.layers.0.mlp.experts.down_proj_blocks" not in tensors else [
        name for name in tensors if name.startswith("model.layers.0.mlp.experts.down_proj")
    ]  # fmt: skip


def gguf_file(path: Path, format_name: str = "q4_0") -> Path:
    """The model as a GGUF file with the matrices of PACKED in a ggml type."""
    source = dense(path.parent / f"{path.stem}-dense")
    kept = weights()
    made = {name: numerics.quantize(kept.pop(name).float(), numerics.scheme_of(format_name)) for name in PACKED}
    checkpoint = Checkpoint(
        "safetensors", source, CONFIG,
        {name: LazyTensor(tuple(t.shape), t.dtype, lambda start, stop, t=t: t[start:stop]) for name, t in kept.items()},
        {name: LazyQuantized(qt.scheme, qt.shape, torch.float16, lambda qt=qt: qt) for name, qt in made.items()},
        files=(source / "tokenizer.json", source / "tokenizer_config.json"),
    )  # fmt: skip
    target("gguf").write(checkpoint, path)
    return path


# ------------------------------------------------------------------------------------------------------------------ damage

ABSURD = (None, -1, 10**12, "x", [], {})
_WRONG_DTYPES = (torch.float32, torch.int32, torch.uint8, torch.int64, torch.bool)


class Damaged:
    """A sound folder that is read once, and written again with something wrong in it."""

    def __init__(self, sound: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for file in sound.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (self.weights,) = folder.glob("*.safetensors")
        self.tensors = load_file(self.weights)
        with safe_open(self.weights, "pt") as file:
            self.metadata = file.metadata() or {}
        self.config = json.loads((sound / "config.json").read_text())

    def write(self, tensors: dict[str, Tensor] | None = None, config: dict | None = None, metadata: dict[str, str] | None = None) -> Path:
        """The folder with these tensors, config and texts of the header; what is not given is sound."""
        made = {name: tensor.contiguous() for name, tensor in (self.tensors if tensors is None else tensors).items()}
        save_file(made, self.weights, metadata=self.metadata if metadata is None else metadata)
        return self.write_config(self.config if config is None else config)

    def write_config(self, config: dict) -> Path:
        """The folder with this config; its tensors stay as they are."""
        (self.folder / "config.json").write_text(json.dumps(config))
        return self.folder


def damaged_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(what was done, the tensors) for every tensor without it, in other dtypes and shapes, with bad and extreme values."""
    for name, tensor in tensors.items():
        yield f"{name} dropped", {key: value for key, value in tensors.items() if key != name}
        for what, changed in _changed(tensor):
            yield f"{name} {what}", {**tensors, name: changed}


def _changed(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in _WRONG_DTYPES:
        if dtype != tensor.dtype:
            yield f"as {dtype}", tensor.float().to(dtype)
    for axis, size in enumerate(tensor.shape):
        yield f"with axis {axis} one shorter", tensor.narrow(axis, 0, size - 1)
        yield f"with axis {axis} one longer", torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
        yield f"with axis {axis} empty", tensor.narrow(axis, 0, 0)
    yield "with one axis more", tensor.unsqueeze(0)
    yield "flat", tensor.reshape(-1)
    if tensor.is_floating_point():
        for value in (float("nan"), float("inf"), -1.0, 0.0):
            if tensor.element_size() > 1 or abs(value) < 2:
                yield f"with a {value}", _with(tensor, value)
        if tensor.element_size() == 1:
            yield "with a NaN", _with(tensor.view(torch.uint8), 0x7F).view(tensor.dtype)
    else:
        limits = torch.iinfo(tensor.dtype)
        for value in (limits.min, limits.max, 0):
            yield f"of {value}", torch.full_like(tensor, value)


def _with(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[:1] = value
    return changed


def damaged_values(data: object, values: tuple = ABSURD, path: tuple = ()) -> Iterator[tuple[str, object]]:
    """(what was done, the data) for every key and entry of JSON data removed or replaced by each of values."""
    keys = list(data) if isinstance(data, dict) else range(min(2, len(data))) if isinstance(data, list) else ()
    for key in keys:
        here = (*path, key)
        yield f"{'.'.join(map(str, here))} removed", _edited(data, key)
        for value in values:
            yield f"{'.'.join(map(str, here))} = {value!r}", _edited(data, key, value)
        for what, inner in damaged_values(data[key], values, here):
            yield what, _edited(data, key, inner)


_GONE = object()


def _edited(data, key, value=_GONE):
    made = copy.copy(data)
    if value is _GONE:
        del made[key]
    else:
        made[key] = value
    return made
