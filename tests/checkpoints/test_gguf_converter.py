"""GGUF files against llama.cpp's own converter (oracles/converter.json, see make_converter.py): metadata, tensors and tokenizers."""

import json
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType

from lowbit.checkpoints import gguf, gguf_tokenizer, safetensors
from lowbit.checkpoints.gguf_container import Metadata

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "converter.json").read_text(encoding="utf-8"))
ADDED = {"vocab_size", "rope.freq_base"}  # said by us where the converter leaves them to llama.cpp's default


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    """As in make_converter.py."""
    first = sum(map(ord, name))
    return ((torch.arange(shape.numel()) * 7 + first) % 255 - 127).float().div_(128).reshape(shape)


def put_tokenizer(folder: Path, name: str) -> None:
    for file, text in ORACLE["tokenizers"][name]["files"].items():
        (folder / file).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ORACLE["models"])
def test_metadata_and_tensors_are_the_converters(tmp_path, name):
    entry = ORACLE["models"][name]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**entry["config"]))
    for key, parameter in model.named_parameters():
        parameter.data = weights(key, parameter.shape)
    model.save_pretrained(tmp_path / "hf")
    put_tokenizer(tmp_path / "hf", "GPT-2's kind")
    gguf.write(safetensors.open_folder(tmp_path / "hf"), tmp_path / "ours.gguf")
    header = gguf.read_header(tmp_path / "ours.gguf")
    arch = header.get("general.architecture")
    theirs = {key: value for key, value in entry["metadata"].items() if key.startswith(f"{arch}.")}
    ours = {key: value for key, value in Metadata(header).items() if key.startswith(f"{arch}.")}
    assert theirs and {key: ours.get(key) for key in theirs} == pytest.approx(theirs)
    assert {key.removeprefix(f"{arch}.") for key in ours.keys() - theirs.keys()} <= ADDED
    shape = lambda info: [1, *info.shape] if info.name.endswith("ffn_gate_inp_shexp.weight") else list(info.shape)  # a matrix of one row there, which ggml takes for a vector
    found = {info.name: [GGMLQuantizationType(info.type_id).name, shape(info), zlib.crc32(info.rows.tobytes())] for info in header.tensors.values()}
    assert found == entry["tensors"]


@pytest.mark.parametrize("name", ORACLE["tokenizers"])
def test_tokenizers_are_the_converters(tmp_path, name):
    entry = ORACLE["tokenizers"][name]
    put_tokenizer(tmp_path, name)
    made = gguf_tokenizer.metadata(tuple(tmp_path.iterdir()), {}, entry["rows"], where=tmp_path)
    ours = {key: value for key, (_, value) in made.items()}
    theirs = {key: value for key, value in entry["metadata"].items() if not key.endswith(("add_sep_token", "eot_token_id"))}  # false, and Gemma's own number 107
    assert (ours.pop("tokenizer.ggml.pre"), theirs.pop("tokenizer.ggml.pre")) in {("gpt-2", "unknown"), ("llama-bpe", "unknown"), ("default", "default")}
    special = [i for i, kind in enumerate(theirs["tokenizer.ggml.token_type"]) if kind in (gguf_tokenizer.CONTROL, gguf_tokenizer.UNKNOWN)]
    for values in (ours, theirs):
        for i in special if "tokenizer.ggml.scores" in values else ():
            values["tokenizer.ggml.scores"][i] = 0.0  # -1000 or 0: they are never joined from pieces
    assert {key: ours.get(key) for key in theirs} == theirs
    assert ours.keys() - theirs.keys() <= {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"}
