"""The command line as a newcomer meets it."""

import subprocess
import sys
import time

import pytest

COMMANDS = ("quantize", "imatrix", "compare", "eval", "convert", "merge", "plan", "inspect", "doctor", "demo")


def run(*args):
    return subprocess.run([sys.executable, "-m", "lowbit", *args], capture_output=True, text=True, env={"PATH": "", "COLUMNS": "200", "NO_COLOR": "1"})


def test_help_lists_the_commands_and_answers_at_once():
    run("--help")
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        best = min(best, time.perf_counter() - start)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    imported = subprocess.run([sys.executable, "-X", "importtime", "-m", "lowbit", "--help"], capture_output=True, text=True).stderr
    assert "| torch" not in imported and "transformers" not in imported
    assert best < 2.0  # 0.3 s on an idle machine; see docs/status.md


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"lowbit {command}" in done.stdout


def test_version():
    assert run("--version").stdout.startswith("lowbit 0.")


def test_an_error_is_one_paragraph_and_exit_code_1():
    done = run("quantize", "/no/such/model", "-o", "/tmp/never")
    assert done.returncode == 1
    assert "does not exist" in done.stderr and "Traceback" not in done.stderr


def test_unknown_recipe_word_names_the_known_ones():
    done = run("quantize", ".", "--recipe", "int4-frobnicate")
    assert done.returncode == 1
    assert "'frobnicate' is not known" in done.stderr and "gptq" in done.stderr
