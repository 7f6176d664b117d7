"""Running a transformers model block by block, one block in memory at a time.

1. The text model's own forward runs on each micro-batch with probes in place of its blocks and records what it hands to every block
   (masks, rotary embeddings, keyword arguments; they differ from block to block).
2. The blocks are run outside, one after the other, over all micro-batches.
3. The final hidden states are put back through the model's own norm and head.

In float32 the result equals the plain forward bit for bit (2e-6 for mixtures of experts); tests/pipeline/test_streaming.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import numerics
from ..errors import ModelError
from ..models import skeleton as sk
from ..models.kv_cache import BlockCache, KVScheme
from ..models.linears import find_linears
from ..models.rounding import attach
from ..models.skeleton import Skeleton
from .hidden import HiddenStates

HEAD_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class Batch:
    """A micro-batch: ids int64 [sequences, length]; mask bool [sequences, length], True where a token is real (None: all are)."""

    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What the model hands to one block besides the hidden states."""

    args: tuple
    kwargs: dict


class _Stop(Exception):
    """Raised by a probe when what follows is not needed."""


class Streamer:
    """A model that is run block by block. hidden states are made by embed(), advanced by run(), and turned to logits by logits()."""

    def __init__(
        self, skeleton: Skeleton, batches: list[Batch], *, dtype: torch.dtype, device: torch.device = torch.device("cpu"), kv: KVScheme | None = None
    ) -> None:
        """kv: run as if keys and values had come from a cache that is quantized so."""
        self.kv = kv
        self.skeleton, self.batches, self.dtype, self.device = skeleton, batches, dtype, device
        self.calls: list[list[Call]] = []
        self._prepare_outside()
        self._wrap = self._return_type()

    @property
    def depth(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(len(batch.ids), batch.ids.shape[1]) for batch in self.batches]

    @property
    def hidden_size(self) -> int:
        return self.skeleton.text_config.hidden_size

    def _prepare_outside(self) -> None:
        skeleton = self.skeleton
        embedding, head = skeleton.text.get_input_embeddings(), skeleton.model.get_output_embeddings()
        for name, module in list(sk.modules_outside_blocks(skeleton)):
            if module is embedding:
                _compact_embedding(skeleton, name, cast(nn.Embedding, module), self.batches, self.dtype, self.device)
            elif module is head:
                chunked = ChunkedHead(skeleton, name, module, self.dtype, self.device)
                owner, _, leaf = name.rpartition(".")
                setattr(skeleton.model.get_submodule(owner), leaf, chunked)
            elif name == skeleton.text_name or name.startswith(skeleton.text_name + ".") or not skeleton.text_name:
                sk.fill(skeleton, name, module, self.dtype, self.device)

    def _return_type(self) -> Callable[[Tensor], object]:
        """Whether blocks return a tensor or a tuple, learnt by running the first one on a few tokens."""
        ids = self.batches[0].ids[:1, :4].to(self.device)
        seen: dict = {}

        def probe(index, hidden, args, kwargs):
            seen.update(hidden=hidden, args=args, kwargs=kwargs)
            raise _Stop

        self._run_text(ids, None, probe)
        block = self.load_block(0)
        output = block(seen["hidden"], *seen["args"], **seen["kwargs"])
        return (lambda hidden: (hidden,)) if isinstance(output, tuple) else (lambda hidden: hidden)

    @torch.no_grad()
    def _run_text(self, ids: Tensor, mask: Tensor | None, probe) -> None:
        with suppress(_Stop), _Probes(self.skeleton.blocks, probe):
            self.skeleton.text(input_ids=ids, attention_mask=mask, use_cache=False)

    def record(self, states: HiddenStates | None = None) -> None:
        """Run the model's own forward over all micro-batches with probes: fills self.calls, and states with the embeddings."""
        self.calls = []
        for number, batch in enumerate(self.batches):
            calls: list[Call] = []
            last: list[Tensor] = []

            def probe(index, hidden, args, kwargs, calls=calls, last=last, number=number, batch=batch):
                if tuple(hidden.shape) != (*batch.ids.shape, self.hidden_size):
                    raise ModelError(f"{type(self.skeleton.model).__name__} hands its blocks {list(hidden.shape)}; expected {[*batch.ids.shape, self.hidden_size]}, so it cannot be streamed.")
                if index == 0 and states is not None:
                    states.write(number, hidden)
                if index and hidden is not last[0]:
                    raise ModelError(f"{type(self.skeleton.model).__name__} changes the hidden states between blocks {index - 1} and {index}, so it cannot be streamed block by block.")
                last[:] = [hidden]
                calls.append(Call(args, kwargs))
                if index == self.depth - 1:
                    raise _Stop
                return self._wrap(hidden)

            mask = None if batch.mask is None else batch.mask.to(self.device)
            self._run_text(batch.ids.to(self.device), mask, probe)
            self.calls.append(_share(calls, self.calls[0] if self.calls else calls))

    def load_block(self, index: int) -> nn.Module:
        """Block index, filled from the checkpoint; where that rounds activations, its layers do."""
        block = sk.load_module(self.skeleton, self.skeleton.block_name(index), self.dtype, self.device)
        if self.skeleton.checkpoint.activations:
            attach(block, find_linears(self.skeleton, index), self.skeleton.checkpoint.activations)
        return block

    @torch.no_grad()
    def run_block(self, block: nn.Module, index: int, number: int, hidden: Tensor) -> Tensor:
        """Block index on micro-batch number."""
        return self.run_block_with_gradient(block, index, number, hidden)

    def run_block_with_gradient(self, block: nn.Module, index: int, number: int, hidden: Tensor) -> Tensor:
        """run_block inside of whatever gradient mode is set."""
        call = self.calls[number][index]
        args, kwargs = ((hidden, *call.args), call.kwargs) if self.kv is None else _with_cache(block, hidden, call, BlockCache(self.kv))
        output = block(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run(self, block: nn.Module, index: int, source: HiddenStates, target: HiddenStates, *, tick: Callable[[], None] = lambda: None) -> None:
        """Block index on all micro-batches, from source to target (which may be the same in memory)."""
        for number in range(len(self.batches)):
            target.write(number, self.run_block(block, index, number, source.read(number, self.device)))
            tick()

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The model's own norm and head on final hidden states [sequences, length, hidden]; float32 [sequences, length, vocabulary]."""
        return self.logits_with_gradient(ids, hidden)

    def logits_with_gradient(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """logits inside of whatever gradient mode is set."""

        def probe(index, _, args, kwargs):
            return self._wrap(hidden)

        with _Probes(self.skeleton.blocks, probe):
            return self.skeleton.model(input_ids=ids.to(self.device), use_cache=False).logits.float()


def _with_cache(block: nn.Module, hidden: Tensor, call: Call, cache: BlockCache) -> tuple[tuple, dict]:
    """The arguments of a call, with a cache of keys and values among them."""
    signature = inspect.signature(block.forward)
    if "past_key_values" not in signature.parameters:
        raise ModelError(f"{type(block).__name__} takes no past_key_values, so it cannot be run with a quantized cache.")
    bound = signature.bind(hidden, *call.args, **call.kwargs)
    bound.arguments["past_key_values"] = cache
    return bound.args, bound.kwargs


class _Probes:
    """For a while, calls of the blocks go to probe(index, hidden, args, kwargs)."""

    def __init__(self, blocks: nn.ModuleList, probe) -> None:
        self.blocks, self.probe = blocks, probe

    def __enter__(self):
        for index, block in enumerate(self.blocks):

            def forward(*args, index=index, **kwargs):
                hidden = args[0] if args else kwargs.pop("hidden_states")
                return self.probe(index, hidden, args[1:], kwargs)

            block.forward = forward

    def __exit__(self, *_):
        for block in self.blocks:
            del block.forward


def _share(calls: list[Call], first: list[Call]) -> list[Call]:
    """Use the first micro-batch's tensors where they are equal, so that masks and rotary embeddings are held once, not per micro-batch."""
    memo: dict[int, object] = {}

    def same(value, other):
        if isinstance(value, Tensor):
            if id(value) not in memo:
                equal = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
                memo[id(value)] = other if equal else value
            return memo[id(value)]
        if isinstance(value, tuple | list) and isinstance(other, tuple | list) and len(value) == len(other):
            return type(value)(same(a, b) for a, b in zip(value, other, strict=True))
        if isinstance(value, dict) and isinstance(other, dict):
            return {key: same(item, other.get(key)) for key, item in value.items()}
        return value

    return [Call(same(call.args, base.args), same(call.kwargs, base.kwargs)) for call, base in zip(calls, first, strict=True)]


def _compact_embedding(skeleton: Skeleton, name: str, module: nn.Embedding, batches: list[Batch], dtype: torch.dtype, device: torch.device) -> None:
    """Fill the input embedding with the rows that the batches use, and no others; ids are mapped on the way in."""
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in batches]))
    vocabulary = module.weight.shape[0]
    if int(used[-1]) >= vocabulary:
        raise ModelError(f"a token id is {int(used[-1])}, and the embedding has {vocabulary} rows: the tokenizer does not belong to this model.")
    source = skeleton.sources[f"{name}.weight"].flat()[0]
    lazy = skeleton.checkpoint.lazy(source)
    rows = torch.empty(len(used), lazy.shape[1], dtype=dtype, device=device)
    chunk = max(1, HEAD_CHUNK_BYTES // (lazy.shape[1] * 4))
    for start in range(0, vocabulary, chunk):
        inside = (used >= start) & (used < start + chunk)
        if bool(inside.any()):
            rows[inside] = lazy.read(start, min(start + chunk, vocabulary))[used[inside] - start].to(device, dtype)
    numerics.refuse_bad_values(rows, source)
    place = torch.zeros(vocabulary, dtype=torch.int64)
    place[used] = torch.arange(len(used))
    place = place.to(device)
    sk.fill_buffers(skeleton.model, module, device)
    module.weight = nn.Parameter(rows, requires_grad=False)
    module.padding_idx = None
    module.register_forward_pre_hook(lambda _, args: (place[args[0]], *args[1:]))


class ChunkedHead(nn.Module):
    """The output head, whose rows are read, cast and multiplied a chunk at a time: its weight is never held whole."""

    def __init__(self, skeleton: Skeleton, name: str, head: nn.Linear, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = head.weight.shape
        self._dtype, self._device = dtype, device
        self._lazy = skeleton.checkpoint.lazy(_head_source(skeleton, name))
        self._bias = None if head.bias is None else sk.load_parameter(skeleton, f"{name}.bias", dtype).to(device)
        chunk = max(1, HEAD_CHUNK_BYTES // (self.in_features * dtype.itemsize))
        self._starts = range(0, self.out_features, chunk)
        self._kept: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if len(self._starts) == 1:  # fits one chunk: kept
            if self._kept is None:
                self._kept = self._rows(0)
            return nn.functional.linear(hidden, self._kept, self._bias)
        run = lambda start: nn.functional.linear(hidden, self._rows(start))
        # With gradients each chunk is read again on the way back instead of being kept.
        parts = [checkpoint(run, start, use_reentrant=False) if hidden.requires_grad else run(start) for start in self._starts]
        output = torch.cat(parts, dim=-1)
        return output if self._bias is None else output + self._bias

    def _rows(self, start: int) -> Tensor:
        stop = min(start + self._starts.step, self.out_features)
        return self._lazy.read(start, stop).to(self._device, self._dtype)


def _head_source(skeleton: Skeleton, name: str) -> str:
    for parameter in (f"{name}.weight", skeleton.model.all_tied_weights_keys.get(f"{name}.weight")):
        if parameter in skeleton.sources:
            return skeleton.sources[parameter].flat()[0]
    raise ModelError(f"{name}.weight is not in the checkpoint and tied to nothing.")
