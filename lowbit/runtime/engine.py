"""What runs a model: the native decoder, or transformers for every other architecture; both continue a list of tokens and keep what they have seen."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from ..checkpoints import open_checkpoint
from ..errors import ModelError, RecipeError
from ..models import skeleton as sk
from ..models.kv_cache import KVScheme
from ..models.kv_cache import kv_cache as rounded_cache
from ..models.quantized import PackedLinear
from ..pipeline import resources
from ..pipeline.load import load
from ..pipeline.locate import load_tokenizer, locate
from ..progress import SILENT, Progress
from .decoder import NativeModel, forward_many, open_native, why_not_native

CONTEXT = 4096
CACHES = {"fp16": 16, "int8": 8, "int4": 4}  # bits of keys and values


class Model(Protocol):
    vocabulary: int
    context: int
    nbytes: int
    notes: list[str]

    def forward(self, tokens: list[int], start: int, *, every: bool = False) -> Tensor: ...

    def another(self, slot: int) -> Model: ...


class TransformersModel:
    """A transformers model with its cache."""

    def __init__(self, model: Any, context: int, cache_bits: int = 16) -> None:
        self.model, self.context, self.cache_bits = model, context, cache_bits
        self.vocabulary = model.config.get_text_config().vocab_size
        self.nbytes = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
        self.nbytes += sum(module.matrix.nbytes for module in model.modules() if isinstance(module, PackedLinear))
        self.notes: list[str] = []
        self._cache: Any = None
        self._seen: list[int] = []

    def forward(self, tokens: list[int], start: int, *, every: bool = False) -> Tensor:
        self._seen = [*self._seen[:start], *tokens]
        fed = tokens if self._cut(start) else self._seen
        with torch.inference_mode():
            ids = torch.tensor([fed], device=self.model.device)
            found = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=len(tokens) if every else 1)
        return found.logits[0].float().cpu()

    def another(self, slot: int) -> TransformersModel:
        """The same weights with the cache of another text."""
        return TransformersModel(self.model, self.context, self.cache_bits)

    def _cut(self, length: int) -> bool:
        """Make the cache hold the first tokens alone; where it cannot forget (sliding windows, states), begin anew and return False."""
        held = 0 if self._cache is None else self._cache.get_seq_length()
        if length and held == length:
            return True
        if 0 < length < held:
            with suppress(ValueError, RuntimeError, AttributeError):
                self._cache.crop(length - held)
                if self._cache.get_seq_length() == length:
                    return True
        self._cache = DynamicCache(config=self.model.config) if self.cache_bits == 16 else rounded_cache(self.model.config, KVScheme(self.cache_bits))
        return length == 0


@dataclass
class Engine:
    """A model with its tokenizer. reason: why it is not the native decoder (empty where it is).

    seen: the tokens whose keys and values are in the cache; reused: how many of them the last feed needed not compute again.
    """

    model: Model
    tokenizer: Any
    name: str
    reason: str
    load_seconds: float
    stops: frozenset[int]
    defaults: Any = None
    seen: list[int] = field(default_factory=list)
    reused: int = 0

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def how(self) -> str:
        """What runs it, in words."""
        return f"transformers, because {self.reason}" if self.reason else "native decoder"

    def another(self, slot: int) -> Engine:
        """The same model for another text."""
        return replace(self, model=self.model.another(slot), seen=[])

    def feed(self, tokens: list[int]) -> Tensor:
        """Logits float32 [vocabulary] after tokens; the beginning that is in the cache already is not computed again."""
        known = min(len(self.seen), len(tokens) - 1)
        if self.seen[:known] != tokens[:known]:
            known = next(at for at in range(known) if self.seen[at] != tokens[at])
        self.seen, self.reused = self.seen[:known], known
        logits = self.model.forward(tokens[known:], known)[-1]
        self.seen = list(tokens)
        return logits


def feed_many(engines: list[Engine], texts: list[list[int]]) -> list[Tensor]:
    """feed for several texts of one model (their engines are each other's `another`); where each has one more token than its cache, in one pass."""
    models = [engine.model for engine in engines]
    if len(engines) > 1 and all(isinstance(model, NativeModel) for model in models) and all(engine.seen == text[:-1] for engine, text in zip(engines, texts, strict=True)):
        logits = forward_many(cast(list[NativeModel], models), [text[-1] for text in texts], [len(text) - 1 for text in texts])
        for engine, text in zip(engines, texts, strict=True):
            engine.seen, engine.reused = list(text), len(text) - 1
        return list(logits)
    return [engine.feed(text) for engine, text in zip(engines, texts, strict=True)]


def open_model(
    path: str | Path, *, context: int | None = None, kv_cache: str = "fp16", threads: int | None = None, isa: str = "", native: bool | None = None, progress: Progress = SILENT
) -> Engine:
    """Open anything that lowbit reads for running.

    context: tokens of prompt and answer together (None: what the model allows, at most 4096). kv_cache: fp16, int8 or int4. isa: of the native kernels.
    native: None where it can be, True to insist, False never.
    Raises LowbitError for what cannot be run here.
    """
    if kv_cache not in CACHES:
        raise RecipeError(f"kv_cache is {kv_cache!r}; expected one of {', '.join(CACHES)}.")
    bits, started = CACHES[kv_cache], time.monotonic()
    located = locate(path, progress=progress)
    checkpoint = open_checkpoint(located)
    built = sk.build(checkpoint)
    limit = getattr(built.text_config, "max_position_embeddings", None) or CONTEXT
    length = min(context or min(CONTEXT, limit), limit)
    reason = "it was asked not to be" if native is False else why_not_native(built)
    if reason and native:
        raise ModelError(f"{located} cannot run in the native decoder: {reason}.")
    resources.require_memory(int(1.1 * checkpoint.tensor_bytes), purpose="Running this model")
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:  # before the weights: reading a GGUF's tokens takes some 300 MB for a while
        tokenizer = load_tokenizer(checkpoint, Path(scratch))
    resources.release_memory()
    model: Model
    if reason:
        model = TransformersModel(load(located, kernels=native is None), length, bits)
    else:
        model = open_native(built, context=length, threads=threads, isa=isa, cache_bits=bits, progress=progress)
    defaults = None
    if found := next((file.parent for file in checkpoint.files if file.name == "generation_config.json"), None):
        with suppress(OSError, ValueError):
            defaults = GenerationConfig.from_pretrained(found)
    return Engine(model, tokenizer, Path(located).name, reason, time.monotonic() - started, _stops(tokenizer, defaults, built.text_config), defaults)


def _stops(tokenizer: Any, defaults: Any, config: Any) -> frozenset[int]:
    """Tokens that end a text, by tokenizer, generation config and config."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(defaults, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        if value is not None:
            found |= set(value) if isinstance(value, list | tuple) else {int(value)}
    return frozenset(found)
