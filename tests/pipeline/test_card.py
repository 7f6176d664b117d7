"""The model card and push: metadata, the lines that load, what was measured; what would be uploaded, and what is said without a network or a login."""

import json

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

import lowbit
from lowbit.errors import LowbitError
from lowbit.pipeline import card
from lowbit.pipeline.convert import convert
from lowbit.pipeline.evaluate import compare
from lowbit.pipeline.push import push


@pytest.fixture(scope="module")
def original(save_model, tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("original") / "model", dtype=torch.float16)


@pytest.fixture(scope="module")
def result(original, tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("card") / "out"
    lowbit.quantize(original, "int4-sym-g32-gptq", out, calibration=text_file, n_samples=4, seq_len=32)
    return out


def metadata(path):
    _, head, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_beside_a_folder(result):
    head, text = metadata(result / "README.md")
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lowbit", "quantized", "compressed-tensors"]}
    lines = ('from_pretrained("path-to-this-model"', "pip install transformers accelerate compressed-tensors")
    for part in ("`int4-sym-g32-gptq`", "| method | gptq |", "4 windows of 32 tokens", "21 matrices", "Relative squared error", *lines):
        assert part in text
    assert str(result.parent) not in text


def test_beside_a_file_and_with_a_base_on_the_hub(result, tmp_path):
    made = convert(result, "gguf", tmp_path / "m.gguf").path
    head, text = metadata(made.with_name("m.gguf.README.md"))
    assert head["library_name"] == "gguf" and "llama-cli -m" in text
    card.write_card(result, base="org/Model-1", location=tmp_path / "README.md")
    head, text = metadata(tmp_path / "README.md")
    assert (head["base_model"], head["base_model_relation"]) == ("org/Model-1", "quantized") and "https://huggingface.co/org/Model-1" in text


def test_a_hub_base_is_kept_by_convert(result, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in result.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    card.write_card(source, base="org/Model-1")
    convert(source, "gptq", tmp_path / "gptq")
    assert metadata(tmp_path / "gptq" / "README.md")[0]["base_model"] == "org/Model-1"


def test_what_was_measured_goes_into_the_card(result, original, text_file, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for file in result.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    comparison = compare([folder], against=original, text=text_file, ctx=32, n_windows=4, noise_floor=False)
    for _ in range(2):  # again: in the place of the first
        path = card.write_measured(folder, card.measured_table(comparison, comparison.rows[1]))
    text = path.read_text()
    assert text.count("mean KL divergence") == 1 and "4 windows of 32 tokens" in text and "Relative squared error" not in text and "## Use" in text


def test_push_says_what_would_go(result):
    planned = push(result, "me/model", dry_run=True)
    assert planned.url is None and {"README.md", "config.json", "model.safetensors", "tokenizer.json", "lowbit.json"} <= {name for name, _, _ in planned.files}
    assert planned.total_bytes == sum(file.stat().st_size for file in result.iterdir())


@pytest.fixture
def calls(monkeypatch):
    """What a hub that takes everything is asked for."""
    calls = []

    class Hub:
        def whoami(self):
            return {"name": "me"}

        def create_repo(self, name, **options):
            calls.append((name, options))

        def create_commit(self, name, operations, commit_message):
            calls.append((name, {operation.path_in_repo: operation.path_or_fileobj for operation in operations}, commit_message))
            return type("Commit", (), {"commit_url": f"https://hub/{name}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return calls


def test_push_uploads_one_commit(result, calls):
    assert push(result, "me/model", private=True).url == "https://hub/me/model"
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True}) and "model.safetensors" in calls[1][1] and "out" in calls[1][2]
    assert b'from_pretrained("me/model"' in calls[1][1]["README.md"] and b"path-to-this-model" not in calls[1][1]["README.md"]


def test_a_split_file_goes_whole(result, tmp_path, calls):
    """By its folder or by any of its parts, with the card that lies in the folder."""
    folder = convert(result, "gguf", tmp_path / "parts", max_shard_size="20kB").path
    parts = sorted(file.name for file in folder.glob("*.gguf"))
    assert len(parts) > 2 and f"llama-cli -m \"path-to-this-model/{parts[0]}\"" in (folder / "README.md").read_text() and not list(tmp_path.glob("*.md"))
    for path in (folder, folder / parts[1]):
        push(path, "me/model")
        files = calls.pop()[1]
        assert files.keys() == {"README.md", *parts}
        assert f"llama-cli -m \"{parts[0]}\"".encode() in files["README.md"] and b"path-to-this-model" not in files["README.md"]


@pytest.mark.parametrize(("error", "message"), [(LocalTokenNotFoundError("no"), "hf auth login"), (ConnectionError("no"), "cannot be reached")])
def test_push_without_a_login_or_a_network(result, monkeypatch, error, message):
    def refuse(self):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", refuse)
    with pytest.raises(LowbitError, match=message):
        push(result, "me/model")


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "../x", ""])
def test_push_needs_a_name(result, name):
    with pytest.raises(LowbitError, match="no repository"):
        push(result, name, dry_run=True)


def test_push_takes_only_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(LowbitError, match="holds no weights"):
        push(tmp_path, "me/model", dry_run=True)


def test_what_is_not_quantized_is_not_said_to_be(original, tmp_path):
    made = convert(original, "gguf", tmp_path / "m.gguf").path
    head, text = metadata(made.with_name("m.gguf.README.md"))
    assert head["tags"] == ["lowbit"] and "in the layout gguf." in text and "quantized with" not in text
    card.write_card(made, base="org/Model-1", location=tmp_path / "README.md")
    head, _ = metadata(tmp_path / "README.md")
    assert head["base_model"] == "org/Model-1" and "base_model_relation" not in head


def test_codes_of_others_are_not_said_to_be_ours(result, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in result.iterdir():
        if file.name not in ("lowbit.json", "README.md"):
            (source / file.name).write_bytes(file.read_bytes())
    head, text = metadata(convert(source, "lowbit", tmp_path / "out").path / "README.md")
    assert "quantized" in head["tags"] and "in the layout lowbit." in text and "quantized with" not in text


def test_measured_of_a_model_that_is_not_here(tmp_path):
    with pytest.raises(LowbitError, match="no folder or file here"):
        card.write_measured(tmp_path / "org" / "model", "| table |")
