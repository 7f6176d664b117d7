"""Hidden states of all micro-batches at one block boundary, in memory or in a memory-mapped file."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """One tensor [sequences, length, hidden] per micro-batch.

    On file the bytes are page cache (RssFile), not memory of the process (RssAnon), and outlive it: a killed job goes on from them.
    """

    def __init__(self, shapes: list[tuple[int, int]], hidden_size: int, dtype: torch.dtype, *, file: Path | None = None) -> None:
        self.shapes, self.hidden_size, self.dtype, self.file = shapes, hidden_size, dtype, file
        total = sum(rows * length for rows, length in shapes) * hidden_size
        if file is None:
            self._map, flat = None, torch.empty(total, dtype=dtype)
        else:
            with open(file, "r+b" if file.exists() else "w+b") as handle:
                os.ftruncate(handle.fileno(), total * dtype.itemsize)
                self._map = mmap.mmap(handle.fileno(), total * dtype.itemsize)
            flat = torch.frombuffer(self._map, dtype=dtype)
        self._parts, start = [], 0
        for rows, length in shapes:
            count = rows * length * hidden_size
            self._parts.append(flat[start : start + count].view(rows, length, hidden_size))
            start += count

    def __len__(self) -> int:
        return len(self._parts)

    def read(self, index: int, device: torch.device) -> Tensor:
        return self._parts[index].to(device)

    def write(self, index: int, value: Tensor) -> None:
        self._parts[index].copy_(value)

    def sync(self) -> None:
        """Put the states of a file on the disk."""
        if self._map is not None:
            self._map.flush()
