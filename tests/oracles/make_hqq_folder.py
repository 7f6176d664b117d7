"""Makes hqq_folder.safetensors: a tiny Llama quantized and written by the hqq package, its own safetensors folder; a tag of layers has its own bits, axis and group.

    pip install torch==2.13.0 transformers==5.23.0 accelerate hqq==0.2.8.post1 && python tests/oracles/make_hqq_folder.py

Variants: mixed (all of TAGS, float32), half (4 bits in float16). The folder is read again with FromSafetensors, which is what a user of the folder has to write down: hqq's own
loader takes a pickle, and transformers leaves the layers random. layer.BITS.AXIS: a [16, 24] layer for itself, in groups of 24 (axis 1) or 16 (axis 0).
"""

import tempfile
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import load_file
from tiny import llama, logits, save, variant

TAGS = {
    "self_attn.q_proj": (4, 1, 64), "self_attn.k_proj": (8, 1, 32), "self_attn.v_proj": (3, 0, 64), "self_attn.o_proj": (2, 1, 32), "mlp.gate_proj": (4, 0, 32),
    "mlp.up_proj": (1, 1, 64), "mlp.down_proj": (3, 1, None),
}  # fmt: skip  # bits, axis, group size

DECODED = ("k_proj", "v_proj", "down_proj")
PARTS = ("W_q", "scale", "zero", "nbits", "packing", "unpack_view_dtype")


class FromSafetensors(AutoHQQHFModel):
    """hqq's loader, with the tensors from a safetensors file in the place of its pickle."""

    @classmethod
    def get_weight_file(cls, folder):
        return str(Path(folder) / "model.safetensors")

    @classmethod
    def load_weights(cls, folder, map_location=None):
        modules = {}
        for name, value in load_file(cls.get_weight_file(folder)).items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = value
        return modules


def made(configs: dict, dtype: torch.dtype) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "hqq"
        model = AutoHQQHFModel.quantize_model(llama(), configs, compute_dtype=dtype, device="cpu")
        AutoHQQHFModel.save_to_safetensors(model, str(folder), verbose=False)
        again = FromSafetensors.from_quantized(str(folder), compute_dtype=dtype, device="cpu")
        assert torch.equal(logits(again), logits(model))
        layers = {name: module for name, module in again.named_modules() if isinstance(module, HQQLinear) and ".0." in name}
        assert len(layers) == len(TAGS)
        return variant(folder, {f"{name}.weight": layer.dequantize() for name, layer in layers.items() if name.endswith(DECODED)}, logits(again))


def main() -> None:
    configs = {tag: BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis) for tag, (bits, axis, size) in TAGS.items()}
    variants = {"mixed": made(configs, torch.float32)}
    half = made(BaseQuantizeConfig(nbits=4, group_size=64, axis=1), torch.float16)
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    extra = {f"half.{name}": value for name, value in half["file"].items() if ".0.self_attn.k_proj." in name and name.endswith(PARTS)}
    extra["half.weight"] = half["decoded"]["model.layers.0.self_attn.k_proj.weight"]
    for bits in (8, 5, 4, 3, 2, 1.58, 1):
        for axis in (0, 1):
            layer = HQQLinear.from_weights(W.clone(), None, BaseQuantizeConfig(nbits=bits, group_size=24 if axis else 16, axis=axis), compute_dtype=torch.float32, device="cpu")
            state = layer.state_dict()
            extra |= {f"layer.{bits}.{axis}.{key}": state[key] for key in PARTS} | {f"layer.{bits}.{axis}.decoded": layer.dequantize()}
    save("hqq_folder", variants, extra)


if __name__ == "__main__":
    main()
