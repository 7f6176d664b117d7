"""Make imatrix-*.gguf and imatrix-*.dat with llama.cpp's own llama-imatrix: a Llama whose tokenizer adds BOS, and a mixture of experts.

    python tests/oracles/make_imatrix.py PATH/TO/llama-imatrix        # of llama.cpp build 11434

Weights are a formula and tokenizers those of converter.json; tests/checkpoints/test_imatrix.py makes the same models.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowbit.checkpoints import gguf, safetensors

HERE = Path(__file__).parent
TEXT = "\n".join(f"{i}. the quick brown fox jumps over the lazy dog; what is {i} + 345?  it's {345 + i}." for i in range(8))
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None}
MODELS = {
    "llama": ({**COMMON, "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}, "Llama 2's kind"),
    "mixtral": ({**COMMON, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}, "GPT-2's kind"),
}
LENGTH, WINDOWS = 32, 4


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers that look like chance and are the same everywhere."""
    first = sum(map(ord, name))
    scale = 1.0 if len(shape) == 1 else 0.1 if "embed" not in name else 0.5
    return torch.sin(torch.arange(shape.numel(), dtype=torch.float64).mul_(12.9898).add_(first).sin_().mul_(43758.5453)).mul_(scale).float().reshape(shape)


def save(folder: Path, config: dict, tokenizer: str) -> None:
    stored = json.loads((HERE / "converter.json").read_text(encoding="utf-8"))["tokenizers"][tokenizer]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config, vocab_size=stored["rows"]))
    for name, parameter in model.named_parameters():
        parameter.data = weights(name, parameter.shape)
    model.save_pretrained(folder)
    for file, text in stored["files"].items():
        (folder / file).write_text(text, encoding="utf-8")


def main(program: str) -> None:
    for name, (config, tokenizer) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            save(path / "hf", config, tokenizer)
            gguf.write(safetensors.open_folder(path / "hf"), path / "model.gguf")
            (path / "text.txt").write_text(TEXT, encoding="utf-8")
            for form in ("gguf", "dat"):
                options = ["-c", str(LENGTH), "-b", str(LENGTH), "--chunks", str(WINDOWS), "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-ppl", "-t", "1", "--output-format", form]
                out = HERE / f"imatrix-{name}.{form}"
                subprocess.run([program, "-m", "model.gguf", "-f", "text.txt", *options, "-o", str(out)], cwd=folder, check=True)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).absolute()))
