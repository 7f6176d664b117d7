"""Row chunks of a matrix on several threads, each running torch on one.

The loops here are made of many small operations; splitting each of them over threads costs more in synchronisation than it gains
(and hundreds of times more on a busy machine). Output rows are independent, so they are shared out instead.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
MIN_ROWS = 1280  # of a chunk: with fewer, the interpreter (one thread at a time) and not the arithmetic is the limit, and two threads are slower than one


def over_rows(run: Callable[[slice], T], rows: int) -> list[T]:
    """run(slice) for consecutive row slices that cover rows, one per thread; results in order."""
    threads = torch.get_num_threads()
    chunks = max(1, min(threads, rows // MIN_ROWS))
    if chunks == 1:
        return [run(slice(0, rows))]
    bounds = [rows * i // chunks for i in range(chunks + 1)]
    slices = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    try:
        with ThreadPoolExecutor(chunks, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, slices))
    finally:
        torch.set_num_threads(threads)  # the setting is partly global (MKL)
