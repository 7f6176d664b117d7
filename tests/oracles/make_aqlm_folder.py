"""Makes aqlm_folder.safetensors: a tiny Llama of random AQLM layers, packed by the aqlm package, written and run by transformers with it.

    pip install torch==2.13.0 transformers==5.23.0 accelerate aqlm==1.1.7 numba==0.68.1 scipy && NUMBA_NUM_THREADS=1 python tests/oracles/make_aqlm_folder.py

Variant 2x8: float16, as save_pretrained writes it. layer.KIND.*: one [24, 64] layer of other codebooks, its codes [24, 8, codebooks] as stored; of the 65536 vectors of 1x16 only those in
use are kept: vectors[i] is codebooks[0, used[i]].
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # with more, their CPU kernel adds to one vector from several threads

import torch
from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data
from safetensors.torch import save_file
from tiny import llama, logits, save, variant
from transformers import AutoModelForCausalLM

LAYERS = {"1x8": (1, 8, 1), "1x16": (1, 16, 1), "2x9-out2": (2, 9, 2)}  # codebooks, bits of each, rows of a group
DECODED = [f"model.layers.0.{name}" for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")]
G = torch.Generator().manual_seed(0)


def layer(rows: int, columns: int, codebooks: int, bits: int, group: int) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 2**bits, (rows // group, columns // 8, codebooks), generator=G)
    vectors = (torch.randn(codebooks, 2**bits, group, 8, generator=G) * 0.05).half()
    return {"codes": pack_int_data(codes, bits), "codebooks": vectors, "scales": (torch.rand(rows // group, 1, 1, 1, generator=G) + 0.5).half()}


def decoded(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    return _dequantize_weight(unpack_int_data(parts["codes"], bits), parts["codebooks"].float(), parts["scales"].float())


def folder_2x8() -> dict:
    model = llama().half()
    state = model.state_dict()
    for name in [name for name in state if name.endswith("proj.weight")]:
        state |= {f"{name.removesuffix('weight')}{part}": value for part, value in layer(*state.pop(name).shape, 2, 8, 1).items()}
    quantization = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8, "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight"]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"dtype": "float16", "quantization_config": quantization}))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)  # before a forward pass: the first one transposes the codes in place
        values = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        parts = {name: {part: state[f"{name}.{part}"] for part in ("codes", "codebooks", "scales")} for name in DECODED}
        return variant(folder, {f"{name}.weight": decoded(kept, 8) for name, kept in parts.items()}, values)


def main() -> None:
    extra = {}
    for kind, (codebooks, bits, group) in LAYERS.items():
        parts = layer(24, 64, codebooks, bits, group)
        extra[f"layer.{kind}.decoded"] = decoded(parts, bits)
        if kind == "1x16":
            used = unpack_int_data(parts["codes"], bits).unique()
            parts |= {"used": used.int(), "vectors": parts.pop("codebooks")[0, used]}
        extra |= {f"layer.{kind}.{part}": value for part, value in parts.items()}
    save("aqlm_folder", {"2x8": folder_2x8()}, extra)


if __name__ == "__main__":
    main()
