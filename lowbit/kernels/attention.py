"""Attention over whole sequences in bfloat16 on the processor, with gradients (csrc/bf16.cpp).

Dao et al., "FlashAttention", arXiv:2205.14135. torch's own takes several times as long on processors with AVX-512 BF16 (docs/runtime.md); elsewhere torch's is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import native, threads

LARGEST_DIM = 256


def can_attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    """Whether `attend` takes these: bfloat16 on the processor, heads of a multiple of 32 channels up to 256, as many queries as keys where causal."""
    tensors = (query, key, value)
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.ndim == 4 and x.shape[-1] == query.shape[-1] and x.numel() for x in tensors)
        and query.shape[-1] % 32 == 0
        and query.shape[-1] <= LARGEST_DIM
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
        and (not causal or query.shape[2] == key.shape[2])
        and (module := native()) is not None
        and module.attention_supported()
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T) v: query [batch, heads, length, dim], key and value [batch, heads / some, keys, dim], all bfloat16; differentiable.

    The result is a view of [batch, length, heads, dim].
    """
    made: Tensor = _Attention.apply(query, key, value, scale, causal)
    return made


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        query, key, value = map(_rows, (query, key, value))
        out, lse = _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        native().attention(*map(_bits, (query, key, value, out)), lse, scale, causal, threads())
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        to_query, to_key, to_value = _like(query), _like(query, key.shape[2]), _like(query, key.shape[2])
        native().attention_backward(*map(_bits, (query, key, value, out)), lse, *map(_bits, (_rows(gradient), to_query, to_key, to_value)), ctx.scale, ctx.causal, threads())
        if (heads := key.shape[1]) != query.shape[1]:
            to_key, to_value = (each.unflatten(1, (heads, -1)).sum(2) for each in (to_key, to_value))
        return to_query, to_key, to_value, None, None


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of a row beside each other, and rows at even places."""
    return x if x.stride(3) == 1 and x.stride(2) % 2 == 0 else x.contiguous()


def _like(query: Tensor, length: int | None = None) -> Tensor:
    """An empty [batch, heads, length, dim] whose memory is [batch, length, heads, dim], as transformers wants it next."""
    batch, heads, queries, dim = query.shape
    return query.new_empty(batch, queries if length is None else length, heads, dim).transpose(1, 2)


def _bits(x: Tensor) -> Tensor:
    return x.detach().view(torch.uint16)
