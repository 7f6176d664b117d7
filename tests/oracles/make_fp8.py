"""Makes fp8.safetensors: tiny Llamas in the layout of DeepSeek-V3 and Qwen3-FP8 (quant_method "fp8"), quantized by transformers' own operation, loaded and decoded by transformers.

    pip install torch==2.13.0 transformers==5.23.0 accelerate && python tests/oracles/make_fp8.py

Variants: blocks (blocks of 32 x 32 in the place of 128 x 128, so that a tiny matrix has several), tensor (one scale per matrix, static activations: the scalars activation_scale). ue8m0.*:
a [64, 96] weight with scales that are powers of two. Without a GPU transformers decodes while it loads, so the logits are of decoded float32 weights.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tiny import llama, logits, save, variant
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

DECODED = [f"model.layers.0.{name}.weight" for name in ("self_attn.k_proj", "mlp.down_proj")]


def settings(block: list[int] | None, scale_fmt: str = "float") -> SimpleNamespace:
    """What the operations ask of their quantizer."""
    return SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))


def made(block: list[int] | None, scheme: str) -> dict:
    model = llama()
    state = model.state_dict()
    for name in [name for name in state if name.endswith("proj.weight")]:
        state |= Fp8Quantize(settings(block)).convert({name: state[name]})
        if block is None:
            scale = name.removesuffix("weight") + "weight_scale_inv"
            state[scale] = state[scale].reshape(())
            state[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.01)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": scheme, "weight_block_size": block}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"dtype": "float32", "quantization_config": quantization}))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return variant(folder, {name: again.get_parameter(name) for name in DECODED}, logits(again))


def main() -> None:
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    parts = Fp8Quantize(settings([32, 32], "ue8m0")).convert({"ue8m0.weight": W})
    decoded = Fp8Dequantize(settings([32, 32]))._dequantize_one(parts["ue8m0.weight"], parts["ue8m0.weight_scale_inv"], torch.float32)
    save("fp8", {"blocks": made([32, 32], "dynamic"), "tensor": made(None, "static")}, {**parts, "ue8m0.decoded": decoded})


if __name__ == "__main__":
    main()
