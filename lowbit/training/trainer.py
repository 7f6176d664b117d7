"""transformers' Trainer for what is trained here: a measurement of one number, models that are distilled from their original, the layer that a NaN comes from."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer

from ..errors import FormatError, ModelError
from .losses import cross_entropy, divergence
from .modules import ActView, FakeQuantLinear
from .views import View


class Rows(Dataset):
    """Windows of tokens, int64 [windows, length], as the Trainer takes them."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


class MeasuringTrainer(Trainer):
    """A Trainer whose evaluation is one number on held-out data."""

    def measure(self) -> tuple[str, float]:
        """Its name and value; called in evaluation mode, without gradients, under the autocast of training."""
        raise NotImplementedError

    def measured(self) -> tuple[str, float]:
        """measure, also before training, which only then patches the model with its autocast; nothing is logged."""
        model: Any = self.model
        was = model.training
        model.eval()
        with torch.no_grad(), torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            found = self.measure()
        model.train(was)
        return found

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        name, value = self.measured()
        found = {f"{metric_key_prefix}_{name}": value}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def refuse_not_finite(self, model: nn.Module, ids: Tensor, loss: Tensor | None = None, cause: Exception | None = None) -> None:
        """Raise ModelError, naming the layer, for a loss that is not finite (None: it was not even computed)."""
        if loss is None or not bool(torch.isfinite(loss)):
            raise ModelError(
                f"the loss is not finite at step {self.state.global_step}: {first_bad(model, ids)}. Lower the learning rates, or compute in float32 (--dtype float32)."
            ) from cause


class DistillationTrainer(MeasuringTrainer):
    """loss: the share of cross-entropy, beside the KL to teacher. held_out: windows that the KL is measured on (key eval_kl), second half of each scored."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, loss: float, lr_scales: float, held_out: Tensor, **more: Any) -> None:
        super().__init__(*args, **more)
        self.teacher, self.share, self.lr_scales, self.held_out = teacher, loss, lr_scales, held_out
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        ids = inputs["input_ids"]
        try:
            output = model(input_ids=ids, use_cache=False)
        except FormatError as error:
            self.refuse_not_finite(model, ids, cause=error)
            raise
        logits = output.logits
        total = logits.new_zeros((), dtype=torch.float32)
        if self.share < 1:
            with torch.no_grad():
                goal = self.teacher(input_ids=ids, use_cache=False).logits
            total = total + (1 - self.share) * divergence(logits, goal)
        if self.share > 0:
            total = total + self.share * cross_entropy(logits, ids)
        self.refuse_not_finite(model, ids, total)
        return (total, output) if return_outputs else total

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """Weights and the rest at args.learning_rate, scales and zero-points at lr_scales; nothing decays but the masters, if asked for."""
        if self.optimizer is None:
            assert self.model is not None
            views = {id(p) for module in self.model.modules() if isinstance(module, View | ActView) for p in module.parameters()}
            trained = [p for p in self.model.parameters() if p.requires_grad]
            groups = [
                {"params": [p for p in trained if id(p) not in views and p.ndim > 1], "lr": self.args.learning_rate, "weight_decay": self.args.weight_decay},
                {"params": [p for p in trained if id(p) not in views and p.ndim < 2], "lr": self.args.learning_rate, "weight_decay": 0.0},
                {"params": [p for p in trained if id(p) in views], "lr": self.lr_scales, "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon)
        return self.optimizer

    def measure(self) -> tuple[str, float]:
        """Mean KL to the original on the held-out windows, second half of each."""
        model: Any = self.model
        teacher: Any = self.teacher
        total = 0.0
        for ids in self.held_out.to(self.args.device).split(1):
            half = slice(ids.shape[1] // 2, ids.shape[1] - 1)
            total += float(divergence(model(input_ids=ids, use_cache=False).logits[:, half], teacher(input_ids=ids, use_cache=False).logits[:, half]))
        return "kl", total / len(self.held_out)


def first_bad(model: nn.Module, ids: Tensor) -> str:
    """The first layer whose weight, scale, gradient or output (for the tokens ids) is not finite, in words."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"{name} holds NaN or infinity"
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name} is not finite"
    for name, module in model.named_modules():
        if not isinstance(module, FakeQuantLinear):
            continue
        try:
            finite = bool(torch.isfinite(module.view(module.weight)).all())
        except FormatError:
            finite = False
        if not finite:
            return f"the quantized weight of {name} is not finite"
    overflowed = _first_overflow(model, ids)
    return "every weight is finite, a difference of logits overflowed" if overflowed is None else f"every weight is finite, the output of {overflowed} is not"


@torch.no_grad()
def _first_overflow(model: nn.Module, ids: Tensor) -> str | None:
    """The name of the first module whose output is not finite."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
            found.append(name)

    hooks = [module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output)) for name, module in model.named_modules()]
    try:
        with suppress(FormatError):  # the next layer refuses to round it
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
