"""How fast a model answers and what it holds, measured in a fresh process, so that nothing that ran before counts.

The model is loaded whole through transformers' modules, quantized weights decoded to the dtype of the computation, so a quantized model takes the time and memory of a
dense one, and experts run one by one; what the native kernels make of it is measured by lowbit bench. The process is `python -m lowbit.pipeline.latency`;
it answers with one line of JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import errors
from ..checkpoints import open_checkpoint
from ..errors import LowbitError, ModelError, ResourceError
from ..models import skeleton as sk
from . import resources
from .locate import locate
from .selfgen import load_model

SEED = 0


@dataclass(frozen=True)
class Latency:
    """Times of a batch of one. prefill: tokens of the prompt; decode: tokens generated after it, one by one; repeats: timed runs of both.

    prefill_ms_per_token: over the runs; decode_ms_per_token: over all tokens of all runs; tokens_per_s: from the medians.
    load_s: opening and loading, without imports. peak_memory_bytes: the largest RssAnon seen; peak_rss_bytes: VmHWM, mapped files included.
    weights_bytes: of the loaded model.
    """

    prefill: int
    decode: int
    repeats: int
    dtype: str
    threads: int
    load_s: float
    prefill_ms_per_token_p50: float
    prefill_ms_per_token_p95: float
    decode_ms_per_token_p50: float
    decode_ms_per_token_p95: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    weights_bytes: int
    peak_memory_bytes: int
    peak_rss_bytes: int


def measure(
    path: str | Path,
    *,
    prefill: int = 128,
    decode: int = 32,
    dtype: str = "float32",
    threads: int | None = None,
    repeats: int = 5,
) -> Latency:
    """Measure prefill, decoding, loading and memory of a model in a process of its own.

    path: what open_checkpoint reads, or a hub id. dtype: of weights and computation. threads: of torch; None: its default.
    Raises ResourceError before loading when the model does not fit into memory, and whatever else the process raises.
    """
    numbers = {"prefill": prefill, "decode": decode, "repeats": repeats} | ({} if threads is None else {"threads": threads})
    for name, value in numbers.items():
        if value < 1:
            raise ModelError(f"{name} is {value}; expected at least 1.")
    words = ["--dtype", dtype] + [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    # -P and PYTHONPATH: the process imports this lowbit, not one that lies in the current folder.
    home = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-P", "-m", "lowbit.pipeline.latency", str(locate(path).absolute()), *words]
    return _answer(subprocess.run(command, capture_output=True, text=True, env=environment))


def _answer(done: subprocess.CompletedProcess) -> Latency:
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        if done.returncode == -9:
            raise ResourceError("the process that was measured was killed, most likely for lack of memory. Try --dtype bfloat16, or a machine with more.") from None
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LowbitError(f"the process that was measured ended with code {done.returncode}: {last}") from None
    if "error" in answer:
        raise getattr(errors, answer["error"], LowbitError)(answer["message"])
    return Latency(**answer)


def measure_here(path: Path, *, prefill: int, decode: int, dtype: str, threads: int | None, repeats: int) -> Latency:
    """The same in this process; peak memory then counts what this process held before."""
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = resources.choose_dtype(dtype, torch.device("cpu"))
    peak, start = resources.PeakMemory(), time.perf_counter()
    skeleton = sk.build(open_checkpoint(path))
    _check(skeleton, prefill + decode, chosen)
    with _watched(peak):
        model = load_model(skeleton, chosen)
    load_s = time.perf_counter() - start
    ids = torch.randint(0, skeleton.text_config.vocab_size, (1, prefill), generator=torch.Generator().manual_seed(SEED))
    prefills, decodes = [], []
    _run(model, ids, min(decode, 2))  # warms up: allocations, oneDNN's choice of kernels
    for _ in range(repeats):
        first, others = _run(model, ids, decode)
        prefills.append(first / prefill)
        decodes += others
        peak.look()
    found = {f"{name}_ms_per_token_p{q}": 1000 * _quantile(times, q) for name, times in (("prefill", prefills), ("decode", decodes)) for q in (50, 95)}
    return Latency(
        prefill,
        decode,
        repeats,
        str(chosen).removeprefix("torch."),
        torch.get_num_threads(),
        load_s,
        **found,
        prefill_tokens_per_s=1 / _quantile(prefills, 50),
        decode_tokens_per_s=1 / _quantile(decodes, 50),
        weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        peak_memory_bytes=peak.peak_bytes,
        peak_rss_bytes=resources.process_memory().get("peak_rss_bytes", 0),
    )


def _check(skeleton: sk.Skeleton, tokens: int, dtype: torch.dtype) -> None:
    """Refuse a prompt that is too long for the model, and a model that is too large for the memory."""
    limit = getattr(skeleton.text_config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ModelError(f"prefill and decode are {tokens} tokens together, and this model takes at most {limit}.")
    largest = max(p.numel() for p in skeleton.model.parameters())
    needed = skeleton.parameter_count() * dtype.itemsize + largest * (4 + dtype.itemsize)  # the largest is decoded to float32, then cast
    resources.require_memory(needed, purpose=f"Measuring latency (the whole model is held, in {str(dtype).removeprefix('torch.')})")


@contextmanager
def _watched(peak: resources.PeakMemory, every_s: float = 0.01):
    """Look at the memory all the while, from a thread: a matrix that is decoded is large for a moment only."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            peak.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        peak.look()


@torch.no_grad()
def _run(model, ids: torch.Tensor, steps: int) -> tuple[float, list[float]]:
    """Seconds of the prompt, and of each token generated greedily after it."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache, step, seconds = None, ids, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        output = model(input_ids=step, past_key_values=cache, use_cache=True, **last_only)
        step = output.logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
        cache = output.past_key_values
    return seconds[0], seconds[1:]


def _quantile(values: list[float], percent: int) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()


def main(words: list[str]) -> int:
    """The process: measure, and answer with one line of JSON, the result or the error."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.pipeline.latency")
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", default="float32")
    for name in ("prefill", "decode", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--threads", type=int)
    try:
        answer = asdict(measure_here(**vars(parser.parse_args(words))))
    except LowbitError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
