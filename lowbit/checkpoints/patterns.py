"""Regular expressions that a file of a stranger holds: bounded in length, in what they count, and by a clock."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import regex

from ..errors import CheckpointError

LENGTH, SECONDS = 10_000, 5.0
_COSTLY = re.compile(r"\{[^}]*\d{3}|\(\?(?![:=!i]|<[=!])")  # counts of hundreds and recursion take memory that no clock bounds


class Patterns:
    """Compiles and matches the expressions of one file, which may take SECONDS together: with some names some take for ever. what: how errors call one of them."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what, self.seconds = path, what, SECONDS

    def compiled(self, pattern: str) -> regex.Pattern:
        """CheckpointError for what is no expression for names."""
        if len(pattern) > LENGTH or _COSTLY.search(pattern):
            raise CheckpointError(f"{self.path}: the {self.what} {pattern[:80]!r} is no expression for names: it is long, counts to hundreds or calls itself.")
        try:
            with self._timed(pattern):
                return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: the {self.what} {pattern[:80]!r} is not a regular expression: {error}.") from error

    def matches(self, pattern: regex.Pattern, name: str) -> bool:
        """Whether it matches from the start of name, as re.match does."""
        with self._timed(pattern.pattern):
            return pattern.match(name, timeout=self.seconds) is not None

    @contextmanager
    def _timed(self, pattern: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
            self.seconds -= time.monotonic() - start
            if self.seconds <= 0:
                raise TimeoutError
        except TimeoutError as error:
            raise CheckpointError(f"{self.path}: the {self.what} {pattern[:80]!r} takes too long to match the names of this model.") from error
