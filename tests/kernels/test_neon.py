"""The NEON kernels, cross-compiled and run under an emulator: csrc/check.cpp compares them with sums in float64 and with the portable ones."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)")
def test_neon_kernels_under_an_emulator(tmp_path):
    for name in ("neon", "portable", "avx2", "avx512", "matrix", "blocks", "check"):
        more = ["-march=armv8.2-a+dotprod"] if name == "neon" else []
        subprocess.run([COMPILER, *FLAGS, *more, "-c", CSRC / f"{name}.cpp", "-o", tmp_path / f"{name}.o"], check=True)
    subprocess.run([COMPILER, "-static", *tmp_path.glob("*.o"), "-o", tmp_path / "check"], check=True)
    made = subprocess.run([EMULATOR, "-cpu", "max", tmp_path / "check"], capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout.splitlines() == ["portable: checked", "neon: checked"], made.stdout
