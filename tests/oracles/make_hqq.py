"""Makes hqq.safetensors: the hqq package's quantizer on the CPU in float32, both axes.

    pip install hqq==0.2.8.post1 && python tests/oracles/make_hqq.py
"""

from pathlib import Path

import torch
from hqq.core import optimize
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file

CASES = [(bits, axis) for bits in (2, 3, 4, 8) for axis in (0, 1)]


def main() -> None:
    W = torch.randn(128, 192, generator=torch.Generator().manual_seed(0))
    W[3] *= 20
    W[:, 5] = 0.01
    tensors = {"W": W}
    for bits, axis in CASES:
        codes, meta = Quantizer.quantize(
            W, nbits=bits, channel_wise=True, group_size=64, optimize=True, round_zero=bits == 4, axis=axis, bitpack=False, compute_dtype=torch.float32, device="cpu"
        )
        key = f"{bits}.{axis}"
        tensors[f"{key}.scale"], tensors[f"{key}.zero"] = meta["scale"].float(), meta["zero"].float()
        tensors[f"{key}.codes"] = codes.to(torch.uint8)
        tensors[f"{key}.decoded"] = ((codes.float() - meta["zero"].float()) * meta["scale"].float()).reshape(W.shape)
    save_file({key: value.contiguous() for key, value in tensors.items()}, Path(__file__).with_name("hqq.safetensors"))
    print(optimize.__file__)


if __name__ == "__main__":
    main()
