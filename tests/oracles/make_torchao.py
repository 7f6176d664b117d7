"""Makes torchao.safetensors: tiny Llamas that transformers quantizes with torchao on the CPU, saves and loads again, kinds of tensors mixed in one file.

    pip install torch==2.13.0 transformers==5.23.0 accelerate torchao==0.18.0 && python tests/oracles/make_torchao.py

Variants: weights (WEIGHTS), activations (ACTIVATIONS: the same kinds with 8-bit activations, whose rounding is in the logits). nvfp4.*: one [32, 64] weight as NVFP4Tensor. The metadata
of the file, which is needed to read it, is "metadata" of a variant's texts; that of nvfp4 is the text "nvfp4".
"""

import json
import tempfile
from pathlib import Path

import torch
import torchao.quantization as ao
from tiny import llama, logits, save, variant
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from transformers import AutoModelForCausalLM, TorchAoConfig

ASYMMETRIC = ao.MappingType.ASYMMETRIC
WEIGHTS = {
    "q_proj": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    "k_proj": ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=ao.PerGroup(16), mapping_type=ASYMMETRIC),
    "v_proj": ao.Int8WeightOnlyConfig(),
    "o_proj": ao.Float8WeightOnlyConfig(),
    "gate_proj": ao.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=ao.PerAxis(0)),
    "up_proj": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
    "down_proj": ao.Float8WeightOnlyConfig(granularity=ao.PerTensor()),
}
ACTIVATIONS = {
    "q_proj": ao.Int8DynamicActivationInt8WeightConfig(),
    "k_proj": ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC),
    "v_proj": ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=ao.PerAxis(0)),
    "o_proj": ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)),
    "(gate|up|down)_proj": ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=ao.PerAxis(0), weight_mapping_type=ASYMMETRIC),
}
DECODED = {"weights": ("q_proj", "k_proj", "v_proj", "o_proj"), "activations": ("k_proj", "v_proj")}


def made(label: str, configs: dict) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        source, folder = Path(temporary) / "source", Path(temporary) / "quantized"
        llama().save_pretrained(source)
        config = ao.FqnToConfig({rf"re:model\.layers\..*\.{name}": value for name, value in configs.items()})
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=TorchAoConfig(config), device_map="cpu")
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
        assert torch.equal(logits(again), logits(model.eval()))
        kinds = {name: type(module.weight).__name__ for name, module in again.model.layers[0].named_modules() if name.endswith("proj")}
        print(label, kinds)
        decoded = {f"{name}.weight": module.weight.dequantize() for name, module in again.named_modules() if ".0." in name and name.endswith(DECODED[label])}
        return variant(folder, decoded, logits(again))


def main() -> None:
    variants = {"weights": made("weights", WEIGHTS), "activations": made("activations", ACTIVATIONS)}
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    tensor = NVFP4Tensor.to_nvfp4(W, per_tensor_scale=W.abs().max() / (448 * 6))
    parts, metadata = flatten_tensor_state_dict({"nvfp4.weight": tensor})
    save("torchao", variants, {**parts, "nvfp4.decoded": tensor.dequantize(torch.float32)}, {"nvfp4": json.loads(metadata["nvfp4.weight"])})


if __name__ == "__main__":
    main()
