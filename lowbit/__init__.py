"""lowbit makes large language models small and says exactly what was lost.

    import lowbit
    result = lowbit.quantize("path/to/model", "int4-sym-g64-gptq", "out")
    table = lowbit.compare(["out"], against="path/to/model")
    checkpoint = lowbit.open("out")              # lazy: names, shapes, weights one by one
    model = lowbit.load("out")                   # a transformers model to run, quantized matrices kept packed

Imports are lazy, so `import lowbit` and `lowbit --help` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .pipeline.convert import convert
    from .pipeline.evaluate import compare, evaluate
    from .pipeline.imatrix import imatrix
    from .pipeline.load import load
    from .pipeline.plan import plan
    from .pipeline.quantize import quantize
    from .training.merge import merge

_PUBLIC = {
    "quantize": "pipeline.quantize",
    "convert": "pipeline.convert",
    "evaluate": "pipeline.evaluate",
    "compare": "pipeline.evaluate",
    "imatrix": "pipeline.imatrix",
    "plan": "pipeline.plan",
    "load": "pipeline.load",
    "merge": "training.merge",
    "Scheme": "scheme",
    "Recipe": "recipe",
    "LowbitError": "errors",
}

__all__ = ["LowbitError", "Recipe", "Scheme", "compare", "convert", "evaluate", "imatrix", "load", "merge", "open", "plan", "quantize"]


def open(path):
    """Open a checkpoint lazily: a Hugging Face folder (dense, or quantized in any layout that lowbit reads), a hub id or a GGUF file. Returns a Checkpoint."""
    from .checkpoints import open_checkpoint
    from .pipeline.locate import locate

    return open_checkpoint(locate(path))


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
