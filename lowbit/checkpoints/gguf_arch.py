"""What GGUF calls the parts of a model: one table entry per architecture, read in both directions.

Facts are those of llama.cpp's convert_hf_to_gguf.py and of its model loaders; tensor names without their .weight or .bias.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import plain_config

Value = tuple[str, object]  # a GGUF type ("u32", "f32", "bool", "string", "i32[]", ...) and the value

_DECODER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{e}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{e}.up_proj": "ffn_up_exps",
    "mlp.experts.{e}.down_proj": "ffn_down_exps",
}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# (GGUF key without the architecture, key of config.json, type)
_KEYS = (
    ("block_count", "num_hidden_layers", "u32"),
    ("context_length", "max_position_embeddings", "u32"),
    ("embedding_length", "hidden_size", "u32"),
    ("feed_forward_length", "intermediate_size", "u32"),
    ("attention.head_count", "num_attention_heads", "u32"),
    ("attention.head_count_kv", "num_key_value_heads", "u32"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", "f32"),
)
_HEAD_DIM = (("attention.key_length", "head_dim", "u32"), ("attention.value_length", "head_dim", "u32"))
_EXPERT_KEYS = (
    ("expert_count", "num_experts", "u32"),
    ("expert_used_count", "num_experts_per_tok", "u32"),
    ("expert_feed_forward_length", "moe_intermediate_size", "u32"),
)
_GPT2_KEYS = (
    ("block_count", "n_layer", "u32"),
    ("context_length", "n_positions", "u32"),
    ("embedding_length", "n_embd", "u32"),
    ("feed_forward_length", "n_inner", "u32"),
    ("attention.head_count", "n_head", "u32"),
    ("attention.layer_norm_epsilon", "layer_norm_epsilon", "f32"),
)


@dataclass(frozen=True)
class Arch:
    """One architecture.

    name: general.architecture. model_type, architecture: what a GGUF of it is called in config.json. layers: the prefix of a layer.
    outer, layer: tensor names, Hugging Face -> GGUF; {e} stands for the number of an expert (GGUF stacks experts into one tensor).
    keys: metadata <-> config. fixed: config values that llama.cpp assumes (the first is assumed when reading).
    ropes: rope types it can express. permuted: matrices whose rows are reordered per head. norm_shift: added to norm weights.
    transposed: matrices that Hugging Face stores [in, out]. flat: of one row, which a GGUF holds as a vector. activation: the config key and the functions that are the same as llama.cpp's.
    """

    name: str
    model_type: str
    architecture: str
    layer: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    layers: str = "model.layers."
    keys: tuple[tuple[str, str, str], ...] = _KEYS
    fixed: Mapping[str, tuple] = field(default_factory=lambda: {"hidden_act": ("silu",)})
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    permuted: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    norm_shift: float = 0.0
    tied: bool = False

    @property
    def experts(self) -> bool:
        return any("{e}" in name for name in self.layer)


ARCHS: dict[str, Arch] = {
    arch.model_type: arch
    for arch in (
        Arch(
            "llama",
            "llama",
            "LlamaForCausalLM",
            {**_DECODER, **_MLP},
            keys=(*_KEYS, *_HEAD_DIM),
            ropes=("default", "linear", "yarn", "llama3"),
            permuted=("attn_q", "attn_k"),
        ),
        Arch(
            "llama",
            "mixtral",
            "MixtralForCausalLM",
            {
                **_DECODER,
                "block_sparse_moe.gate": "ffn_gate_inp",
                "block_sparse_moe.experts.{e}.w1": "ffn_gate_exps",
                "block_sparse_moe.experts.{e}.w3": "ffn_up_exps",
                "block_sparse_moe.experts.{e}.w2": "ffn_down_exps",
            },
            keys=(*_KEYS, *_HEAD_DIM, ("expert_count", "num_local_experts", "u32"), ("expert_used_count", "num_experts_per_tok", "u32")),
            permuted=("attn_q", "attn_k"),
        ),
        Arch("qwen2", "qwen2", "Qwen2ForCausalLM", {**_DECODER, **_MLP}),
        Arch("qwen3", "qwen3", "Qwen3ForCausalLM", {**_DECODER, **_QK_NORM, **_MLP}, keys=(*_KEYS, *_HEAD_DIM)),
        Arch(
            "qwen3moe",
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {**_DECODER, **_QK_NORM, **_EXPERTS},
            keys=(*_KEYS, *_HEAD_DIM, *_EXPERT_KEYS),
            fixed={"hidden_act": ("silu",), "norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
        ),
        Arch(
            "qwen2moe",
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            {
                **_DECODER,
                **_EXPERTS,
                "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
                "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
                "mlp.shared_expert.up_proj": "ffn_up_shexp",
                "mlp.shared_expert.down_proj": "ffn_down_shexp",
            },
            keys=(*_KEYS, *_EXPERT_KEYS, ("expert_shared_feed_forward_length", "shared_expert_intermediate_size", "u32")),
            fixed={"hidden_act": ("silu",), "norm_topk_prob": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
            flat=("ffn_gate_inp_shexp",),
        ),
        Arch(
            "gemma2",
            "gemma2",
            "Gemma2ForCausalLM",
            {**_DECODER, **_MLP, **_GEMMA_NORMS},
            keys=(
                *_KEYS,
                *_HEAD_DIM,
                ("attention.sliding_window", "sliding_window", "u32"),
                ("attn_logit_softcapping", "attn_logit_softcapping", "f32"),
                ("final_logit_softcapping", "final_logit_softcapping", "f32"),
            ),
            fixed={"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (None, False)},
            ropes=("default", "linear"),
            norm_shift=1.0,
            tied=True,
        ),
        Arch(
            "starcoder2",
            "starcoder2",
            "Starcoder2ForCausalLM",
            {**_DECODER, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
            keys=(*(key for key in _KEYS if key[1] != "rms_norm_eps"), ("attention.layer_norm_epsilon", "norm_epsilon", "f32")),
            fixed={"hidden_act": ("gelu_pytorch_tanh",)},
            tied=True,
        ),
        Arch(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            {**_DECODER, **_QK_NORM, **_MLP, **_GEMMA_NORMS},
            keys=(
                *_KEYS,
                *_HEAD_DIM,
                ("attention.sliding_window", "sliding_window", "u32"),
                ("final_logit_softcapping", "final_logit_softcapping", "f32"),
            ),
            fixed={"hidden_activation": ("gelu_pytorch_tanh",), "attn_logit_softcapping": (None,), "use_bidirectional_attention": (False,)},
            ropes=("default", "linear"),
            norm_shift=1.0,
            tied=True,
        ),
        Arch(
            "olmo2",
            "olmo2",
            "Olmo2ForCausalLM",
            {
                **{theirs: ours for theirs, ours in _DECODER.items() if "norm" not in ours},
                **_QK_NORM,
                **_MLP,
                "post_attention_layernorm": "post_attention_norm",
                "post_feedforward_layernorm": "post_ffw_norm",
            },
            fixed={"hidden_act": ("silu",), "attention_bias": (False,), "tie_word_embeddings": (False,)},
        ),
        Arch(
            "smollm3",
            "smollm3",
            "SmolLM3ForCausalLM",
            {**_DECODER, **_MLP},
            fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,)},
            permuted=("attn_q", "attn_k"),
            tied=True,
        ),
        Arch(
            "bitnet",
            "bitnet",
            "BitNetForCausalLM",
            {**_DECODER, **_MLP, "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"},
            fixed={"hidden_act": ("silu",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
            tied=True,
        ),
        Arch(
            "phi3",
            "phi3",
            "Phi3ForCausalLM",
            {
                "input_layernorm": "attn_norm",
                "self_attn.qkv_proj": "attn_qkv",
                "self_attn.o_proj": "attn_output",
                "post_attention_layernorm": "ffn_norm",
                "mlp.gate_up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
            },
            keys=(*_KEYS, ("rope.scaling.original_context_length", "original_max_position_embeddings", "u32")),
            ropes=("default", "longrope"),
        ),
        Arch(
            "gpt2",
            "gpt2",
            "GPT2LMHeadModel",
            {
                "ln_1": "attn_norm",
                "attn.c_attn": "attn_qkv",
                "attn.c_proj": "attn_output",
                "ln_2": "ffn_norm",
                "mlp.c_fc": "ffn_up",
                "mlp.c_proj": "ffn_down",
            },
            outer={"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output"},
            layers="transformer.h.",
            keys=_GPT2_KEYS,
            fixed={
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
            },
            ropes=(),
            transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            tied=True,
        ),
    )
}

_ALIASES = {"mistral": "llama", "gemma3": "gemma3_text"}
_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))
_DROPPED = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.|\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")

# Tensors that hold no weights: what a rope does with each frequency. They come from the config and go into it.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_YARN = (
    ("attention_factor", "rope.scaling.attn_factor"),
    ("extrapolation_factor", "rope.scaling.yarn_ext_factor"),
    ("beta_fast", "rope.scaling.yarn_beta_fast"),
    ("beta_slow", "rope.scaling.yarn_beta_slow"),
)


def find(config: dict) -> Arch:
    """The architecture of a config.json, or CheckpointError naming those there are."""
    model_type = config.get("model_type")
    arch = None if not isinstance(model_type, str) else ARCHS.get(_ALIASES.get(model_type, model_type))
    if arch is None:
        known = ", ".join(sorted({*ARCHS, *_ALIASES}))
        raise CheckpointError(
            f"model type {model_type!r} cannot be written as GGUF: llama.cpp's names for its tensors and settings are not in this version, which knows {known}. "
            "Use the target compressed-tensors or safetensors, or add it (docs/adding.md)."
        )
    return arch


def find_named(name: str, metadata: Mapping[str, object]) -> Arch | None:
    """The architecture of a GGUF file; None for one that has no entry."""
    experts = bool(metadata.get(f"{name}.expert_count"))
    return next((arch for arch in ARCHS.values() if arch.name == name and arch.experts == experts), None)


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lies in a GGUF file. leaf: its name without block and suffix. layer: None outside of the blocks."""

    name: str
    leaf: str
    layer: int | None
    expert: int | None = None


def place(arch: Arch, name: str) -> Place | None:
    """The place of a checkpoint's tensor; None for one that a GGUF leaves out (vision, buffers). Raises CheckpointError for an unknown one."""
    if _DROPPED.search(name):
        return None
    short = _plain_name(arch, name)
    stem, _, suffix = short.rpartition(".")
    if stem in arch.outer:
        return Place(f"{arch.outer[stem]}.{suffix}", arch.outer[stem], None)
    match = re.fullmatch(re.escape(arch.layers) + r"(\d+)\.(.+)", stem)
    if match:
        layer, inner = int(match[1]), match[2]
        expert = re.search(r"\.experts\.(\d+)\.", inner)
        key = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", inner)
        if key in arch.layer:
            return Place(f"blk.{layer}.{arch.layer[key]}.{suffix}", arch.layer[key], layer, int(expert[1]) if expert else None)
    raise CheckpointError(f"{name} has no place in a GGUF of architecture {arch.name}; llama.cpp would not load a file with it.")


def _plain_name(arch: Arch, name: str) -> str:
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    # The first GPT-2 checkpoints were saved without the model around the transformer.
    return f"transformer.{name}" if arch.name == "gpt2" and re.match(r"(h\.\d+|wte|wpe|ln_f)\.", name) else name


def hugging_face_name(arch: Arch, name: str) -> str:
    """The Hugging Face name of a GGUF tensor, with {e} for the expert where it is a stack of them; CheckpointError for an unknown one."""
    stem, _, suffix = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    table, leaf, prefix = (arch.layer, match[2], f"{arch.layers}{match[1]}.") if match else (arch.outer, stem, "")
    for theirs, ours in table.items():
        if ours == leaf:
            return f"{prefix}{theirs}.{suffix}"
    raise CheckpointError(f"tensor {name!r} is not one of architecture {arch.name} as this version knows it; the model would be incomplete without it.")


def full_config(config: dict) -> dict:
    """The text model's config with every default filled in by transformers (a config.json may leave them out)."""
    from transformers import AutoConfig

    given = plain_config(config, "the model")
    try:
        return AutoConfig.for_model(**given).get_text_config().to_dict()
    except Exception as error:  # the library raises many kinds for values that make no config
        raise CheckpointError(f"transformers does not accept this config of a {config['model_type']} model: {' '.join(str(error).split())}") from error


def heads(arch: Arch, leaf: str, config: Mapping) -> int:
    """Heads of a permuted matrix."""
    return int(config["num_attention_heads"] if leaf == "attn_q" else config.get("num_key_value_heads") or config["num_attention_heads"])


def metadata(arch: Arch, config: dict) -> dict[str, Value]:
    """The architecture's keys, from a full config. Raises CheckpointError for what llama.cpp would compute differently."""
    _refuse(arch, config)
    if arch.name == "gpt2":
        config = {**config, "n_inner": config["n_inner"] or 4 * config["n_embd"]}
    values = {
        key: (kind, config.get(name, config.get("num_local_experts") if name == "num_experts" else None)) for key, name, kind in arch.keys
    }
    values["vocab_size"] = ("u32", config["vocab_size"])
    values.update(_rope_metadata(arch, config))
    if arch.name == "phi3":
        values["attention.sliding_window"] = ("u32", config["sliding_window"] or 0)
    return {f"{arch.name}.{key}": (kind, value) for key, (kind, value) in values.items() if value is not None}


def _refuse(arch: Arch, config: dict) -> None:
    for key, allowed in arch.fixed.items():
        if config.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"the config says {key} = {config[key]!r}; llama.cpp computes {arch.name} with {allowed[0]!r} and has no setting for it.")
    if arch.name == "smollm3" and [bool(rope) for rope in config["no_rope_layers"]] != [bool((i + 1) % _NO_ROPE_EVERY) for i in range(config["num_hidden_layers"])]:
        raise CheckpointError(f"llama.cpp computes smollm3 without rope in layers {_NO_ROPE_EVERY}, {2 * _NO_ROPE_EVERY}, ...; the config's no_rope_layers are others.")
    if arch.name == "bitnet" and _head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise CheckpointError(f"the config says head_dim = {_head_dim(config)}; llama.cpp computes bitnet with hidden_size / num_attention_heads.")
    if arch.name not in _GEMMAS:
        return
    period = _GEMMAS[arch.name][0]
    if config["layer_types"] != ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(config["num_hidden_layers"])]:
        raise CheckpointError(f"llama.cpp computes {arch.name} with global attention in layers {period}, {2 * period}, ...; the config's layer_types are others.")
    if config["query_pre_attn_scalar"] != _attention_scalar(arch, config):
        raise CheckpointError(f"the config says query_pre_attn_scalar = {config['query_pre_attn_scalar']}; llama.cpp computes {arch.name} with {_attention_scalar(arch, config)}.")


# Every how many layers of SmolLM3 positions are left out.
_NO_ROPE_EVERY = 4

# Every how many layers attention is global, and the layers of the 27B model, by which llama.cpp knows it.
_GEMMAS = {"gemma2": (2, 46), "gemma3": (6, 62)}


def _attention_scalar(arch: Arch, config: Mapping) -> int:
    return config["hidden_size"] // config["num_attention_heads"] if config["num_hidden_layers"] == _GEMMAS[arch.name][1] else config["head_dim"]


def _rope_metadata(arch: Arch, config: dict) -> dict[str, Value]:
    if not arch.ropes:
        return {}
    rope = config["rope_parameters"]
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    kind = {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])
    if kind not in arch.ropes:
        raise CheckpointError(f"rope type {kind!r} cannot be written for GGUF architecture {arch.name}; it has {', '.join(arch.ropes)}.")
    values: dict[str, Value] = {"rope.freq_base": ("f32", rope["rope_theta"])}
    if local:
        values["rope.freq_base_swa"] = ("f32", local["rope_theta"])
    if arch.name in ("llama", "smollm3"):
        values["rope.dimension_count"] = ("u32", _head_dim(config))
    if arch.name == "phi3":
        values["rope.dimension_count"] = ("u32", int(rope.get("partial_rotary_factor", 1.0) * config["hidden_size"]) // config["num_attention_heads"])
    if kind in ("linear", "yarn", "longrope"):
        values["rope.scaling.type"] = ("string", kind)
    if kind in ("linear", "yarn"):
        values["rope.scaling.factor"] = ("f32", rope["factor"])
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = ("u32", rope["original_max_position_embeddings"])
        values.update({key: ("f32", rope[name]) for name, key in _YARN if rope.get(name) is not None})
    if kind == "longrope":
        values["rope.scaling.attn_factor"] = ("f32", _longrope_factor(config, rope))
    return values


def _head_dim(config: Mapping) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _longrope_factor(config: dict, rope: dict) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    original = config["original_max_position_embeddings"]
    scale = config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rope_tensors(arch: Arch, config: Mapping) -> dict[str, Tensor]:
    """The divisors of each frequency, float32 [rotary / 2], for ropes that metadata cannot say; from a full config."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        return {ROPE_TENSORS[0]: llama3_factors(rope, _head_dim(config))}
    if rope.get("rope_type") in ("longrope", "su"):
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32) for kind in ("long", "short")}
    return {}


def llama3_factors(rope: Mapping, head_dim: int) -> Tensor:
    """What llama 3's rope scaling divides each frequency by, float32 [head_dim / 2]."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    wavelength = 2 * math.pi / frequencies
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    between[wavelength < original / high] = 1.0
    between[wavelength > original / low] = factor
    return between


def config_from(arch: Arch, values: Mapping[str, object], names: Iterable[str], rows: int, rope_data: Mapping[str, Tensor]) -> dict:
    """A config.json for a GGUF's metadata.

    names: of its tensors. rows: of the embedding. rope_data: the tensors of ROPE_TENSORS that it has.
    """
    names = set(names)
    config: dict = {"model_type": arch.model_type, "architectures": [arch.architecture]}
    for key, name, kind in arch.keys:
        value = values.get(f"{arch.name}.{key}")
        if value is not None:
            config[name] = shortest(value) if kind == "f32" else value
    missing = [key for key, name, kind in arch.keys if name not in config and key in _REQUIRED]
    if missing:
        raise CheckpointError(f"the metadata lacks {arch.name}.{missing[0]}; llama.cpp would not load this file either.")
    config.update({key: allowed[0] for key, allowed in arch.fixed.items()})
    config["vocab_size"] = rows
    config["tie_word_embeddings"] = "output.weight" not in names
    if arch.name == "starcoder2":
        config["use_bias"] = "blk.0.attn_q.bias" in names
    if arch.name in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if arch.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = values.get(f"tokenizer.ggml.{theirs}_token_id")
    config.update(_rope_config(arch, values, config, rope_data))
    if arch.name in _GEMMAS:
        config["head_dim"] = config.get("head_dim") or 256
        config["query_pre_attn_scalar"] = _attention_scalar(arch, config)
    if arch.name == "gemma3":
        config["rope_local_base_freq"] = shortest(values.get("gemma3.rope.freq_base_swa", 10000.0))
    if arch.name == "olmo2" and values.get("olmo2.attention.sliding_window"):
        raise CheckpointError("the metadata has olmo2.attention.sliding_window: it is an OLMo 3, which this version does not read.")
    if arch.name == "smollm3":
        config["no_rope_layer_interval"] = _NO_ROPE_EVERY
    if arch.name == "phi3":
        config["sliding_window"] = values.get("phi3.attention.sliding_window") or None
    return config


_REQUIRED = {key for key, _, _ in (*_KEYS, *_GPT2_KEYS)} - {"attention.head_count_kv"}


def shortest(value: Any) -> float:
    """The shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06. ValueError for NaN and infinity."""
    made = float(str(np.float32(value)))
    if not math.isfinite(made):
        raise ValueError(f"{value} is not a finite number")
    return made


def _rope_config(arch: Arch, values: Mapping[str, object], config: Mapping, rope_data: Mapping[str, Tensor]) -> dict:
    """rope_theta, rope_scaling and what depends on them, in the words that transformers 4 and 5 both read."""
    if not arch.ropes:
        return {}
    get = lambda key: values.get(f"{arch.name}.{key}")
    # llama.cpp's default; Gemma 3's converter wrote 1e6 where a config did not say.
    result: dict = {"rope_theta": shortest(get("rope.freq_base") or (1e6 if arch.name == "gemma3" else 10000.0))}
    dimensions, per_head = get("rope.dimension_count"), config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if arch.name == "phi3" and dimensions and dimensions != per_head:
        result["partial_rotary_factor"] = dimensions / per_head
    kind = get("rope.scaling.type")
    if ROPE_TENSORS[0] in rope_data:
        result["rope_scaling"] = _scaling_of_factors(rope_data[ROPE_TENSORS[0]], result["rope_theta"], config)
    elif ROPE_TENSORS[1] in rope_data and ROPE_TENSORS[2] in rope_data:
        result["rope_scaling"] = {"rope_type": "longrope"} | {
            f"{k}_factor": [shortest(x) for x in rope_data[f"rope_factors_{k}.weight"].tolist()] for k in ("short", "long")
        }
        if get("rope.scaling.attn_factor") is not None:
            result["rope_scaling"]["attention_factor"] = shortest(get("rope.scaling.attn_factor"))
    elif kind in ("linear", "yarn") and get("rope.scaling.factor"):
        result["rope_scaling"] = {"rope_type": kind, "factor": shortest(get("rope.scaling.factor"))}
        if kind == "yarn":
            result["rope_scaling"]["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
            result["rope_scaling"].update({name: shortest(get(key)) for name, key in _YARN if get(key) is not None})
    return result


def _scaling_of_factors(factors: Tensor, theta: float, config: Mapping) -> dict:
    """rope_scaling of the divisors that a file stores: llama 3's own settings if they give these numbers, else the numbers themselves. ValueError for what divides nothing."""
    if not bool((factors > 0).all()):
        raise ValueError(f"a divisor of the rope is {factors.min().item()}")
    rope = {
        "rope_type": "llama3",
        "factor": shortest(factors.max().item()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if torch.allclose(llama3_factors({**rope, "rope_theta": theta}, 2 * len(factors)), factors, rtol=1e-5):
        return rope
    numbers = [shortest(x) for x in factors.tolist()]
    return {
        "rope_type": "longrope",
        "short_factor": numbers,
        "long_factor": numbers,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
