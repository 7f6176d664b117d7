"""QLoRA: an adapter trained on a frozen base that stays packed in the memory of its numbers.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314. The base is a dense model, rounded here (NF4 with double quantization), or any quantized checkpoint as it
is; the adapter is peft's, file included. In OUT.train, until the end:

    base/       the base that was made of a dense model, in lowbit's own layout; where calibration or LoftQ made it, it stays as OUT-base
    start/      where the adapter starts (loftq, weighted)
    steps/      the Trainer's checkpoints
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import __version__
from ..checkpoints import Checkpoint, open_checkpoint
from ..checkpoints.safetensors import open_file, read_json, write_text
from ..errors import DataError, JobError, ModelError, RecipeError
from ..models import skeleton as sk
from ..models.experts import is_experts
from ..models.linears import find_linears, outside_matrices
from ..pipeline import recipes, resources
from ..pipeline.calibration import Windows
from ..pipeline.job import refuse_existing, save_tensors, temporary
from ..pipeline.load import load
from ..pipeline.locate import base_name, load_tokenizer, locate
from ..pipeline.output import dtype_name, publish, readable_errors, refuse_own_input
from ..pipeline.output import write as write_output
from ..pipeline.quantize import fingerprint, model_key, quantize
from ..progress import SILENT, Progress
from ..recipe import Recipe
from . import adapters, starts
from .chat import IGNORED, Document, Rows, pack, read_documents
from .job import NOTES, arguments, claim, finish, is_finished, refuse_float16, require_one_process, require_packages, run, steps_within, whole
from .starts import INITS, Start
from .trainer import MeasuringTrainer

DEFAULT_RECIPE = "nf4-dq"
HELD_OUT = 8  # windows' worth of the data that is measured and not trained on, at most a tenth of it
WEIGHED = 32  # windows that the weighted start sees


@dataclass(frozen=True)
class QloraOptions:
    """rank, alpha, dropout: of the adapter, whose product counts alpha / rank times; alpha None: the rank. init: one of starts.INITS.

    epochs over the data, or steps, or minutes. batch: windows in a step; micro: of them at once. lr: constant after a warm-up of a share of the steps. The defaults of rate, batch and gradient norm
    are the paper's; it takes rank 64 and alpha 16, and dropout 0.1 up to 13B, 0.05 above.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.05
    init: str = "default"
    seq_len: int = 512
    epochs: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    batch: int = 16
    micro: int = 1
    lr: float = 2e-4
    warmup: float = 0.03
    max_grad_norm: float = 0.3
    eval_every: int = 50
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0) or not 0 <= self.dropout < 1:
            raise RecipeError(f"rank is {self.rank}, alpha {self.alpha} and dropout {self.dropout}; expected a rank of at least 1, an alpha above 0 and a dropout from 0 to below 1.")
        if self.init not in INITS:
            raise RecipeError(f"init is {self.init!r}; expected one of {', '.join(INITS)}.")
        if self.batch < 1 or self.micro < 1 or self.batch % self.micro:
            raise RecipeError(f"batch is {self.batch} and micro {self.micro}; expected a multiple.")
        if self.steps is not None and self.minutes is not None:
            raise RecipeError(f"steps is {self.steps} and minutes {self.minutes}; expected one of them.")
        if self.seq_len < 8 or self.epochs <= 0 or not 0 <= self.warmup <= 1 or self.lr <= 0 or self.eval_every < 1:
            raise RecipeError(
                f"seq_len is {self.seq_len}, epochs {self.epochs}, warmup {self.warmup}, lr {self.lr} and eval_every {self.eval_every}; "
                "expected at least 8 tokens, more than 0 epochs, a share from 0 to 1, a rate above 0 and at least 1 step."
            )

    @property
    def scale(self) -> float:
        """alpha, settled."""
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class Adapter:
    """What qlora made. curve: (step, held-out loss per learned token), the start first; losses: (step, training loss). base: a folder that was written with it (loftq), else None."""

    path: Path
    base: Path | None
    curve: list[tuple[int, float]]
    losses: list[tuple[int, float]]
    seconds: float
    provenance: dict

    @property
    def perplexity(self) -> tuple[float, float]:
        """On held-out data, before and after; after: of the adapter as it was written."""
        return math.exp(self.provenance["held_out"]["before"]), math.exp(self.provenance["held_out"]["after"])


def qlora(
    model: str | Path,
    output: str | Path,
    *,
    data: str,
    recipe: str | Path | None = None,
    held_out: str | None = None,
    original: str | Path | None = None,
    options: QloraOptions = QloraOptions(),
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Adapter:
    """Train an adapter for a model and write it as peft does.

    model: a dense one, which recipe rounds (None: nf4-dq), or a quantized checkpoint, which stays as it is. data, held_out: text, JSONL with text or messages (learned: the answers);
    held_out None: a part of the data. original: the dense model of a quantized one, for the start "weighted". trainer: further transformers.TrainingArguments. resume: go on from
    the last checkpoint of OUT.train. Raises LowbitError before any work on bad input.
    """
    require_packages("accelerate", "peft", trainer=trainer)
    import accelerate
    import peft

    started, path, located = time.monotonic(), Path(output), locate(model, progress=progress)
    source = open_checkpoint(located)
    built = sk.build(source)
    place = resources.choose_device(device)
    compute = resources.choose_dtype(dtype, place)
    refuse_float16(compute)
    require_one_process()
    ready = _is_quantized(built)
    _refuse_contradictions(located, built, ready, recipe, original, options)
    draft = None if ready else recipes.parse(recipe or DEFAULT_RECIPE)
    own_base = path.with_name(path.name + "-base") if options.init == "loftq" or (draft is not None and _needs_data(draft.recipe)) else None
    folder = path.with_name(path.name + ".train")
    if resume and is_finished(folder, path):
        return _made(path, own_base, time.monotonic() - started)
    refuse_existing(path, resume=resume, overwrite=overwrite)
    refuse_own_input(path, located)
    if own_base is not None:
        refuse_existing(own_base, resume=False, overwrite=overwrite or (resume and folder.exists()))  # a training that was killed at its end may have written it
    if any(is_experts(module) for module in built.model.modules()):
        progress.note("The experts of this model lie in one tensor each, which gets no adapter: they stay as they are, decoded.")
    train, held = _data(source, data, held_out, options, progress)
    key = {
        **model_key(source, place, compute), "accelerate": accelerate.__version__, "peft": peft.__version__, "recipe": None if draft is None else draft.recipe.to_dict(),
        "original": str(original), "options": asdict(options), "trainer": trainer or {}, "data": [Windows(rows.ids, None, 0).digest for rows in (train, held)], "seed": seed,
    }  # fmt: skip
    claim(folder, key, resume=resume, overwrite=overwrite)
    with readable_errors(path):
        base, start = _base_and_start(built, located, draft, original, train, options, folder, compute, device, dtype, progress)
        peft_model = _attached(base, start, options, compute, place, device, seed)
        result = _train(peft_model, train, held, options, folder, compute, place, seed, trainer or {}, progress)
        if own_base is not None:
            target = "lowbit" if draft is None or _has_conv1d(built) else draft.recipe.target
            write_output(open_checkpoint(base), target, own_base, progress, overwrite=overwrite or resume, base=base_name(model, located))
        provenance = {
            "lowbit": __version__, "transformers": transformers.__version__, "torch": torch.__version__, "model": fingerprint(source), "base": fingerprint(open_checkpoint(own_base or base)),
            "base_kept": own_base and own_base.name,
            "recipe": None if draft is None else draft.recipe.to_dict(), "options": asdict(options), "seed": seed, "compute_dtype": str(compute).removeprefix("torch."),
            "data": {"windows": len(train), "learned_tokens": train.learned, "held_out_tokens": held.learned}, **result,
        }  # fmt: skip
        _save(peft_model, path, folder, provenance, compute, base=str(model) if own_base is None else str(own_base), overwrite=overwrite)
    finish(folder, path)
    return _made(path, own_base, time.monotonic() - started)


def _made(path: Path, base: Path | None, seconds: float) -> Adapter:
    """The adapter that was written."""
    provenance = read_json(path / NOTES)
    curve, losses = ([(int(step), float(value)) for step, value in pairs] for pairs in (provenance["held_out"]["curve"], provenance["losses"]))
    return Adapter(path, base, curve, losses, seconds, provenance)


def _needs_data(recipe: Recipe) -> bool:
    """Whether a base of this recipe depends on calibration, so that only its own files say what the adapter was trained on."""
    return bool(recipe.transforms) or {recipe.algorithm, *(rule.algorithm or "rtn" for rule in recipe.rules)} - {"rtn", "hqq"} != set()


def _is_quantized(built: sk.Skeleton) -> bool:
    """Whether matrices of the blocks are quantized in the checkpoint."""
    return any(linear.name in built.checkpoint.quantized for index in range(len(built.blocks)) for linear in find_linears(built, index))


def _has_conv1d(built: sk.Skeleton) -> bool:
    return any(linear.transposed for index in range(len(built.blocks)) for linear in find_linears(built, index))


def _refuse_contradictions(located: Path, built: sk.Skeleton, ready: bool, recipe: object, original: object, options: QloraOptions) -> None:
    """Raise before any work what cannot be."""
    if ready and recipe is not None:
        raise RecipeError(f"{located} is quantized, and is the base as it is. Leave out the recipe {str(recipe)!r}, or give the dense model.")
    if ready and options.init == "loftq":
        raise RecipeError(f"loftq rounds the dense model in its own way, and {located} is quantized. Give the dense model, or take --init weighted with --original.")
    if ready and options.init == "weighted" and original is None:
        raise RecipeError(f"weighted compares the base with its original, and {located} is quantized. Give the dense model with --original.")
    if original is not None and (options.init != "weighted" or not ready):
        raise RecipeError("original is the dense model of a quantized base, for --init weighted alone. Leave it out.")
    limit = getattr(built.text_config, "max_position_embeddings", None)
    if limit is not None and options.seq_len > limit:
        raise ModelError(f"seq_len is {options.seq_len}, and this model takes at most {limit} tokens.")


def _data(source: Checkpoint, data: str, held_out: str | None, options: QloraOptions, progress: Progress) -> tuple[Rows, Rows]:
    """Windows to train on and windows to measure."""
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        tokenizer = load_tokenizer(source, Path(scratch))
        documents, notes = read_documents(data, tokenizer, length=options.seq_len)
        if held_out is not None:
            held, more = read_documents(held_out, tokenizer, length=options.seq_len)
            notes += more
        else:
            documents, held = _parted(documents, options.seq_len, data)
        filler = next((number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id) if number is not None), 0)
    for note in notes:
        progress.note(note)
    return pack(documents, options.seq_len, filler=filler), pack(held, options.seq_len, filler=filler)


def _parted(documents: list[Document], length: int, data: str) -> tuple[list[Document], list[Document]]:
    """The last documents apart: HELD_OUT windows' worth of tokens, at most a tenth of all."""
    sizes = [len(document.ids) for document in documents]
    wanted, count, tokens = min(HELD_OUT * length, sum(sizes) / 10), 0, 0
    while tokens < wanted and count < len(documents) - 1:
        count += 1
        tokens += sizes[-count]
    if not count:
        raise DataError(f"{data} holds a single document of {sum(sizes)} tokens, of which none can be held out. Give more data, a smaller --seq-len, or --held-out FILE.")
    return documents[:-count], documents[-count:]


def _base_and_start(
    built: sk.Skeleton, located: Path, draft: recipes.Draft | None, original: str | Path | None, train: Rows, options: QloraOptions, folder: Path, compute: torch.dtype,
    device: str | None, dtype: str | None, progress: Progress,
) -> tuple[Path, Start | None]:  # fmt: skip
    """The folder or file of the base, made if it has to be, and the start of its adapter (None: peft's); both are found again when a training goes on."""
    base = located if draft is None else folder / "base"
    stored = folder / "start.safetensors"
    if not base.exists() or (options.init != "default" and not stored.exists()):
        start: Start = {}
        if options.init == "loftq":
            assert draft is not None
            recipe, plans = _plans(built, draft)
            made, start = starts.loftq_base(built, recipe, plans, options.rank, progress)
            write_output(made, "lowbit", base, progress, overwrite=True, base=base_name(located, located))
        elif not base.exists():
            assert draft is not None
            quantize(located, draft.recipe, base, target_name="lowbit", device=device, dtype=dtype, resume=base.with_name("base.work").exists(), progress=progress)
        if options.init == "weighted":
            whole = open_checkpoint(located if original is None else locate(original, progress=progress))
            ids = train.ids[torch.arange(min(WEIGHED, len(train))) * len(train) // min(WEIGHED, len(train))]
            start = starts.weighted_start(sk.build(open_checkpoint(base)), whole, Windows(ids, None, ids.numel()), options.rank, compute, resources.choose_device(device), progress)
        if start:
            save_tensors({f"{name}|{part}": value.contiguous() for name, pair in start.items() for part, value in zip("AB", pair, strict=True)}, stored)
    return base, _read_start(stored) if stored.exists() else None


def _plans(built: sk.Skeleton, draft: recipes.Draft) -> tuple[Any, dict[str, recipes.LayerPlan]]:
    """The recipe, settled, and what it does to each matrix; RecipeError where that needs data, which LoftQ's rounds do not have."""
    shapes = {linear.name: linear.shape for index in range(len(built.blocks)) for linear in find_linears(built, index)}
    recipe, _ = recipes.settle(replace(draft, recipe=replace(draft.recipe, target="lowbit")), shapes, dtype_name(built.checkpoint, next(iter(shapes))))
    plans = recipes.resolve(recipe, shapes, outside_matrices(built), built.checkpoint.config)
    for name, plan in plans.items():
        if plan.algorithm not in ("rtn", "hqq") or recipe.transforms:
            raise RecipeError(f"{name}: loftq rounds anew in each of its steps, without data; {recipe.name} is more than plain rounding. Take nf4-dq, or int4-asym-g64-hqq, or --init weighted.")
    return recipe, {name: plan for name, plan in plans.items() if name in shapes}


def _read_start(file: Path) -> Start:
    tensors = open_file(file)
    return {name.removesuffix("|A"): (tensors[name].load(), tensors[f"{name.removesuffix('A')}B"].load()) for name in tensors if name.endswith("|A")}


def _attached(base: Path, start: Start | None, options: QloraOptions, compute: torch.dtype, place: torch.device, device: str | None, seed: int) -> Any:
    """The base with its adapter; embeddings, head and norms in the dtype of the computation, linear layers packed."""
    transposed = any(isinstance(module, Conv1D) for module in sk.build(open_checkpoint(base)).model.modules())
    model = load(base, dtype=str(compute).removeprefix("torch."), device=device or str(place))
    model.config.use_cache = False
    return adapters.attach(model, rank=options.rank, alpha=options.scale, dropout=options.dropout, seed=seed, transposed=transposed, start=start)


class AdapterTrainer(MeasuringTrainer):
    """Measured is the held-out loss per learned token (key eval_loss)."""

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        found: Any = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        self.refuse_not_finite(model, inputs["input_ids"], found[0] if return_outputs else found)
        return found

    def measure(self) -> tuple[str, float]:
        """Mean of -log p over the learned tokens of the held-out windows, in nats."""
        model: Any = self.model
        rows: Any = self.eval_dataset
        total, count = 0.0, 0
        for index in range(len(rows)):
            inputs = {name: value.unsqueeze(0).to(self.args.device) for name, value in rows[index].items()}
            labels = inputs.pop("labels")[:, 1:].flatten()
            logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits[labels != IGNORED].float(), labels[labels != IGNORED], reduction="sum"))
            count += int((labels != IGNORED).sum())
        return "loss", total / max(1, count)


def _train(model: Any, train: Rows, held: Rows, options: QloraOptions, folder: Path, compute: torch.dtype, place: torch.device, seed: int, more: dict, progress: Progress) -> dict:
    """Train the adapter in place; the held-out loss before and after, its curve, and the training losses."""
    model.train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def one() -> None:
        for start in range(0, options.batch, options.micro):
            rows = [train[number % len(train)] for number in range(start, start + options.micro)]
            inputs = {name: torch.stack([row[name] for row in rows]).to(place) for name in rows[0]}
            with torch.autocast(place.type, compute, enabled=compute != torch.float32):
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
        model.zero_grad(set_to_none=True)

    steps = options.steps or max(1, math.ceil(options.epochs * len(train) / options.batch))
    if options.steps is None and options.minutes is not None:
        steps = steps_within(options.minutes, one, folder / "steps.json")
    given = arguments(
        folder / "steps", steps=steps, batch=options.batch, micro=options.micro, eval_every=options.eval_every, metric="loss", seed=seed, compute=compute, place=place, more=more,
        learning_rate=options.lr, lr_scheduler_type="constant_with_warmup", warmup_steps=int(options.warmup * steps), max_grad_norm=options.max_grad_norm, logging_steps=1, label_names=["labels"],
    )  # fmt: skip
    trainer = AdapterTrainer(model=model, args=given, train_dataset=train, eval_dataset=held)
    before_file = folder / "before.json"
    if not before_file.exists():
        write_text(before_file, json.dumps(trainer.measured()[1]))
    before = json.loads(before_file.read_text())
    run(trainer, folder / "steps", progress)
    adapters.round_(model, compute)
    history = trainer.state.log_history
    curve = [(0, before), *((int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry)]
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    return {"held_out": {"before": before, "after": trainer.measured()[1], "curve": curve}, "losses": losses, "steps": trainer.state.global_step}


def _save(model: Any, path: Path, folder: Path, provenance: dict, compute: torch.dtype, *, base: str, overwrite: bool) -> None:
    """Write the adapter as peft does, in the dtype of the computation, with lowbit.json beside it; through a sibling. base: what peft is to take for the base's name."""
    draft = temporary(path)
    shutil.rmtree(draft, ignore_errors=True)
    state = {name: value.to(compute) for name, value in model.state_dict().items() if "lora_" in name}
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(draft), state_dict=state, save_embedding_layers=False)
    write_text(draft / NOTES, json.dumps(provenance, indent=1) + "\n")
    if path.exists() and not overwrite:  # it came while this trained
        raise JobError(f"{path} exists already. Choose another -o, or --overwrite.")
    whole(folder)
    publish(draft, path, overwrite=overwrite)
