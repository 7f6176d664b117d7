"""Makes mxfp4.safetensors: a tiny gpt-oss in the layout of the released ones (experts in MXFP4), loaded and decoded by transformers.

    pip install torch==2.13.0 transformers==5.23.0 accelerate && python tests/oracles/make_mxfp4.py

Blocks and scales are drawn at random: quantizing to this layout needs a GPU in transformers, decoding does not. Variant gpt-oss: the other weights are bfloat16, the logits float32.
decoded.* are the float32 parameters as transformers has them, [experts, in, out]. edge.*: all sixteen codes with the smallest and largest scales that give finite numbers.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import SIZES, logits, save, shaken, variant
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SHAPE = {
    **SIZES, "num_local_experts": 2, "num_experts_per_tok": 2, "intermediate_size": 96, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.1, "tie_word_embeddings": False, "architectures": ["GptOssForCausalLM"],
}  # fmt: skip
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
DECODED = ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]


def made() -> dict:
    torch.manual_seed(0)
    config = GptOssConfig(**SHAPE)
    model = shaken(GptOssForCausalLM(config)).bfloat16()
    state = model.state_dict()
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(119, 124, (experts, rows, columns // 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "bfloat16", "quantization_config": QUANTIZATION}))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return variant(folder, {name: again.get_parameter(name) for name in DECODED}, logits(again))


def main() -> None:
    blocks = (torch.arange(16, dtype=torch.uint8) | (15 - torch.arange(16, dtype=torch.uint8)) << 4).view(1, 1, 1, 16).repeat(1, 6, 1, 1)
    scales = torch.tensor([0, 1, 126, 127, 128, 252], dtype=torch.uint8).view(1, 6, 1)
    edge = {"edge.blocks": blocks, "edge.scales": scales, "edge.decoded": convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)}
    save("mxfp4", {"gpt-oss": made()}, edge)


if __name__ == "__main__":
    main()
