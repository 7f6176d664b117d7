"""Makes gptaq.safetensors with the authors' inner loop (github.com/Intelligent-Computing-Lab-Yale/GPTAQ, commit 883afc6, fake_quant/gptaq_utils.py).

    python tests/oracles/make_gptaq.py path/to/gptaq_utils.py

Their loop runs on the CPU in one block of columns, with a scale per row as their WeightQuantizer finds it (max|w| / (2^(b-1) - 1)).
"""

import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file


class Quantizer:
    """A scale per row, symmetric, as quant_utils.WeightQuantizer without a search."""

    def __init__(self, bits: int) -> None:
        self.top = 2 ** (bits - 1) - 1
        self.scale = None

    def ready(self) -> bool:
        return self.scale is not None

    def find_params(self, W: torch.Tensor) -> None:
        self.scale = W.abs().amax(1, keepdim=True) / self.top

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(x / self.scale), -self.top - 1, self.top) * self.scale


def main() -> None:
    for name in ("utils", "quant_utils", "model_utils"):
        sys.modules[name] = types.ModuleType(name)
    spec = importlib.util.spec_from_file_location("gptaq_utils", sys.argv[1])
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    torch.cuda.synchronize = lambda: None
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 96, generator=generator) @ (torch.eye(96) + 0.3 * torch.randn(96, 96, generator=generator))
    original = X + 0.2 * torch.randn(400, 96, generator=generator)
    W = torch.randn(24, 96, generator=generator)
    tensors = {"W": W, "H": X.T @ X, "cross": (original - X).T @ X}
    for bits in (3, 4):
        for order in (False, True):
            layer = torch.nn.Linear(96, 24, bias=False)
            layer.weight.data = W.clone()
            job = theirs.GPTAQ(layer)
            job.quantizer = Quantizer(bits)
            job.fp_inp = [original.T]  # kept as [in_features, tokens] there
            job.add_batch(X, None)
            job.fasterquant(blocksize=96, percdamp=0.01, actorder=order, alpha=0.25)
            tensors[f"{bits}.{'activation' if order else 'natural'}"] = layer.weight.data.clone()
    save_file(tensors, Path(__file__).with_name("gptaq.safetensors"))


if __name__ == "__main__":
    main()
