"""Recipes, tokenizers and provenance of strangers: one clear error for each, whatever is wrong with the text."""

import json
import os
from dataclasses import replace

import pytest
from hostile import files, layouts
from hostile.files import PROVENANCE, RECIPE, RECORD, SHAPES, toml
from hostile.layouts import ROWS, damaged_values

from lowbit.checkpoints import gguf, gguf_tokenizer, open_checkpoint
from lowbit.checkpoints.imatrix import read_imatrix
from lowbit.errors import LowbitError
from lowbit.pipeline import recipes
from lowbit.pipeline.card import card_of
from lowbit.pipeline.convert import convert
from lowbit.pipeline.evaluate import evaluate
from lowbit.pipeline.locate import load_tokenizer
from lowbit.report.model import model_section

VALUES = (None, -1, 0, 10**12, 2**32, "x", "", [], {}, True, 1.5, [1], {"a": 1}, ["a", "b"])

# ------------------------------------------------------------------------------------------------------------------ recipes

TEXTS = {
    "no TOML": ("scheme = ", "cannot be read as TOML"),
    "no text": (b"\xff\xfe", "cannot be read as TOML"),
    "brackets": ("a = " + "[" * 9000, "cannot be read as TOML"),
    "tables": ("a = " + "{a=" * 3000, "cannot be read as TOML"),
    "a key of thousands of parts": ("a" + ".a" * 40_000 + " = 1", "a line is longer than 10,000 characters"),
    "a number of thousands of digits": ("scheme = " + "9" * 5000, "cannot be read as TOML"),
    "a megabyte": ("# " * 500_000, "1,000,000 bytes; a recipe has at most 100,000"),
    "a key twice": ('scheme = "int4"\nscheme = "int4"', "cannot be read as TOML"),
    "NUL": ('scheme = "int4\0"', "cannot be read as TOML"),
    "a date": ("scheme = 1979-05-27T07:32:00Z", "expected a short form"),
    "a group of thousands of digits": (f'scheme = "int4-g{"9" * 5000}"', "is not known"),
    "outliers of thousands of digits": (f'scheme = "int4-out{"9" * 5000}"', "is not known"),
    "digits of another script": ('scheme = "int４"', "is not known"),
    "fp8 activations of 10^12 bits": ('scheme = "int4"\n[activations]\nformat = "fp8_e4m3"\nbits = 1000000000000', "bits is 1000000000000; expected 2 to 8"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_recipe_files(tmp_path, bounded, name):
    text, message = TEXTS[name]
    (tmp_path / "x.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with bounded(), pytest.raises(LowbitError, match=message):
        recipes.parse(tmp_path / "x.toml")


def test_recipe_is_a_pipe(tmp_path, bounded):
    os.mkfifo(tmp_path / "x.toml")
    with bounded(), pytest.raises(LowbitError, match="is no file"):
        recipes.parse(tmp_path / "x.toml")


def test_every_value_of_a_recipe(tmp_path, bounded):
    """Each key gone or absurd: parsed and resolved, or refused in our words."""
    refused = set()
    for what, data in (("sound", RECIPE), *damaged_values(RECIPE, tuple(value for value in VALUES if value is not None))):
        (tmp_path / "x.toml").write_text("\n".join(f"{key} = {toml(value)}" for key, value in data.items()))
        try:
            with bounded():
                recipe, _ = recipes.settle(recipes.parse(tmp_path / "x.toml"), SHAPES, "float16")
                recipes.resolve(recipe, SHAPES, {})
        except LowbitError:
            refused.add(what)
    assert "sound" not in refused and {"scheme removed", "scheme = -1", "calibration.n_samples = -1", "rules = {}", "transforms.awq = 'x'"} <= refused


@pytest.mark.parametrize("case", files.IMATRICES, ids=lambda case: case.name)
def test_importance_matrices(tmp_path, bounded, case):
    path = case.make(tmp_path)
    with bounded(), pytest.raises(LowbitError, match=case.message):
        read_imatrix(path)


# --------------------------------------------------------------------------------------------------------------- tokenizers

PANICS = {
    "charsmap that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "nothing to prepend": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "a pattern for ever": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?:.|.)+\1"}, "behavior": "Isolated", "invert": False}},
    "no pattern": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return files.sound(tmp_path / "model")


def use(folder, tmp_path):
    """Whatever lowbit does with a tokenizer: as GGUF metadata, and as transformers loads it."""
    checkpoint = open_checkpoint(folder)
    for action in (lambda: gguf_tokenizer.metadata(checkpoint.files, checkpoint.config, ROWS, where=folder), lambda: load_tokenizer(checkpoint, tmp_path)):
        try:
            action()
        except LowbitError as error:
            yield str(error)
        else:
            yield ""


@pytest.mark.parametrize("name", PANICS)
def test_tokenizers_that_make_rust_panic(folder, tmp_path, bounded, name):
    (folder / "tokenizer.json").write_text(json.dumps({**layouts.tokenizer(), **PANICS[name]}))
    with bounded():
        assert any("tokenizer" in said for said in use(folder, tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_every_value_of_a_tokenizer(folder, tmp_path, bounded, name):
    """Each key gone or absurd; of tokenizer_config.json with a class of another name and files elsewhere, too."""
    data, refused = json.loads((folder / name).read_text()), set()
    kept = data.get("model", {}).pop("vocab", None)
    more = {"bos_token": {"content": "th"}, "add_bos_token": True, "chat_template": [{"name": "default", "template": "x"}], "vocab_file": "/etc/passwd"}
    data |= more if name == "tokenizer_config.json" else {}
    for what, changed in damaged_values(data, VALUES[::3]):
        if kept and isinstance(changed.get("model"), dict):
            changed = {**changed, "model": {"vocab": kept, **changed["model"]}}
        (folder / name).write_text(json.dumps(changed))
        with bounded():
            if any(use(folder, tmp_path)):
                refused.add(what)
    expected = {"tokenizer.json": {"model removed", "model = True", "added_tokens = True"}, "tokenizer_config.json": {"eos_token = True", "chat_template.0 = True", "bos_token.content = True"}}
    assert expected[name] <= refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"\xff\xfe", "cannot be read as UTF-8"), ("chat_template.json", b"[1]", "holds a JSON list"), ("tokenizer_config.json", b"[1]", "holds a JSON list"),
        ("tokenizer.json", b"", "cannot be read as JSON"), ("tokenizer.json", b"{}", "tokenizer"), ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "half of a surrogate pair"),
        ("config.json", json.dumps({**layouts.CONFIG, "bos_token_id": 2**40}).encode(), "a GGUF cannot hold"),
    ],
)  # fmt: skip
def test_files_of_a_tokenizer(folder, tmp_path, bounded, name, content, message):
    (folder / name).write_bytes(content)
    with bounded(), pytest.raises(LowbitError, match=message):
        gguf.write(open_checkpoint(folder), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("key", ["tokens", "merges", "token_type", "pre", "model", "eos_token_id", "bos_token_id"])
def test_tokenizers_in_a_gguf(tmp_path, bounded, key):
    """Each key gone or of another kind: rebuilt, or refused in our words; and no file is written elsewhere."""
    refused = 0
    values = [None, ("u32", 2**32 - 1), ("f32", float("nan")), ("string", ""), ("string[]", []), ("string[]", ["../../x", "b"]), ("i32[]", [1] * 5), ("f32[]", [1.0])]
    for number, value in enumerate(values):
        path = files.metadata(**{f"tokenizer__ggml__{key}": value})(tmp_path)
        try:
            with bounded():
                gguf.write_tokenizer(path, tmp_path / f"to-{number}")
        except LowbitError:
            refused += 1
    assert refused >= 2 and {p.name.partition("-")[0] for p in tmp_path.iterdir()} <= {"bad.gguf", "to"}


# --------------------------------------------------------------------------------------------------------------- provenance

def test_every_value_of_a_provenance(folder, bounded, text_file):
    """A report of a model whose provenance is not ours: drawn, or refused in our words."""
    sound = evaluate(folder, text=text_file, ctx=16, n_windows=1)
    row, refused, drawn = sound.rows[0], set(), 0
    for what, data in damaged_values(PROVENANCE, (None, -1, 10**12, "x", [], {}, float("nan"))):
        (folder / "lowbit.json").write_text(json.dumps(data))
        try:
            with bounded():
                row = replace(row, provenance=open_checkpoint(folder).provenance)
                drawn += "<details" in str(model_section(row, is_open=True)) and "library_name: " in card_of(folder, base="x")
        except LowbitError:
            refused.add(what)
    assert drawn > 5 and {"layers = 'x'", "recipe = -1"} <= refused


def test_markup_in_a_provenance(folder, text_file):
    """What a report shows of it is text."""
    words = "<script>alert(1)</script>"
    (folder / "lowbit.json").write_text(json.dumps({**PROVENANCE, "notes": [words], "recipe": {"name": words}, "layers": {f"model.layers.0.{words}.weight": {**RECORD, "notes": [words]}}}))
    row = evaluate(folder, text=text_file, ctx=16, n_windows=1).rows[0]
    assert words not in str(model_section(row, is_open=True)) and "&lt;script&gt;" in str(model_section(row, is_open=True))


def test_a_card_that_is_no_text(folder, tmp_path):
    """convert looks into README.md for the name of the original."""
    (folder / "README.md").write_bytes(b"base_model: \xff")
    with pytest.raises(LowbitError, match="README.md cannot be read as UTF-8"):
        convert(folder, "safetensors", tmp_path / "out")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(LowbitError, match="leads out of the folder"):
        convert(folder, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
