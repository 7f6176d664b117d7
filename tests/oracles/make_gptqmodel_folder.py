"""Makes gptqmodel_folder.safetensors: a tiny Llama that GPTQModel quantizes on random tokens, saves and loads again, float32 with float16 scales.

    pip install torch==2.13.0 transformers==5.23.0 gptqmodel==7.7.0 && GPTQMODEL_CPU_WORKERS=2 python tests/oracles/make_gptqmodel_folder.py

Its kernel loads in float16, which holds all of this model's dense weights, and computes in float32 after float(). Variants, all of 4 bits in groups of 32: sym, act-order (desc_act), asym
(which it saves as v1, too: zero-points of 0 would not survive that).
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it asks for two, and by itself gives one on two cores

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from tiny import llama, logits, save, variant
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIGS = {"sym": {"sym": True, "desc_act": False}, "act-order": {"sym": True, "desc_act": True}, "asym": {"sym": False, "desc_act": False}}
DECODED = [f"model.layers.0.{name}" for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")]


def source(folder: Path) -> Path:
    """The model with a tokenizer, without which GPTQModel loads nothing."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:128])}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), pad_token="!", eos_token="!").save_pretrained(folder)
    llama(intermediate_size=96, vocab_size=128).half().float().save_pretrained(folder)
    return folder


def made(config: dict) -> dict:
    ids = torch.randint(0, 128, (64, 1, 64), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "quantized"
        model = GPTQModel.load(str(source(Path(temporary) / "source")), QuantizeConfig(bits=4, group_size=32, offload_to_disk=False, **config), device="cpu", dtype=torch.float32)
        model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
        model.save(str(folder))
        again = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.float().eval()
        decoded = {f"{name}.weight": again.get_submodule(name).dequantize_weight().T for name in DECODED}
        return variant(folder, decoded, logits(again))


def main() -> None:
    save("gptqmodel_folder", {label: made(config) for label, config in CONFIGS.items()})


if __name__ == "__main__":
    main()
