"""Makes bitsandbytes_folder.safetensors: a tiny Llama that transformers quantizes with bitsandbytes on the CPU, saves and loads again, float32.

    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2 && python tests/oracles/make_bitsandbytes_folder.py

Variants: nf4-dq (double quantization), fp4, int8 (LLM.int8(), threshold 6). Logits are of the model in training mode, which Llama computes alike: in evaluation mode bitsandbytes packs 4-bit
weights anew and computes in bfloat16 on processors that have it, and rounds the inputs of int8; int8.rounded are the logits of that. Columns are whole blocks of 64: its CPU kernel decodes
narrower matrices wrongly.
"""

import tempfile
from pathlib import Path

import torch
from bitsandbytes import functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tiny import llama, logits, save, variant
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CONFIGS = {
    "nf4-dq": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
SMALL = dict(intermediate_size=64, vocab_size=128)
DECODED = [f"model.layers.0.{name}" for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")]


def decoded(layer: Linear4bit | Linear8bitLt) -> torch.Tensor:
    if isinstance(layer, Linear4bit):
        return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def made(config: BitsAndBytesConfig) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        source, folder = Path(temporary) / "source", Path(temporary) / "quantized"
        llama(**SMALL).save_pretrained(source)
        load = lambda path, **options: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **options).train()
        model = load(source, quantization_config=config)
        model.save_pretrained(folder)
        again = load(folder)
        weights = {f"{name}.weight": decoded(again.get_submodule(name)) for name in DECODED}
        assert torch.equal(logits(again), logits(model))
        return variant(folder, weights, logits(again)) | {"rounded": logits(again.eval())}


def main() -> None:
    variants = {label: made(config) for label, config in CONFIGS.items()}
    save("bitsandbytes_folder", variants, {"int8.rounded": variants["int8"]["rounded"]})


if __name__ == "__main__":
    main()
