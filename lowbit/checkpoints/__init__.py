"""Bytes on disk <-> weights: opening any checkpoint lazily, and writing one in the layout that a target's programs load.

Each convention of the world (nibble order, zero-points, row permutations) lives in the one file of its format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, LowbitError, RecipeError, ShapeError
from ..scheme import INT, Scheme
from . import aqlm, bitnet, bitsandbytes, compressed_tensors, ct_layouts, fp8, gguf, gptq, hqq, mxfp4, own, safetensors, torchao
from .checkpoint import Checkpoint, LazyQuantized, LazyTensor
from .gguf_container import parts_of

__all__ = ["TARGETS", "Checkpoint", "LazyQuantized", "LazyTensor", "Target", "ct_layouts", "holds", "open_checkpoint", "target", "weight_files"]

ANY_SHAPE = (4096, 4096)


@dataclass(frozen=True)
class Target:
    """A layout that lowbit writes.

    write: (checkpoint, path, shard_bytes, progress) -> None; path is an empty folder, or a file to make when suffix is given and shard_bytes (of a file, at most) is None.
    check: (scheme, shape, name) -> None; raises before work when the layout cannot hold such a matrix, naming what fits.
    scale_dtype: the only one that the layout has for scales of integers; None: the model's.
    """

    write: Callable[..., None]
    check: Callable[[Scheme, tuple[int, int], str], None]
    default_recipe: str
    consumers: str
    suffix: str = ""
    scale_dtype: str | None = None


TARGETS: dict[str, Target] = {
    "compressed-tensors": Target(
        compressed_tensors.write, compressed_tensors.check, "int4-sym-g64-gptq", "vLLM; transformers with the compressed-tensors package"
    ),
    "gguf": Target(gguf.write, gguf.check, "int4-sym-g32-gptq", "llama.cpp, Ollama, LM Studio, transformers", suffix=".gguf", scale_dtype="float16"),
    "gptq": Target(gptq.write("gptq"), gptq.check("gptq"), "int4-sym-g64-gptq", "transformers with optimum and gptqmodel; vLLM (4 and 8 bits, symmetric)", scale_dtype="float16"),
    "awq": Target(gptq.write("awq"), gptq.check("awq"), "int4-asym-g64-awq-rtn", "transformers with gptqmodel; vLLM", scale_dtype="float16"),
    "auto-round": Target(gptq.write("auto-round"), gptq.check("auto-round"), "int4-sym-g64-gptq", "transformers with auto-round", scale_dtype="float16"),
    "bitsandbytes": Target(bitsandbytes.write, bitsandbytes.check, "nf4-g64-dq-rtn", "transformers with bitsandbytes, peft", scale_dtype="float32"),
    "hqq": Target(hqq.write, hqq.check, "int4-asym-g64-hqq", "hqq; transformers 4 with hqq"),
    "aqlm": Target(aqlm.write, aqlm.check, "aqlm-2x8", "transformers with aqlm"),
    "bitnet": Target(bitnet.write, bitnet.check, "bitnet", "transformers"),
    "torchao": Target(torchao.write, torchao.check, "int4-sym-g64-gptq", "transformers with torchao (codes of all widths take a byte)"),
    "lowbit": Target(own.write, own.check, "quip-2", "lowbit; transformers after import lowbit.hf"),
    "safetensors": Target(safetensors.write_folder, lambda scheme, shape, name: None, "int4-sym-g64-gptq", "anything: dense weights that lie on the grid"),
}


READERS: dict[str, Callable[[Path], Checkpoint]] = {
    "compressed-tensors": compressed_tensors.open_folder,
    "gptq": gptq.open_folder,
    "awq": gptq.open_folder,
    "auto-round": gptq.open_folder,
    "bitsandbytes": bitsandbytes.open_folder,
    "hqq": hqq.open_folder,
    "aqlm": aqlm.open_folder,
    "bitnet": bitnet.open_folder,
    "torchao": torchao.open_folder,
    "fp8": fp8.open_folder,
    "mxfp4": mxfp4.open_folder,
    "lowbit": own.open_folder,
}


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a model: those in a folder, or a GGUF file with the other parts of its model."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf") and file.is_file())
    return parts_of(path)


def target(name: str) -> Target:
    """The table entry of a target, or RecipeError naming those there are."""
    if name not in TARGETS:
        raise RecipeError(f"target {name!r} is not known; expected one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def holds(name: str, scheme: Scheme) -> bool:
    """Whether a target's files hold a scheme's codes, in matrices whose sides go with it."""
    entry = TARGETS[name]
    try:
        entry.check(replace(scheme, scale_dtype=entry.scale_dtype or scheme.scale_dtype) if scheme.format == INT else scheme, ANY_SHAPE, "weight")
    except ShapeError:
        return True
    except LowbitError:
        return False
    return True


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a model folder, dense or in a layout of READERS; reads headers only."""
    if path.is_file():
        if path.suffix == ".gguf":
            return gguf.open_file(path)
        raise CheckpointError(f"{path} is a file; expected a folder in the Hugging Face layout or a .gguf file.")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file() and ggufs:
        if len(ggufs) == 1 or set(ggufs) <= set(parts_of(ggufs[0])):
            return gguf.open_file(ggufs[0])
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files; name one of them, e.g. {ggufs[0]}.")
    method = safetensors.quant_method(safetensors.read_json(path / "config.json"), path)
    if method is None:
        return hqq.open_folder(path) if hqq.is_one(path) else safetensors.open_folder(path)
    if method not in READERS:
        raise CheckpointError(f"{path} is quantized with {method!r}, which this version does not read; it reads dense folders, {', '.join(READERS)} and GGUF.")
    return READERS[method](path)
