"""Makes bitnet.safetensors: tiny ternary Llamas in transformers' BitNet layout, packed and run by transformers.

    pip install torch==2.13.0 transformers==5.23.0 accelerate && TORCHDYNAMO_DISABLE=1 python tests/oracles/make_bitnet.py

Variants: bitlinear (weight_scale is 1 / mean|W|; as save_pretrained writes it), auto (autobitlinear offline: weight_scale is mean|W|; packed with their
pack_weights, since save_pretrained raises NotImplementedError there). Logits are of 8-bit activations, as both layers compute. online.*: what autobitlinear online makes of a weight
and of an input.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # no compiler needed

import torch
from safetensors.torch import save_file
from tiny import llama, logits, save, variant
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import ActQuant, WeightQuant, pack_weights, unpack_weights

DECODED = [f"model.layers.0.{name}.weight" for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")]


def made(quantization: dict, inverse: bool, written_by_them: bool) -> dict:
    model = llama()
    state = model.state_dict()
    for name in [name for name in state if name.endswith("proj.weight")]:
        scale = state[name].abs().mean()
        state[f"{name}_scale"] = (1 / scale if inverse else scale).reshape(1)
        state[name] = pack_weights((state[name] / scale).round().clamp(-1, 1))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = model.config.to_dict() | {"dtype": "float32", "quantization_config": {"quant_method": "bitnet", **quantization}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if written_by_them:
            again.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        decoded = {}
        for name in DECODED:
            layer, scale = again.get_submodule(name.removesuffix(".weight")), state[f"{name}_scale"]
            decoded[name] = unpack_weights(layer.weight, torch.float32) / scale if inverse else layer.weight * layer.weight_scale
        return variant(folder, decoded, logits(again))


def main() -> None:
    variants = {
        "bitlinear": made({}, True, True),
        "auto": made({"linear_class": "autobitlinear", "quantization_mode": "offline"}, False, False),
    }
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(24, 40, generator=g) * 0.1, torch.randn(3, 40, generator=g)
    save("bitnet", variants, {"online.W": W, "online.x": x, "online.weight": WeightQuant.apply(W), "online.input": ActQuant.apply(x)})


if __name__ == "__main__":
    main()
