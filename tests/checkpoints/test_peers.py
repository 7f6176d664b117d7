"""Whole folders that other programs wrote with their own writers (tests/oracles): read to the weights that they decode, run to the logits that they compute, written back as they were."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit import numerics
from lowbit.checkpoints import TARGETS, open_checkpoint
from lowbit.pipeline.streaming import Batch

ORACLES = Path(__file__).parents[1] / "oracles"
IDS = torch.arange(16).unsqueeze(0) * 7 % 256
# fixture, variant, greatest difference of logits
FOLDERS = [("hqq_folder", "mixed", 1e-4), ("bitnet", "bitlinear", 1e-4), ("bitnet", "auto", 1e-4), ("aqlm_folder", "2x8", 2e-3), ("torchao", "weights", 1e-4)]


@pytest.fixture
def peer_folder(tmp_path):
    """folder(name, variant): a checkpoint as another program wrote it, made again from its fixture."""

    def make(name: str, variant: str) -> Path:
        folder = tmp_path / f"{name}-{variant}"
        folder.mkdir()
        with safe_open(ORACLES / f"{name}.safetensors", "pt") as file:
            texts = json.loads(file.metadata()[variant])
            own = {key.removeprefix(prefix): file.get_tensor(key) for prefix in ("shared.", f"{variant}.file.") for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        save_file(own, folder / "model.safetensors", metadata=texts["metadata"])
        (folder / "config.json").write_text(json.dumps(texts["config"]))
        return folder

    return make


def oracle(name, variant):
    """decoded weights by name, and logits."""
    with safe_open(ORACLES / f"{name}.safetensors", "pt") as file:
        prefix = f"{variant}.decoded."
        decoded = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        return decoded, file.get_tensor(f"{variant}.logits")


@pytest.mark.parametrize(("name", "variant", "tolerance"), FOLDERS)
def test_read_and_run(peer_folder, stream, name, variant, tolerance):
    folder = peer_folder(name, variant)
    checkpoint = open_checkpoint(folder)
    decoded, logits = oracle(name, variant)
    assert decoded
    for key, value in decoded.items():
        weight = key if key.endswith(".weight") else f"{key}.weight"
        torch.testing.assert_close(numerics.dequantize(checkpoint.quantized[weight].load()), value, rtol=1e-6, atol=1e-8)
    found = stream(folder, [Batch(IDS)])[0].view_as(logits)  # weights of float16 checkpoints are rounded to float16 here, and not there
    torch.testing.assert_close(found, logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "variant"), [("hqq_folder", "mixed"), ("bitnet", "auto"), ("aqlm_folder", "2x8")])
def test_written_back_as_it_was(peer_folder, tmp_path, name, variant):
    """All tensors bit for bit, and the keys of quantization_config."""
    folder = peer_folder(name, variant)
    checkpoint = open_checkpoint(folder)
    TARGETS[checkpoint.kind].write(checkpoint, tmp_path)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    different = [key for key in theirs if theirs[key].dtype != ours[key].dtype or not torch.equal(theirs[key], ours[key])]
    assert all(key.endswith(".round_zero") for key in different)  # hqq's note of an option that has no part in decoding
    sections = [json.loads((where / "config.json").read_text()).get("quantization_config", {}) for where in (folder, tmp_path)]
    assert sections[0].keys() <= sections[1].keys()
