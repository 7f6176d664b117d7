"""Rotations: the residual stream and the heads' values in another orthogonal basis, where no channel stands out; folded into the weights, computed once.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv:2404.00456, section 4 (stages 1a and 1b as far as weights can hold them). With R orthogonal,
a randomized Hadamard matrix, RMSNorm(R x) = R RMSNorm(x) once the norm's weight g is part of the matrices behind it:

    reads the stream    W diag(g) R^T          writes to it    R W, R b          embedding    E R^T          head    W diag(g_final) R^T
    values of a head    H W_v, H b_v           read by         W_o H^T           (the rotations of keys, queries and of the MLP's inside need a transform while the model runs: not here)

A tied head becomes a tensor of its own, as it takes the final norm's weight and the embedding does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checkpoints import Checkpoint, LazyTensor
from ..errors import ModelError, RecipeError
from ..models.skeleton import Skeleton
from ..numerics import hadamard

# Families whose residual stream is read through RMSNorm alone and written to without a norm: there the rotation is exact.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "smollm3")
NORM_OF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "gate", "shared_expert_gate"), "post_attention_layernorm"),
}
WRITERS = ("o_proj", "down_proj")

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RotateOptions:
    """residual: rotate the stream. heads: rotate the values inside of each head."""

    residual: bool = True
    heads: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.residual, bool) or not isinstance(self.heads, bool) or not (self.residual or self.heads):
            raise RecipeError(f"residual is {self.residual!r} and heads {self.heads!r}; expected true or false, at least one of them true.")


def rotate(skeleton: Skeleton, options: RotateOptions, *, seed: int) -> Checkpoint:
    """The checkpoint of the rotated model, whose tensors are rotated when they are read. ModelError where that would not be exact."""
    return _Rotation(skeleton, options, seed).checkpoint()


class _Rotation:
    def __init__(self, skeleton: Skeleton, options: RotateOptions, seed: int) -> None:
        self.skeleton, self.options = skeleton, options
        self.config = skeleton.text_config
        if self.config.model_type not in FAMILIES or self.config is not skeleton.config:
            raise ModelError(f"{skeleton.config.model_type} cannot be rotated: that is exact for {', '.join(FAMILIES)}, whose norms are RMSNorm in front of each layer. Leave rotate out.")
        self.signs = 1.0 - 2.0 * torch.randint(2, (self.config.hidden_size,), generator=torch.Generator().manual_seed(seed)).float()
        self.tensors: dict[str, LazyTensor] = {}

    def checkpoint(self) -> Checkpoint:
        skeleton = self.skeleton
        if not self._separate_values() and not self.options.residual:
            raise ModelError(f"{self.config.model_type} holds queries, keys and values in one matrix, whose values are not rotated alone. Leave rotate out, or residual = false.")
        for index in range(len(skeleton.blocks)):
            self._block(index)
        config = skeleton.checkpoint.config
        if self.options.residual:
            self._outside()
            config = {**config, "tie_word_embeddings": False}
        base = skeleton.checkpoint
        quantized = {name: entry for name, entry in base.quantized.items() if name not in self.tensors}
        return replace(base, config=config, tensors={**base.tensors, **self.tensors}, quantized=quantized)

    def _outside(self) -> None:
        model = self.skeleton.model
        embedding, head = (self._name(module) for module in (self.skeleton.text.get_input_embeddings(), model.get_output_embeddings()))
        sources, tied = self.skeleton.sources, model.all_tied_weights_keys
        source_of = lambda name: sources.get(name) or sources[tied[name]]
        norm = f"{self.skeleton.text_name}.norm.weight" if self.skeleton.text_name else "norm.weight"
        if norm not in sources:
            raise ModelError(f"{type(model).__name__} has no final norm called {norm}, so it cannot be rotated. Leave rotate out.")
        table, rows = source_of(f"{embedding}.weight").flat()[0], source_of(f"{head}.weight").flat()[0]
        gain = self._vector(sources[norm].flat()[0])
        self._put(table, lambda E: self._read_side(E), own=table if table != f"{head}.weight" else f"{embedding}.weight")
        own = rows if rows != table else f"{head}.weight"
        self._put(rows, lambda W: self._read_side(W * gain()), own=own)
        self._ones(sources[norm].flat()[0])

    def _block(self, index: int) -> None:
        prefix = self.skeleton.block_name(index)
        for local, parameter in self.skeleton.blocks[index].named_parameters():
            source = self.skeleton.sources[f"{prefix}.{local}"]
            parts = local.split(".")
            leaf = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
            bias = parts[-1] == "bias"
            if leaf in NORM_OF and not bias:
                gain = self._vector(self.skeleton.sources[f"{prefix}.{NORM_OF[leaf]}.weight"].flat()[0])
                for name in source.flat():
                    self._put(name, self._reader(gain, values=leaf == "v_proj"))
            elif leaf in NORM_OF:
                if leaf == "v_proj" and self.options.heads:
                    self._put(source.flat()[0], lambda b: self._heads(b.unsqueeze(1)).squeeze(1), whole=True)
            elif leaf in WRITERS:
                for name in source.flat():
                    self._put(name, self._writer(values=leaf == "o_proj" and not bias), whole=True)
            elif local in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                if self.options.residual:
                    self._ones(source.flat()[0])
            elif parameter.ndim > 1 or local.endswith("layernorm.weight"):
                raise ModelError(f"{prefix}.{local} is not known to read from the residual stream or to write to it, so this model cannot be rotated. Leave rotate out.")

    def _reader(self, gain: Callable[[], Tensor], *, values: bool) -> Change:
        turned = values and self.options.heads

        def change(W: Tensor) -> Tensor:
            W = self._read_side(W * gain()) if self.options.residual else W
            return self._heads(W) if turned else W

        change.whole = turned  # type: ignore[attr-defined]
        return change

    def _writer(self, *, values: bool) -> Change:
        def change(W: Tensor) -> Tensor:
            if values and self.options.heads and self._separate_values():
                size = self._head_size()
                W = hadamard.mix(W.view(len(W), -1, size)).view(W.shape)
            if not self.options.residual:
                return W
            turned = hadamard.mix(W.reshape(len(W), -1).T * self.signs).T
            return turned.reshape(W.shape)

        return change

    def _read_side(self, W: Tensor) -> Tensor:
        """W R^T: every row in the new basis."""
        return hadamard.mix(W * self.signs)

    def _heads(self, W: Tensor) -> Tensor:
        """The rows of each head of the values mixed: W [heads * size, columns]."""
        size = self._head_size()
        return hadamard.mix(W.view(-1, size, W.shape[1]).transpose(1, 2)).transpose(1, 2).reshape(W.shape)

    def _head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def _separate_values(self) -> bool:
        return hasattr(self.skeleton.blocks[0].self_attn, "v_proj")

    def _name(self, wanted: torch.nn.Module) -> str:
        return next(name for name, module in self.skeleton.model.named_modules() if module is wanted)

    def _vector(self, name: str) -> Callable[[], Tensor]:
        """A norm's weight, read when asked for."""
        lazy = self.skeleton.checkpoint.lazy(name)
        return lambda: lazy.load().float()

    def _ones(self, name: str) -> None:
        lazy = self.skeleton.checkpoint.lazy(name)
        self.tensors[name] = LazyTensor(lazy.shape, lazy.dtype, lambda start, stop: torch.ones(max(0, min(stop, lazy.shape[0]) - start), dtype=lazy.dtype))

    def _put(self, name: str, change: Change, *, own: str | None = None, whole: bool = False) -> None:
        """A tensor that is changed when it is read; whole: all of it is needed for any row."""
        lazy = self.skeleton.checkpoint.lazy(name)
        if whole or getattr(change, "whole", False):
            read = lambda start, stop: change(lazy.load().float())[start:stop].to(lazy.dtype)
        else:
            read = lambda start, stop: change(lazy.read(start, stop).float()).to(lazy.dtype)
        self.tensors[own or name] = LazyTensor(lazy.shape, lazy.dtype, read)
