"""Make mixtures.json with llama.cpp's own llama-quantize: the block type that every named mixture gives to every tensor of some models.

    python tests/oracles/make_mixtures.py PATH/TO/llama-quantize        # of llama.cpp build 11434

The models have the layers, heads, experts and ties of published ones (or odd ones on purpose) and narrow rows. Only headers are written, the
weights are holes in the file: --dry-run says the types without reading any. Of a model's weight the fixture holds "type", or
"type other:layers" where layers differ: {"attn_v": "q4_k q6_k:0-3,6,9"}. "weighted" is what changes when there is an importance matrix.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowbit.checkpoints import gguf, gguf_arch
from lowbit.checkpoints.gguf_container import header_bytes, pack_value
from lowbit.pipeline.plan import stand_in

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 64, "dtype": "bfloat16"}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2, "num_experts_per_tok": 2, "tie_word_embeddings": False}
MOE = {**LLAMA, "num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
MODELS = {
    "llama, 2 layers": {**LLAMA, "num_key_value_heads": 8},
    "llama, tied, 8 layers": {**LLAMA, "num_hidden_layers": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "SmolLM2 135M": {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "Llama 2 7B": {**LLAMA, "num_hidden_layers": 32, "num_key_value_heads": 8},
    "Llama 3 8B": {**LLAMA, "num_hidden_layers": 32, "num_key_value_heads": 2},
    "Llama 65B": {**LLAMA, "num_hidden_layers": 80, "num_key_value_heads": 8},
    "Llama 3 70B": {**LLAMA, "num_hidden_layers": 80, "num_key_value_heads": 1},
    "rows of 96 and 80": {**LLAMA, "num_hidden_layers": 8, "hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 1},
    "rows of 80, tied": {**LLAMA, "hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "Mixtral 8x7B": {**MIXTRAL, "num_hidden_layers": 32, "num_local_experts": 8},
    "Mixtral of 4 experts": {**MIXTRAL, "num_hidden_layers": 8, "num_local_experts": 4},
    "Qwen2 1.5B": {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 28, "num_attention_heads": 6, "hidden_size": 768, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "Qwen2 72B": {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 80, "num_key_value_heads": 1},
    "Qwen3 4B": {**LLAMA, "model_type": "qwen3", "num_hidden_layers": 36, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "Qwen3-MoE of 8 experts": {**MOE, "model_type": "qwen3_moe", "num_hidden_layers": 9, "num_experts": 8, "norm_topk_prob": True},
    "Qwen3-MoE of 16 experts": {**MOE, "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 16, "norm_topk_prob": True},
    "Qwen2-MoE": {**MOE, "model_type": "qwen2_moe", "num_hidden_layers": 24, "num_experts": 12, "shared_expert_intermediate_size": 256},
    "Gemma 2 2B": {**LLAMA, "model_type": "gemma2", "num_hidden_layers": 26, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    "Gemma 3 4B": {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 34, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    "Phi-3 mini": {**LLAMA, "model_type": "phi3", "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 64, "pad_token_id": 0},
    "GPT-2": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 64},
    "StarCoder2 3B": {**LLAMA, "model_type": "starcoder2", "num_hidden_layers": 30, "num_attention_heads": 24, "hidden_size": 768, "num_key_value_heads": 2},
    "OLMo 2 7B": {**LLAMA, "model_type": "olmo2", "num_hidden_layers": 32, "num_key_value_heads": 8},
    "SmolLM3 3B": {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 36, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0},
}  # fmt: skip
MIXTURES = (
    "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0",
    "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4_moe",
)  # fmt: skip
LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- .*?type = +(\w+), size =.*?(?:\((\w+)\))?$")


def write_header(path: Path, config: dict) -> None:
    """A GGUF of a model whose weights are a hole."""
    checkpoint = stand_in(config, "model")
    arch, full = gguf_arch.find(config), gguf_arch.full_config(config)
    tensors = gguf._plan(checkpoint, arch, full, None)
    values = {"general.architecture": ("string", arch.name), **gguf_arch.metadata(arch, full)}
    with open(path, "wb") as file:
        size = file.write(header_bytes({key: pack_value(kind, value) for key, (kind, value) in values.items()}, tensors, 32))
        file.truncate(size + sum(-(-tensor.nbytes // 32) * 32 for tensor in tensors))


def write_imatrix(path: Path) -> None:
    """One entry, so that there is a matrix at all (legacy form)."""
    name = b"blk.0.none.weight"
    ints = lambda *values: np.array(values, np.int32).tobytes()
    path.write_bytes(ints(1, len(name)) + name + ints(1, 1) + np.ones(1, np.float32).tobytes() + ints(1, 0))


def chosen(program: str, model: Path, mixture: str, imatrix: Path | None) -> dict[str, str]:
    """Tensor -> type, of those that are quantized."""
    options = [] if imatrix is None else ["--imatrix", str(imatrix)]
    done = subprocess.run([program, "--dry-run", *options, str(model), mixture], capture_output=True, text=True, check=True)
    lines = [LINE.search(line) for line in (done.stdout + done.stderr).replace("\r", "").split("\n") if "size =" in line and "type =" in line]
    return {match[1]: match[3].lower() for match in lines if match[3]}


def compact(types: dict[str, str]) -> dict[str, str]:
    leaves: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        leaves.setdefault(match[2], {})[int(match[1] or 0)] = kind
    return {leaf: " ".join(spans(layers)) for leaf, layers in sorted(leaves.items())}


def spans(layers: dict[int, str]) -> list[str]:
    """The type of most layers, then others with their layers."""
    kinds = sorted(set(layers.values()), key=lambda kind: (-list(layers.values()).count(kind), kind))
    words = kinds[:1]
    for kind in kinds[1:]:
        own, parts = [i for i in sorted(layers) if layers[i] == kind], []
        while own:
            stop = next((n for n in range(1, len(own)) if own[n] != own[0] + n), len(own))
            parts.append(f"{own[0]}-{own[stop - 1]}" if stop > 1 else f"{own[0]}")
            own = own[stop:]
        words.append(f"{kind}:{','.join(parts)}")
    return words


def main(program: str) -> None:
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        model, imatrix = Path(folder) / "model.gguf", Path(folder) / "imatrix.dat"
        write_imatrix(imatrix)
        for name, config in MODELS.items():
            write_header(model, config)
            plain = {mixture: compact(chosen(program, model, mixture, None)) for mixture in MIXTURES}
            weighted = {mixture: compact(chosen(program, model, mixture, imatrix)) for mixture in MIXTURES}
            changed = {mixture: {leaf: text for leaf, text in types.items() if plain[mixture][leaf] != text} for mixture, types in weighted.items()}
            made[name] = {"config": config, "types": plain, "weighted": {mixture: types for mixture, types in changed.items() if types}}
            print(name, len(plain["q4_k_m"]), file=sys.stderr)
    text = json.dumps(made, indent=None, separators=(",", ":"))
    Path(__file__).with_name("mixtures.json").write_text(re.sub(r'(\{"config"|"(?:types|weighted)":|"[a-z0-9_]+":\{"attn)', r"\n\1", text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
