"""lowbit.training.qat from a model to a file: what it begins with, what falls, what is written, what a kill leaves, what is refused."""

import signal
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import numerics
from lowbit.checkpoints import Checkpoint, open_checkpoint
from lowbit.errors import DataError, JobError, LowbitError, ModelError, RecipeError
from lowbit.evaluation.summary import summarize
from lowbit.pipeline.calibration import Windows
from lowbit.pipeline.evaluate import score_all
from lowbit.progress import SILENT, Progress
from lowbit.training import QatOptions
from lowbit.training.blockwise import BlockOptions
from lowbit.training.modules import FakeQuantEmbedding, FakeQuantLinear
from lowbit.training.qat import qat

pytest.importorskip("accelerate")
qat_module = import_module("lowbit.training.qat")  # the package has the function by that name
SMALL = QatOptions(start_samples=32, seq_len=64, steps=12, eval_every=4, lr=1e-4, lr_scales=1e-4, blocks=BlockOptions(epochs=8, lr=1e-4, lr_scales=1e-4))


def options(**changes) -> QatOptions:
    return replace(SMALL, **changes)


def run(folder: Path, out: Path, text: Path, recipe: str = "int2-asym-g32", **more):
    chosen = more.pop("options", SMALL)
    return qat(folder, recipe, out, data=str(text), options=chosen, dtype=more.pop("dtype", "float32"), **more)


def plain_start(folder: Path, out: Path, text: Path) -> Path:
    """What quantize makes of the windows that the start of a training sees."""
    windows = qat_module.start_windows(qat_module.data_windows(folder, str(text), None, SMALL, 0, SILENT), SMALL)
    lowbit.quantize(folder, "int2-asym-g32", out, windows=windows, dtype="float32", seed=0)
    return out


def exact(checkpoint: Checkpoint) -> Checkpoint:
    """Its matrices as their codes decode, in float32; a GGUF's are else rounded to the float16 that they stand for."""
    return replace(checkpoint, quantized={name: replace(entry, dtype=torch.float32) for name, entry in checkpoint.quantized.items()})


def held_out_kl(original: Path, paths: list[Path], text: Path) -> list[float]:
    """KL to the original on the held-out windows, by the machinery of lowbit.compare."""
    ids = qat_module.data_windows(original, str(text), None, SMALL, 0, SILENT).ids[-qat_module.HELD_OUT :]
    models = [exact(open_checkpoint(path)) for path in (original, *paths)]
    found = score_all(models, [torch.float32] * len(models), Windows(ids, None, ids.numel()), torch.device("cpu"), SILENT, kv=[None] * len(models))
    return [summarize(scores, "llama.cpp").kl_mean.value for scores in found[1:]]


def decoded(path: Path) -> dict[str, torch.Tensor]:
    return {name: numerics.dequantize(tensor.load()) for name, tensor in open_checkpoint(path).quantized.items()}


def test_text_to_measure_on(model_folder, text_file, tmp_path):
    """It replaces the end of the data, all of which is then trained on; too little of it is refused."""
    other, folder = tmp_path / "other.txt", model_folder("llama")
    other.write_text("seven wizards quietly mix a jug of rum and lime " * 200)
    alone, with_other = (qat_module.data_windows(folder, str(text_file), held, SMALL, 0, SILENT).ids for held in (None, str(other)))
    assert torch.equal(with_other[: -qat_module.HELD_OUT], alone)
    measured = qat_module.data_windows(folder, str(other), None, SMALL, 0, SILENT).ids
    assert all(bool((measured == row).all(1).any()) for row in with_other[-qat_module.HELD_OUT :])
    other.write_text("seven wizards")
    with pytest.raises(DataError, match="which is measured on, holds 0 windows of 64 tokens; training needs at least 8"):
        qat_module.data_windows(folder, str(text_file), str(other), SMALL, 0, SILENT)
    with pytest.raises(DataError, match="the data holds 0 windows of 64 tokens"):
        qat_module.data_windows(folder, str(other), str(text_file), SMALL, 0, SILENT)


class Watch:
    """The trained model, as it is before the first step and as it is written."""

    def __init__(self, monkeypatch) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        written, loaded = qat_module.as_checkpoint, qat_module.masters

        def prepared(*args):
            found = loaded(*args)
            frame = sys._getframe(1)
            while "student" not in frame.f_locals:  # another watch in between
                frame = frame.f_back
            self.before = {name: parameter.detach().clone() for name, parameter in frame.f_locals["student"].named_parameters()}
            return found

        def as_checkpoint(model, *args):
            self.after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            layers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear | FakeQuantEmbedding)}
            self.values = {f"{name}.weight": module.view(module.weight).detach() for name, module in layers.items()}
            return written(model, *args)

        monkeypatch.setattr(qat_module, "masters", prepared)
        monkeypatch.setattr(qat_module, "as_checkpoint", as_checkpoint)

    def moved(self) -> set[str]:
        return {name for name in self.before if not torch.equal(self.before[name], self.after[name])}


class Notes(Progress):
    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, text: str) -> None:
        self.found.append(text)


@pytest.fixture(scope="module")
def folder(model_folder):
    return model_folder("qwen2")


@pytest.fixture(scope="module")
def block_phase(folder, text_file, tmp_path_factory):
    """The result of the block phase alone: what the end phase begins with."""
    out = tmp_path_factory.mktemp("blocks") / "out"
    return out, run(folder, out, text_file, options=options(phases=("blocks",)))


def test_from_a_model_to_a_file(folder, block_phase, text_file, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    result = run(folder, tmp_path / "out", text_file)
    steps, kls = zip(*result.curve, strict=True)
    assert steps == (0, 4, 8, 12)
    begun, ended = held_out_kl(folder, [block_phase[0], tmp_path / "out"], text_file)
    assert kls[0] == pytest.approx(begun, rel=1e-4)
    assert min(kls) == pytest.approx(ended, rel=1e-4) and min(kls) < 0.97 * kls[0]
    read = decoded(tmp_path / "out")
    assert read.keys() == watch.values.keys()
    assert all(torch.equal(read[name], watch.values[name]) for name in read)
    assert {name for name in watch.before if ".view." in name or name.endswith(("proj.weight", "norm.weight"))} <= watch.moved()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    said = open_checkpoint(tmp_path / "out").provenance
    assert said["training"]["curve"] == [list(pair) for pair in result.curve] and said["refinement"]["method"] == "blockwise training" and said["recipe"]["algorithm"] == "gptq"
    assert lowbit.load(tmp_path / "out", dtype="float32")(torch.arange(8).unsqueeze(0)).logits.isfinite().all()


def test_the_block_phase_alone(folder, block_phase, text_file, tmp_path):
    out, result = block_phase
    assert result.curve == []
    plain, trained = held_out_kl(folder, [plain_start(folder, tmp_path / "start", text_file), out], text_file)
    assert trained < plain
    layers = open_checkpoint(out).provenance["layers"]
    assert all(entry["block_mse"] < entry["start_block_mse"] for entry in layers.values())


def test_the_end_phase_alone_begins_with_what_quantize_makes(folder, text_file, tmp_path):
    result = run(folder, tmp_path / "out", text_file, options=options(phases=("end",), steps=4))
    start = plain_start(folder, tmp_path / "start", text_file)
    assert result.curve[0][1] == pytest.approx(held_out_kl(folder, [start], text_file)[0], rel=1e-4)
    assert "refinement" not in result.provenance


def test_scales_and_norms_alone(folder, text_file, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    result = run(folder, tmp_path / "out", text_file, options=options(train="scales", phases=("end",), lr=3e-4, lr_scales=1e-3))
    moved = watch.moved()
    assert moved == {name for name in watch.before if ".view." in name or "norm" in name or name.endswith("bias")}
    assert min(kl for _, kl in result.curve) < result.curve[0][1]


def test_a_gguf_file_with_a_tied_embedding(model_folder, text_file, tmp_path, monkeypatch):
    watch, original, out = Watch(monkeypatch), model_folder("llama-tied"), tmp_path / "out.gguf"
    result = run(original, out, text_file, "q4_0-gptq", options=options(steps=12, lr=1e-5, lr_scales=1e-5))
    assert min(kl for _, kl in result.curve) < result.curve[0][1]
    read = decoded(out)
    assert len(read) == 22 and all(torch.equal(value, watch.values[name]) for name, value in read.items())
    assert "model.embed_tokens.weight" in read and "model.embed_tokens.weight" in watch.moved()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"loss": 0.02}, {"scales": "minmax"}, {"scales": "fixed"}, {"gradient_checkpointing": True}, {"batch": 4, "micro": 2}, {"minutes": 0.001, "steps": None, "eval_every": 100},
], ids=lambda changes: "-".join(changes))  # fmt: skip
def test_options(changes, folder, text_file, tmp_path):
    result = run(folder, tmp_path / "out", text_file, options=options(**{"phases": ("end",), "steps": 8, **changes}))
    assert result.curve[-1][0] == (8 if "minutes" not in changes else result.curve[-1][0]) and result.curve[-1][0] < 400
    if "scales" in changes:
        return
    assert min(kl for _, kl in result.curve) < result.curve[0][1] or "minutes" in changes
    if "gradient_checkpointing" in changes or "micro" in changes:
        other = run(folder, tmp_path / "other", text_file, options=options(phases=("end",), steps=8))
        assert [kl for _, kl in result.curve] == pytest.approx([kl for _, kl in other.curve], rel=2e-2)


def test_bfloat16_and_other_formats(folder, text_file, tmp_path, monkeypatch):
    for number, (recipe, target) in enumerate((("nf4-g64-dq-rtn", "bitsandbytes"), ("int4-sym-channel-rtn-a8", None))):
        watch = Watch(monkeypatch)
        out = tmp_path / f"out{number}"
        run(folder, out, text_file, recipe, options=options(steps=12, lr=2e-5, lr_scales=2e-5), dtype="bfloat16", target_name=target)
        read = decoded(out)
        assert watch.values and all(torch.equal(value, watch.values[name]) for name, value in read.items())


@pytest.mark.parametrize("target", ["lowbit", "gguf"])
def test_norms_of_a_bfloat16_model_are_trained_as_the_file_holds_them(save_model, text_file, tmp_path, monkeypatch, target):
    """Vectors are bfloat16 in a folder and float32 in a GGUF file; what is measured in training is what the file then gives."""
    folder = save_model("qwen2", tmp_path / "model", dtype=torch.bfloat16)
    recipe, out = ("int2-asym-g32", tmp_path / "out") if target == "lowbit" else ("q4_0", tmp_path / "out.gguf")
    watch = Watch(monkeypatch)
    result = run(folder, out, text_file, recipe, target_name=target, options=options(train="scales", phases=("end",), lr=3e-3, lr_scales=1e-3))
    made = open_checkpoint(out)
    assert min(kl for _, kl in result.curve) == pytest.approx(held_out_kl(folder, [out], text_file)[0], rel=1e-6)
    assert made.provenance["recipe"]["algorithm"] == "gptq"
    norms = [name for name in watch.after if name.endswith("norm.weight")]
    stored = {name: watch.after[name].to(torch.bfloat16 if target == "lowbit" else torch.float32).float() for name in norms}
    read = lowbit.load(out, dtype="float32").state_dict()
    assert norms and all(torch.equal(read[name], stored[name]) for name in norms)
    assert any(not torch.equal(watch.before[name].bfloat16(), watch.after[name].bfloat16()) for name in norms)


def test_a_block_whose_error_rises_stays_as_it_began(folder, text_file, tmp_path):
    begun = decoded(plain_start(folder, tmp_path / "start", text_file))
    result = run(folder, tmp_path / "out", text_file, options=options(phases=("blocks",), blocks=BlockOptions(epochs=2, lr=0.5, lr_scales=0.5)))
    layers = result.provenance["layers"]
    left = [name for name, entry in layers.items() if "kept" in entry]
    assert left and all(layers[name]["block_mse"] > layers[name]["start_block_mse"] for name in left)
    first = [name for name in left if ".layers.0." in name]  # later blocks see other inputs than they did without training
    assert all(torch.equal(decoded(tmp_path / "out")[name], begun[name]) for name in first)


@pytest.mark.slow
def test_data_from_the_original_itself(folder, tmp_path):
    result = qat(folder, "int2-asym-g32", tmp_path / "out", data="self", options=options(steps=4, phases=("end",)), dtype="float32")
    assert result.curve[-1][0] == 4


def test_where_no_step_is_better_the_start_is_written(folder, block_phase, text_file, tmp_path):
    notes = Notes()
    result = run(folder, tmp_path / "out", text_file, options=options(steps=2, eval_every=1, lr=0.5, lr_scales=0.5, warmup=0.0), progress=notes)
    assert all(kl > result.curve[0][1] for _, kl in result.curve[1:])
    assert any("No step brought the held-out KL below" in note for note in notes.found)
    start, read = decoded(block_phase[0]), decoded(tmp_path / "out")
    assert all(torch.equal(read[name], start[name]) for name in start)


# Runs in a child process.
PRELUDE = """
import os, signal
from dataclasses import replace
import transformers
from importlib import import_module
module = import_module("lowbit.training.qat")
from lowbit.pipeline.job import Job
from lowbit.training import QatOptions
from lowbit.training.blockwise import BlockOptions, Blockwise
from lowbit.training.trainer import DistillationTrainer

def die_at(owner, name, number, after=False):
    original, count = getattr(owner, name), [0]
    def patched(*args, **kwargs):
        count[0] += 1
        if count[0] == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count[0] == number and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, patched)
"""
RUN = """
blocks = BlockOptions(epochs=4, lr=3e-4, lr_scales=3e-4)
options = QatOptions(start_samples=8, seq_len=32, steps=6, eval_every=2, lr=3e-4, lr_scales=3e-4, blocks=blocks)
module.qat(model, "int2-asym-g32", out, data=text, options=options, dtype="float32", resume=resume)
"""
POINTS = {
    "training block 1": "die_at(Blockwise, '_error', 6)",
    "block 1 is trained": "die_at(Job, 'save', 2)",
    "the start is whole": "die_at(module, '_end_to_end', 1)",
    "before the first checkpoint": "die_at(DistillationTrainer, 'compute_loss', 2)",
    "step 5": "die_at(DistillationTrainer, 'compute_loss', 5)",
    "in the second checkpoint": "die_at(DistillationTrainer, '_save_rng_state', 2)",
    "trained": "die_at(module, 'write_output', 1)",
    "the output has its name": "die_at(module, 'write_output', 1, after=True)",
}


@pytest.fixture(scope="module")
def undisturbed(fork_server, folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    answer = fork_server.run(PRELUDE + RUN, model=folder, text=text_file, out=out, resume=False)
    assert answer["status"] == 0, answer["output"]
    return out


@pytest.mark.parametrize("point", [pytest.param(point, marks=[] if point in ("training block 1", "step 5") else pytest.mark.slow) for point in POINTS])
def test_a_killed_training_goes_on_to_the_same_bytes(point, fork_server, folder, text_file, undisturbed, tmp_path, assert_same):
    out = tmp_path / "out"
    killed = fork_server.run(PRELUDE + POINTS[point] + RUN, model=folder, text=text_file, out=out, resume=False)
    assert killed["status"] == -signal.SIGKILL, killed["output"]
    assert (tmp_path / "out.train").exists()
    with pytest.raises(JobError, match="exists already|holds an unfinished training. Go on with --resume"):
        run(folder, out, text_file)
    resumed = fork_server.run(PRELUDE + RUN, model=folder, text=text_file, out=out, resume=True)
    assert resumed["status"] == 0, resumed["output"]
    assert_same(undisturbed, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_another_training_is_not_resumed(fork_server, folder, text_file, tmp_path):
    out = tmp_path / "out"
    fork_server.run(PRELUDE + POINTS["training block 1"] + RUN, model=folder, text=text_file, out=out, resume=False)
    with pytest.raises(JobError, match="another training: its .*recipe"):
        run(folder, out, text_file, "int3-asym-g32", resume=True)
    with pytest.raises(JobError, match="another training: its options"):
        run(folder, out, text_file, resume=True, options=options(steps=5))
    run(folder, out, text_file, "int3-asym-g32", overwrite=True, options=options(phases=("blocks",)))
    assert open_checkpoint(out).quantized and not (tmp_path / "out.train").exists()


def test_numbers_that_are_not_finite_stop_with_the_layer(folder, text_file, tmp_path):
    with pytest.raises(ModelError, match=r"the loss is not finite at step \d+: .*model\.layers\.\d.* Lower the learning rates"):
        run(folder, tmp_path / "a", text_file, options=options(phases=("end",), lr=1e30, lr_scales=1e30, warmup=0.0))
    with pytest.raises(ModelError, match=r"the loss is not finite at step \d+: .*model\..* Lower the learning rates"):
        run(folder, tmp_path / "b", text_file, options=options(phases=("end",), lr=1e30, lr_scales=0.0, warmup=0.0))
    with pytest.raises(LowbitError, match=r"block 0|model\.layers\.0"):
        run(folder, tmp_path / "c", text_file, options=options(phases=("blocks",), blocks=BlockOptions(lr=1e30, lr_scales=1e30)))
    assert not any((tmp_path / name).exists() for name in "abc")


@pytest.mark.parametrize(("recipe", "more", "why"), [
    ("aqlm-2x8", {}, "its codes are vectors"), ("quip-2", {}, "its codes are vectors"), ("int4-asym-g32-gptq-out2", {"target_name": "lowbit"}, "outlier channels"),
    ("nf4-g64-rtn", {"target_name": "gptq"}, "gptq"), ("int4-asym-g32", {"target_name": "gguf"}, "Train a type that GGUF has"), ("int4-asym-g32-awq", {}, "rewrites the model"),
    ("int4-asym-g32", {"target_name": "safetensors"}, "holds dense weights"), ("int4-frobnicate", {}, "is not known"), ("int4-asym-g32", {"options": options(seq_len=1024)}, "at most 128 tokens"),
    ("int4-asym-g32", {"data": "short"}, r"the data holds \d windows of 64 tokens"), ("int4-asym-g32", {"data": "missing"}, "is no file"), ("int4-asym-g32", {"model": "gpt2"}, "Conv1D"),
    ("int4-asym-g32", {"model": "mixtral"}, "experts in one tensor"), ("int4-asym-g32", {"trainer": {"report_to": ["tensorboard"]}, "hide": "tensorboard"}, r'pip install "lowbit\[train\]"'),
    ("int4-asym-g32", {"hide": "accelerate"}, r'pip install "lowbit\[train\]"'),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))  # fmt: skip
def test_refused_before_anything_is_written(recipe, more, why, model_folder, text_file, tmp_path, monkeypatch):
    more = dict(more)
    short = tmp_path / "short"
    short.write_text(text_file.read_text()[:250])
    text = {"short": short, "missing": tmp_path / "missing"}.get(more.pop("data", ""), text_file)
    if hidden := more.pop("hide", None):
        monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(LowbitError, match=why):
        run(model_folder(more.pop("model", "qwen2")), tmp_path / "out", text, recipe, **more)
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_an_existing_output_stays(folder, text_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "older.txt").write_text("older")
    with pytest.raises(JobError, match="exists already"):
        run(folder, out, text_file)
    with pytest.raises(JobError):
        run(folder, folder, text_file, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["older.txt"]
    run(folder, out, text_file, overwrite=True, options=options(phases=("blocks",), blocks=BlockOptions(epochs=1)))
    assert not (out / "older.txt").exists() and open_checkpoint(out).quantized


@pytest.mark.parametrize(("given", "why"), [
    ({"phases": ()}, "phases"), ({"phases": ("middle",)}, "phases"), ({"train": "some"}, "train"), ({"loss": 1.5}, "loss"), ({"batch": 4, "micro": 3}, "micro"), ({"scales": "frozen"}, "scales"),
    ({"steps": 0}, "steps is 0"), ({"minutes": 0.0}, "minutes is 0"), ({"eval_every": 0}, "eval_every is 0"), ({"seq_len": 4}, "seq_len is 4"), ({"lr": -1.0}, "lr is -1"),
], ids=str)  # fmt: skip
def test_options_that_cannot_be(given, why):
    with pytest.raises(RecipeError, match=why):
        QatOptions(**given)
    with pytest.raises(RecipeError, match="epochs is 0"):
        BlockOptions(epochs=0)


def test_too_little_text_is_an_error_about_data(folder, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 20)
    with pytest.raises(DataError, match="training needs at least 16. Give more text, or a smaller --seq-len"):
        run(folder, tmp_path / "out", tmp_path / "text.txt")
