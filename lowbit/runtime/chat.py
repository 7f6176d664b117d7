"""A conversation with a model: its template, its history, and what fits into the context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..errors import RecipeError
from ..pipeline.calibration import template_errors
from .engine import Engine
from .generate import Sampling, Text, generate


@dataclass
class Chat:
    """messages: as chat templates take them ({"role", "content"}). Oldest exchanges are forgotten where they no longer fit; dropped counts them."""

    engine: Engine
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    dropped: int = 0

    def say(self, content: str) -> Iterator[tuple[str, Text]]:
        """Pieces of the answer; the exchange is part of the history when the last piece has come, also where the caller stops in between."""
        self.messages.append({"role": "user", "content": content})
        answer, seed = "", self.sampling.seed
        sampling = self.sampling if seed is None else replace(self.sampling, seed=seed + len(self.messages))  # other chances for each answer
        try:
            for piece, text in generate(self.engine, self._prompt(), sampling=sampling, max_tokens=self.max_tokens):
                answer += piece
                yield piece, text
        finally:
            self.messages.append({"role": "assistant", "content": answer})

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _prompt(self) -> list[int]:
        """The tokens of the conversation; exchanges that leave less than a quarter of the context for the answer are forgotten, the oldest first."""
        while True:
            ids = prompt_of(self.engine, self.messages)
            first = next((i for i, message in enumerate(self.messages) if message["role"] == "user"), None)
            if len(ids) <= self.engine.context * 3 // 4 or first is None or first + 2 >= len(self.messages):
                return ids
            del self.messages[first : first + 2]
            self.dropped += 1


def has_template(engine: Engine) -> bool:
    return bool(engine.tokenizer.chat_template)


def prompt_of(engine: Engine, messages: list[dict[str, str]]) -> list[int]:
    """Tokens of a conversation up to the beginning of the answer. RecipeError where the model has no template, or its template refuses."""
    if not has_template(engine):
        raise RecipeError(f"{engine.name} has no chat template. Give it a text to continue instead.")
    with template_errors("the chat template"):
        return engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def tokens_of(engine: Engine, text: str) -> list[int]:
    """Tokens of a text to continue, with what the tokenizer puts before a text."""
    return list(engine.tokenizer(text)["input_ids"])
