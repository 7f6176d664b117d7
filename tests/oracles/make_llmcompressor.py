"""Makes llmcompressor.safetensors: a tiny Llama that llm-compressor quantizes without data (oneshot), saves compressed and loads again, float32.

    pip install torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1 compressed-tensors==0.19.0 && python tests/oracles/make_llmcompressor.py

Variants: w4a16, w4a16-asym (groups of 16: the preset's 128 is more than this model has columns), w8a8, fp8 (dynamic; the rounding of inputs is in the logits).
"""

import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tiny import llama, logits, save, variant
from transformers import AutoModelForCausalLM

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
RECIPES = {
    "w4a16": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, "symmetric": True}}}},
    "w4a16-asym": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, "symmetric": False}}}},
    "w8a8": {"targets": "Linear", "scheme": "W8A8"},
    "fp8": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
}
SMALL = dict(hidden_size=32, intermediate_size=64, vocab_size=128)
DECODED = [f"model.layers.0.{name}" for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")]


def made(recipe: dict) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        source, folder = Path(temporary) / "source", Path(temporary) / "quantized"
        llama(**SMALL).save_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **recipe))
        expected = logits(model)
        schemes = {name: model.get_submodule(name).quantization_scheme for name in DECODED}
        model.save_pretrained(folder, save_compressed=True)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()), expected)
        tensors, decoded = load_file(folder / "model.safetensors"), {}
        for name, scheme in schemes.items():
            parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            decoded[f"{name}.weight"] = BaseCompressor.get_value_from_registry(scheme.format.value).decompress(parts, scheme)["weight"]
        return variant(folder, decoded, expected)


def main() -> None:
    save("llmcompressor", {label: made(recipe) for label, recipe in RECIPES.items()})


if __name__ == "__main__":
    main()
