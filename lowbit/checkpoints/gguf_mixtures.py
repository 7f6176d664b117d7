"""llama-quantize's named mixtures (Q4_K_M, ...): the block type that each gives to every tensor of a model.

Most tensors have one type; a few that matter more have another, by their kind, their layer and the model. Rows that the chosen type's blocks
do not divide take a substitute afterwards: gguf.fallback. Source: llama-quant.cpp of llama.cpp (build 11434); rules for architectures that
lowbit does not write (Falcon) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..numerics import ggml
from . import gguf_arch
from .gguf_arch import Place

Rules = tuple[tuple[str, str], ...]  # (where, type): the first that holds for a layer


@dataclass(frozen=True)
class Mixture:
    """type: what no rule changes. file_type: general.file_type. attn_v (fused attn_qkv too), ffn_down, attn_output: rules for such tensors.

    token_embd: of an embedding that is not the head as well. output: of the head, and of an embedding that is.
    """

    type: str
    file_type: int
    description: str
    attn_v: Rules = ()
    ffn_down: Rules = ()
    attn_output: Rules = ()
    token_embd: str | None = None
    output: str = "q6_k"


MIXTURES: dict[str, Mixture] = {
    "q2_k": Mixture(
        "q2_k", 10, "Q2_K, with Q3_K and Q4_K where it matters",
        attn_v=(("4 queries a key", "q4_k"), ("all", "q3_k")), ffn_down=(("all", "q3_k"),), attn_output=(("all", "q3_k"),),
    ),
    "q2_k_s": Mixture("q2_k", 21, "Q2_K almost throughout; needs importance", attn_v=(("4 queries a key", "q4_k"),), ffn_down=(("first eighth", "q4_k"),)),
    "q3_k_s": Mixture("q3_k", 11, "Q3_K throughout"),
    "q3_k_m": Mixture(
        "q3_k", 12, "Q3_K, with Q4_K and Q5_K where it matters",
        attn_v=(("first 2", "q5_k"), ("all", "q4_k")), ffn_down=(("first sixteenth", "q5_k"), ("all", "q4_k")), attn_output=(("all", "q4_k"),),
    ),
    "q3_k_l": Mixture("q3_k", 13, "Q3_K, with Q5_K where it matters", attn_v=(("all", "q5_k"),), ffn_down=(("all", "q5_k"),), attn_output=(("all", "q5_k"),)),
    "q4_0": Mixture("q4_0", 2, "Q4_0, the head in Q6_K", ffn_down=(("first eighth, weighted", "q4_1"),)),
    "q4_1": Mixture("q4_1", 3, "Q4_1, the head in Q6_K"),
    "q4_k_s": Mixture("q4_k", 14, "Q4_K, with Q5_K in the first layers", attn_v=(("first 4", "q5_k"),), ffn_down=(("first eighth", "q5_k"),)),
    "q4_k_m": Mixture("q4_k", 15, "Q4_K, with Q6_K in half of attn_v and ffn_down", attn_v=(("more", "q6_k"),), ffn_down=(("more", "q6_k"),)),
    "q5_0": Mixture("q5_0", 8, "Q5_0, the head in Q6_K", ffn_down=(("first eighth, weighted", "q5_1"),)),
    "q5_1": Mixture("q5_1", 9, "Q5_1, the head in Q6_K"),
    "q5_k_s": Mixture("q5_k", 16, "Q5_K, the head in Q6_K"),
    "q5_k_m": Mixture("q5_k", 17, "Q5_K, with Q6_K in half of attn_v and ffn_down", attn_v=(("more", "q6_k"),), ffn_down=(("more", "q6_k"),)),
    "q6_k": Mixture("q6_k", 18, "Q6_K throughout"),
    "q8_0": Mixture("q8_0", 7, "Q8_0 throughout", output="q8_0"),
    "iq4_nl": Mixture("iq4_nl", 25, "IQ4_NL, with Q5_K where it matters", attn_v=(("4 queries a key", "q5_k"),), ffn_down=(("first eighth, plain", "q5_k"),)),
    "iq4_xs": Mixture("iq4_xs", 30, "IQ4_XS, with Q5_K where it matters", attn_v=(("4 queries a key", "q5_k"),), ffn_down=(("first eighth, plain", "q5_k"),)),
    "tq1_0": Mixture("tq1_0", 36, "TQ1_0 for ternary models, the embedding in Q4_K", token_embd="q4_k"),
    "tq2_0": Mixture("tq2_0", 37, "TQ2_0 for ternary models, the embedding in Q4_K", token_embd="q4_k"),
    "mxfp4_moe": Mixture("ggml_mxfp4", 38, "MXFP4 for experts, Q8_0 for the rest", output="q8_0"),
}  # fmt: skip

# Of a model with eight experts every expert is large and attention small: its values and keys become Q8_0, its output Q5_K in these mixtures.
_FINER_OUTPUT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")


@dataclass(frozen=True)
class Model:
    """What the rules look at. arch: general.architecture. kv_heads: those that keys have. tied: the embedding is the head. weighted: the error is weighted by an importance matrix."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    tied: bool
    weighted: bool


_WHERE: dict[str, Callable[[int, Model], bool]] = {
    "all": lambda i, model: True,
    "first 2": lambda i, model: i < 2,
    "first 4": lambda i, model: i < 4,
    "first eighth": lambda i, model: i < model.layers // 8,
    "first sixteenth": lambda i, model: i < model.layers // 16,
    "first eighth, weighted": lambda i, model: model.weighted and i < model.layers // 8,
    "first eighth, plain": lambda i, model: not model.weighted and i < model.layers // 8,
    "4 queries a key": lambda i, model: model.heads // model.kv_heads >= 4,
    "more": lambda i, model: i < model.layers // 8 or i >= 7 * model.layers // 8 or (i - model.layers // 8) % 3 == 2,  # the ends, and every third between
}


def known() -> tuple[str, ...]:
    """The mixtures whose block types lowbit encodes."""
    return tuple(name for name, mixture in MIXTURES.items() if mixture.type in ggml.BLOCK_TYPES)


def types(name: str, config: dict, names: Mapping[str, object], *, weighted: bool) -> dict[str, str]:
    """The block type of each of a model's matrices, as llama-quantize --imatrix (weighted) or without chooses it before it looks at the length of rows.

    config: of the model. names: Hugging Face names of all its matrices, with embedding and head.
    Raises CheckpointError for an architecture that cannot be written as GGUF.
    """
    arch = gguf_arch.find(config)
    places = {key: place for key in names if (place := gguf_arch.place(arch, key)) is not None}
    values: dict[str, Any] = {key.removeprefix(f"{arch.name}."): value for key, (_, value) in gguf_arch.metadata(arch, gguf_arch.full_config(config)).items()}
    heads = values["attention.head_count"]
    tied = not any(place.leaf == "output" for place in places.values())
    model = Model(arch.name, values["block_count"], heads, values.get("attention.head_count_kv") or heads, values.get("expert_count", 0), tied, weighted)
    return {key: type_of(name, place, model) for key, place in places.items()}


def type_of(name: str, place: Place, model: Model) -> str:
    """The block type that the mixture gives to one tensor."""
    mixture = MIXTURES[name]
    if place.leaf == "output" or (place.leaf == "token_embd" and model.tied):
        return mixture.output
    if name == "mxfp4_moe":
        return mixture.type if place.expert is not None and model.experts > 1 else "q8_0"
    if place.layer is None:
        return mixture.token_embd or mixture.type
    if place.leaf in ("attn_v", "attn_qkv"):
        if model.experts == 8:
            return "q8_0"
        found = _first(mixture.attn_v, place.layer, model, mixture.type)
        return "q5_k" if _is_70b(model) and found in ("q3_k", "q4_k") else found
    if place.leaf == "attn_k" and model.experts == 8:
        return "q8_0"
    if place.leaf == "attn_output" and model.experts == 8:
        return "q5_k" if name in _FINER_OUTPUT else mixture.type
    rules = mixture.ffn_down if place.leaf.startswith("ffn_down") else mixture.attn_output if place.leaf == "attn_output" else ()
    return _first(rules, place.layer, model, mixture.type)


def _first(rules: Rules, layer: int, model: Model, default: str) -> str:
    return next((kind for where, kind in rules if _WHERE[where](layer, model)), default)


def _is_70b(model: Model) -> bool:
    """What llama.cpp takes for a model of 70B, whose values are few since eight heads share them."""
    return model.layers == 80 and (model.arch == "qwen2" or (model.arch == "llama" and model.heads != model.kv_heads))
