"""Hidden states of all micro-batches at one block boundary, in memory or in a memory-mapped file."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import JobError


class HiddenStates:
    """One tensor [sequences, length, hidden] per micro-batch.

    On file the bytes are page cache (RssFile), not memory of the process (RssAnon), and outlive it: a killed job goes on from them.
    must_exist: the file holds states of an earlier run; JobError when it is lost. Raises OSError when the disk has no room.
    """

    def __init__(self, shapes: list[tuple[int, int]], hidden_size: int, dtype: torch.dtype, *, file: Path | None = None, must_exist: bool = False) -> None:
        self.shapes, self.hidden_size, self.dtype, self.file = shapes, hidden_size, dtype, file
        total = sum(rows * length for rows, length in shapes) * hidden_size
        if file is None:
            self._map, flat = None, torch.empty(total, dtype=dtype)
        else:
            size = total * dtype.itemsize
            if must_exist and (not file.exists() or file.stat().st_size != size):
                raise JobError(f"{file} is gone or of another size, so the job cannot go on from there. Begin anew with --overwrite.")
            with open(file, "r+b" if file.exists() else "w+b") as handle:
                os.ftruncate(handle.fileno(), size)
                _reserve(handle.fileno(), size)
                self._map = mmap.mmap(handle.fileno(), size)
            flat = torch.frombuffer(self._map, dtype=dtype)
        self._parts, start = [], 0
        for rows, length in shapes:
            count = rows * length * hidden_size
            self._parts.append(flat[start : start + count].view(rows, length, hidden_size))
            start += count

    def __len__(self) -> int:
        return len(self._parts)

    def read(self, index: int, device: torch.device) -> Tensor:
        """A copy, so that a block that works in place does not change what it may have to read again."""
        return self._parts[index].to(device, copy=True)

    def write(self, index: int, value: Tensor) -> None:
        self._parts[index].copy_(value)

    def sync(self) -> None:
        """Put the states of a file on the disk."""
        if self._map is not None:
            self._map.flush()


def _reserve(descriptor: int, size: int) -> None:
    """Take the file's room on the disk now: a hole that cannot be filled later is no error but a signal that ends the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, 1 << 20):  # macOS: read and write back
        os.pwrite(descriptor, os.pread(descriptor, min(1 << 20, size - start), start), start)
