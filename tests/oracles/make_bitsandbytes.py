"""Makes bitsandbytes.safetensors: NF4 and FP4 on the CPU, plain and with double quantization, by bitsandbytes itself.

    pip install bitsandbytes==0.50.2 && python tests/oracles/make_bitsandbytes.py

Codes are unpacked from its nibbles (the first of a pair is the high one). Shapes: [48, 192], and [5, 100], whose rows do not end with a block of 64
(0.50.2's CPU kernel decodes such a matrix wrongly where its columns are even and more than a block; 100 columns are decoded right).
"""

from pathlib import Path

import torch
from bitsandbytes import functional as F
from safetensors.torch import save_file


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {"a": torch.randn(48, 192, generator=generator) * torch.logspace(-2, 1, 48).unsqueeze(1), "b": torch.randn(5, 100, generator=generator)}
    matrices["a"][7, 64:128] = 0
    tensors = {}
    for label, W in matrices.items():
        tensors[label] = W
        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                packed, state = F.quantize_4bit(W, blocksize=64, quant_type=kind, compress_statistics=nested)
                key = f"{label}.{kind}.{'nested' if nested else 'plain'}"
                flat = packed.view(-1)
                tensors[f"{key}.codes"] = torch.stack([flat >> 4, flat & 15], 1).view(-1)[: W.numel()].view(W.shape).contiguous()
                tensors[f"{key}.decoded"] = F.dequantize_4bit(packed, state)
                tensors[f"{key}.absmax"] = state.absmax
                if nested:
                    tensors[f"{key}.nested_absmax"] = state.state2.absmax
                    tensors[f"{key}.offset"] = state.offset
    tensors["nf4.values"], tensors["fp4.values"] = F.get_4bit_type("nf4", device="cpu"), F.get_4bit_type("fp4", device="cpu")
    tensors["dynamic.values"] = F.create_dynamic_map()
    save_file({key: value.contiguous() for key, value in tensors.items()}, Path(__file__).with_name("bitsandbytes.safetensors"))


if __name__ == "__main__":
    main()
