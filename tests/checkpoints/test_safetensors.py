"""Folders of safetensors: shards, index, alignment, same input same bytes, and every way a folder can be wrong."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoints import safetensors
from lowbit.checkpoints.checkpoint import Checkpoint, LazyTensor
from lowbit.errors import CheckpointError

MIXED = {
    "a.odd": torch.arange(3, dtype=torch.uint8),
    "b.weight": torch.arange(12.0).view(3, 4),
    "c.half": torch.arange(5, dtype=torch.float16),
    "d.words": torch.arange(7, dtype=torch.int32).view(7, 1),
    "e.brain": torch.arange(9, dtype=torch.bfloat16).view(3, 3),
    "f.shape": torch.tensor([3, 4]),
    "g.scalar": torch.tensor(2.5),
    "h.flag": torch.tensor([True, False, True]),
    "i.byte": torch.tensor([-1, 2], dtype=torch.int8),
    "j.empty": torch.empty(0, 4),
    "k.transposed": torch.arange(6.0).view(2, 3).T,
}


def write(folder, tensors, **options):
    folder.mkdir(exist_ok=True)
    writer = safetensors.ShardWriter(folder, entries=len(tensors), **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return folder


def header_of(file):
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), 8 + size, data


@pytest.fixture
def folder(tmp_path):
    """A sound folder of three shards."""
    (tmp_path / "config.json").write_text("{}")
    return write(tmp_path, {f"w{i}": torch.full((8, 8), float(i)) for i in range(3)}, max_bytes=300)


def test_mixed_dtypes_come_back_and_are_aligned(tmp_path):
    write(tmp_path, MIXED)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(MIXED)
    for name, tensor in MIXED.items():
        assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape and torch.equal(stored[name], tensor), name
    header, start, data = header_of(tmp_path / "model.safetensors")
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        assert begin == end and begin % MIXED[name].element_size() == 0, name
        end = stop
    assert start + end == len(data)


def test_lazy_tensors_read_rows_and_scalars(tmp_path):
    write(tmp_path, MIXED)
    tensors = safetensors.open_tensors(tmp_path)
    assert torch.equal(tensors["b.weight"].read(1, 3), MIXED["b.weight"][1:3])
    assert tensors["g.scalar"].load() == 2.5 and tensors["j.empty"].load().shape == (0, 4)
    assert {name: (t.shape, t.dtype, t.nbytes) for name, t in tensors.items()} == {
        name: (tuple(t.shape), t.dtype, t.numel() * t.element_size()) for name, t in MIXED.items()
    }


def test_same_input_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, MIXED, max_bytes=64)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir()) and len(files) > 3
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_shards_and_index(folder):
    """Three tensors of 256 bytes with a limit of 300: one each."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 768}
    assert index["weight_map"] == {f"w{i}": f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)}
    assert not list(folder.glob("*.tmp"))
    tensors = safetensors.open_folder(folder).tensors
    assert [tensors[f"w{i}"].load()[0, 0].item() for i in range(3)] == [0, 1, 2]


def test_a_tensor_larger_than_the_limit_gets_a_shard_by_itself(tmp_path):
    write(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(100), "c": torch.zeros(4)}, max_bytes=64)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors", "c": "model-00003-of-00003.safetensors"}


def test_usual_names_fit_one_shard(tmp_path):
    names = [f"model.layers.{layer}.self_attn.{part}.weight_zero_point" for layer in range(100) for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    write(tmp_path, {name: torch.zeros(2) for name in names})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_more_tensors_than_expected_begin_a_new_shard(tmp_path):
    tmp_path.joinpath("x").mkdir()
    writer = safetensors.ShardWriter(tmp_path / "x", entries=1)
    for i in range(50):
        writer.add(f"tensor.{i}", torch.full((2,), float(i)))
    writer.close()
    tensors = safetensors.open_tensors(tmp_path / "x")
    assert [tensors[f"tensor.{i}"].load()[0].item() for i in range(50)] == list(range(50))
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1


def test_no_tensors_is_an_empty_file(tmp_path):
    write(tmp_path, {})
    assert safetensors.open_tensors(tmp_path) == {}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A bfloat16 Llama with sizes that are not multiples of 8, and the folder that transformers saved of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 30, "intermediate_size": 27, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 41}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    return model, path


def loads_equal(folder, model):
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_several_shards_load_in_transformers(tiny, tmp_path):
    model, source = tiny
    write(tmp_path, {name: tensor.load() for name, tensor in safetensors.open_tensors(source).items()}, max_bytes=10_000)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) >= 3
    loads_equal(tmp_path, model)


def test_write_folder(tiny, tmp_path):
    model, path = tiny
    source, told = safetensors.open_folder(path), []
    config = {**source.config, "quantization_config": {"quant_method": "gone"}}
    checkpoint = Checkpoint("safetensors", path, config, source.tensors, files=source.files, provenance={"from": "a test"})
    safetensors.write_folder(checkpoint, tmp_path, progress=told.append)
    loads_equal(tmp_path, model)
    again = safetensors.open_folder(tmp_path)
    assert again.provenance == {"from": "a test"} and again.config == source.config
    assert [f.name for f in again.files] == ["generation_config.json"]
    assert sum(told) == source.tensor_bytes == again.tensor_bytes


def test_input_is_not_modified_and_need_not_be_contiguous(tmp_path):
    tensor = torch.arange(12.0).view(3, 4).T
    write(tmp_path, {"w": tensor})
    assert torch.equal(tensor, torch.arange(12.0).view(3, 4).T)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor)


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        safetensors.open_folder(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert message.endswith(".") or ":" in message


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_shard(folder, keep):
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, "model-00002-of-00003.safetensors", "is not a whole safetensors file", "Download or copy it again")


@pytest.mark.parametrize("length", [2**63, 2**31, 10**6])
def test_header_length_beyond_the_file(folder, length):
    shard = folder / "model-00001-of-00003.safetensors"
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    refused(folder, "model-00001-of-00003.safetensors", "is not a whole safetensors file")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 10**9]},
        {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, -1]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [-8, -8], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [9, 8], "data_offsets": [0, 256]},
        {"dtype": "F999", "shape": [8, 8], "data_offsets": [0, 256]},
    ],
)
def test_header_that_lies(folder, entry):
    header = json.dumps({"w0": entry}).encode()
    (folder / "model-00001-of-00003.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(256))
    refused(folder, "model-00001-of-00003.safetensors")


def test_dtype_that_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2, dtype=torch.uint16)}, tmp_path / "model.safetensors")
    refused(tmp_path, "tensor 'w' has dtype U16")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/../../model.safetensors", "..\\model.safetensors", "", "a\0b"])
def test_index_that_points_outside(folder, name):
    save_file({"w0": torch.zeros(2)}, folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w0": name}}))
    refused(folder, repr(name), "outside the folder", "Refused")


def test_missing_shard(folder):
    os.remove(folder / "model-00003-of-00003.safetensors")
    refused(folder, "model-00003-of-00003.safetensors does not exist", "the index lists it")


def test_shards_mixed_up(folder):
    one, two = folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    one.write_bytes(two.read_bytes())
    refused(folder, "the index lists 'w0' in this shard, which does not hold it")


@pytest.mark.parametrize("weight_map", [None, [], {"w0": 3}, "x"])
def test_index_of_the_wrong_kind(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "expected an object weight_map")


@pytest.mark.parametrize("text", ["", "{", '{"a": }', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_bad_json(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    refused(folder, name, "cannot be read as JSON")


def test_json_that_is_not_utf8_or_not_an_object(folder):
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(folder, "config.json", "cannot be read as UTF-8 text")
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json", "holds a JSON list; expected an object")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"never opened")
    refused(tmp_path, name, "a pickle can run any code", "safetensors")


def test_no_weights_and_no_config(tmp_path):
    refused(tmp_path, "config.json does not exist")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no weights")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused(tmp_path, "holds other.safetensors but no model.safetensors")


def test_a_failed_write_leaves_no_final_name(tmp_path):
    def fail(start, stop):
        raise OSError("disk gone")

    checkpoint = Checkpoint(
        "safetensors", tmp_path, {}, {"a": LazyTensor((2,), torch.float32, lambda s, e: torch.zeros(2)), "b": LazyTensor((2,), torch.float32, fail)}
    )
    with pytest.raises(OSError, match="disk gone"):
        safetensors.write_folder(checkpoint, tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
