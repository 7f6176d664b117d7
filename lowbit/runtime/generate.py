"""Text, token by token: sampling by transformers' own processors, and pieces that never break a character."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import RecipeError
from .engine import Engine


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0, top_p 1, min_p 0, repetition_penalty 1: off. seed: None is another text each time."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.repetition_penalty <= 0:
            raise RecipeError(
                f"temperature is {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, min_p {self.min_p} and repetition_penalty {self.repetition_penalty}; "
                "expected at least 0, at least 0, above 0 to 1, from 0 to below 1, and above 0."
            )

    def processors(self) -> LogitsProcessorList:
        made = LogitsProcessorList()
        if self.repetition_penalty != 1:
            made.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            made.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            made.append(TopPLogitsWarper(self.top_p))
        if self.temperature and self.min_p:
            made.append(MinPLogitsWarper(self.min_p))
        return made


@dataclass
class Text:
    """A generated text as far as it is. finish: "" (not yet), "stop" or "length". Times in seconds."""

    prompt_tokens: int
    tokens: list[int]
    text: str = ""
    finish: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cached_tokens: int = 0


def generate(engine: Engine, prompt: list[int], *, sampling: Sampling = Sampling(), max_tokens: int | None = None, stop: tuple[str, ...] = ()) -> Iterator[tuple[str, Text]]:
    """Pieces of text as they are made, each with all that is known so far; the last piece has a finish. stop: words that end the text and are not part of it.

    Raises RecipeError where the prompt leaves no room in the context.
    """
    steps = write(engine, prompt, sampling=sampling, max_tokens=max_tokens, stop=stop)
    found: list[int] | tuple[str, Text] | None = next(steps)
    while found is not None:
        if isinstance(found, list):
            found = steps.send(engine.feed(found))
        else:
            yield found
            found = next(steps, None)


def write(
    engine: Engine, prompt: list[int], *, sampling: Sampling = Sampling(), max_tokens: int | None = None, stop: tuple[str, ...] = ()
) -> Generator[list[int] | tuple[str, Text], torch.Tensor | None, None]:
    """What generate does, with the model left to the caller: yields the tokens whose logits it needs, which are sent to it, and pieces as generate does."""
    room = engine.context - len(prompt)
    if not prompt:
        raise RecipeError("the prompt is empty: there is nothing to continue.")
    if room < 1:
        raise RecipeError(f"the prompt has {len(prompt)} tokens, and the context is {engine.context}. Shorten it, or give a larger --context.")
    limit = min(room, max_tokens or room)
    processors, generator = sampling.processors(), torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    stream = DecodeStream(skip_special_tokens=True)
    made, held, tokens = Text(len(prompt), []), "", list(prompt)
    started = time.perf_counter()
    logits = yield tokens
    made.prefill_seconds, made.cached_tokens = time.perf_counter() - started, engine.reused
    started = time.perf_counter()
    while True:
        assert logits is not None
        token = _choose(logits, tokens, sampling, processors, generator)
        if token in engine.stops:
            made.finish = "stop"
        else:
            made.tokens.append(token)
            tokens.append(token)
            held += stream.step(engine.tokenizer._tokenizer, token) or ""
            if any(word in held for word in stop):
                held = held[: min(held.index(word) for word in stop if word in held)]
                made.finish = "stop"
            elif len(made.tokens) == limit:
                made.finish = "length"
        made.decode_seconds = time.perf_counter() - started
        ready = held if made.finish else held[: len(held) - _overlap(held, stop)]
        held = held[len(ready) :]
        made.text += ready
        if ready or made.finish:
            yield ready, made
        if made.finish:
            return
        logits = yield tokens


def _choose(logits: torch.Tensor, tokens: list[int], sampling: Sampling, processors: LogitsProcessorList, generator: torch.Generator) -> int:
    scores = logits.unsqueeze(0)
    if processors:
        seen: Any = torch.tensor([tokens if sampling.repetition_penalty != 1 else []], dtype=torch.long)
        scores = processors(seen, scores)
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(scores.float().softmax(-1)[0], 1, generator=generator))


def _overlap(text: str, stop: tuple[str, ...]) -> int:
    """How many last characters of text may be the beginning of a stop word."""
    return max((size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])), default=0)
