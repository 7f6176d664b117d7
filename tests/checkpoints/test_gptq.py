"""GPTQ, AWQ and AutoRound folders: GPTQModel's own packed tensors, golden words, round trips, whole jobs, and files that are damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import numerics
from lowbit.checkpoints import ct_layouts, gptq, open_checkpoint
from lowbit.checkpoints.checkpoint import Checkpoint, LazyQuantized
from lowbit.errors import CheckpointError, LowbitError, RecipeError, ShapeError
from lowbit.numerics import integer
from lowbit.pipeline.convert import convert
from lowbit.pipeline.streaming import Batch
from lowbit.scheme import Scheme

NAME = "model.layers.0.self_attn.q_proj.weight"
X = NAME.removesuffix(".weight")
SCHEMES = [
    ("gptq", Scheme(bits=b, block=block, symmetric=symmetric, scale_dtype="float16")) for b in (2, 3, 4, 8) for block in ((1, 32), (1, -1)) for symmetric in (True, False)
] + [(kind, Scheme(bits=4, block=(1, 32), symmetric=symmetric, scale_dtype="float16")) for kind in ("awq", "auto-round") for symmetric in (True, False)]  # fmt: skip


def weights(rows=64, columns=96):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def written(kind, qt, folder):
    folder.mkdir(exist_ok=True)
    gptq.write(kind)(Checkpoint("safetensors", None, {"dtype": qt.dtype}, {}, {NAME: LazyQuantized(qt.scheme, qt.shape, getattr(torch, qt.dtype), lambda: qt)}), folder)
    return folder


@pytest.fixture(scope="module")
def stored():
    return load_file(Path(__file__).parents[1] / "oracles" / "gptqmodel.safetensors")


@pytest.mark.parametrize("order", ["natural", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodels_own_tensors(stored, bits, order):
    key = f"{bits}.{order}"
    scheme = Scheme(bits=bits, block=(1, 32), symmetric=False, scale_dtype="float16")
    parts = {part: stored[f"{key}.{part}"] for part in gptq.PARTS}
    made = gptq.decode(parts, scheme, (64, 96), "float16", gptq.V2)
    assert torch.equal(made.parts["codes"], stored[f"{key}.codes"]) and torch.equal(made.parts["zero_point"], stored[f"{key}.zero"])
    assert ("g_idx" in made.parts) == (order == "act-order")
    index = parts["g_idx"].long()
    expected = (stored[f"{key}.codes"].float() - stored[f"{key}.zero"].float()[:, index]) * parts["scales"].float().T[:, index]
    assert torch.equal(numerics.dequantize(made), expected)
    back = gptq.encode(made, gptq.V2)
    assert all(torch.equal(back[part], parts[part]) for part in gptq.PARTS)
    older = {**parts, "qzeros": stored[f"{key}.qzeros_v1"]}
    assert torch.equal(gptq.decode(older, scheme, (64, 96), "float16", gptq.V1).parts["zero_point"], stored[f"{key}.zero"])
    assert torch.equal(gptq.encode(made, gptq.V1)["qzeros"], stored[f"{key}.qzeros_v1"])


def test_golden_words():
    """The words that the formats' descriptions give."""
    qt = numerics.quantize(weights(), Scheme(bits=4, block=(1, 32), scale_dtype="float16"))
    assert set(gptq.encode(qt, gptq.V1)["qzeros"].unique().tolist()) == {0x77777777}
    assert {word & 0xFFFFFFFF for word in gptq.encode(qt, gptq.V2)["qzeros"].unique().tolist()} == {0x88888888}
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1).repeat(4, 32)
    awq = gptq.encode(integer.from_codes(codes, torch.ones(32, 1), None, Scheme(bits=4, block=(1, 32), scale_dtype="float16"), "float16"), gptq.AWQ)
    assert set(awq["qweight"].unique().tolist()) == {0x75316420}


@pytest.mark.parametrize(("kind", "scheme"), SCHEMES, ids=lambda value: getattr(value, "name", value))
def test_round_trip_bit_for_bit(tmp_path, kind, scheme):
    qt = numerics.quantize(weights().half(), scheme)
    opened = open_checkpoint(written(kind, qt, tmp_path))
    assert opened.kind == kind and not opened.tensors
    found = opened.quantized[NAME].load()
    assert found.scheme == scheme and set(found.parts) == set(qt.parts)
    assert all(torch.equal(found.parts[key], value) and found.parts[key].dtype == value.dtype for key, value in qt.parts.items())
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert first == {file.name: file.read_bytes() for file in written(kind, qt, tmp_path / "again").iterdir()}


def test_act_order_comes_back(stored, tmp_path):
    scheme = Scheme(bits=4, block=(1, 32), symmetric=False, scale_dtype="float16")
    qt = gptq.decode({part: stored[f"4.act-order.{part}"] for part in gptq.PARTS}, scheme, (64, 96), "float16", gptq.V2)
    found = open_checkpoint(written("gptq", qt, tmp_path)).quantized[NAME].load()
    assert torch.equal(found.parts["g_idx"], qt.parts["g_idx"]) and torch.equal(numerics.dequantize(found), numerics.dequantize(qt))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["desc_act"] is True  # without it vLLM's kernels take groups of neighbours
    assert json.loads((tmp_path / "quantize_config.json").read_text())["desc_act"] is True


@pytest.mark.parametrize(("kind", "recipe"), [("gptq", "int4-sym-g32-gptq"), ("gptq", "int3-asym-g32-rtn"), ("awq", "int4-asym-g32-awq-rtn"), ("auto-round", "int4-sym-g32-rtn")])
def test_a_whole_job(save_model, stream, tmp_path, text_file, kind, recipe):
    """What is written streams as a dense folder of the same values does, and can be quantized again."""
    model = save_model("qwen2", tmp_path / "model", dtype=torch.float16)  # with biases
    made = lowbit.quantize(model, recipe, tmp_path / "packed", target_name=kind, calibration=text_file, n_samples=4, seq_len=32)
    lowbit.quantize(model, recipe, tmp_path / "dense", target_name="safetensors", calibration=text_file, n_samples=4, seq_len=32)
    ids = [Batch(torch.randint(3, 280, (2, 24), generator=torch.Generator().manual_seed(3)))]
    assert made.path == tmp_path / "packed"
    one, other = stream(tmp_path / "packed", ids)[0], stream(tmp_path / "dense", ids)[0]
    assert float((one - other).norm()) < 5e-3 * float(other.norm())  # scales in float16 in one, of the model's dtype in both
    lowbit.quantize(tmp_path / "packed", "int8-sym-channel-rtn", tmp_path / "again", target_name="compressed-tensors")
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == kind and section["bits"] in (3, 4)


@pytest.mark.parametrize(
    ("kind", "scheme", "shape", "error", "message"),
    [
        ("gptq", Scheme(bits=5, scale_dtype="float16"), (64, 64), RecipeError, "gptq cannot hold int5"),
        ("awq", Scheme(bits=3, scale_dtype="float16"), (64, 64), RecipeError, "awq cannot hold int3"),
        ("gptq", Scheme("nf4", 4, (1, 64)), (64, 64), RecipeError, "gptq cannot hold nf4"), ("gptq", Scheme("float16", 16), (64, 64), RecipeError, "packs every linear layer"),
        ("gptq", Scheme(bits=4), (64, 64), RecipeError, "stores scales in float16"), ("gptq", Scheme(bits=4, block=(1, 32), scale_dtype="float16"), (40, 64), ShapeError, "multiples of 32"),
        ("gptq", Scheme(bits=4, block=(1, 64), scale_dtype="float16"), (64, 96), ShapeError, "whole groups"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind, scheme, shape, error, message):
    with pytest.raises(error, match=message):
        gptq.check(kind)(scheme, shape, "x")


@pytest.fixture
def sound(tmp_path):
    return written("gptq", numerics.quantize(weights().half(), Scheme(bits=4, block=(1, 32), symmetric=False, scale_dtype="float16")), tmp_path / "sound")


def refused(folder, message, *, load=False):
    with pytest.raises(CheckpointError, match=message):
        opened = open_checkpoint(folder)
        if load:
            opened.quantized[NAME].load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits 5"), ({"bits": "4"}, "bits '4'"), ({"bits": True}, "bits True"), ({"group_size": 0}, "group_size 0"), ({"group_size": -32}, "group_size -32"),
        ({"group_size": 16}, "qzeros is"),
        ({"sym": 1}, "symmetric 1"), ({"checkpoint_format": "marlin"}, "layout is 'marlin'"), ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic overrides"), ({"bits": 8}, "qzeros is|needs"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "packing_format is"), ({"quant_method": "awq", "version": "gemv"}, "of AWQ this version reads gemm"),
        ({"quant_method": "auto-round", "packing_format": "auto_round", "extra_config": [1]}, "extra_config is"), ({"quant_method": "sinq"}, "does not read"),
    ],
)  # fmt: skip
def test_hostile_config(sound, changes, message):
    config = json.loads((sound / "config.json").read_text())
    config["quantization_config"].update(changes)
    (sound / "config.json").write_text(json.dumps(config))
    refused(sound, message)


@pytest.mark.parametrize(
    ("part", "tensor", "message", "load"),
    [
        ("qweight", torch.zeros(12, 64), "qweight is", False),
        ("qweight", torch.zeros(0, 64, dtype=torch.int32), "expected a matrix", False),
        ("qweight", torch.zeros(12, dtype=torch.int32), "expected a matrix", False),
        ("qzeros", torch.zeros(3, 7, dtype=torch.int32), "qzeros is", False),
        ("scales", torch.zeros(3, 64, dtype=torch.int32), "scales is", False), ("scales", torch.zeros(2, 64).half(), "scales is", False),
        ("scales", torch.full((3, 64), float("nan")).half(), "NaN or infinity", True),
        ("g_idx", torch.full((96,), 3, dtype=torch.int32), "g_idx reaches", True),
        ("g_idx", torch.full((96,), -1, dtype=torch.int32), "g_idx reaches", True),
        ("g_idx", torch.zeros(95, dtype=torch.int32), "g_idx is", False), ("qweight", None, "has no qweight|belongs to no", False), ("scales", None, "has no scales", False),
    ],
)  # fmt: skip
def test_hostile_tensors(sound, part, tensor, message, load):
    tensors = load_file(sound / "model.safetensors")
    tensors[f"{X}.{part}"] = tensor
    save_file({key: value for key, value in tensors.items() if value is not None}, sound / "model.safetensors", metadata={"format": "pt"})
    refused(sound, message, load=load)


def test_a_symmetric_config_with_other_zero_points(sound):
    config = json.loads((sound / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (sound / "config.json").write_text(json.dumps(config))
    refused(sound, "the config says that it is symmetric", load=True)


def test_conversions_keep_every_value(save_model, tmp_path, stored):
    """Between GPTQ, AWQ, AutoRound and compressed-tensors, in a circle, decoded weights stay bit for bit; act-order only fits gptq."""
    model = save_model("llama", tmp_path / "model", dtype=torch.float16)
    lowbit.quantize(model, "int4-asym-g32-rtn", tmp_path / "gptq", target_name="gptq")
    first = open_checkpoint(tmp_path / "gptq")
    source = tmp_path / "gptq"
    for kind in ("compressed-tensors", "awq", "auto-round", "gptq"):
        source = convert(source, kind, tmp_path / f"to-{kind}").path
        made = open_checkpoint(source)
        assert made.kind == kind and set(made.quantized) == set(first.quantized)
        assert all(torch.equal(made.dense(name), first.dense(name)) for name in first.quantized)
    lowbit.quantize(model, "int4-sym-g32-rtn", tmp_path / "sym", target_name="gptq")
    assert convert(tmp_path / "sym", "gguf", tmp_path / "out.gguf").path.is_file()
    qt = gptq.decode({part: stored[f"4.act-order.{part}"] for part in gptq.PARTS}, Scheme(bits=4, block=(1, 32), symmetric=False, scale_dtype="float16"), (64, 96), "float16", gptq.V2)
    for kind in ("awq", "auto-round"):
        with pytest.raises(LowbitError, match="act-order"):
            written(kind, qt, tmp_path / f"order-{kind}")
    with pytest.raises(LowbitError, match="act-order"):
        ct_layouts.encode(qt)


def test_scales_that_would_change_are_refused(save_model, tmp_path):
    model = save_model("llama", tmp_path / "model")
    lowbit.quantize(model, "int4-sym-g32-rtn", tmp_path / "packed")  # scales in float32
    with pytest.raises(LowbitError, match="cannot be written as float16 without loss"):
        convert(tmp_path / "packed", "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
