"""lowbit's own folders: every number format of the table, whole jobs, what transformers makes of them with and without lowbit.hf, and files that are damaged."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import numerics
from lowbit.checkpoints import open_checkpoint, own
from lowbit.checkpoints.checkpoint import Checkpoint, LazyQuantized
from lowbit.errors import CheckpointError, FormatError, ModelError
from lowbit.numerics import FORMATS, integer, parts
from lowbit.pipeline.convert import convert
from lowbit.pipeline.streaming import Batch
from lowbit.scheme import INT, Activation, Rounding, Scheme
from lowbit.tensor import QuantizedTensor

NAME = "model.layers.0.self_attn.q_proj.weight"
SCHEMES = [
    *(numerics.scheme_of(name) for name in FORMATS if name != INT), *(Scheme(bits=b, symmetric=b % 2 == 0) for b in (2, 3, 4, 5, 8)), Scheme(bits=3, block=(-1, -1)),
    Scheme(bits=2, block=(64, 1), symmetric=False, zero_dtype="float", scale_dtype="float16"), Scheme("nf4", 4, (1, 64), nested=256), Scheme("nf4", 4, (1, 48)),
    Scheme(bits=4, outliers=3), Scheme(bits=4, outliers=3, outlier_bits=8), Scheme(bits=8, block=(1, -1), act=Activation(range="textbook", threshold=6.0)), Scheme("ternary", 2, (-1, -1)),
]  # fmt: skip


def weights(rows=64, columns=256):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def any_blocks(scheme, rows=64, columns=256):
    """Of a format that is only read."""
    blocks = torch.randint(0, 256, (rows, numerics.nbytes(scheme, (1, columns))), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return QuantizedTensor(scheme, (rows, columns), "bfloat16", {"blocks": blocks})


def written(qt, folder, activations=None):
    folder.mkdir(exist_ok=True)
    entry = LazyQuantized(qt.scheme, qt.shape, getattr(torch, qt.dtype), lambda: qt)
    own.write(Checkpoint("safetensors", None, {"model_type": "llama"}, {}, {NAME: entry}, activations=activations or {}), folder)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_every_format_comes_back_bit_for_bit(tmp_path, scheme):
    qt = numerics.quantize(weights().bfloat16(), scheme) if FORMATS[scheme.format].quantize else any_blocks(scheme)
    activations = {NAME: Rounding(scheme.act)} if scheme.act else {}
    opened = open_checkpoint(written(qt, tmp_path, activations))
    found = opened.quantized[NAME].load()
    assert opened.kind == "lowbit" and not opened.tensors and opened.activations == activations
    assert (found.scheme, found.shape, found.dtype) == (scheme, qt.shape, "bfloat16") and found.parts.keys() == qt.parts.keys()
    assert all(torch.equal(found.parts[part], value) and found.parts[part].dtype == value.dtype for part, value in qt.parts.items())
    decoded = torch.cat(list(opened.quantized[NAME].values(chunk_bytes=5 * 4 * 256)))  # five rows at a time
    assert torch.equal(decoded.nan_to_num(), numerics.dequantize(qt).nan_to_num())
    stored = load_file(tmp_path / "model.lowbit.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == parts.shapes(scheme, qt.shape).keys() - (set() if "g_idx" in qt.parts else set(parts.optional(scheme)))
    if scheme.outliers is None and scheme.format not in ("binary", "aqlm_1x10", "aqlm_1x12", "aqlm_2x12") and "zero_point" not in qt.parts:
        assert opened.quantized[NAME].nbytes == numerics.nbytes(scheme, qt.shape)  # what is promised is what is stored


def test_act_order_comes_back(tmp_path):
    qt = numerics.quantize(weights(), Scheme(bits=3))
    qt.parts["g_idx"] = torch.randint(0, 4, (256,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    entry = open_checkpoint(written(qt, tmp_path)).quantized[NAME]
    assert torch.equal(numerics.dequantize(entry.load()), integer.dequantize(qt))
    assert torch.equal(torch.cat(list(entry.values(chunk_bytes=5 * 4 * 256))), integer.dequantize(qt))


@pytest.mark.parametrize("recipe", ["quip-2", "int3-asym-g32-out4-rtn", "int8-sym-channel-a8-rtn", "q4_0-rtn"])
def test_whole_job(save_model, tmp_path, recipe, stream, text_file):
    """quantize writes it, our reader streams it, lowbit.load and transformers give the same logits."""
    import lowbit.hf

    source = save_model("llama-tied", tmp_path / "model", dtype=torch.bfloat16)
    lowbit.quantize(source, recipe, tmp_path / "out", target_name="lowbit", calibration=text_file, n_samples=4, seq_len=32)
    assert not list((tmp_path / "out").glob("model.safetensors*"))
    ids = torch.arange(40).view(1, 40)
    expected = stream(tmp_path / "out", [Batch(ids)])[0]
    with torch.no_grad():
        ours = lowbit.load(tmp_path / "out", dtype="float32")
        torch.testing.assert_close(ours(ids).logits, expected.view(1, 40, -1), rtol=1e-5, atol=1e-5)
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant="lowbit", dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
        assert ours.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 45)
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral", "gemma3-vision", "llama-tied"])
def test_transformers_reports_nothing_that_is_not_so(save_model, tmp_path, name):
    """Names that transformers changes, and a head tied to an embedding that is quantized: nothing is "newly initialized"."""
    import lowbit.hf

    lowbit.quantize(save_model(name, tmp_path / "model"), "int8-sym-g32-rtn", tmp_path / "out", target_name="lowbit")
    folder = convert(tmp_path / "out", "lowbit", tmp_path / "all", outside="q8_0").path
    auto = transformers.AutoModelForImageTextToText if name == "gemma3-vision" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, variant="lowbit", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, lowbit.load(folder, dtype="float32")(ids).logits, rtol=1e-4, atol=1e-5)


def test_experts_and_shards(save_model, tmp_path, stream):
    """Experts are decoded, also by transformers; several shards have transformers' names."""
    import lowbit.hf

    source = save_model("mixtral", tmp_path / "model")
    lowbit.quantize(source, "e8p4-rtn", tmp_path / "out", target_name="lowbit", max_shard_size=60_000)
    assert len(list((tmp_path / "out").glob("model.lowbit-00*.safetensors"))) > 1 and (tmp_path / "out" / "model.safetensors.index.lowbit.json").is_file()
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        expected = stream(tmp_path / "out", [Batch(ids)])[0].view(1, 40, -1)
        torch.testing.assert_close(lowbit.load(tmp_path / "out", dtype="float32")(ids).logits, expected, rtol=1e-5, atol=1e-5)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant="lowbit", dtype=torch.float32)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_conv1d_and_casts(save_model, tmp_path):
    """GPT-2's transposed layers; a model in bfloat16 keeps float32 scales."""
    source = save_model("gpt2", tmp_path / "model")
    lowbit.quantize(source, "mxfp6-rtn", tmp_path / "out", target_name="lowbit")
    decoded = convert(tmp_path / "out", "safetensors", tmp_path / "dense").path
    ids = torch.arange(30).view(1, 30)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(lowbit.load(tmp_path / "out", dtype="float32")(ids).logits, expected, rtol=1e-5, atol=1e-5)
        half = lowbit.load(tmp_path / "out", dtype="float32").bfloat16()
        assert half.transformer.h[0].attn.c_attn._scale.dtype == torch.uint8 and torch.isfinite(half(ids).logits).all()


def test_experts_with_rounded_inputs_need_lowbit(save_model, tmp_path):
    import lowbit.hf

    lowbit.quantize(save_model("mixtral", tmp_path / "model"), "int8-sym-channel-a8-rtn", tmp_path / "out", target_name="lowbit")
    with pytest.raises(ModelError, match=r"lowbit\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant="lowbit")


@pytest.fixture
def sound(tmp_path):
    return written(numerics.quantize(weights(), numerics.scheme_of("ternary")), tmp_path / "sound")


def refused(folder, *, load=True):
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(folder).quantized[NAME].load()
    return str(found.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=2), "reads version 1"), (lambda s: s.update(schemes=3), "expected a list"), (lambda s: s.update(weights=[]), "expected an object"),
        (lambda s: s["schemes"][0].update(format="int99"), "no scheme"), (lambda s: s["schemes"][0].update(extra=1), "no scheme"), (lambda s: s["schemes"][0].update(block=[1]), "no scheme"),
        (lambda s: s["schemes"][0].update(block=[0, 1]), "no scheme"), (lambda s: s["schemes"][0].update(bits=7), "no scheme"), (lambda s: s["weights"][NAME].update(scheme=1), "a place in schemes"),
        (lambda s: s["weights"][NAME].update(scheme=-1), "a place in schemes"), (lambda s: s["weights"][NAME].update(shape=[64, -1]), "shape"),
        (lambda s: s["weights"][NAME].update(shape=[2**50, 2**50]), "shape"), (lambda s: s["weights"][NAME].update(shape=[64, 128]), "needs torch.int32"),
        (lambda s: s["weights"][NAME].update(dtype="int8"), "dtype"), (lambda s: s["weights"][NAME].update(activation={"act": 1}), "no rounding"),
        (lambda s: s["weights"].update(x=None), "expected scheme"),
    ],
)  # fmt: skip
def test_hostile_config(sound, change, message):
    config = json.loads((sound / "config.json").read_text())
    change(config["quantization_config"])
    (sound / "config.json").write_text(json.dumps(config))
    assert message in refused(sound)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("codes", lambda t: None, "is missing"), ("codes", lambda t: t[:-1].clone(), "needs torch.int32"), ("codes", lambda t: t.to(torch.int64), "needs torch.int32"),
        ("scale", lambda t: t * float("nan"), "NaN or infinity"), ("codes", lambda t: torch.full_like(t, -1), "ternary code is 3"), ("weight", lambda t: torch.zeros(64, 256), "twice"),
    ],
)  # fmt: skip
def test_hostile_tensors(sound, part, change, message):
    file = sound / "model.lowbit.safetensors"
    tensors = load_file(file)
    key = f"{NAME.removesuffix('weight')}{part}"
    made = change(tensors.pop(key, None))
    save_file({**tensors, **({} if made is None else {key: made})}, file, metadata={"format": "pt"})
    assert message in refused(sound)


def test_zero_points_beyond_the_codes(tmp_path):
    folder = written(numerics.quantize(weights(), Scheme(bits=4, block=(1, 32), symmetric=False)), tmp_path / "out")
    file = folder / "model.lowbit.safetensors"
    tensors = load_file(file)
    tensors[f"{NAME.removesuffix('weight')}zero_point"][0, 0] = 16
    save_file(tensors, file, metadata={"format": "pt"})
    assert "a zero-point is 16; expected at most 15" in refused(folder)


def test_values_that_the_dtype_does_not_hold_are_refused_by_rows_too(tmp_path):
    """int8 with a scale of 1000 stands for float16 numbers beyond 65504."""
    qt = numerics.quantize(weights(), Scheme(bits=8))
    large = QuantizedTensor(qt.scheme, qt.shape, "float16", {**qt.parts, "scale": torch.full_like(qt.parts["scale"], 1000)})
    opened = open_checkpoint(written(large, tmp_path))
    for read in (lambda: opened.dense(NAME), lambda: opened.lazy(NAME).read(0, 5)):
        with pytest.raises(FormatError, match="NaN or infinite"):
            read()


@pytest.mark.parametrize("name", ["nf4", "int4-asym-g64", "mxfp4", "q4_0"])
def test_rows_past_the_end_are_left_out(tmp_path, name):
    recipe = {"int4-asym-g64": Scheme(bits=4, block=(1, 64), symmetric=False)}
    qt = numerics.quantize(weights(), recipe.get(name) or numerics.scheme_of(name))
    lazy = open_checkpoint(written(qt, tmp_path)).lazy(NAME)
    assert torch.equal(lazy.read(60, 100), lazy.load()[60:]) and lazy.read(60, 100).shape == (4, 256)
