"""How long steps report how far they are. The library calls it; only the command line draws it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Says that n more units of a step are done."""

    def __call__(self, n: int = 1) -> None: ...


class Progress:
    """Silent progress; cli/console.py has the one with bars. Subclasses override step and note."""

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Advance]:
        """A step of `total` units; yields advance(n=1)."""
        yield lambda n=1: None

    def note(self, message: str) -> None:
        """One line that the user should see: a default that was chosen, a fallback."""


SILENT = Progress()
