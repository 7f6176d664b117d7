"""What vLLM asks of a folder, read in the source of its version 0.33.0 (it needs a GPU; nothing was run in it). Files are named beside each rule, below vllm/model_executor/layers/quantization.

Only what is sure is judged: layers of Llama's family, that vLLM fuses as models/arch.py says, one GPU of compute capability 8.0 or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..checkpoints import Checkpoint, LazyQuantized
from ..checkpoints.ct_layouts import layout_of
from ..models.arch import FUSED
from ..scheme import CASTS, Scheme

NAME = "vLLM 0.33.0"
KNOWN = ("compressed-tensors", "gptq", "awq", "auto-round", "torchao", "fp8", "mxfp4", "safetensors")  # config/model.py
GROUPS = (-1, 32, 64, 128)  # utils/marlin_utils.py


def verdicts(checkpoint: Checkpoint) -> dict[str, str]:
    """What can be said of vLLM for a checkpoint, by the name and version that it is said of."""
    if checkpoint.kind in ("gguf", "bitsandbytes"):
        return {NAME: f"{checkpoint.kind} is read by a plugin of its own there (vllm-{'gguf' if checkpoint.kind == 'gguf' else 'bnb'}-plugin), whose rules are not checked."}
    if checkpoint.kind not in KNOWN:
        return {NAME: f"refused: it does not know the method {checkpoint.kind}."}
    broken = list(dict.fromkeys(_broken(checkpoint)))
    return {NAME: f"rules kept{_scope(checkpoint)}." if not broken else f"rules broken: {'; '.join(broken[:4])}{f'; and {len(broken) - 4} more' if len(broken) > 4 else ''}."}


def _scope(checkpoint: Checkpoint) -> str:
    return " (that config and shapes are what its source asks for; its kernels were not run)" if checkpoint.quantized else " (a dense model)"


def _broken(checkpoint: Checkpoint) -> Iterator[str]:
    quantized = {name: entry for name, entry in checkpoint.quantized.items() if entry.scheme.format not in CASTS}
    yield from _fused(checkpoint, quantized)
    for name, entry in quantized.items():
        if checkpoint.kind == "compressed-tensors":
            yield from _compressed_tensors(entry.scheme, entry.shape)
        elif checkpoint.kind in ("gptq", "awq", "auto-round"):
            yield from _integers(checkpoint, entry.scheme, entry.shape)
        elif checkpoint.kind == "torchao" and len({other.scheme for other in quantized.values()}) > 1:
            yield "torchao: one scheme for all layers (torchao.py), and this has several"
        if name == "lm_head.weight" and checkpoint.kind != "compressed-tensors":
            yield f"{checkpoint.kind}: a quantized lm_head is not read"


def _fused(checkpoint: Checkpoint, quantized: Mapping[str, LazyQuantized]) -> Iterator[str]:
    for names in _fused_parts(checkpoint):
        schemes = {quantized[name].scheme if name in quantized else None for name in names}
        if len(schemes) > 1:
            yield f"{' and '.join(_short(name) for name in names)} become one layer and have several schemes (compressed_tensors/utils.py)"
        elif schemes and (scheme := schemes.pop()) is not None and scheme.format == "nvfp4":
            factors = {float(quantized[name].load().parts["global_scale"]) for name in names}
            if len(factors) > 1:
                yield f"{' and '.join(_short(name) for name in names)} become one layer and have several weight_global_scale, of which the largest is taken for all (w4a4_nvfp4.py)"
        static = {(rounding.scale, rounding.zero_point) for name in names if (rounding := checkpoint.activations.get(name)) is not None and rounding.scale is not None}
        if len(static) > 1:
            yield f"{' and '.join(_short(name) for name in names)} become one layer and have several input_scale, of which the last counts (w8a8_int8.py)"


def _fused_parts(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    shapes, found = checkpoint.shapes(), []
    for leaves in FUSED:
        for name in shapes:
            if name.endswith(f".{leaves[0]}.weight"):
                parts = tuple(f"{name.removesuffix(f'{leaves[0]}.weight')}{leaf}.weight" for leaf in leaves)
                found.append(tuple(part for part in parts if part in shapes))
    return found


def _short(name: str) -> str:
    return ".".join(name.removesuffix(".weight").split(".")[-2:])


def _compressed_tensors(scheme: Scheme, shape: tuple[int, int]) -> Iterator[str]:
    """compressed_tensors/compressed_tensors.py, get_scheme, and the classes of its folder schemes."""
    layout, act = layout_of(scheme), scheme.act
    if layout == "pack-quantized":
        if scheme.block == (-1, -1):
            yield f"{scheme.name}: a scale for the whole tensor is refused for packed integers"
        if shape[1] * scheme.bits % 32:
            yield f"{scheme.name}: rows of {shape[1]} do not fill whole words (wNa16.py)"
        if not scheme.symmetric and shape[0] * scheme.bits % 32:
            yield f"{scheme.name}: zero-points of {shape[0]} outputs do not fill whole words, and the last ones are dropped (parameter.py)"
    elif layout == "int-quantized":
        assert act is not None
        if scheme.bits != 8 or not scheme.symmetric or scheme.group_size > 0 or act.bits != 8:
            yield f"{scheme.name}: of integers with rounded inputs it runs symmetric 8-bit weights per channel or tensor with 8-bit inputs on a GPU"
        elif not act.static and act.per == "tensor":
            yield f"{scheme.name}: dynamic scales are for each token there, not for the tensor"
        elif not act.symmetric and (shape[0] % 16 or shape[1] % 16):
            yield f"{scheme.name}: asymmetric inputs need sides that are multiples of 16 (_custom_ops.py)"
    elif layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized") and shape[1] % (16 if scheme.format == "nvfp4" else 32):
        yield f"{scheme.name}: rows of {shape[1]} are not whole blocks"


def _integers(checkpoint: Checkpoint, scheme: Scheme, shape: tuple[int, int]) -> Iterator[str]:
    """auto_gptq.py, auto_awq.py, inc/."""
    section = checkpoint.config.get("quantization_config", {})
    packing = str(section.get("packing_format", "")) if checkpoint.kind == "auto-round" else {"gptq": "gptq", "awq": "awq"}[checkpoint.kind]
    if checkpoint.kind == "auto-round" and packing not in ("auto_round:auto_gptq", "auto_round:auto_awq"):
        yield f"packing_format {packing}: it reads auto_round:auto_gptq and auto_round:auto_awq (inc/inc.py)"
    elif packing.endswith("awq"):
        if scheme.bits != 4 or shape[0] % 8 or scheme.group_size not in GROUPS:
            yield f"{scheme.name}: AWQ there has 4 bits, outputs in multiples of 8 and groups of 32, 64, 128 or a channel"
    elif not scheme.symmetric or (scheme.bits not in (4, 8) and checkpoint.kind == "gptq"):
        yield f"{scheme.name}: of GPTQ it reads symmetric 4 and 8 bits (auto_gptq.py)"
    elif scheme.bits in (4, 8) and scheme.group_size not in GROUPS:
        yield f"{scheme.name}: groups there are 32, 64, 128 or a channel (marlin_utils.py)"
    if section.get("desc_act") and scheme.group_size != -1:
        yield "desc_act: groups of any columns (act-order) are not read any more (gptq_utils.py)"


