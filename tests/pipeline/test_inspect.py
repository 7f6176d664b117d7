"""inspect of every kind of file that lowbit reads, and the histogram of one tensor."""

import struct

import pytest
import torch

from lowbit.checkpoints import open_checkpoint, safetensors
from lowbit.checkpoints.gguf import read_header
from lowbit.errors import CheckpointError, RecipeError
from lowbit.pipeline.inspect import inspect, tensor_histogram
from lowbit.pipeline.quantize import quantize

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = 2 * 320 * 64 + 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.fixture(scope="module")
def folder(save_model, tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("inspect") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    return quantize(folder, "int4-asym-g32-rtn", tmp_path_factory.mktemp("ct") / "out").path


@pytest.fixture(scope="module")
def gguf_file(folder, tmp_path_factory):
    return quantize(folder, "q4_0", tmp_path_factory.mktemp("gguf") / "out.gguf").path


def test_a_dense_folder(folder):
    found = inspect(folder)
    assert (found.kind, found.bits_per_weight, found.files[0]) == ("safetensors", 16.0, "tokenizer.json")
    assert (found.weights, found.tensor_bytes) == (WEIGHTS, 2 * WEIGHTS)
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size
    assert found.config == {
        "model_type": "llama", "architecture": "LlamaForCausalLM", "layers": 3, "hidden_size": 64, "intermediate_size": 128, "heads": 4, "kv_heads": 2,
        "head_dim": 16, "vocabulary": 320, "context": 128, "tied_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    assert list(found.formats) == ["bfloat16"] and found.provenance == {}


def test_a_compressed_tensors_folder(packed):
    """int4 asymmetric g32: 4 bits, a bfloat16 scale and a packed zero-point for 32 weights, 16 bytes of shape."""
    found = inspect(packed)
    row = next(row for row in found.tensors if row.name == Q_PROJ)
    assert (row.format, row.shape, row.size_bytes) == ("int4-asym-g32", (64, 64), 64 * 64 // 2 + 64 * 2 * 2 + 8 * 2 * 4 + 16)
    assert row.bits_per_weight == 8 * row.size_bytes / 4096
    assert found.formats["int4-asym-g32"].tensors == 21 and found.formats["bfloat16"].weights == 2 * 320 * 64 + 7 * 64
    assert found.tensor_bytes == open_checkpoint(packed).tensor_bytes == sum(total.size_bytes for total in found.formats.values())
    assert found.provenance["recipe"]["name"] == "int4-asym-g32-rtn"


def test_a_gguf(gguf_file):
    found = inspect(gguf_file)
    formats = {row.name: (row.format, row.bits_per_weight) for row in found.tensors}
    assert formats[Q_PROJ] == ("q4_0", 4.5) and formats["lm_head.weight"] == ("q8_0", 8.5) and formats["model.norm.weight"] == ("float32", 32.0)
    assert found.kind == "gguf" and found.file_bytes == gguf_file.stat().st_size
    assert found.tensor_bytes == sum(info.nbytes for info in read_header(gguf_file).tensors.values())


def test_a_type_that_is_decoded_when_read_is_shown_as_stored(gguf_file, tmp_path):
    """q4_0 and iq4_nl (20 in ggml's enum) have blocks of one size, so one can be called the other."""
    data = gguf_file.read_bytes()
    name = b"blk.0.attn_q.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", data, place) == (2,)
    changed = tmp_path / "iq4.gguf"
    changed.write_bytes(data[:place] + struct.pack("<I", 20) + data[place + 4 :])
    row = next(row for row in inspect(changed).tensors if row.name == Q_PROJ)
    assert (row.format, row.size_bytes, row.bits_per_weight) == ("iq4_nl", 64 * 64 // 32 * 18, 4.5)


def test_names_are_in_natural_order(save_model, tmp_path):
    layers = [int(row.name.split(".")[2]) for row in inspect(save_model("llama", tmp_path, num_hidden_layers=11)).tensors if ".layers." in row.name]
    assert layers == sorted(layers) and layers[-1] == 10


def test_experts_and_transposed_matrices_of_a_gguf(save_model, tmp_path):
    """GGUF stacks experts, and its reader shows what GPT-2 stores transposed as float16; the bytes are those of the file."""
    for kind, name in (("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"), ("gpt2", "transformer.h.0.mlp.c_fc.weight")):
        path = quantize(save_model(kind, tmp_path / kind), "q4_0", tmp_path / f"{kind}.gguf").path
        found = inspect(path)
        row = next(row for row in found.tensors if row.name == name)
        assert (row.format, row.bits_per_weight) == ("q4_0", 4.5)
        assert found.tensor_bytes == sum(info.nbytes for info in read_header(path).tensors.values())


def test_histogram_of_known_values(tmp_path):
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 4.0, 4.0, float("nan")]])
    with safetensors.ShardWriter(tmp_path, entries=2) as writer:
        writer.add("a.weight", values)
        writer.add("flat", torch.full((5,), 2.0))
        writer.add("bad", torch.full((5,), float("inf")))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = tensor_histogram(tmp_path, "a", bins=4)
    assert (found.name, found.counts, found.edges, found.bad_values) == ("a.weight", (1, 1, 1, 4), (0.0, 1.0, 2.0, 3.0, 4.0), 1)
    assert (found.minimum, found.maximum, found.mean) == (0.0, 4.0, pytest.approx(18 / 7))
    assert found.std == pytest.approx(values[values.isfinite()].std(correction=0).item())
    flat = tensor_histogram(tmp_path, "flat", bins=3)
    assert (flat.counts, flat.edges[0], flat.edges[-1], flat.std) == ((0, 5, 0), 1.5, 2.5, 0.0)
    with pytest.raises(CheckpointError, match="holds no finite value"):
        tensor_histogram(tmp_path, "bad")


def test_histogram_of_a_quantized_matrix_is_of_its_decoded_values(packed):
    found, values = tensor_histogram(packed, Q_PROJ), open_checkpoint(packed).dense(Q_PROJ).float()
    assert found.format == "int4-asym-g32" and sum(found.counts) == 4096 and len(found.counts) == 40
    assert (found.minimum, found.maximum) == (values.min().item(), values.max().item())
    assert found.mean == pytest.approx(values.mean().item(), abs=1e-7) and found.std == pytest.approx(values.std(correction=0).item(), rel=1e-5)


def test_histogram_of_many_chunks_is_that_of_one(folder, monkeypatch):
    whole = tensor_histogram(folder, "lm_head")
    monkeypatch.setattr("lowbit.pipeline.inspect.CHUNK", 1000)
    parts = tensor_histogram(folder, "lm_head")
    assert parts.counts == whole.counts and parts.std == pytest.approx(whole.std)


def test_errors(folder, tmp_path):
    with pytest.raises(CheckpointError, match="holds no tensor model.layers.0.attn.q_proj. Its tensors are called like"):
        tensor_histogram(folder, "model.layers.0.attn.q_proj")
    with pytest.raises(RecipeError, match="bins is 0"):
        tensor_histogram(folder, Q_PROJ, bins=0)
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "nothing")
