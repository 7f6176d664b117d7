"""Makes autoround.safetensors: auto-round's fake quantization with given parameters, and its gradients, on the CPU.

    pip install auto-round==0.15.1 && python tests/oracles/make_autoround.py
"""

from pathlib import Path

import torch
from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym
from safetensors.torch import save_file


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    W, V = torch.randn(12, 96, generator=generator), torch.rand(12, 96, generator=generator) - 0.5
    weight = torch.randn(12, 96, generator=generator)  # the loss is the sum of decoded * weight
    low, high = 1 - 0.3 * torch.rand(36, generator=generator), 1 - 0.3 * torch.rand(36, generator=generator)
    tensors = {"W": W, "V": V, "weight": weight, "min_scale": low, "max_scale": high}
    for bits in (2, 4):
        for name, function in (("sym", quant_tensor_sym), ("asym", quant_tensor_asym)):
            v, a, b = V.reshape(36, 32).clone().requires_grad_(), low.clone().requires_grad_(), high.clone().requires_grad_()
            decoded, scale, _ = function(W, bits=bits, group_size=32, v=v, min_scale=a, max_scale=b, scale_dtype=torch.float32)
            (decoded * weight).sum().backward()
            key = f"{name}{bits}"
            tensors |= {f"{key}.decoded": decoded.detach(), f"{key}.scale": scale.detach().reshape(12, 3), f"{key}.dV": v.grad, f"{key}.dmin": a.grad, f"{key}.dmax": b.grad}
    save_file({key: value.contiguous() for key, value in tensors.items()}, Path(__file__).with_name("autoround.safetensors"))


if __name__ == "__main__":
    main()
