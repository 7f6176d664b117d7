"""How fast a model runs here, beside what the memory allows."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from ..native import threads
from ..pipeline import resources
from .decoder import NativeModel
from .engine import Engine

READ = 1 << 28  # bytes that the bandwidth test reads, more than caches hold


@dataclass(frozen=True)
class Prefill:
    tokens: int
    tokens_per_s: float


@dataclass(frozen=True)
class Speed:
    """decode: one token after the other behind context tokens; ms per token. weights_bytes: read for each token. read_gbs: bandwidth in 10^9 bytes/s, measured by summing;
    share: of it that decoding uses.

    peak_memory_bytes: the largest RssAnon seen (what is not a mapped file).
    """

    model: str
    decoder: str
    threads: int
    prefill: list[Prefill]
    decode_tokens: int
    context: int
    decode_tokens_per_s: float
    ms_p50: float
    ms_p95: float
    weights_bytes: int
    read_gbs: float
    share: float
    load_s: float
    peak_memory_bytes: int


def bench(engine: Engine, *, prefill: tuple[int, ...] = (128, 512), decode: int = 64, repeats: int = 3) -> Speed:
    """Measure an engine; medians over repeats. Prompts are random tokens."""
    peak = resources.PeakMemory()
    generator = torch.Generator().manual_seed(0)
    longest = min(engine.context - decode - 1, max(prefill))
    tokens = torch.randint(0, engine.model.vocabulary, (longest + decode,), generator=generator).tolist()
    found = []
    for size in sorted({min(size, longest) for size in prefill}):
        seconds = [_timed(lambda size=size: engine.model.forward(tokens[:size], 0)) for _ in range(repeats + 1)][1:]
        found.append(Prefill(size, size / statistics.median(seconds)))
        peak.look()
    start = min(found[0].tokens, longest)
    engine.model.forward(tokens[:start], 0)
    times = [_timed(lambda at=at: engine.model.forward([tokens[at]], at)) for _ in range(repeats) for at in range(start, start + decode)]
    peak.look()
    engine.seen = []
    p50, p95 = (1e3 * value for value in (statistics.median(times), sorted(times)[int(0.95 * (len(times) - 1))]))
    bandwidth = read_bandwidth()
    decoder = f"native, {engine.model.isa}" if isinstance(engine.model, NativeModel) else "transformers"
    return Speed(
        engine.name, decoder, threads(), found, decode, start, 1e3 / p50, p50, p95, engine.model.nbytes, bandwidth / 1e9,
        engine.model.nbytes / (p50 / 1e3) / bandwidth, engine.load_seconds, peak.peak_bytes,
    )  # fmt: skip


def _timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from memory: the best of some sums over more than the caches hold."""
    values = torch.ones(READ // 4)
    return READ / min(_timed(lambda: values.sum()) for _ in range(6))
