"""The programs that load what lowbit writes: which packages they need and which lines load a folder. The model card shows these lines, and verify runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template

from ..checkpoints import Checkpoint
from ..checkpoints.ct_layouts import LAYOUTS, layout_of
from ..scheme import CASTS, INT

AUTO = '"auto"'


@dataclass(frozen=True)
class Consumer:
    """How one program loads a checkpoint.

    code: Python that leaves the model in the name model, with $path and $dtype to be filled in; for a GGUF file a command. packages: what pip installs beside torch and transformers,
    by the names that are imported. only_own_dtype: loads only in the dtype that config.json names. environment: variables to set before. decodes_to: the dtype that weights are rounded to
    whatever dtype is asked for. rounds: computes on inputs that it rounds itself, so that logits are compared as distributions.
    """

    name: str
    code: str
    packages: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    only_own_dtype: bool = False
    decodes_to: str | None = None
    rounds: bool = False
    note: str = ""

    def lines(self, path: str, dtype: str = AUTO) -> str:
        """The code for a folder; dtype as Python text."""
        return Template(self.code).substitute(path=json.dumps(path), dtype=AUTO if self.only_own_dtype else dtype)

    @property
    def install(self) -> str:
        """What to install first."""
        return " ".join(["pip install", "transformers accelerate", *self.packages.values()]) if self.name != "llama.cpp" else "https://github.com/ggml-org/llama.cpp"


PLAIN = "from transformers import {auto}\nmodel = {auto}.from_pretrained($path, dtype=$dtype)"
ON_CPU = PLAIN.replace("dtype=$dtype", 'dtype=$dtype, device_map="cpu"')
OWN = "import lowbit.hf\n" + PLAIN.replace("dtype=$dtype", 'dtype=$dtype, variant="lowbit"')
DEQUANTIZED = PLAIN.replace("import {auto}", "import {auto}, CompressedTensorsConfig").replace("dtype=$dtype", "dtype=$dtype, quantization_config=CompressedTensorsConfig(dequantize=True)")
HQQ = """import glob
import torch
from safetensors.torch import load_file
from hqq.models.hf.base import AutoHQQHFModel

class FromSafetensors(AutoHQQHFModel):  # hqq itself reads only its pickles
    @classmethod
    def get_weight_file(cls, folder):
        return glob.glob(folder + "/*.safetensors")[0]

    @classmethod
    def load_weights(cls, folder, map_location=None):
        modules = {}
        for file in glob.glob(folder + "/*.safetensors"):
            for name, value in load_file(file).items():
                module, _, part = name.rpartition(".")
                modules.setdefault(module, {})[part] = value
        return modules

model = FromSafetensors.from_quantized($path, compute_dtype=$dtype, device="cpu")"""


def consumer_of(checkpoint: Checkpoint) -> Consumer:
    """The program that the checkpoint's layout is of, with the lines that load it."""
    kind = checkpoint.kind
    if kind == "gguf":
        return Consumer("llama.cpp", "llama-cli -m $path -p 'Once upon a time'", {"xllamacpp": "xllamacpp"})
    auto = _auto_class(checkpoint.config)
    plain, on_cpu = PLAIN.format(auto=auto), ON_CPU.format(auto=auto)
    if kind == "compressed-tensors":
        return _compressed_tensors(checkpoint, auto)
    return {
        "safetensors": Consumer("transformers", plain),
        "gptq": Consumer("transformers with gptqmodel", on_cpu, {"gptqmodel": "gptqmodel", "optimum": "optimum"}),
        "awq": Consumer("transformers with gptqmodel", on_cpu, {"gptqmodel": "gptqmodel", "optimum": "optimum"}),
        "auto-round": Consumer("transformers with auto-round", on_cpu, {"auto_round": "auto-round", "auto_round_kernel": "auto-round-lib"}),
        "bitsandbytes": Consumer(
            "transformers with bitsandbytes", on_cpu, {"bitsandbytes": "bitsandbytes"}, rounds=True, note="bitsandbytes computes in bfloat16 on processors that multiply it, whatever the dtype."
        ),
        "hqq": Consumer("hqq", HQQ, {"hqq": "hqq"}, note="transformers 5.23 does not read HQQ: from_pretrained gives random weights without an error. transformers 4 with hqq does, on a GPU."),
        "aqlm": Consumer(
            "transformers with aqlm", plain, {"aqlm": "aqlm[cpu]"}, {"NUMBA_NUM_THREADS": "1"}, note="On the CPU set NUMBA_NUM_THREADS=1: with more threads the package's kernel adds up wrong sums."
        ),
        "bitnet": Consumer("transformers", plain, {}, {"TORCHDYNAMO_DISABLE": "1"}, only_own_dtype=_linear_class(checkpoint) == "autobitlinear"),
        "torchao": Consumer("transformers with torchao", on_cpu, {"torchao": "torchao"}, only_own_dtype=True),
        "fp8": Consumer("transformers", plain, only_own_dtype=True),
        "mxfp4": Consumer("transformers", plain),
        "lowbit": Consumer("transformers with lowbit.hf", OWN.format(auto=auto), {"lowbit": "lowbit"}),
    }[kind]


def _auto_class(config: dict) -> str:
    names = config.get("architectures") or [""]
    return "AutoModelForImageTextToText" if str(names[0]).endswith("ForConditionalGeneration") else "AutoModelForCausalLM"


def _linear_class(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("quantization_config", {}).get("linear_class", "bitlinear"))


def _compressed_tensors(checkpoint: Checkpoint, auto: str) -> Consumer:
    """By what the library's version 0.20 loads in transformers 5.23 (docs of checkpoints/compressed_tensors.py)."""
    schemes = {entry.scheme for entry in checkpoint.quantized.values() if entry.scheme.format not in CASTS}
    layouts = {layout_of(scheme) for scheme in schemes}
    floats = bool(layouts - {None}) and all(LAYOUTS[layout].main == "weight_packed" or layout == "mxfp8-quantized" for layout in layouts if layout) and not any(s.format == INT for s in schemes)
    asymmetric = any(scheme.format == INT and not scheme.symmetric and scheme.act is None for scheme in schemes)
    whole, packages = "transformers with compressed-tensors", {"compressed_tensors": "compressed-tensors"}
    if len(schemes) == 1 and (asymmetric or floats) and not any(scheme.act for scheme in schemes):
        return Consumer(whole, DEQUANTIZED.format(auto=auto), packages, decodes_to="bfloat16" if any(scheme.format == "nvfp4" for scheme in schemes) else None)
    note = "transformers 5.23 does not read asymmetric layers among several schemes; vLLM does." if len(schemes) > 1 and asymmetric else ""
    return Consumer(whole, PLAIN.format(auto=auto), packages, note=note)
