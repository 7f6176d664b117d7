"""BitNet: training with binary or ternary weights and 8-bit activations, from scratch or from an existing model.

Ma et al., "The Era of 1-bit LLMs", arXiv:2402.17764 (b1.58); Wang et al., "BitNet", arXiv:2310.11453 (binary). Gradients pass straight through both roundings, clipped codes included.
Schedule of BitNet b1.58 2B4T (arXiv:2504.12285): the learning rate falls in two stages, each along a line, and weight decay is off in the second. Phasing in, w + phase (Q(w) - w): Hugging Face's
fine-tuning to 1.58 bits; full precision first: Nielsen et al., arXiv:2502.11895.

    OUT.train/start/      the model that training begins with, its tokenizer (from scratch)
    OUT.train/tokens.bin  the text as tokens
    OUT.train/steps/      the Trainer's checkpoints
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .. import __version__, numerics
from ..checkpoints import Checkpoint, LazyQuantized, gguf, open_checkpoint
from ..checkpoints import bitnet as layout
from ..checkpoints.safetensors import read_json
from ..errors import CheckpointError, LowbitError, RecipeError, foreign_errors
from ..models import skeleton as sk
from ..numerics import affine, ggml
from ..pipeline import resources
from ..pipeline.job import refuse_existing
from ..pipeline.locate import base_name, load_tokenizer, locate
from ..pipeline.output import readable_errors, refuse_own_input
from ..pipeline.output import write as write_output
from ..pipeline.quantize import model_key
from ..pipeline.selfgen import load_model
from ..progress import SILENT, Progress
from ..scheme import Rounding, Scheme
from ..tensor import QuantizedTensor
from .job import arguments, claim, finish, is_finished, refuse_float16, require_one_process, require_packages, run, whole
from .losses import cross_entropy
from .modules import ActView, FakeQuantLinear, as_stored
from .prepare import matrices
from .qat import Trained
from .save import as_checkpoint, stored_dtypes
from .text import split, train_tokenizer, write_tokens
from .trainer import DistillationTrainer
from .views import View

WEIGHTS = ("ternary", "binary", "full")
BLOCKS = ("tq1_0", "tq2_0")  # ggml's ternary types
SMALL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": None, "hidden_act": "silu",
    "tie_word_embeddings": True, "max_position_embeddings": 2048, "rope_theta": 10000.0,
}  # fmt: skip


@dataclass(frozen=True)
class BitNetOptions:
    """weights: "ternary" (b1.58), "binary" or "full" (none rounded: a twin to compare with).

    switch_at: share of the steps in full precision first. phase_in: share of the steps after that in which the rounding comes in. steps: default: epochs over the data.
    batch: windows in a step; micro: of them at once. lr falls to lr_half (default 8 / 15 of it) in the first half; the second begins at lr_second (default a third of lr), and ends at 0.
    weight_decay: in the first half. warmup: share of the steps. loss: share of cross-entropy; the rest is the KL to the original, where there is one. held_out: windows, at most.
    """

    weights: str = "ternary"
    switch_at: float = 0.0
    phase_in: float = 0.0
    epochs: float = 5.0
    steps: int | None = None
    batch: int = 16
    micro: int | None = None
    seq_len: int = 256
    lr: float = 1.5e-3
    lr_half: float | None = None
    lr_second: float | None = None
    weight_decay: float = 0.1
    warmup: float = 0.02
    loss: float = 1.0
    held_out: int = 128
    eval_every: int = 100
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise RecipeError(f"weights is {self.weights!r}; expected one of {', '.join(WEIGHTS)}.")
        if not (0 <= self.switch_at < 1 and self.phase_in >= 0 and self.switch_at + self.phase_in < 1):
            raise RecipeError(f"switch_at is {self.switch_at} and phase_in {self.phase_in}; expected shares of the steps that leave some for training with all of the rounding.")
        if self.weights == "full" and (self.switch_at or self.phase_in):
            raise RecipeError("weights is full, so nothing is rounded; leave switch_at and phase_in out.")
        if self.batch < 1 or self.batch % (self.micro or self.batch):
            raise RecipeError(f"batch is {self.batch} and micro {self.micro}; expected a multiple.")
        if not 0 <= self.loss <= 1:
            raise RecipeError(f"loss is {self.loss}; expected the share of cross-entropy, from 0 (KL to the original alone) to 1.")
        if not self.lr > 0 or self.epochs <= 0 or self.seq_len < 2 or self.held_out < 1:
            raise RecipeError(f"lr is {self.lr}, epochs {self.epochs}, seq_len {self.seq_len} and held_out {self.held_out}; expected more than 0, windows of at least 2 tokens.")

    def phase(self, step: int, steps: int) -> float:
        """How much of the rounding is there in a step, from 0 to 1."""
        done = step - self.switch_at * steps
        return 0.0 if done < 0 else 1.0 if done >= self.phase_in * steps else done / (self.phase_in * steps)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step."""
        half, share = self.lr_half or self.lr * 8 / 15, min(step / steps, 1.0)
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * steps))
        return warm * (self.lr + (half - self.lr) * 2 * share if share < 0.5 else (self.lr_second or self.lr / 3) * 2 * (1 - share))


PHASED = BitNetOptions(phase_in=0.5, epochs=1.0, lr=1e-4, loss=0.0)  # of an existing model


def bitnet(
    output: str | Path,
    *,
    data: str,
    model: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    options: BitNetOptions | None = None,
    gguf_type: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Trained:
    """Train a model of binary or ternary weights and write it as a BitNet folder, which transformers loads; with weights "full" as a plain one.

    model: an existing one to begin with, from which it is distilled; None: from scratch, with config (values of transformers' bitnet class, or a JSON file of them; defaults: SMALL) and a
    byte-level BPE trained on data. options: default PHASED with a model, BitNetOptions() without. gguf_type: "tq1_0" or "tq2_0": write OUT.gguf, too. trainer: further transformers.TrainingArguments.
    resume: go on from the last checkpoint of OUT.train. Raises LowbitError before any work on bad input.
    """
    require_packages("accelerate", trainer=trainer)
    began, path = time.monotonic(), Path(output)
    options = options or (PHASED if model is not None else BitNetOptions())
    plan = _from_model(locate(model, progress=progress), config) if model is not None else _from_scratch(config)
    _refuse(plan, options, path, gguf_type, progress)
    files = {"folder": path, **({"gguf": _gguf_path(path)} if gguf_type else {})}
    folder = path.with_name(path.name + ".train")
    if resume and is_finished(folder, path):
        provenance = open_checkpoint(path).provenance
        return Trained(path, [(step, value) for step, value in provenance["training"]["curve"]], time.monotonic() - began, {}, provenance)
    for file in files.values():
        refuse_existing(file, resume=resume, overwrite=overwrite or (resume and file.suffix == ".gguf"))  # a file that was written before the process ended
    place = resources.choose_device(device)
    compute = resources.choose_dtype(dtype, place)
    refuse_float16(compute)
    require_one_process()
    known = {"config": plan.config, "torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(compute), "device": place.type, "threads": torch.get_num_threads()}
    key = {
        **(known if plan.folder is None else model_key(open_checkpoint(plan.folder), place, compute)), "options": asdict(options), "gguf": gguf_type, "seed": seed, "trainer": trainer or {},
        "data": {"name": str(data), "bytes": Path(data).stat().st_size, "changed": Path(data).stat().st_mtime_ns},
    }  # fmt: skip
    with readable_errors(path):
        claim(folder, key, resume=resume, overwrite=overwrite)
        start = plan.folder or _begin(folder / "start", plan.config, data, seed)
        scheme = None if options.weights == "full" else scheme_of(options.weights, _scale_dtype(plan.config, gguf_type))
        made, curve = _train(start, folder, scheme, options, data, seed, place, compute, plan.folder is not None, trainer or {}, progress)
        training = {**asdict(options), "seed": seed, "metric": "kl" if options.loss < 1 else "loss", "curve": curve, "transformers": transformers.__version__}
        provenance = {"lowbit": __version__, **({} if scheme is None else {"recipe": {"name": "bitnet"}}), "training": training}
        made = replace(made, provenance=provenance)
        base = path.name if model is None else base_name(model, start)
        if gguf_type:
            write_output(as_gguf(made, gguf_type), "gguf", files["gguf"], progress, overwrite=overwrite or resume, base=base)
        write_output(made, "safetensors" if scheme is None else "bitnet", path, progress, overwrite=overwrite, base=base, whole=lambda: whole(folder))
    finish(folder, path)
    seconds = time.monotonic() - began
    return Trained(path, curve, seconds, {"end": seconds}, provenance)


# ---------------------------------------------------------------------------------------------------------------- before work


@dataclass(frozen=True)
class _Plan:
    """What training begins with. folder: of an existing model; None: from scratch. shapes: of the matrices that are rounded."""

    config: dict
    shapes: dict[str, tuple[int, int]]
    folder: Path | None = None


def _from_scratch(given: Mapping[str, Any] | str | Path | None) -> _Plan:
    values = configuration(given)
    if values.pop("model_type", "bitnet") != "bitnet":
        raise RecipeError("the configuration is of another model_type than bitnet, whose blocks have a norm before every linear layer. Train other models from an existing one.")
    known = transformers.BitNetConfig().to_dict()
    if unknown := sorted(key for key in values if key not in known and key not in ("rope_theta", "rope_scaling", "head_dim", "architectures")):
        raise RecipeError(f"the configuration has {', '.join(unknown)}, which transformers' BitNetConfig does not know.")
    with foreign_errors("transformers makes no BitNet model of this configuration"):
        config = transformers.BitNetConfig(**{**values, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None})
        with torch.device("meta"):
            model = transformers.BitNetForCausalLM(config)
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    full = {**config.to_dict(), "architectures": ["BitNetForCausalLM"], "dtype": "float32"}
    return _Plan(full, _shapes(model))


def configuration(given: Mapping[str, Any] | str | Path | None, sizes: Mapping[str, Any] | None = None) -> dict:
    """Values of a configuration: those given and, for the others, SMALL; of a JSON file the class's own defaults. sizes change them."""
    if isinstance(given, str | Path):
        found, base = read_json(Path(given)), transformers.BitNetConfig().to_dict()
    else:
        found, base = dict(given or {}), SMALL
    ropes = ("rope_parameters", "rope_theta", "rope_scaling")
    kept = {key: value for key, value in base.items() if not (key in ropes and any(rope in found for rope in ropes))}
    return {**kept, **found, **(sizes or {})}


def _from_model(path: Path, config: object) -> _Plan:
    if config is not None:
        raise RecipeError("an existing model has its configuration; give sizes or a configuration only without one.")
    checkpoint = open_checkpoint(path)
    return _Plan(checkpoint.config, _shapes(sk.build(checkpoint).model), path)


def _shapes(model: Any) -> dict[str, tuple[int, int]]:
    return {f"{name}.weight": (linear.out_features, linear.in_features) for name, linear in matrices(model)[0].items()}


def _refuse(plan: _Plan, options: BitNetOptions, path: Path, gguf_type: str | None, progress: Progress) -> None:
    """Raise what training would end in: an output that cannot hold the model."""
    if path.suffix == ".gguf":
        raise RecipeError(f"-o {path} names a file; expected a new folder. With --gguf tq2_0 (or tq1_0) a GGUF file is written beside it.")
    if plan.folder is not None:
        refuse_own_input(path, plan.folder)
    if (most := plan.config.get("max_position_embeddings")) and most < options.seq_len:
        raise RecipeError(f"the configuration holds {most} positions, and windows have {options.seq_len} tokens. Give a smaller --seq-len.")
    if plan.folder is None and options.loss < 1:
        raise RecipeError(f"loss is {options.loss}, and from scratch there is no original to distil from; expected 1, cross-entropy alone.")
    if options.weights == "full":
        if gguf_type:
            raise RecipeError(f"--gguf {gguf_type} holds ternary weights, and weights is full. Write the folder, and convert it.")
        return
    for name, shape in plan.shapes.items():
        layout.check(scheme_of("ternary"), shape, name)
    if gguf_type is not None and gguf_type not in BLOCKS:
        raise RecipeError(f"gguf is {gguf_type!r}; expected one of {', '.join(BLOCKS)}.")
    try:
        gguf.supported(plan.config)
        for name, shape in plan.shapes.items():
            gguf.check(ggml.scheme(gguf_type or BLOCKS[0]), shape, name)
    except LowbitError as error:
        if gguf_type:
            raise RecipeError(f"this model does not go into a GGUF of {gguf_type}: {error} Or leave --gguf out: the folder is for transformers.") from error
        progress.note(f"For transformers only; llama.cpp cannot hold this model: {error}")


def _gguf_path(path: Path) -> Path:
    return path.with_name(path.name + ".gguf")


def _scale_dtype(config: Mapping, gguf_type: str | None) -> str:
    """That of the model, in which transformers keeps scales; with a GGUF one whose numbers float16 holds."""
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = str(named) if named in layout.FLOATS.values() else "float32"
    return "float16" if gguf_type and dtype == "float32" else dtype


def scheme_of(weights: str, scale_dtype: str = "float32") -> Scheme:
    """The number format of every matrix."""
    return Scheme(weights, numerics.ternary.KINDS[weights].bits, (-1, -1), scale_dtype=scale_dtype, act=layout.ACT)


# ------------------------------------------------------------------------------------------------------------------- the work


def _begin(folder: Path, config: dict, data: str, seed: int) -> Path:
    """A new model with its tokenizer, in a folder; what is there already is it."""
    if folder.exists():
        return folder
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer = train_tokenizer(data, config["vocab_size"])
    tokenizer.model_max_length = config["max_position_embeddings"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**config))
    model.float().save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    os.replace(draft, folder)
    return folder


def fake_quantize(model: Any, scheme: Scheme) -> Any:
    """Put layers that round weights (scales found anew in each step) and inputs where the blocks of a model have linear layers; in place."""
    for name, linear in matrices(model)[0].items():
        weight = nn.Parameter(linear.weight.detach().float())
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float())
        view = View(numerics.quantize(weight.detach(), scheme), "minmax", straight=True)
        model.set_submodule(name, FakeQuantLinear(weight, bias, view, ActView(Rounding(layout.ACT))).train(linear.training))
    return model


def set_phase(model: nn.Module, phase: float) -> None:
    """How much of the rounding the forward pass has: 0 none, 1 all."""
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            module.phase = phase


def _train(
    start: Path, folder: Path, scheme: Scheme | None, options: BitNetOptions, data: str, seed: int, place: torch.device, compute: torch.dtype, existing: bool, more: dict, progress: Progress
) -> tuple[Checkpoint, list[tuple[int, float]]]:
    source = open_checkpoint(start)
    skeleton = sk.build(source)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        tokenizer = load_tokenizer(source, Path(scratch))
        if not (folder / "tokens.bin").exists():
            write_tokens(data, tokenizer, folder / "tokens.bin")
    train, held = split(folder / "tokens.bin", len(tokenizer), options.seq_len, options.held_out)
    resources.require_memory(int(skeleton.parameter_count() * (16 + compute.itemsize * existing) * 1.1), purpose="Training (weights, gradients, two moments of AdamW)")
    student = load_model(skeleton, torch.float32, place)
    student.requires_grad_(True).train()
    if scheme is not None:
        fake_quantize(student, scheme)
    as_stored(student, stored_dtypes(skeleton, "bitnet"))
    teacher = load_model(sk.build(source), compute, place) if options.loss < 1 else None
    steps = options.steps or max(1, int(options.epochs * len(train)) // options.batch)
    micro = options.micro or options.batch
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    given = arguments(
        folder / "steps", steps=steps, batch=options.batch, micro=micro, eval_every=options.eval_every, metric="loss" if teacher is None else "kl", seed=seed, compute=compute, place=place,
        more=more, learning_rate=options.lr, weight_decay=options.weight_decay, adam_beta2=0.95, dataloader_drop_last=True,
    )  # fmt: skip
    trainer = BitNetTrainer(
        model=student, args=given, train_dataset=train, eval_dataset=held, teacher=teacher, loss=options.loss, lr_scales=0.0, held_out=torch.stack([held.row(i) for i in range(len(held))]),
        rate=partial(options.rate, steps=steps), callbacks=[_Stages(student, options, steps)],
    )  # fmt: skip
    run(trainer, folder / "steps", progress)
    name = f"eval_{'loss' if teacher is None else 'kl'}"
    curve = [(int(entry["step"]), float(entry[name])) for entry in trainer.state.log_history if name in entry]
    made = as_checkpoint(student, source, "bitnet", {})
    return replace(made, quantized={name: _ternary(entry) for name, entry in made.quantized.items()}), curve


class BitNetTrainer(DistillationTrainer):
    """rate: the learning rate of a step. Measured is with all of the rounding: the KL to the teacher, or without one the cross-entropy (key eval_loss)."""

    def __init__(self, *args: Any, rate: Callable[[int], float], **more: Any) -> None:
        super().__init__(*args, **more)
        self.rate = rate

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            base, given = self.args.learning_rate, optimizer or self.optimizer
            assert given is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(given, lambda step: self.rate(step) / base)
        return self.lr_scheduler

    def measure(self) -> tuple[str, float]:
        model: Any = self.model
        phases = {module: module.phase for module in model.modules() if isinstance(module, FakeQuantLinear)}
        set_phase(model, 1.0)
        try:
            return super().measure() if self.teacher is not None else ("loss", self._cross_entropy())
        finally:
            for module, phase in phases.items():
                module.phase = phase

    def _cross_entropy(self) -> float:
        model: Any = self.model
        parts = self.held_out.split(self.args.per_device_train_batch_size)
        return sum(float(cross_entropy(model(input_ids=ids.to(self.args.device), use_cache=False).logits, ids.to(self.args.device))) * len(ids) for ids in parts) / len(self.held_out)


class _Stages(transformers.TrainerCallback):
    """The phase of the rounding, and weight decay off in the second half."""

    def __init__(self, model: nn.Module, options: BitNetOptions, steps: int) -> None:
        self.model, self.options, self.steps = model, options, steps

    def on_step_begin(self, args, state, control, optimizer=None, **_: Any) -> None:
        set_phase(self.model, self.options.phase(state.global_step, self.steps))
        if 2 * state.global_step >= self.steps:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0


# ------------------------------------------------------------------------------------------------------------------ the files


def _ternary(entry: LazyQuantized) -> LazyQuantized:
    """A binary matrix as a ternary one without zeros, which is what BitNet's layouts hold; a ternary one as it is."""
    if entry.scheme.format != "binary":
        return entry
    scheme = replace(entry.scheme, format="ternary", bits=numerics.ternary.KINDS["ternary"].bits)

    def load() -> QuantizedTensor:
        qt = entry.load()
        return replace(qt, scheme=scheme, parts={**qt.parts, "codes": 2 * qt.parts["codes"]})

    return LazyQuantized(scheme, entry.shape, entry.dtype, load, numerics.nbytes(scheme, entry.shape))


def as_gguf(checkpoint: Checkpoint, type_name: str) -> Checkpoint:
    """A checkpoint of ternary matrices, with one scale each that float16 holds, as one of blocks of a ggml type; inputs are rounded as llama.cpp does (8 bits for 256 of them)."""
    return replace(checkpoint, quantized={name: _blocks(entry, type_name) for name, entry in checkpoint.quantized.items()}, activations={})


def _blocks(entry: LazyQuantized, type_name: str) -> LazyQuantized:
    scheme, shape = ggml.scheme(type_name), entry.shape
    if entry.scheme.format != "ternary" or entry.scheme.block != (-1, -1):
        raise CheckpointError(f"{entry.scheme.name} does not go into {type_name} unchanged; ternary weights with one scale do.")

    def load() -> QuantizedTensor:
        qt = entry.load()
        scale = qt.parts["scale"].float()
        if not torch.equal(scale.half().float(), scale):
            raise CheckpointError(f"a scale is {float(scale)}, which {type_name} cannot hold: it has float16. Train with --gguf, which keeps to such scales.")
        count, kind = shape[1] // ggml.BLOCK_TYPES[type_name].block_size, ggml.BLOCK_TYPES[type_name]
        bare = QuantizedTensor(scheme, shape, qt.dtype, {"blocks": torch.zeros(shape[0], count * kind.block_bytes, dtype=torch.uint8)})
        scaled = affine.with_parameters(bare, {"d": scale.expand(shape[0], count)})
        return affine.with_codes(scaled, qt.parts["codes"].float() - 1)

    return LazyQuantized(scheme, shape, entry.dtype, load, numerics.nbytes(scheme, shape))
