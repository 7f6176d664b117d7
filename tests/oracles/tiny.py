"""What the scripts beside it share that make whole checkpoints with another package's own writer: a tiny model, one input, and a file that holds several variants of a folder.

In a fixture, VARIANT.file.NAME is a tensor as it stood in the package's model.safetensors, and shared.NAME one that is the same in every variant; decoded.NAME is a float32
weight that the package itself decodes, and logits [1, 16, vocabulary] what its forward pass gives for IDS. metadata["texts"] is JSON: of each variant
its config (config.json) and metadata (of model.safetensors). tests/conftest.py makes the folder from it again.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(16).unsqueeze(0) * 7 % 256
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256, max_position_embeddings=128)


def shaken(model):
    """The model with norms and biases that are not all ones and zeros, in evaluation mode."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval()


def llama(**changes) -> LlamaForCausalLM:
    """A seeded float32 Llama of two layers, its embedding not tied; changes go to the configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "tie_word_embeddings": False, "initializer_range": 0.1, "architectures": ["LlamaForCausalLM"], "bos_token_id": None, "eos_token_id": None, **changes})
    return shaken(LlamaForCausalLM(config))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def variant(folder: Path, decoded: dict[str, torch.Tensor], values: torch.Tensor) -> dict:
    """What a fixture keeps of a folder with one model.safetensors, of weights that the package decoded, and of its logits."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    return {"file": tensors, "decoded": decoded, "logits": values, "config": json.loads((folder / "config.json").read_text()), "metadata": metadata}


def save(name: str, variants: dict[str, dict], extra: dict[str, torch.Tensor] | None = None, texts: dict | None = None) -> None:
    """Write name.safetensors beside this file: the variants, and whatever else is to be kept; texts go into the JSON of its metadata beside the variants'."""
    first, *others = [kept["file"] for kept in variants.values()]
    shared = {key for key in first if others and all(key in other and other[key].dtype == first[key].dtype and torch.equal(other[key], first[key]) for other in others)}
    tensors = {f"shared.{key}": value for key, value in first.items() if key in shared} | (extra or {})
    for label, kept in variants.items():
        tensors |= {f"{label}.file.{key}": value for key, value in kept["file"].items() if key not in shared}
        tensors |= {f"{label}.decoded.{key}": value.float() for key, value in kept["decoded"].items()} | {f"{label}.logits": kept["logits"]}
    texts = (texts or {}) | {label: {"config": kept["config"], "metadata": kept["metadata"]} for label, kept in variants.items()}
    file = Path(__file__).with_name(f"{name}.safetensors")
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, file, metadata={"texts": json.dumps(texts, sort_keys=True)})
    print(file.name, file.stat().st_size, "bytes;", *(f"{label}: {len(kept['file'])} tensors" for label, kept in variants.items()))
