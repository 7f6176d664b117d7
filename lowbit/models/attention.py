"""transformers' attention through our kernel where that takes it, through its own sdpa where not."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..kernels.attention import attend, can_attend

NAME = "lowbit"
FEWEST_QUERIES = 16  # below, laying out the keys costs more than is won


def use_native(model: transformers.PreTrainedModel) -> None:
    """Let a model that computes with sdpa call our kernel; others (eager, models that choose by themselves) stay as they are."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled(query.device.type):  # as sdpa does there
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)) and query.shape[2] > 1
    plain = attention_mask is None and not dropout and all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap"))
    if plain and query.shape[2] >= FEWEST_QUERIES and can_attend(query, key, value, causal):
        return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, causal).transpose(1, 2), None
    made: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
    return made


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
