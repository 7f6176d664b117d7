"""Every bad file of files.py through the library and the command line: one clear error of ours, in bounded time and memory, and nothing written."""

import itertools
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hostile import files, layouts

from lowbit.checkpoints import open_checkpoint
from lowbit.cli.main import main
from lowbit.errors import LowbitError
from lowbit.pipeline.evaluate import evaluate
from lowbit.pipeline.inspect import inspect, tensor_histogram
from lowbit.pipeline.plan import plan
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.verify import verify

CASES = [*((f"folder: {case.name}", case) for case in files.FOLDERS), *((f"gguf: {case.name}", case) for case in files.GGUFS)]
LATE = [(name, case) for name, case in CASES if case.late]


def table(cases):
    return pytest.mark.parametrize("case", [case for _, case in cases], ids=[name for name, _ in cases])


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(case): the bad file, and what is on the disk then; the current folder is one of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(case):
        (tmp_path / "model").mkdir()
        return case.make(tmp_path / "model"), listing(tmp_path)

    return run


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in itertools.chain(folder.glob("*"), folder.glob("*/*"), folder.glob("*/*/*")))


def check(message: str, case: files.Case) -> None:
    """One paragraph that says what is wrong."""
    assert re.search(case.message, message), message
    assert "\n\n" not in message and "Traceback" not in message


@table(CASES)
def test_inspect(case, make, bounded, tmp_path):
    path, before = make(case)
    with bounded():
        if case.late:
            assert inspect(path).tensors is not None
        else:
            with pytest.raises(LowbitError) as caught:
                inspect(path)
            check(str(caught.value), case)
            assert str(path.parent if path.is_file() else path) in str(caught.value) or "tensor" in str(caught.value)
    assert listing(tmp_path) == before


def command(monkeypatch, capsys, *words) -> str:
    """Run the command line; it ends with code 1. Returns what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    return capsys.readouterr().err


@table(CASES)
def test_convert_on_the_command_line(case, make, bounded, tmp_path, monkeypatch, capsys):
    path, before = make(case)
    with bounded():
        said = command(monkeypatch, capsys, "convert", path, "--to", "gguf" if path.suffix == ".gguf" else "safetensors", "-o", tmp_path / "out")
    check(said[said.index("error ") :].removeprefix("error "), case)
    assert listing(tmp_path) == before


@table(LATE)
def test_quantize(case, make, bounded, tmp_path):
    path, before = make(case)
    with bounded(), pytest.raises(LowbitError) as caught:
        quantize(path, "int4-sym-g32-rtn", tmp_path / "out")
    check(str(caught.value), case)
    assert [name for name in listing(tmp_path) if not name.startswith("out.")] == before


@table(LATE)
def test_evaluate(case, make, bounded, tmp_path, text_file):
    path, before = make(case)
    with bounded(), pytest.raises(LowbitError) as caught:
        evaluate(path, text=text_file, ctx=16, n_windows=1)
    check(str(caught.value), case)
    assert listing(tmp_path) == before


@table(LATE)
def test_verify(case, make, bounded, tmp_path):
    path, before = make(case)
    with bounded(), pytest.raises(LowbitError) as caught:
        verify(path)
    check(str(caught.value), case)
    assert listing(tmp_path) == before


@table(LATE)
def test_plan(case, make, bounded, tmp_path):
    """A plan reads config.json alone and knows nothing of weights: it is made, or refused in our words."""
    path, before = make(case)
    with bounded(), suppress(LowbitError):
        assert plan(path / "config.json" if path.is_dir() else path, recipes=["q4_0"]).rows
    assert listing(tmp_path) == before


def test_the_sound_ones_are_sound(make, bounded, tmp_path, text_file):
    """So that what is refused above is refused for what was done to it."""
    for maker in (files.sound, files.written(files.sound_gguf())):
        path = maker(tmp_path)
        with bounded():
            assert inspect(path).weights > 0 and evaluate(path, text=text_file, ctx=16, n_windows=1).rows
            quantize(path, "int4-sym-g32-rtn", tmp_path / f"out-{path.name}")


ODD_NAMES = ("a\x1b]0;owned\x07", "[bold red]b[/] [/c]", "\u202egnp.exe", "d\0\n\re", "\x1b[2J\x1b[H", "../../../f", "x" * 10_000, "[", "\\[/]")


def test_odd_names_are_shown_plainly(tmp_path, monkeypatch, capsys):
    """Tensors may have any name: nothing in it is markup or reaches the terminal as a control character, and nothing is written by it."""
    path = files.weights(**{name: torch.zeros(2) for name in ODD_NAMES})(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lowbit", "inspect", str(path), "--all"])
    main_exits_well()
    shown = capsys.readouterr()
    assert not [c for c in shown.out + shown.err if not c.isprintable() and c != "\n"]
    for part in (r"a\x1b]0;owned\x07", "[bold red]b[/] [/c]", r"\u202egnp.exe", r"d\x00", "../../../f", "xxxx"):
        assert part in shown.out
    monkeypatch.setattr(sys, "argv", ["lowbit", "convert", str(path), "--to", "safetensors", "-o", str(tmp_path / "out")])
    main_exits_well()
    assert set(ODD_NAMES) < set(open_checkpoint(tmp_path / "out").tensors)
    for name in ODD_NAMES[:5]:
        assert tensor_histogram(path, name).counts


def main_exits_well():
    try:
        main()
    except SystemExit as ended:
        assert ended.code in (0, None)


def test_odd_values_of_a_config_are_shown_plainly(tmp_path, monkeypatch, capsys):
    path = files.config(model_type="\x1b[31m[/]", architectures=["[red]x\u202e"], hidden_size=["y" * 5000])(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lowbit", "inspect", str(path)])
    main_exits_well()
    shown = capsys.readouterr().out
    assert not [c for c in shown if not c.isprintable() and c != "\n"]
    assert r"\x1b[31m[/]" in shown and "[red]x" in shown and "(5,004 characters)" in shown


def test_no_pickle_was_loaded():
    assert not Path("lowbit-was-here").exists()


def test_truncated_gguf(tmp_path):
    """Cut at every place of the header (every 97th byte) and in the data."""
    data = files.sound_gguf()
    path = files.written(data)(tmp_path)
    ends = [info.rows.size for info in files.parts(path)[2].tensors.values()]
    start = len(data) - sum(-(-size // 32) * 32 for size in ends)
    for size in (*range(0, start, 97), start, start + 1000, len(data) - 33):
        path.write_bytes(data[:size])
        with pytest.raises(LowbitError, match="truncated|incomplete|more than|can hold"):
            open_checkpoint(path)


def test_flipped_bytes_of_a_gguf(tmp_path, bounded):
    """One byte of the header changed: refused in our words, or read as something that can be decoded."""
    data, generator = files.sound_gguf(), torch.Generator().manual_seed(0)
    path = files.written(data)(tmp_path)
    tail = data.index(b"token_embd.weight") - 8
    for place in (*range(0, 500, 3), *range(tail, tail + 300, 2)):
        broken = bytearray(data)
        broken[place] ^= int(torch.randint(1, 256, (), generator=generator))
        path.write_bytes(broken)
        try:
            with bounded():
                checkpoint = open_checkpoint(path)
                decoded = [checkpoint.lazy(name).read(0, 1) for name in checkpoint.shapes()]
        except LowbitError as error:
            assert str(path) in str(error) or "tensor" in str(error)
        else:
            assert decoded


def test_layouts_are_listed():
    """Each reader has a layout here; a new one needs a maker in layouts.py."""
    from lowbit.checkpoints import READERS

    assert {name.partition("-")[0] for name in READERS} <= {name.partition("-")[0] for name in layouts.FOLDERS} | {"compressed", "fp8"}  # damaged FP8 folders: checkpoints/test_peers.py
