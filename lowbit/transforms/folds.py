"""Where a block can be rescaled without changing what it computes: channels divided in what writes them, multiplied in what reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.linears import Linear


@dataclass(frozen=True)
class Fold:
    """A place for a scale per channel. producer: the norm or linear layer that writes the channels; consumers: everything that reads them.

    Names are modules of the block; "experts:parameter" is that parameter of fused experts, of which "up" is the second half of gate_up_proj.
    heads: the producer is the values' projection, whose channels several query heads share.
    """

    producer: str
    consumers: tuple[str, ...]
    heads: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_EXPERTS = ("mlp.gate", "mlp.experts:gate_up_proj")

# Tried from the top; a fold is there when all its modules are, and a consumer belongs to the first that has it. What reads a norm must be listed
# completely: pipeline/transform.py runs every block before and after.
FOLDS = (
    Fold("input_layernorm", _QKV),
    Fold("input_layernorm", ("self_attn.qkv_proj",)),
    Fold("self_attn_layer_norm", _QKV),  # OPT
    Fold("ln_1", ("attn.c_attn",)),  # GPT-2
    Fold("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
    Fold("self_attn.v_proj", ("self_attn.out_proj",), heads=True),  # OPT
    Fold("pre_feedforward_layernorm", _MLP),  # Gemma
    Fold("post_attention_layernorm", _MLP),
    Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),  # Phi-3
    Fold("post_attention_layernorm", _EXPERTS),
    Fold("ln_2", ("mlp.c_fc",)),
    Fold("final_layer_norm", ("fc1",)),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
    Fold("mlp.experts:up", ("mlp.experts:down_proj",)),
    Fold("fc1", ("fc2",)),
)


def find_folds(block: nn.Module) -> list[Fold]:
    """The folds of a block, in the order of the table."""
    names = {name for name, _ in block.named_modules()}
    here = lambda name: name.partition(":")[0] in names
    found: list[Fold] = []
    taken: set[str] = set()
    for fold in FOLDS:
        if here(fold.producer) and all(map(here, fold.consumers)) and not taken & set(fold.consumers) and not _is_broken(block, fold):
            found.append(fold)
            taken |= set(fold.consumers)
    return found


def _is_broken(block: nn.Module, fold: Fold) -> bool:
    """Whether something that a scale does not pass lies between producer and consumer: OPT's other activations, and norms behind the layers."""
    if fold.producer == "fc1":
        return not isinstance(getattr(block, "activation_fn", None), nn.ReLU)
    return fold.producer.endswith("layer_norm") and not getattr(block, "do_layer_norm_before", True)


def reads(fold: Fold, linear: Linear) -> bool:
    """Whether a matrix is among the fold's consumers."""
    return any(linear.module == name if not parameter else (linear.module, linear.parameter) == (name, parameter) for name, _, parameter in (c.partition(":") for c in fold.consumers))


def apply(block: nn.Module, fold: Fold, scale: Tensor, expert: int | None = None) -> set[str]:
    """Divide the producer's channels by scale [channels] and multiply the consumers' columns by it, in place; returns the parameters changed.

    Norm weights are rounded to their dtype, and the consumers get exactly what was taken from them. expert: of a fold between experts' matrices.
    """
    changed, scale = _divide(block, fold, scale, expert)
    for consumer in fold.consumers:
        name, _, parameter = consumer.partition(":")
        module: Any = block.get_submodule(name)
        weight = getattr(module, parameter or "weight").data
        weight = weight if expert is None else weight[expert]
        by_row = not isinstance(module, nn.Linear) and not parameter and weight.ndim == 2 and weight.shape[0] == len(scale)  # Conv1D is [in, out]
        weight.mul_((scale.unsqueeze(1) if by_row else scale).to(weight.dtype))
        changed.add(f"{name}.{parameter or 'weight'}")
    return changed


def _divide(block: nn.Module, fold: Fold, scale: Tensor, expert: int | None) -> tuple[set[str], Tensor]:
    """Divide the producer; returns its parameters and the scale that it was really divided by."""
    name, _, part = fold.producer.partition(":")
    module: Any = block.get_submodule(name)
    if part == "up":
        up = module.gate_up_proj.data[expert]
        up[len(up) // 2 :].div_(scale.unsqueeze(1).to(up.dtype))
        return {f"{name}.gate_up_proj"}, scale
    if isinstance(module, nn.Linear):
        rows = _by_key_head(fold, block, scale)[:, 0].reshape(-1) if fold.heads else scale
        module.weight.data.div_(rows.unsqueeze(1).to(module.weight.dtype))
        if module.bias is not None:
            module.bias.data.div_(rows.to(module.bias.dtype))
        return {f"{name}.weight"} | ({f"{name}.bias"} if module.bias is not None else set()), scale
    shift = _norm_shift(module)
    before = module.weight.data.float() + shift
    module.weight.data.copy_(before / scale - shift)
    after = module.weight.data.float() + shift
    exact = torch.where(after != 0, before / after, scale)
    changed = {f"{name}.weight"}
    if getattr(module, "bias", None) is not None:
        module.bias.data.div_(exact.to(module.bias.dtype))
        changed.add(f"{name}.bias")
    return changed, exact


def tie(fold: Fold, block: nn.Module, scale: Tensor) -> Tensor:
    """The scale with one value for all query heads that read a channel of the values (their geometric mean)."""
    if not fold.heads:
        return scale
    heads = _by_key_head(fold, block, scale.log())
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1).exp()


def _by_key_head(fold: Fold, block: nn.Module, values: Tensor) -> Tensor:
    """Values per channel of all query heads as [key heads, query heads of each, head size]."""
    rows = getattr(block.get_submodule(fold.producer), "out_features")  # noqa: B009
    size = getattr(block.get_submodule(fold.producer.rpartition(".")[0]), "head_dim", rows)
    return values.view(rows // size, -1, size)


def _norm_shift(norm: Any) -> float:
    """1 for norms that multiply by 1 + weight (Gemma's), else 0: known by what a norm without weight gives."""
    if not hasattr(norm, "weight"):
        raise ModelError(f"{type(norm).__name__} has no weight that could take a scale.")
    kept = norm.weight.data
    try:
        norm.weight.data = torch.zeros_like(kept)
        x = torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype, device=kept.device).view(1, 1, -1)
        y = norm(x)
        bias = getattr(norm, "bias", None)
        return float(bool((y - (0 if bias is None else bias)).abs().max() > 0))
    finally:
        norm.weight.data = kept
