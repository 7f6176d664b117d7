"""What every training shares: the folder of its job, its last whole checkpoint, its progress."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from ..checkpoints.safetensors import read_json, write_text
from ..errors import JobError, RecipeError, missing_extra
from ..pipeline.job import FINISHED, temporary
from ..progress import Progress

NOTES = "lowbit.json"  # beside an adapter: what it was trained on and how
STEP_SHARE = 1.15  # of a step with optimizer, measurements and checkpoints, to one without


def require_packages(*packages: str, trainer: dict[str, Any] | None = None) -> None:
    """Raise LowbitError with the line that installs it where a package that training needs is missing; trainer: further arguments, whose report_to may need one."""
    for package in (*packages, *(["tensorboard"] if "tensorboard" in ((trainer or {}).get("report_to") or ()) else [])):
        if find_spec(package) is None:
            raise missing_extra(package, "train", purpose="logging to TensorBoard" if package == "tensorboard" else "training")


def refuse_float16(compute: torch.dtype) -> None:
    """Raise RecipeError for a dtype whose gradients would need scaled losses."""
    if compute == torch.float16:
        raise RecipeError("training computes in bfloat16 or float32; float16 would need scaled losses. Give another --dtype.")


def require_one_process() -> None:
    """Raise RecipeError under a launcher of several processes (torchrun, accelerate launch), which would each make the start and the output."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains in one process. For several, put lowbit.training.prepare into a loop of your own.")


def is_finished(folder: Path, output: Path) -> bool:
    """Whether an earlier run got as far as giving the output its name; folder is removed then."""
    done = (folder / FINISHED).exists() and output.exists() and not temporary(output).exists()
    if done:
        finish(folder, output)
    return done


def whole(folder: Path) -> None:
    """Note that the output is whole under its temporary name."""
    write_text(folder / FINISHED, "{}\n")


def claim(folder: Path, key: dict, *, resume: bool, overwrite: bool) -> None:
    """Take the folder of a training, or refuse: an unfinished one without resume, another one with it. key: what must be the same, as JSON has it."""
    key = json.loads(json.dumps(key, default=str))
    if folder.exists() and overwrite and not resume:
        shutil.rmtree(folder)
    if folder.exists():
        if not resume:
            raise JobError(f"{folder} holds an unfinished training. Go on with --resume, or begin anew with --overwrite.")
        stored = read_json(folder / "job.json")
        if different := [name for name in key if stored.get(name) != key[name]]:
            raise JobError(f"{folder} holds another training: its {', '.join(different)} differ from this command's. Repeat the first command with --resume, or begin anew with --overwrite.")
        (folder / FINISHED).unlink(missing_ok=True)
        return
    folder.mkdir(parents=True)
    write_text(folder / "job.json", json.dumps(key, indent=1) + "\n")


def finish(folder: Path, output: Path) -> None:
    """Delete the folder of a training that is done; curves for TensorBoard go to OUT.runs."""
    if (folder / "steps" / "runs").exists():
        shutil.copytree(folder / "steps" / "runs", output.with_name(output.name + ".runs"), dirs_exist_ok=True)
    for file in folder.iterdir():  # what says that the training is finished goes last
        if file.name != FINISHED:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.rmtree(folder)


def steps_within(minutes: float, step: Callable[[], None], file: Path) -> int:
    """How many steps the second of two (forward and backward), timed, lets expect; settled in file, so that a resumed training has as many."""
    if not file.exists():
        with torch.random.fork_rng():  # what is drawn here must not move what is drawn later
            step()
            started = time.monotonic()
            step()
        write_text(file, json.dumps({"steps": max(1, int(60 * minutes / (STEP_SHARE * (time.monotonic() - started))))}) + "\n")
    return int(read_json(file)["steps"])


def arguments(
    folder: Path, *, steps: int, batch: int, micro: int, eval_every: int, metric: str, seed: int, compute: torch.dtype, place: torch.device, more: dict[str, Any], **own: Any
) -> transformers.TrainingArguments:
    """The Trainer's arguments of a training in folder: measured and kept every eval_every steps, the best loaded at the end; own: of this kind of training; more: the user's."""
    common = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": micro, "gradient_accumulation_steps": batch // micro, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "bf16": compute == torch.bfloat16, "use_cpu": place.type == "cpu", "seed": seed, "data_seed": seed, "save_strategy": "steps", "save_steps": eval_every, "save_total_limit": 2,
        "eval_strategy": "steps", "eval_steps": eval_every, "load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": False, "logging_steps": 10, "report_to": [],
        "remove_unused_columns": False, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**common, **own, **more})


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of the Trainer in folder, and None where there is none; those that were being written when the process ended are removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the last file of a checkpoint
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return str(path)
    return None


class Report(transformers.TrainerCallback):
    """Progress for whoever draws it; and the last step is measured and kept, too."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._step: Any = None

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self._step = self.progress.step("Training", state.max_steps)
        self._advance = self._step.__enter__()
        self._advance(state.global_step)

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self._advance(1)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_train_end(self, args, state, control, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the step of the progress, also where training stopped with an error."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None


def run(trainer: transformers.Trainer, folder: Path, progress: Progress) -> None:
    """Train from the last whole checkpoint in folder, or from the start; nothing is printed."""
    report = Report(progress)
    trainer.add_callback(report)
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    finally:
        report.close()
