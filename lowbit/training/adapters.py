"""peft's adapters on models whose matrices stay packed.

Hu et al., "LoRA", arXiv:2106.09685; Dettmers et al., "QLoRA", arXiv:2305.14314.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, ModelError, foreign_errors, missing_extra
from ..models import skeleton as sk
from ..models.arch import ROUTERS
from ..models.quantized import QuantLinear
from .starts import Start


def targets(model: PreTrainedModel) -> list[str]:
    """The linear layers of the blocks that get an adapter, by the names that LoraConfig takes: their last parts, or where another module has one of these, too, whole names."""
    blocks = sk.find_blocks(model)
    linear = lambda name, module: name.startswith(f"{blocks}.") and isinstance(module, QuantLinear | nn.Linear | Conv1D) and name.rpartition(".")[2] not in ROUTERS
    names = [name for name, module in model.named_modules() if linear(name, module)]
    if not names:
        raise ModelError(f"{type(model).__name__}: its blocks hold no linear layer that an adapter could be put on.")
    leaves = {name.rpartition(".")[2] for name in names}
    others = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves and name not in names]
    return names if others else sorted(leaves)


def attach(model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, seed: int, transposed: bool = False, start: Start | None = None) -> Any:
    """The model as a peft.PeftModel with LoRA on every linear layer of its blocks, packed ones included; only the adapter is trained.

    transposed: the model of transformers has Conv1D layers there. seed: of peft's start (A by Kaiming, B zero); start: another one.
    """
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets(model), bias="none", task_type="CAUSAL_LM", fan_in_fan_out=transposed)
    _register(config)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        with _known_layers():
            made = peft.get_peft_model(model, config)
    if start is not None:
        put(made, start, alpha / rank)
    return made


def load(model: PreTrainedModel, adapter: str | Path, *, trainable: bool = False) -> Any:
    """A model of lowbit.load with an adapter that peft saved, as a peft.PeftModel. Raises CheckpointError where it cannot be loaded."""
    peft = _peft()
    if not all(Path(adapter, name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):  # peft would look for pickles, too
        raise CheckpointError(f"{adapter} holds no adapter of peft (adapter_config.json, adapter_model.safetensors). Give the folder that lowbit train qlora or peft's save_pretrained wrote.")
    with foreign_errors(f"{adapter}: peft cannot load this adapter"):
        config = peft.PeftConfig.from_pretrained(str(adapter))
        if not isinstance(config, peft.LoraConfig):
            raise CheckpointError(f"{adapter} is an adapter of the kind {config.peft_type}; on packed layers LoRA can be loaded.")
        _register(config)
        with _known_layers():
            return peft.PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=trainable)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise missing_extra("peft", "train", purpose="an adapter") from None
    return peft


@contextmanager
def _known_layers() -> Iterator[None]:
    """peft warns of each layer that it has no name for, those that it was told of included."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        yield


def _register(config: Any) -> None:
    """Tell peft which of its layers goes onto a packed one (its way for modules that it does not know: dynamic dispatch)."""
    from peft.tuners.lora import Linear

    class LoraQuantLinear(Linear):
        """peft's own layer; to write into packed codes is refused."""

        def merge(self, *_: Any, **__: Any) -> None:
            raise ModelError("an adapter cannot be added to packed codes: the result has to be rounded anew. Keep it beside its base.")

    config._register_custom_module({QuantLinear: LoraQuantLinear})


@torch.no_grad()
def put(model: Any, start: Start, scaling: float) -> None:
    """Let the adapter of each module begin with B A; peft multiplies by scaling, of which each of the two takes its share."""
    for name, (A, B) in start.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(A / scaling**0.5)
        layer.lora_B["default"].weight.copy_(B / scaling**0.5)


@torch.no_grad()
def round_(model: Any, dtype: torch.dtype) -> None:
    """Round the adapter's numbers to what dtype holds, in place: what is measured is then what the file has."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(parameter.to(dtype))
