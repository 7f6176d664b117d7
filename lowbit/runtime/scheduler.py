"""Several texts at once from one model: each has a cache of its own, and they take turns, one token each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .engine import Engine
from .generate import Sampling, Text, generate


@dataclass
class Job:
    """One request. tell: is called in the scheduler's thread with each piece and all so far, or with an exception. cancel: stop at the next token."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    tell: Callable[[str, Text | None, BaseException | None], None]
    cancelled: bool = False
    slot: int = -1
    pieces: Any = field(default=None, repr=False)

    def cancel(self) -> None:
        self.cancelled = True


class Scheduler:
    """Runs jobs in a thread of its own; at most slots at a time, the others wait in the order in which they came."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engines = [engine, *(engine.another(slot) for slot in range(1, slots))]
        self.waiting: deque[Job] = deque()
        self.running: deque[Job] = deque()
        self._free = list(range(slots))
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="lowbit-scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._change:
            self.waiting.append(job)
            self._change.notify()

    def close(self) -> None:
        """End after the current token; unfinished jobs are told nothing more."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self.waiting or self.running)
                if self._closed:
                    return
                while self.waiting and self._free:
                    job = self.waiting.popleft()
                    if not job.cancelled:
                        self._start(job)
            if self.running:
                self._turn(self.running.popleft())

    def _start(self, job: Job) -> None:
        """Give a job the free cache that knows most of its prompt."""
        job.slot = max(self._free, key=lambda slot: _shared(self.engines[slot].seen, job.prompt))
        self._free.remove(job.slot)
        job.pieces = generate(self.engines[job.slot], job.prompt, sampling=job.sampling, max_tokens=job.max_tokens, stop=job.stop, every_token=True)
        self.running.append(job)

    def _turn(self, job: Job) -> None:
        """One token of a job; then it is the others' turn."""
        if not job.cancelled:
            try:
                piece, text = next(job.pieces)
            except Exception as error:  # whatever goes wrong belongs to this request, which is told; the others go on
                job.tell("", None, error)
            else:
                job.tell(piece, replace(text), None)  # as it is now: it goes on while the other thread reads
                if not text.finish:
                    self.running.append(job)
                    return
        job.pieces.close()
        self._free.append(job.slot)


def _shared(seen: list[int], prompt: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(seen, prompt, strict=False)) if pair[0] != pair[1]), min(len(seen), len(prompt)))
