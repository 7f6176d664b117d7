"""Quantization-aware training of a whole model: a post-training result, block by block, then end to end, distilled from the original.

    OUT.train/start              the post-training result that training begins with, after the block phase, in the recipe's target
    OUT.train/masters/           the trained masters of the block phase
    OUT.train/steps/             the Trainer's checkpoints; its logs (--log-to) become OUT.runs
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .. import __version__
from ..checkpoints import open_checkpoint, target
from ..errors import DataError, RecipeError
from ..models import skeleton as sk
from ..pipeline import recipes, resources
from ..pipeline.calibration import Windows, default_text, packed, read_texts
from ..pipeline.job import refuse_existing, work_folder
from ..pipeline.locate import base_name, load_tokenizer, locate
from ..pipeline.output import readable_errors, refuse_own_input
from ..pipeline.output import write as write_output
from ..pipeline.quantize import model_key, quantize
from ..pipeline.selfgen import load_model, self_texts
from ..pipeline.setup import set_up
from ..progress import SILENT, Progress
from ..recipe import Calibration, Recipe
from .blockwise import BlockOptions, Blockwise, masters
from .job import arguments, claim, finish, is_finished, refuse_float16, require_one_process, require_packages, run, steps_within, whole
from .losses import divergence
from .modules import as_stored
from .prepare import matrices, prepare, refuse_untrainable
from .save import as_checkpoint, stored_dtypes
from .views import MODES

PHASES = ("blocks", "end")
HELD_OUT = 8  # windows of the data that are measured and not trained on


@dataclass(frozen=True)
class QatOptions:
    """phases: "blocks" (block by block), "end" (end to end) or both. start_samples: calibration windows of the start and of the block phase.

    steps or minutes: how long end to end (None: one pass over the data; minutes: as many steps as two timed ones let expect). batch: windows in a step; micro: of them at once.
    loss: share of cross-entropy (0: KL to the original alone).
    train: "all" weights, or "scales" (with norms). lr of weights, lr_scales of scales (relative to where they begin) and zero-points (in codes); warmup: share of the steps.
    scales: see views.View.
    """

    phases: tuple[str, ...] = PHASES
    start_samples: int = 64
    seq_len: int = 512
    blocks: BlockOptions = BlockOptions()
    steps: int | None = None
    minutes: float | None = None
    batch: int = 4
    micro: int = 4
    loss: float = 0.0
    train: str = "all"
    lr: float = 2e-5
    lr_scales: float = 1e-3
    warmup: float = 0.05
    scales: str = "learned"
    eval_every: int = 50
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.phases or set(self.phases) - set(PHASES):
            raise RecipeError(f"phases is {self.phases!r}; expected one or both of {', '.join(PHASES)}.")
        if self.train not in ("all", "scales"):
            raise RecipeError(f"train is {self.train!r}; expected all (weights, scales, norms) or scales (scales and norms).")
        if not 0 <= self.loss <= 1:
            raise RecipeError(f"loss is {self.loss}; expected the share of cross-entropy, from 0 (KL to the original alone) to 1.")
        if self.scales not in MODES:
            raise RecipeError(f"scales is {self.scales!r}; expected one of {', '.join(MODES)}.")
        counts = {"steps": self.steps, "minutes": self.minutes, "eval_every": self.eval_every, "start_samples": self.start_samples, "seq_len": self.seq_len}
        if bad := [f"{name} is {value}" for name, value in counts.items() if value is not None and value <= (7 if name == "seq_len" else 0)]:
            raise RecipeError(f"{', '.join(bad)}; expected positive numbers, and windows of at least 8 tokens.")
        if min(self.lr, self.lr_scales, self.warmup) < 0:
            raise RecipeError(f"lr is {self.lr}, lr_scales {self.lr_scales} and warmup {self.warmup}; expected at least 0.")
        if self.batch < 1 or self.micro < 1 or self.batch % self.micro:
            raise RecipeError(f"batch is {self.batch} and micro {self.micro}; expected a multiple.")
        if self.steps is not None and self.minutes is not None:
            raise RecipeError(f"steps is {self.steps} and minutes {self.minutes}; expected one of them.")


@dataclass(frozen=True)
class Trained:
    """What qat made. curve: (step, held-out KL), the start first. seconds: in all, of start and block phase together, and end to end. provenance as in quantize."""

    path: Path
    curve: list[tuple[int, float]]
    seconds: float
    phase_seconds: dict[str, float]
    provenance: dict = field(default_factory=dict)


def qat(
    model: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    data: str = "default",
    held_out: str | None = None,
    target_name: str | None = None,
    options: QatOptions = QatOptions(),
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Trained:
    """Train a model in the numbers that its file will hold, and write that file.

    It begins with the recipe's post-training result (GPTQ unless the recipe says otherwise). data: text or JSONL with chat, or "self" (generated by the original). held_out: text that is
    measured on, None: the end of the data. trainer: further transformers.TrainingArguments. resume: go on from the last checkpoint of OUT.train. Raises LowbitError before any work on bad input.
    """
    require_packages("accelerate", trainer=trainer)
    import accelerate

    started, path, located = time.monotonic(), Path(output), locate(model, progress=progress)
    recipe = _with_gptq(recipe)
    draft = recipes.parse(recipe, target_name=target_name or ("gguf" if path.suffix == ".gguf" else None))
    folder = path.with_name(path.name + ".train")
    if resume and is_finished(folder, path):
        provenance = open_checkpoint(path).provenance
        return Trained(path, [(step, kl) for step, kl in provenance["training"]["curve"]], time.monotonic() - started, {}, provenance)
    refuse_existing(path, resume=resume, overwrite=overwrite)
    refuse_own_input(path, located)
    setup = set_up(located, draft, data, options.start_samples, options.seq_len, seed, device, dtype, SILENT)
    matrices(setup.skeleton.model)  # which refuses what is not trained
    refuse_untrainable(setup.recipe, setup.plans)
    place, compute = setup.device, setup.dtype
    refuse_float16(compute)
    require_one_process()
    if "end" in options.phases:
        held = (16 if options.train == "all" else 8) + compute.itemsize  # masters (and gradients, two moments of AdamW), the original
        resources.require_memory(int(setup.skeleton.parameter_count() * held * 1.1), purpose="Training end to end (masters, gradients, moments, the original)")
    windows = data_windows(located, data, held_out, options, seed, progress)
    key = {
        **model_key(open_checkpoint(located), place, compute), "accelerate": accelerate.__version__, "recipe": draft.recipe.to_dict(), "options": asdict(options),
        "trainer": trainer or {}, "data": windows.digest, "seed": seed,
    }  # fmt: skip
    claim(folder, key, resume=resume, overwrite=overwrite)
    start = folder / f"start{target(draft.recipe.target).suffix}"
    with readable_errors(path):
        if not start.exists():
            refinement = Blockwise(replace(options.blocks, seed=seed, scales=options.scales), folder / "masters") if "blocks" in options.phases else None
            quantize(
                located, recipe, start, target_name=draft.recipe.target, calibration=data, n_samples=options.start_samples, seq_len=options.seq_len, device=device, dtype=dtype,
                seed=seed, resume=work_folder(start).exists(), windows=start_windows(windows, options), refinement=refinement, progress=progress,
            )  # fmt: skip
        begun = time.monotonic()
        made, curve = open_checkpoint(start), []
        provenance = made.provenance
        if "end" in options.phases:
            made, curve = _end_to_end(located, start, folder, windows, options, seed, place, compute, trainer or {}, progress)
        provenance = {**provenance, "training": {**asdict(options), "seed": seed, "metric": "kl", "curve": curve, "lowbit": __version__, "transformers": transformers.__version__}}
        write_output(replace(made, provenance=provenance), draft.recipe.target, path, progress, overwrite=overwrite, base=base_name(model, located), whole=lambda: whole(folder))
    finish(folder, path)
    ended = time.monotonic()
    return Trained(path, curve, ended - started, {"start": begun - started, "end": ended - begun}, provenance)


def _with_gptq(recipe: str | Path | Recipe) -> str | Path | Recipe:
    """Words that name a number format and no algorithm get GPTQ, whatever that format's default is."""
    if not isinstance(recipe, str) or recipe.endswith(".toml") or "rtn" in recipe.split("-") or recipes.parse(recipe).recipe.algorithm != "rtn":
        return recipe
    try:
        recipes.parse(f"{recipe}-gptq")
    except RecipeError:  # a format or a preset that GPTQ does not take
        return recipe
    return f"{recipe}-gptq"


def start_windows(windows: Windows, options: QatOptions) -> Windows:
    """Those that the start and the block phase see: spread evenly over the windows that are trained on; those that are measured are not among them."""
    train, count = windows.ids[:-HELD_OUT], options.start_samples
    chosen = train if len(train) <= count else train[torch.arange(count) * len(train) // count]
    return Windows(chosen, None, windows.found)


def data_windows(located: Path, data: str, held_out: str | None, options: QatOptions, seed: int, progress: Progress) -> Windows:
    """All windows of the training data; the last HELD_OUT of them are for measuring, and come from held_out where that is given."""
    checkpoint = open_checkpoint(located)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        tokenizer = load_tokenizer(checkpoint, Path(scratch))
        if data == "self":
            texts = self_texts(checkpoint, tokenizer, Calibration("self", options.start_samples * 4, options.seq_len), seed=seed, progress=progress)
        else:
            texts = [default_text("calibration")] if data == "default" else read_texts(data, tokenizer)
        windows = packed(texts, tokenizer, length=options.seq_len, count=None, spread=False)
        measured = None
        if held_out is not None:
            measured = packed([default_text("evaluation")] if held_out == "default" else read_texts(held_out, tokenizer), tokenizer, length=options.seq_len, count=HELD_OUT, spread=True)
    least = HELD_OUT if held_out is not None else 2 * HELD_OUT
    for found, enough, what in ((windows, least, "the data holds"), (measured, HELD_OUT, f"{held_out}, which is measured on, holds")):
        if found is not None and (count := len(found.ids) if found.ids.shape[1] == options.seq_len else 0) < enough:
            raise DataError(f"{what} {count} windows of {options.seq_len} tokens; training needs at least {enough}. Give more text, or a smaller --seq-len.")
    return windows if measured is None else Windows(torch.cat([windows.ids, measured.ids]), None, windows.found)


def _end_to_end(located: Path, begun: Path, folder: Path, windows: Windows, options: QatOptions, seed: int, place: torch.device, compute: torch.dtype, more: dict, progress: Progress):
    from .trainer import DistillationTrainer, Rows

    start, source = open_checkpoint(begun), open_checkpoint(located)
    skeleton = sk.build(source)
    student = load_model(sk.build(source), torch.float32, place)
    student.requires_grad_(True).train()
    recipe = recipe_of(start.provenance)
    prepare(student, recipe, scales=options.scales, start=start)
    with torch.no_grad():
        for name, lazy in masters(folder / "masters"):
            student.get_parameter(name).copy_(lazy.load())
    as_stored(student, stored_dtypes(skeleton, recipe.target))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(options.train == "all" or ".view." in name or parameter.ndim < 2)
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = load_model(skeleton, compute, place)
    train, held = windows.ids[:-HELD_OUT], windows.ids[-HELD_OUT:]
    steps = _steps(student, teacher, train, options, compute, folder)
    given = arguments(
        folder / "steps", steps=steps, batch=options.batch, micro=options.micro, eval_every=options.eval_every, metric="kl", seed=seed, compute=compute, place=place, more=more,
        learning_rate=options.lr, lr_scheduler_type="cosine", warmup_steps=int(options.warmup * steps),
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, args=given, train_dataset=Rows(train), eval_dataset=Rows(held), teacher=teacher, loss=options.loss, lr_scales=options.lr_scales, held_out=held,
    )  # fmt: skip
    _, first = trainer.measured()
    run(trainer, folder / "steps", progress)
    history = [(int(entry["step"]), float(entry["eval_kl"])) for entry in trainer.state.log_history if "eval_kl" in entry]
    curve = [(0, first), *[pair for pair in history if pair[0]]]
    if min(curve, key=lambda pair: pair[1])[0] == 0:
        progress.note(f"No step brought the held-out KL below the {first:.4g} that training began with: what is written is the start. Lower the learning rates, or give more text.")
        return start, curve
    return as_checkpoint(student, source, recipe.target, {}), curve


def _steps(student: nn.Module, teacher: nn.Module, train: torch.Tensor, options: QatOptions, compute: torch.dtype, folder: Path) -> int:
    """How many steps end to end: as many as asked for, one pass over the data, or what fits into the minutes."""
    if options.steps is not None or options.minutes is None:
        return options.steps or max(1, len(train) // options.batch)

    def one() -> None:
        for ids in train[: options.batch].to(next(student.parameters()).device).split(options.micro):
            with torch.autocast(ids.device.type, compute, enabled=compute != torch.float32):
                with torch.no_grad():
                    goal = teacher(input_ids=ids, use_cache=False).logits
                loss = divergence(student(input_ids=ids, use_cache=False).logits, goal)
            loss.backward()
        student.zero_grad(set_to_none=True)

    return steps_within(options.minutes, one, folder / "steps.json")


def recipe_of(provenance: dict) -> Recipe:
    """The recipe that a checkpoint of lowbit's says it was made by."""
    from ..recipe import Rule, from_dict
    from ..scheme import Scheme

    data = dict(provenance["recipe"])
    data["scheme"] = Scheme.from_dict(data["scheme"])
    data["rules"] = tuple(Rule(rule["match"], None if rule["scheme"] is None else Scheme.from_dict(rule["scheme"]), rule["algorithm"], rule["options"]) for rule in data["rules"])
    data["calibration"] = from_dict(Calibration, data["calibration"], where="calibration")
    return from_dict(Recipe, data, where="recipe")
