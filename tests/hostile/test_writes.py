"""Writers that are killed or fail anywhere: nothing is left that a consumer would take for whole, and an existing output stays."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from hostile import files, layouts

from lowbit.checkpoints import TARGETS, Checkpoint, open_checkpoint
from lowbit.checkpoints.checkpoint import LazyTensor
from lowbit.checkpoints.safetensors import ShardWriter, copy_files, write_folder
from lowbit.errors import LowbitError
from lowbit.pipeline.convert import convert
from lowbit.pipeline.push import push

# Runs in a child process: SIGKILL before the n-th call of owner.name.
PRELUDE = """
import os, signal, shutil
from pathlib import Path
import lowbit.checkpoints.gguf_container as gguf
import lowbit.checkpoints.safetensors as st
import lowbit.pipeline.output as output
from lowbit.pipeline.convert import convert

def die_at(owner, name, number):
    original, count = getattr(owner, name), [0]
    def patched(*args, **kwargs):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def die_at_the_name():
    original = os.replace
    def patched(source, destination):
        if str(destination) == out:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(source, destination)
    os.replace = patched
"""
CONVERT = "\nconvert(model, target, out, overwrite=overwrite)\n"
POINTS = {
    "the first tensor": "die_at(st.ShardWriter, 'add', 1); die_at(gguf, '_write_tensor', 1)",
    "half of the tensors": "die_at(st.ShardWriter, 'add', 6); die_at(gguf, '_write_tensor', 6)",
    "the header": "die_at(st.ShardWriter, '_finish_shard', 1); die_at(gguf, 'header_bytes', 1)",
    "the bytes are synced": "die_at(st.os, 'fsync', 1)",
    "the first name inside": "die_at(st.os, 'replace', 1)",
    "config.json": "die_at(st, 'write_text', 1); die_at(gguf.os, 'replace', 1)",
    "the tokenizer": "die_at(shutil, 'copyfile', 1); die_at(gguf.os, 'fsync', 1)",
    "the card": "die_at(output, 'write_text', 1)",
    "its name": "die_at_the_name()",
}


def looks_whole(folder):
    """What a program would load."""
    whole = lambda path: path.suffix == ".gguf" or path.name == "model.safetensors.index.json" or (path.name == "config.json" and any(path.parent.glob("*.safetensors")))
    return [path.name for path in folder.rglob("*") if whole(path)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"safetensors": layouts.FOLDERS["gptq-v1"](folder / "gptq"), "gguf": layouts.dense(folder / "dense"), "compressed-tensors": layouts.FOLDERS["gptq-v2"](folder / "gptq2")}


@pytest.mark.parametrize(
    ("target", "point", "existing"),
    [
        *((target, point, False) for target in ("safetensors", "gguf") for point in POINTS),
        *((target, point, True) for target in ("safetensors", "gguf") for point in ("half of the tensors", "config.json", "the card", "its name")),
        ("compressed-tensors", "half of the tensors", False),
        ("compressed-tensors", "its name", True),
    ],
)
def test_killed_anywhere(target, point, existing, models, fork_server, tmp_path):
    out = tmp_path / f"out{TARGETS[target].suffix}"
    before = None
    if existing:
        convert(models[target], target, out)
        before = {path: path.read_bytes() for path in (out.rglob("*") if out.is_dir() else [out])}
    answer = fork_server.run(PRELUDE + POINTS[point] + CONVERT, model=models[target], target=target, out=out, overwrite=existing)
    assert answer["status"] == -signal.SIGKILL, answer["output"]
    if existing and point == "its name" and target != "gguf":  # between two renames: the older result is whole beside the newer one
        assert not out.exists() and open_checkpoint(tmp_path / "out.old").shapes() == open_checkpoint(tmp_path / "out.tmp").shapes()
        out = tmp_path / "out.old"
        before = {out / path.name: data for path, data in before.items()}
    if existing:
        assert {path: path.read_bytes() for path in before} == before
    elif target == "gguf" and point == "the card":  # which is written last
        assert open_checkpoint(out).shapes()
    else:
        assert not out.exists()
        assert looks_whole(tmp_path) == [] or point in ("the card", "its name")  # all of it is there then, under a temporary name
    if point not in ("half of the tensors", "its name"):
        return
    again = tmp_path / f"out{TARGETS[target].suffix}"
    convert(models[target], target, again, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} - {f"{again.name}.README.md"} == {again.name} and open_checkpoint(again).shapes()


@pytest.mark.parametrize("target", TARGETS)
def test_failing_anywhere(target, tmp_path):
    """An error at the n-th tensor: the older output is as it was, and nothing else is left."""
    source = files.sound(tmp_path / "model") if (tmp_path / "model").mkdir() is None else None
    own = {"awq": "awq", "bitsandbytes": "bitsandbytes-nf4", "auto-round": "auto-round", "gptq": "gptq-v1", "hqq": "hqq-4", "aqlm": "aqlm", "bitnet": "bitnet", "torchao": "torchao-int"}
    model = layouts.FOLDERS[own[target]](tmp_path / "packed") if target in own else source
    out = tmp_path / f"out{TARGETS[target].suffix}"
    out.write_bytes(b"older") if out.suffix else (out.mkdir(), (out / "older").write_bytes(b"older"))
    checkpoint = open_checkpoint(model)
    from lowbit.pipeline.output import write
    from lowbit.progress import SILENT

    for number in (0, 3, len(checkpoint.tensors) - 1):
        name = list(checkpoint.tensors)[number]
        broken = replace(checkpoint, tensors={**checkpoint.tensors, name: replace(checkpoint.tensors[name], read=lambda start, stop: 1 / 0)})
        with pytest.raises(ZeroDivisionError):
            write(broken, target, out, SILENT, overwrite=True, base="x")
        assert (out if out.suffix else out / "older").read_bytes() == b"older"
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == [out.name]


def test_a_rename_that_fails_puts_the_older_output_back(tmp_path, monkeypatch):
    from lowbit.pipeline import output

    (tmp_path / "model").mkdir()
    model, out = files.sound(tmp_path / "model"), tmp_path / "out"
    convert(model, "safetensors", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real, calls = output.os.replace, []

    def refuse(source, destination):
        calls.append(str(destination))
        if str(source).endswith("out.tmp"):
            raise PermissionError(13, "not allowed", str(destination))
        real(source, destination)

    monkeypatch.setattr(output.os, "replace", refuse)
    with pytest.raises(LowbitError, match="not allowed"):
        convert(model, "safetensors", out, overwrite=True)
    assert str(tmp_path / "out.old") in calls and {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_shards_have_no_name_before_all_are_whole(tmp_path):
    """Of several shards none is called so, and there is no index, before the last one is written."""

    def fail(start, stop):
        raise OSError("disk gone")

    tensors = {f"t{i}": LazyTensor((64,), torch.float32, lambda start, stop: torch.zeros(stop - start)) for i in range(5)}
    with pytest.raises(OSError, match="disk gone"), ShardWriter(tmp_path, entries=6, max_bytes=300) as writer:
        for name, lazy in {**tensors, "bad": LazyTensor((2,), torch.float32, fail)}.items():
            writer.add(name, lazy)
    assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"} and len(list(tmp_path.iterdir())) > 3
    with pytest.raises(OSError, match="disk gone"):
        write_folder(Checkpoint("safetensors", tmp_path, {}, {**tensors, "bad": LazyTensor((2,), torch.float32, fail)}), tmp_path)
    assert not looks_whole(tmp_path)


def test_long_names_fit_their_header(tmp_path):
    """Room for the header is kept free before the names are known: one name longer than all of it."""
    writer = ShardWriter(tmp_path, entries=1)
    names = ["a", "b" * 5000, "c" * 2_000_000, "d"]
    for name in names:
        writer.add(name, torch.full((8,), float(len(name) % 7)))
    writer.close()
    from lowbit.checkpoints.safetensors import open_tensors

    assert {name: lazy.load()[0].item() for name, lazy in open_tensors(tmp_path).items()} == {name: float(len(name) % 7) for name in names}


def test_files_beside_the_weights_are_copied_by_content(tmp_path):
    """A link is not copied as a link, and only names that are known are copied at all."""
    (tmp_path / "model").mkdir()
    model = files.sound(tmp_path / "model")
    (model / "tokenizer.json").rename(model / "real.json")
    (model / "tokenizer.json").symlink_to("real.json")  # inside of the folder: allowed
    (model / "evil.py").write_text("raise SystemExit")
    out = convert(model, "safetensors", tmp_path / "out").path
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "lowbit.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert not (out / "tokenizer.json").is_symlink() and json.loads((out / "tokenizer.json").read_text()) == layouts.tokenizer()
    (tmp_path / "to").mkdir()
    copy_files([model / "tokenizer.json"], tmp_path / "to")
    assert (tmp_path / "to" / "tokenizer.json").is_file() and not (tmp_path / "to" / "tokenizer.json").is_symlink()


def test_a_link_is_not_pushed(tmp_path):
    """What is uploaded is what lies in the folder, and no secret that a link leads to."""
    (tmp_path / "model").mkdir()
    model = files.sound(tmp_path / "model")
    (tmp_path / "secret").write_text("key")
    (model / "notes.txt").symlink_to("../secret")
    with pytest.raises(LowbitError, match="leads out of the folder"):
        push(model, "a/b", dry_run=True)
    (model / "notes.txt").unlink()
    assert "config.json" in {name for name, _, _ in push(model, "a/b", dry_run=True).files}


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """snapshots/HASH/file -> ../../blobs/NAME, which is out of the folder and allowed; anything else is not."""
    home = tmp_path / "models--org--name"
    snapshot, blobs = home / "snapshots" / "0123", home / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for name, data in files.sound_files().items():
        (blobs / f"blob-{name}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    assert open_checkpoint(snapshot).files
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(LowbitError, match="leads out of the folder"):
        open_checkpoint(snapshot)
