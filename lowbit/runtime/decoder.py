"""A checkpoint as a decoder of the native extension: one description for all families whose blocks are Llama's with variations.

What varies is read from the modules that transformers builds of the config (scaling, windows, norms), so that there is one definition of each model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError, ModelError, RecipeError
from ..kernels import can_pack, instruction_sets, native, pack, why_not
from ..kernels.packed import REALS
from ..models import skeleton as sk
from ..models.skeleton import Skeleton
from ..native import threads as default_threads
from ..progress import SILENT, Progress

FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite")
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_tanh": 1}
ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the text is


@dataclass
class NativeModel:
    """A decoder and the cache of one text (slot). decoder: the extension's; kept: what it points into; notes: for the user. nbytes: of weights in memory."""

    decoder: Any
    vocabulary: int
    context: int
    kept: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0
    slot: int = 0
    isa: str = ""

    def another(self, slot: int) -> NativeModel:
        """The same weights with the cache of another text. One forward at a time: they share their buffers."""
        return replace(self, slot=slot)

    def forward(self, tokens: list[int], start: int, *, every: bool = False) -> Tensor:
        """Logits float32 [1 or len(tokens), vocabulary] after the last token (of every one), at positions start, start + 1, ...; what the cache holds from start on is replaced."""
        logits = torch.empty(len(tokens) if every else 1, self.vocabulary)
        self.decoder.forward(np.asarray(tokens, dtype=np.int64), start, logits.numpy(), every, self.slot)
        return logits


def forward_many(models: list[NativeModel], tokens: list[int], starts: list[int]) -> Tensor:
    """Logits float32 [texts, vocabulary] after one more token of each text; models: slots of one decoder. The weights are read once for all."""
    logits = torch.empty(len(models), models[0].vocabulary)
    models[0].decoder.forward_many(*(np.asarray(values, dtype=np.int64) for values in (tokens, starts, [model.slot for model in models])), logits.numpy())
    return logits


def why_not_native(built: Skeleton) -> str:
    """Why the native decoder cannot run a model; empty where it can."""
    config = built.text_config
    if native() is None:
        return f"the native extension is missing ({why_not()})"
    if config.model_type not in FAMILIES or built.config.model_type != config.model_type:
        return f"{built.config.model_type} is not among the families of the native decoder ({', '.join(FAMILIES)})"
    if built.checkpoint.activations:
        return "its layers read inputs that are rounded in the checkpoint's own way"
    if _activation(config) is None:
        return f"its activation is {getattr(config, 'hidden_act', None)}"
    kinds = {rope.get("rope_type", "default") for rope in _rope_parameters(config) if rope}
    if kinds - set(ROPES):
        return f"its rotary embedding is of the kind {', '.join(sorted(kinds - set(ROPES)))}"
    if any(source.converter is not None for source in built.sources.values()):
        return "its matrices are joined from several tensors"
    return ""


def _activation(config: Any) -> int | None:
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return ACTIVATIONS.get(str(name))


def _rope_parameters(config: Any) -> list[dict]:
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found or "rope_theta" in found else [value for value in found.values() if isinstance(value, dict)]


def open_native(built: Skeleton, *, context: int, threads: int | None = None, isa: str = "", cache_bits: int = 16, progress: Progress = SILENT) -> NativeModel:
    """The decoder of a skeleton, which why_not_native allows.

    context: tokens that its cache has room for. isa: "" (the best), avx512, avx2, neon or portable. cache_bits: of keys and values: 16 (float16), or 8 or 4 for each head and token in groups
    of 32 channels with a scale and a least value. RecipeError for an isa that is not there, ModelError where the heads have no such groups.
    """
    known = instruction_sets()
    if isa and isa not in known:
        raise RecipeError(f"isa is {isa!r}; this processor and this build have {', '.join(known)}.")
    return replace(_Maker(built, context, threads or default_threads(), isa, cache_bits).make(progress), isa=isa or known[0])


class _Maker:
    def __init__(self, built: Skeleton, context: int, threads: int, isa: str, cache_bits: int) -> None:
        self.built, self.config, self.context = built, built.text_config, context
        self.kept: list[Any] = []
        self.notes: list[str] = []
        self.nbytes = 0
        shape = self._shape()
        if cache_bits != 16 and shape["head_dim"] % 32:
            raise ModelError(f"the heads of this model have {shape['head_dim']} channels, no multiple of 32, so its keys and values cannot be rounded. Leave --kv-cache out.")
        self.decoder = native().Decoder(shape, context, threads, isa, cache_bits)

    def _shape(self) -> dict[str, Any]:
        config = self.config
        attention: Any = self.built.blocks[0].self_attn
        cosine, _ = self._angles(self._layer_types()[0], 1)
        scale = config.hidden_size**0.5 if config.model_type.startswith("gemma") else getattr(config, "embedding_multiplier", 1.0)
        heads = config.num_attention_heads
        return {
            "hidden": config.hidden_size, "heads": heads, "kv_heads": getattr(config, "num_key_value_heads", None) or heads, "head_dim": attention.head_dim,
            "ffn": config.intermediate_size, "vocabulary": config.vocab_size, "eps": float(config.rms_norm_eps), "attention_scale": float(attention.scaling),
            "attention_cap": float(getattr(config, "attn_logit_softcapping", None) or 0),
            "logit_cap": float(getattr(config, "final_logit_softcapping", None) or 0), "embedding_scale": float(scale), "residual_scale": float(getattr(config, "residual_multiplier", 1.0)),
            "logit_scale": 1 / float(getattr(config, "logits_scaling", 1.0)), "activation": _activation(config), "norm_all": int(config.model_type == "olmo2"), "rope_half": cosine.shape[1],
        }  # fmt: skip

    def _layer_types(self) -> list[str | None]:
        """Kinds of rotary angles: one, or one for each kind of layer (Gemma 3)."""
        kinds = getattr(self.built.text.rotary_emb, "layer_types", None)
        return list(kinds) if kinds else [None]

    def _angles(self, kind: str | None, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [length, half], from the model's own module."""
        module: Any = copy.deepcopy(self.built.text.rotary_emb)
        sk.fill_buffers(self.built.model, module, torch.device("cpu"))
        with torch.no_grad():
            cosine, sine = module(torch.zeros(1), torch.arange(length).unsqueeze(0), *([kind] if kind else []))
        half = cosine.shape[-1] // 2
        return cosine[0, :, :half].float().contiguous(), sine[0, :, :half].float().contiguous()

    def make(self, progress: Progress) -> NativeModel:
        kinds = self._layer_types()
        for kind in kinds:
            angles = self._angles(kind, self.context)
            self.kept.extend(angles)
            self.decoder.add_rope(*(part.numpy() for part in angles))
        with progress.step("Loading", len(self.built.blocks) + 1) as advance:
            self._ends()
            advance(1)
            for index in range(len(self.built.blocks)):
                self._block(index, kinds)
                advance(1)
        return NativeModel(self.decoder, self.config.vocab_size, self.context, self.kept, sorted(set(self.notes)), self.nbytes)

    def _ends(self) -> None:
        embedding_name, head_name = (self._module_name(module) for module in (self.built.model.get_input_embeddings(), self.built.model.get_output_embeddings()))
        embedding = self._matrix(f"{embedding_name}.weight")
        tied = self.built.model.all_tied_weights_keys
        parameter = f"{head_name}.weight"
        shared = parameter in tied and (parameter not in self.built.sources or self.built.sources[parameter].flat() == self.built.sources[f"{embedding_name}.weight"].flat())
        head = embedding if shared else self._matrix(parameter)
        self.decoder.set_ends([embedding], [head], self._vector(f"{self._module_name(self.built.text.norm)}", norm=True))

    def _module_name(self, wanted: Any) -> str:
        return next(name for name, module in self.built.model.named_modules() if module is wanted)

    def _block(self, index: int, kinds: list[str | None]) -> None:
        name = self.built.block_name(index)
        block: Any = self.built.blocks[index]
        attention, mlp = block.self_attn, block.mlp
        after = "pre_feedforward_layernorm" if hasattr(block, "pre_feedforward_layernorm") else None if not hasattr(block, "input_layernorm") else "post_attention_layernorm"
        places = {"input": "input_layernorm", "ffn": after, "attention": "post_attention_layernorm" if after != "post_attention_layernorm" else None, "output": "post_feedforward_layernorm"}
        norms = {key: self._vector(f"{name}.{place}", norm=True) for key, place in places.items() if place and hasattr(block, place)}
        for key in ("q", "k"):
            if getattr(attention, f"{key}_norm", None) is not None:
                norms[key] = self._vector(f"{name}.self_attn.{key}_norm", norm=True)
        qkv = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
        gate_up = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else ["gate_proj", "up_proj"]
        parts: list[Any] = []
        for owner, leaves in (("self_attn", qkv), ("self_attn", ["o_proj"]), ("mlp", gate_up), ("mlp", ["down_proj"])):
            names = [f"{name}.{owner}.{leaf}" for leaf in leaves]
            parts += [[self._matrix(f"{one}.weight") for one in names], self._bias(names)]
        turned = bool(getattr(attention, "use_rope", True))
        kind = getattr(attention, "layer_type", None)
        rope = -1 if not turned else kinds.index(kind) if kind in kinds else 0
        window = getattr(attention, "sliding_window", None) if hasattr(attention, "sliding_window") else self.config.sliding_window if self.config.model_type in ("mistral", "phi3") else None
        self.decoder.add_block(norms, *parts, int(window or 0), rope)

    def _bias(self, names: list[str]) -> Any:
        if not any(f"{name}.bias" in self.built.sources for name in names):
            return None
        return self._keep(torch.cat([self._load(f"{name}.bias") for name in names]))

    def _vector(self, module: str, *, norm: bool) -> Any:
        owner = self.built.model.get_submodule(module)
        shift = 1.0 if norm and type(owner).__name__.startswith("Gemma") else 0.0  # Gemma's norms multiply by 1 + weight
        return self._keep(self._load(f"{module}.weight") + shift)

    def _load(self, parameter: str) -> Tensor:
        return sk.load_parameter(self.built, parameter, torch.float32)

    def _keep(self, value: Tensor) -> Any:
        array = value.float().contiguous().numpy()
        self.kept.append(array)
        return array

    def _matrix(self, parameter: str) -> Any:
        """A weight as the decoder takes it: packed where its format allows, else its rows in the dtype that they have (or decode to)."""
        source = self.built.checkpoint
        name = self.built.sources[parameter].flat()[0]
        if name in source.quantized:
            entry = source.quantized[name]
            if can_pack(entry.scheme):
                try:
                    packed = pack(entry.load())
                except FormatError as error:
                    self.notes.append(str(error))
                else:
                    self.kept.append(packed.held)
                    self.nbytes += packed.nbytes
                    return packed.held
            self.notes.append(f"{entry.scheme.name} runs decoded.")
        values = source.dense(name)
        if values.dtype not in REALS:
            values = values.float()
        if values.ndim != 2:
            raise ModelError(f"{name} has {values.ndim} dimensions; expected a matrix.")
        values = values.contiguous()
        array = values.numpy() if values.dtype == torch.float32 else values.view(torch.int16).numpy()
        self.kept += [values, array]
        self.nbytes += values.numel() * values.element_size()
        made = native().Dense(array, REALS[values.dtype])
        self.kept.append(made)
        return made
