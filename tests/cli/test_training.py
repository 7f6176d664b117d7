"""lowbit train as a newcomer and a script meet it."""

import json
import subprocess
import sys

import pytest

HELP = {"PATH": "", "COLUMNS": "200", "NO_COLOR": "1"}


def test_help_with_examples_and_without_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "lowbit", "train", "qat", "--help"], capture_output=True, text=True, env=HELP)
    assert done.returncode == 0
    assert "lowbit train qat ./model --recipe int2-asym-g64" in done.stdout and "--phases" in done.stdout
    assert "| torch" not in done.stderr and "transformers" not in done.stderr


def test_json_alone_is_on_stdout(model_folder, text_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    from lowbit.cli.main import app

    words = ["train", "qat", str(model_folder("qwen2")), "--recipe", "int2-asym-g32", "--data", str(text_file), "--n-samples", "8", "--seq-len", "32", "--steps", "2", "--phases", "end", "--json"]
    app([*words, "-o", str(tmp_path / "out")], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert [step for step, _ in said["curve"]] == [0, 2] and said["path"] == str(tmp_path / "out") and said["training"]["steps"] == 2
    assert (tmp_path / "out" / "config.json").exists()
