"""doctor: quick, complete, and with advice where something is wrong."""

import time

import pytest

from lowbit import kernels
from lowbit.pipeline import doctor as module
from lowbit.pipeline.doctor import Check, doctor


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_it_looks_at_everything_in_three_seconds_and_asks_nobody(monkeypatch):
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda *_, **__: pytest.fail("doctor went online"))
    start = time.perf_counter()
    checks = doctor()
    assert time.perf_counter() - start < 3
    names = ["python", "torch", "transformers", "gguf", "processor", "bfloat16", "memory", "disk", "temporary files", "CUDA", "compiler", "kernels"]
    assert [check.name for check in checks] == [*names, "compressed-tensors", "llama.cpp", "gptqmodel", "bitsandbytes"]
    assert all(check.detail for check in checks)
    assert all(check.advice for check in checks if check.ok is False)
    assert "threads" in by_name(checks)["torch"].detail


def test_kernels(monkeypatch):
    """The instruction set that is used, or why there is none and what to do about it."""
    found = kernels.instruction_sets()
    said = by_name(doctor())["kernels"]
    assert (said.ok is True and found[0] in said.detail) if found else (said.ok is None and said.advice)
    monkeypatch.setattr(kernels, "instruction_sets", lambda: ())
    monkeypatch.setattr(kernels, "why_not", lambda: "it was not built")
    said = by_name(doctor())["kernels"]
    assert said.ok is None and "it was not built" in said.detail and "compiler" in said.advice


def test_an_absent_consumer_gives_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    found = by_name(doctor())
    for name in ("compressed-tensors", "llama.cpp", "gptqmodel", "bitsandbytes"):
        assert (found[name].ok, found[name].advice) == (None, 'pip install "lowbit[consumers]"')


def test_processor_flags(monkeypatch):
    x86 = ["model name\t: A Fast One", "flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_bf16"]
    monkeypatch.setattr(module, "_cpuinfo", lambda: x86)
    assert module._processor().detail == "A Fast One: avx2, avx512, avx512-vnni, avx512-bf16, amx-bf16"
    monkeypatch.setattr(module, "_cpuinfo", lambda: ["Features\t: fp asimd asimddp i8mm bf16"])
    assert module._processor().detail.endswith(": neon, neon-dotprod, neon-i8mm, neon-bf16")
    monkeypatch.setattr(module, "_cpuinfo", list)
    assert "torch says" in module._processor().detail


def test_slow_bfloat16_is_said_with_advice(monkeypatch):
    monkeypatch.setattr(module, "_gflops", lambda dtype: 10.0 if "bfloat16" in str(dtype) else 100.0)
    check = module._speed()
    assert check.ok is None and "--dtype float32" in check.advice and check.detail == "float32 100, bfloat16 10 GFLOP/s (0.1 times)"


def test_little_memory_and_disk(monkeypatch):
    monkeypatch.setattr(module.resources, "available_memory", lambda: 10**9)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    found = by_name(doctor())
    assert found["memory"].ok is False and found["disk"].ok is False and "-o" in found["disk"].advice and "TMPDIR" in found["temporary files"].advice


def test_old_and_missing_libraries(monkeypatch):
    monkeypatch.setattr(module, "_version", lambda name: "4.57.1" if name == "transformers" else None)
    found = by_name(doctor())
    assert found["transformers"].ok is False and "transformers>=5" in found["transformers"].advice
    assert found["gguf"].ok is False and found["gguf"].advice == "pip install gguf"


def test_the_hub_is_asked_only_when_wanted(monkeypatch):
    def refuse(*_, **__):
        raise module.urllib.error.URLError("no network")

    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)
    hub = by_name(doctor(online=True))["hub"]
    assert hub.ok is False and "no network" in hub.detail and hub.advice
