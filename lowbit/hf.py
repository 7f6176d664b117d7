"""transformers loads lowbit's own folders after this import: AutoModelForCausalLM.from_pretrained(folder, variant="lowbit").

    import lowbit.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("out", variant="lowbit")

`import lowbit` alone registers nothing. Quantized matrices of linear layers stay packed (models/quantized.py); embeddings and fused experts are decoded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoints import open_checkpoint, own
from .errors import ModelError
from .models import quantized, skeleton
from .numerics import parts


@register_quantization_config(own.KIND)
class LowbitConfig(QuantizationConfigMixin):
    """The section of config.json, as own.section writes it."""

    def __init__(self, version: int = own.VERSION, schemes: list | None = None, weights: dict | None = None, **_: Any) -> None:
        self.quant_method: Any = own.KIND  # type: ignore[assignment]  # of a method of our own; the library's enum has its own ones
        self.version, self.schemes, self.weights = version, schemes or [], weights or {}


@register_quantizer(own.KIND)
class LowbitQuantizer(HfQuantizer):
    """Fills what is quantized with lowbit's reader after transformers has loaded the rest."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **_: Any):
        if not checkpoint_files:
            raise ModelError("lowbit's layout is loaded from its folder; a state dict alone does not say what its tensors mean.")
        if device_map is not None and len(set(map(str, device_map.values()))) > 1:
            raise ModelError("lowbit's layout is loaded to one device; device_map names several.")
        self.device = torch.device("cpu") if device_map is None else torch.device(next(iter(device_map.values())))
        self.built = skeleton.build(open_checkpoint(Path(checkpoint_files[0]).parent))
        quantized.refuse_rounded_experts(self.built)
        held = self.built.checkpoint.quantized
        self.missing = [name for name, source in self.built.sources.items() if any(key in held for key in source.flat())]
        leaves = {part for entry in held.values() for part in parts.shapes(entry.scheme, entry.shape)} - {"weight"}  # transformers renames what stands before them
        tied = [name for name, other in self.built.model.all_tied_weights_keys.items() if other in self.missing]
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *(f"^{re.escape(name)}$" for name in (*self.missing, *tied))}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *(rf"\.{leaf}$" for leaf in leaves)}
        return model

    def _process_model_after_weight_loading(self, model, **_: Any):
        dtype = model.dtype
        replaced = quantized.install(self.built, model, dtype, self.device)
        for name in self.missing:
            if name not in replaced:
                quantized.set_parameter(model, name, skeleton.load_parameter(self.built, name, dtype).to(self.device))
        model.tie_weights()
        del self.built
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

