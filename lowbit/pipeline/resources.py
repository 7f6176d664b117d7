"""What this machine has: memory, disk, threads, the dtype that it computes fast; and what a process really holds."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from pathlib import Path

import torch

from ..errors import ResourceError


def available_memory() -> int:
    """Bytes that this process may still take: the least of free memory and the control group's limit."""
    limits = [_meminfo("MemAvailable")]
    for current, maximum in (("memory.current", "memory.max"), ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes")):
        try:
            limit = Path("/sys/fs/cgroup", maximum).read_text().strip()
            if limit != "max":
                limits.append(int(limit) - int(Path("/sys/fs/cgroup", current).read_text()))
        except (OSError, ValueError):
            continue
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    except ImportError:
        pass
    return max(0, min(limits))


def total_memory() -> int:
    """Bytes of memory in this machine."""
    return _meminfo("MemTotal")


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_memory() -> dict[str, int]:
    """rss_anon_bytes (what the process really holds), rss_bytes and peak_rss_bytes; RSS counts mapped files, which can be dropped."""
    fields = {"RssAnon": "rss_anon_bytes", "VmRSS": "rss_bytes", "VmHWM": "peak_rss_bytes"}
    found = {}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            key = line.partition(":")[0]
            if key in fields:
                found[fields[key]] = int(line.split()[1]) * 1024
    except OSError:
        import resource

        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps it in its heaps, and what it keeps grows with the number of blocks that came and went."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another libc
        return


class PeakMemory:
    """The largest RssAnon seen at the moments when look() was called (the kernel keeps no peak of it)."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.look()

    def look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, process_memory().get("rss_anon_bytes", 0))


def require_disk(folder: Path, needed: int, *, purpose: str) -> None:
    """Raise ResourceError when folder's disk has less free space than needed (with 2% to spare)."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise ResourceError(f"{purpose} needs {human(needed)} on the disk of {folder}, and {human(free)} are free. Free some, or write elsewhere with -o.")


def require_memory(needed: int, *, purpose: str) -> None:
    """Raise ResourceError when less memory is available than needed."""
    free = available_memory()
    if free < needed:
        raise ResourceError(f"{purpose} needs about {human(needed)} of memory, and {human(free)} are available.")


def human(size: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def parse_size(text: str) -> int:
    """Bytes of a size such as 8GB (powers of 1000), 24GiB (powers of 1024) or a plain number of bytes."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise ResourceError(f"the size {text!r} is not understood; expected something like 8GB, 24GiB or 500MB.")
    return round(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The compute dtype asked for; else bfloat16 where the hardware multiplies it, else float32."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in (None, "auto"):
        if name not in known:
            raise ResourceError(f"dtype {name!r} is not known; expected one of auto, {', '.join(known)}.")
        return known[name]
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_fast_bfloat16()
    return torch.bfloat16 if fast else torch.float32
