"""Folders of safetensors: shards, index, alignment, same input same bytes. Bad ones: tests/hostile."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file

from lowbit.checkpoints import safetensors
from lowbit.checkpoints.checkpoint import Checkpoint

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
