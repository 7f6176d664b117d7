"""Several texts at once from one model: each has a cache of its own, and all get their next token in one pass over the weights; between passes one new prompt is read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .engine import Engine, feed_many
from .generate import Sampling, Text, write


@dataclass(eq=False)
class Job:
    """One request. tell: is called in the scheduler's thread with each piece and all so far, or with an exception. cancel: stop at the next token."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    tell: Callable[[str, Text | None, BaseException | None], None]
    cancelled: bool = False
    slot: int = -1
    steps: Any = field(default=None, repr=False)
    needs: list[int] = field(default_factory=list, repr=False)
    begun: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class Scheduler:
    """Runs jobs in a thread of its own; at most slots at a time, the others wait in the order in which they came."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engines = [engine, *(engine.another(slot) for slot in range(1, slots))]
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
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
            for job in [job for job in self.running if job.cancelled]:
                self._end(job)
            if self.running:
                self._turn()

    def _start(self, job: Job) -> None:
        """Give a job the free cache that knows most of its prompt."""
        job.slot = max(self._free, key=lambda slot: _shared(self.engines[slot].seen, job.prompt))
        self._free.remove(job.slot)
        job.steps = write(self.engines[job.slot], job.prompt, sampling=job.sampling, max_tokens=job.max_tokens, stop=job.stop)
        self.running.append(job)
        self._go_on(job, None)

    def _turn(self) -> None:
        """The prompt of one job that has not begun, then one token of all others together."""
        begun = [job for job in self.running if job.begun]
        if new := next((job for job in self.running if not job.begun), None):
            new.begun = True
            self._feed([new])
        if begun:
            self._feed(begun)

    def _feed(self, jobs: list[Job]) -> None:
        try:
            found = feed_many([self.engines[job.slot] for job in jobs], [job.needs for job in jobs])
        except Exception as error:  # all of them are told, and other requests go on
            for job in jobs:
                self._fail(job, error)
            return
        for job, logits in zip(jobs, found, strict=True):
            self._go_on(job, logits)

    def _go_on(self, job: Job, logits: Tensor | None) -> None:
        """Pieces of a job, until it needs logits again."""
        try:
            item = job.steps.send(logits)
            while not isinstance(item, list):
                piece, text = item
                job.tell(piece, replace(text), None)  # as it is now: it goes on while the other thread reads
                if text.finish:
                    self._end(job)
                    return
                item = next(job.steps)
            job.needs = item
        except Exception as error:  # whatever goes wrong belongs to this request, which is told; the others go on
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        self._end(job)
        with suppress(RuntimeError):  # nobody is left who could be told
            job.tell("", None, error)

    def _end(self, job: Job) -> None:
        job.steps.close()
        self.running.remove(job)
        self._free.append(job.slot)


def _shared(seen: list[int], prompt: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(seen, prompt, strict=False)) if pair[0] != pair[1]), min(len(seen), len(prompt)))
