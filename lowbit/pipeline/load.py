"""A checkpoint as a model to run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import cast

from transformers import GenerationConfig, PreTrainedModel

from ..checkpoints import open_checkpoint
from ..models import quantized
from ..models import skeleton as sk
from . import resources
from .locate import locate


def load(path: str | Path, *, dtype: str | None = None, device: str | None = None, kernels: bool = False) -> PreTrainedModel:
    """The transformers model of a checkpoint, with generate(); anything that lowbit opens: a folder in any of its layouts, a hub id, a GGUF file.

    Quantized matrices of linear layers stay packed and are decoded whenever they are used; embeddings, norms and experts are in dtype ("float32", "bfloat16", "float16";
    default: bfloat16 where the hardware multiplies it). kernels: multiply with the kernels instead, for the formats that they take, without gradients: on the CPU with the layers'
    inputs rounded to 8 bits (docs/runtime.md), several times as fast; on a GPU as they are, by Triton. Raises ResourceError when the model does not fit.
    """
    checkpoint = open_checkpoint(locate(path))
    place = resources.choose_device(device)
    chosen = resources.choose_dtype(dtype, place)
    skeleton = sk.build(checkpoint)
    packed = quantized.matrices(skeleton)
    dense = sum(p.numel() for name, p in skeleton.model.named_parameters() if name not in packed) * chosen.itemsize
    resources.require_memory(int(1.1 * dense) + sum(checkpoint.quantized[name].nbytes for name in packed.values()), purpose="Loading this model")
    model = cast(PreTrainedModel, quantized.load(skeleton, chosen, place, packed=kernels))
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = True
    if located := next((file.parent for file in checkpoint.files if file.name == "generation_config.json"), None):
        with suppress(OSError, ValueError):
            model.generation_config = GenerationConfig.from_pretrained(located)
    return model
