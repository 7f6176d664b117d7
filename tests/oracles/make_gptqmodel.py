"""Makes gptqmodel.safetensors: what GPTQModel's own packers make of codes, scales and zero-points: GPTQ v2 and v1, natural and act-order.

    pip install gptqmodel==7.7.0 && python tests/oracles/make_gptqmodel.py
"""

from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

ROWS, COLUMNS, GROUP = 64, 96, 32


def main() -> None:
    g = torch.Generator().manual_seed(0)
    made = {}
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=g)
        zero = torch.randint(1, 2**bits, (ROWS, COLUMNS // GROUP), generator=g)
        scale = (torch.rand(ROWS, COLUMNS // GROUP, generator=g) * 0.01 + 0.001).half()
        for name, index in (("natural", torch.arange(COLUMNS) // GROUP), ("act-order", torch.randperm(COLUMNS, generator=g) // GROUP)):
            W = (codes - zero[:, index]) * scale.float()[:, index]
            linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
            linear.weight.data = W
            layer = TorchLinear(bits=bits, group_size=GROUP, sym=False, desc_act=name != "natural", in_features=COLUMNS, out_features=ROWS, bias=False, register_buffers=True)
            layer.pack_original(linear, scale.float(), zero.float(), index.to(torch.int32))
            key = f"{bits}.{name}"
            made |= {f"{key}.{part}": getattr(layer, part).detach().clone().contiguous() for part in ("qweight", "qzeros", "scales", "g_idx")}
            made |= {f"{key}.codes": codes.to(torch.uint8), f"{key}.zero": zero.to(torch.uint8)}
            convert_gptq_v2_to_v1_format_module(layer, quantize_config=type("Config", (), {"bits": bits, "pack_dtype": torch.int32})())
            made[f"{key}.qzeros_v1"] = layer.qzeros.detach().clone().contiguous()
    save_file(made, Path(__file__).with_name("gptqmodel.safetensors"))
    print({key: list(value.shape) for key, value in made.items() if key.startswith("4.")})


if __name__ == "__main__":
    main()
