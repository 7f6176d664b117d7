"""The C++ extension (csrc/), or why there is none."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch


@cache
def _loaded() -> tuple[Any, str]:
    try:
        return import_module("lowbit._native"), ""  # after torch, whose OpenMP threads it shares
    except ImportError as error:
        if "_native" in str(error) and isinstance(error, ModuleNotFoundError):
            return None, "it was not built: there was no C++ compiler when lowbit was installed"
        return None, f"it cannot be loaded: {error}"


def native() -> Any:
    """The extension's module, or None."""
    return _loaded()[0]


def why_not() -> str:
    """Why there is no extension; empty where there is one."""
    return _loaded()[1]


def instruction_sets() -> tuple[str, ...]:
    """What the extension offers on this processor, best first; empty without it."""
    module = native()
    return () if module is None else tuple(module.instruction_sets())


def threads() -> int:
    """How many threads the kernels use: as many as torch."""
    return torch.get_num_threads()
