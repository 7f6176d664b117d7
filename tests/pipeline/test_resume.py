"""Work is never lost: a job killed anywhere goes on to the same bytes; a full disk is one paragraph; earlier results stay."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from lowbit.errors import JobError
from lowbit.pipeline.quantize import quantize

# Runs in a child process. die_at(owner, name, n): SIGKILL before (or after) the n-th call of owner.name.
PRELUDE = """
import os, signal
from pathlib import Path
import lowbit.checkpoints.gguf_container as gguf_container
import lowbit.pipeline.job as job_module
from lowbit.checkpoints.safetensors import ShardWriter
from lowbit.errors import LowbitError
from lowbit.pipeline.calibration import Windows
from lowbit.pipeline.hidden import HiddenStates
from lowbit.pipeline.job import Job
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.streaming import Streamer

Windows.batches.__defaults__ = (32,)

def before(owner, name, number, action, after=False):
    original, count = getattr(owner, name), [0]
    def patched(*args, **kwargs):
        count[0] += 1
        if count[0] == number and not after:
            action()
        result = original(*args, **kwargs)
        if count[0] == number and after:
            action()
        return result
    setattr(owner, name, patched)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(owner, name, number, after=False):
    before(owner, name, number, die, after)

def half_a_file(tensors, path):
    Path(path).write_bytes(b"half")
    die()
"""
RUN = """
quantize(model, recipe, out, calibration=text, n_samples=4, seq_len=32, dtype="float32", resume=resume, overwrite=overwrite)
"""
POINTS = {
    "the key is written": "die_at(Job, '__init__', 1, after=True)",
    "half of the embeddings": "die_at(HiddenStates, 'write', 2)",
    "collecting in block 0": "die_at(Streamer, 'run_block', 3)",
    "running block 0 quantized": "die_at(Streamer, 'run_block', 7)",
    "block 0 is done": "die_at(Job, 'save', 1, after=True)",
    "half of block 1 is in its file": "before(Job, 'save', 2, lambda: setattr(job_module, 'save_file', half_a_file))",
    "block 1 has no record yet": "die_at(job_module, 'write_text', 3)",
    "block 1 is done": "die_at(Job, 'save', 2, after=True)",
    "running block 2": "die_at(Streamer, 'run_block', 19)",
    "block 2 is done": "die_at(Job, 'save', 3, after=True)",
    "writing the output": "die_at(ShardWriter, 'add', 6); die_at(gguf_container, '_write_tensor', 6)",
    "the output is whole": "die_at(Job, 'finish', 1)",
    "the output is said to be whole": "die_at(Job, 'finish', 1, after=True)",
    "the output has its name": "die_at(Job, 'remove', 1)",
    "half of the work folder is gone": "before(Job, 'remove', 1, lambda: die_at(Path, 'unlink', 4))",
}


class Bench:
    """Runs a job in children, and keeps the bytes of the undisturbed one."""

    def __init__(self, server, model, text, recipe, suffix=""):
        self.server, self.model, self.text, self.recipe, self.suffix = server, model, text, recipe, suffix

    def run(self, out, prelude="", *, resume=False, overwrite=False, code=RUN, **values):
        return self.server.run(PRELUDE + prelude + code, model=self.model, text=self.text, recipe=self.recipe, out=out, resume=resume, overwrite=overwrite, **values)

    def undisturbed(self, folder):
        out = folder / f"reference{self.suffix}"
        if not out.exists():
            answer = self.run(out)
            assert answer["status"] == 0, answer["output"]
        return out


JOBS = {
    "folder": ("llama-tied", "int4-sym-g32-gptq", "", list(POINTS)),
    "gguf": ("llama-tied", "int4-sym-g32-gptq", ".gguf", ["block 1 is done", "writing the output", "the output is said to be whole", "the output has its name"]),
    "experts": ("mixtral", "int4-sym-g32-gptq", "", ["block 0 is done", "running block 2"]),
    "rounding": ("llama-tied", "int4-sym-g32-rtn", "", ["block 1 is done", "writing the output"]),
}


@pytest.fixture(scope="module")
def dense(fork_server, model_folder, text_file):
    return Bench(fork_server, model_folder("llama"), text_file, "int4-sym-g32-gptq")


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Where the undisturbed results of the jobs are kept."""
    return {job: tmp_path_factory.mktemp(job) for job in JOBS}


@pytest.mark.parametrize(("job", "point"), [(job, point) for job, (*_, points) in JOBS.items() for point in points])
def test_a_killed_job_goes_on_to_the_same_bytes(job, point, fork_server, model_folder, text_file, references, tmp_path, assert_same):
    model, recipe, suffix, _ = JOBS[job]
    bench = Bench(fork_server, model_folder(model), text_file, recipe, suffix)
    reference, out = bench.undisturbed(references[job]), tmp_path / f"out{suffix}"
    killed = bench.run(out, POINTS[point])
    assert killed["status"] == -signal.SIGKILL, killed["output"]
    assert out.exists() == (point in ("the output has its name", "half of the work folder is gone"))
    resumed = bench.run(out, resume=True)
    assert resumed["status"] == 0, resumed["output"]
    assert_same(reference, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([out.name, f"{out.name}.log", *([f"{out.name}.README.md"] if out.is_file() else [])])


def test_killed_again_and_again(dense, tmp_path, assert_same):
    reference = dense.undisturbed(tmp_path)
    for kill in ("die_at(Streamer, 'run_block', 5)", "die_at(Job, 'save', 1, after=True)", "die_at(Streamer, 'run_block', 6)", "die_at(Job, 'save', 2, after=True)", "die_at(ShardWriter, 'add', 9)"):
        answer = dense.run(tmp_path / "out", kill, resume=True)
        assert answer["status"] == -signal.SIGKILL, answer["output"]
    assert dense.run(tmp_path / "out", resume=True)["status"] == 0
    assert_same(reference, tmp_path / "out")


def test_on_two_threads(dense, tmp_path, assert_same):
    two = "import torch; torch.set_num_threads(2)\n"
    assert dense.run(tmp_path / "a", two)["status"] == 0
    assert dense.run(tmp_path / "b", two + POINTS["block 0 is done"])["status"] == -signal.SIGKILL
    with pytest.raises(JobError, match="its threads differ"):  # sums are taken in another order
        again(dense, tmp_path / "b")
    assert dense.run(tmp_path / "b", two, resume=True)["status"] == 0
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_kill_while_an_older_output_is_replaced(dense, tmp_path, assert_same):
    reference = dense.undisturbed(tmp_path)
    for number, kill in enumerate(["die_at(os, 'replace', OLD)", "die_at(os, 'replace', OLD, after=True)"]):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "older.txt").write_text("an older result")
        # the last two renames of a job: the older output goes aside, the new one takes its name
        count = dense.run(tmp_path / "count", "calls = []; original = os.replace\ndef replace(*a):\n calls.append(a); return original(*a)\nos.replace = replace\n", code=RUN + "print(len(calls))")
        shutil.rmtree(tmp_path / "count")
        last = int(count["output"].split()[-1])
        answer = dense.run(out, kill.replace("OLD", str(last)), overwrite=True)
        assert answer["status"] == -signal.SIGKILL, answer["output"]
        kept = out if (out / "older.txt").exists() else out.with_name(out.name + ".old")
        assert (kept / "older.txt").read_text() == "an older result"
        assert dense.run(out, resume=True, overwrite=True)["status"] == 0
        assert_same(reference, out)
        assert not out.with_name(out.name + ".old").exists()


@pytest.fixture
def interrupted(dense, tmp_path):
    """An unfinished job at tmp_path/out, two blocks done."""
    answer = dense.run(tmp_path / "out", POINTS["block 1 is done"])
    assert answer["status"] == -signal.SIGKILL, answer["output"]
    return tmp_path / "out"


def again(dense, out, *, resume=True, **options):
    return quantize(dense.model, **{"recipe": dense.recipe, "output": out, "calibration": dense.text, "n_samples": 4, "seq_len": 32, "dtype": "float32", "resume": resume, **options})


def test_an_unfinished_job_is_not_begun_anew_unasked(dense, interrupted):
    with pytest.raises(JobError, match=r"out\.work holds an unfinished job\. Go on with --resume, or begin anew with --overwrite"):
        again(dense, interrupted, resume=False)
    assert (interrupted.with_name("out.work") / "block-00001.json").exists()


@pytest.mark.parametrize(
    ("options", "different"),
    [
        ({"recipe": "int3-sym-g32-gptq"}, "recipe"),
        ({"n_samples": 3}, "recipe, data"),
        ({"seed": 1}, "recipe"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_another_job_is_not_gone_on_with(options, different, dense, interrupted):
    before = sorted(p.name for p in interrupted.with_name("out.work").iterdir())
    with pytest.raises(JobError, match=rf"out\.work holds another job: its .*{different}.* differ") as caught:
        again(dense, interrupted, **options)
    assert "--resume" in str(caught.value) and "--overwrite" in str(caught.value)
    assert sorted(p.name for p in interrupted.with_name("out.work").iterdir()) == before


def test_another_model_is_not_gone_on_with(dense, interrupted, save_model):
    other = save_model("llama", interrupted.parent / "m", seed=5)
    with pytest.raises(JobError, match="its model, weights differ"):
        quantize(other, dense.recipe, interrupted, calibration=dense.text, n_samples=4, seq_len=32, dtype="float32", resume=True)


def test_overwrite_begins_anew(dense, interrupted, assert_same):
    reference = dense.undisturbed(interrupted.parent)
    assert dense.run(interrupted, overwrite=True)["status"] == 0
    assert_same(reference, interrupted)


@pytest.mark.parametrize("resume", [True, False])
def test_resume_without_anything_to_resume(resume, dense, tmp_path):
    assert again(dense, tmp_path / "out", resume=resume).path == tmp_path / "out"


def test_lost_and_damaged_work(dense, interrupted):
    work = interrupted.with_name("out.work")
    (work / "hidden-0.bin").rename(work / "elsewhere")
    with pytest.raises(JobError, match=r"hidden-0\.bin is gone or of another size.*Begin anew with --overwrite"):
        again(dense, interrupted)
    (work / "elsewhere").rename(work / "hidden-0.bin")
    (work / "block-00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(JobError, match=r"block-00000\.safetensors is damaged.*Begin anew with --overwrite"):
        again(dense, interrupted)
    assert not interrupted.exists()


# ---- a full disk

FULL = """
import sys
folder = Path(out).parent
def fill():
    size = 1 << 16
    with open(folder / "filler", "ab", buffering=0) as file:
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2
"""
CAUGHT = """
try:
    quantize(model, recipe, out, calibration=text, n_samples=4, seq_len=32, dtype="float32", resume=resume, overwrite=overwrite)
except LowbitError as error:
    print(type(error).__name__, "|", error)
else:
    print("nothing was raised")
"""


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting a small file system needs root: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


MOMENTS = {
    "hidden states": "before(Streamer, '__init__', 1, fill, after=True)",
    "the key": "before(Job, '__init__', 1, fill)",
    "a block": "before(Job, 'save', 2, fill)",
    "a block's record": "before(job_module, 'write_text', 3, fill)",
    "the output": "before(ShardWriter, 'add', 3, fill); before(gguf_container, '_write_tensor', 3, fill)",
    "the end": "before(Job, 'finish', 1, fill)",
}


@pytest.mark.parametrize(("suffix", "moment"), [*[("", moment) for moment in MOMENTS], (".gguf", "the output"), (".gguf", "the end")])
def test_a_full_disk_is_one_paragraph_and_the_job_goes_on_later(suffix, moment, dense, small_disk, tmp_path, assert_same):
    bench = Bench(dense.server, dense.model, dense.text, dense.recipe, suffix)
    reference = bench.undisturbed(tmp_path)
    (small_disk / "earlier").mkdir()
    (small_disk / "earlier" / "result.txt").write_text("an earlier result")
    out = small_disk / f"out{suffix}"
    answer = bench.run(out, FULL + MOMENTS[moment], code=CAUGHT)
    lines = answer["output"].strip().splitlines()
    assert answer["status"] == 0 and len(lines) == 1, answer["output"]  # no traceback, of a log either
    assert lines[0].startswith(("ResourceError | There is no room for the output", "JobError | "))
    assert "No space left on device" in lines[0] and str(small_disk) in lines[0]
    assert moment == "the key" or "--resume" in lines[0]
    assert (small_disk / "earlier" / "result.txt").read_text() == "an earlier result"
    assert not out.exists()
    (small_disk / "filler").unlink()
    assert bench.run(out, resume=True)["status"] == 0
    assert_same(reference, out)


def test_a_disk_that_is_too_small_is_said_before_work(dense, small_disk):
    (small_disk / "filler").write_bytes(b"x" * 6_000_000)
    answer = dense.run(small_disk / "out", code=CAUGHT)
    assert answer["output"].startswith("ResourceError | This job needs"), answer["output"]
    assert str(small_disk) in answer["output"]
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("limit", [2_000, 40_000, 120_000])
def test_files_that_may_not_grow(limit, dense, tmp_path, assert_same):
    """As a full disk, for machines where none can be mounted."""
    answer = dense.run(tmp_path / "out", f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))", code=CAUGHT)
    lines = answer["output"].strip().splitlines()
    assert answer["status"] == 0 and len(lines) == 1, answer["output"]
    assert lines[0].startswith("ResourceError | There is no room for the output") and "File too large" in lines[0]
    assert not (tmp_path / "out").exists()
    assert dense.run(tmp_path / "out", resume=True)["status"] == 0
    assert_same(dense.undisturbed(tmp_path), tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("mount"), reason="needs mount")
def test_a_target_that_cannot_be_written(dense, tmp_path):
    folder = tmp_path / "readonly"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=9m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting a file system needs root: {made.stderr.strip()}")
    try:
        answer = dense.run(folder / "out", code=CAUGHT)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert answer["output"].startswith("JobError | ") and "Read-only file system" in answer["output"], answer["output"]
    assert "-o" in answer["output"]


def test_job_folder_is_described_by_its_key(dense, interrupted):
    key = json.loads((interrupted.with_name("out.work") / "job.json").read_text())
    assert {"lowbit", "torch", "transformers", "model", "weights", "recipe", "refinement", "data", "dtype", "device", "threads", "max_shard_size"} == set(key)
