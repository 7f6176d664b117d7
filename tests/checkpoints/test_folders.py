"""The layouts hqq, aqlm, bitnet and torchao: round trips, what the programs that they are of make of our folders, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import numerics
from lowbit.checkpoints import TARGETS, open_checkpoint
from lowbit.checkpoints.checkpoint import Checkpoint, LazyQuantized, LazyTensor
from lowbit.checkpoints.safetensors import read_metadata
from lowbit.errors import CheckpointError, LowbitError
from lowbit.pipeline.consumers import consumer_of
from lowbit.pipeline.verify import verify
from lowbit.scheme import Activation, Scheme

NAME = "model.layers.0.self_attn.q_proj.weight"
W8A8 = Activation(range="textbook")
SCHEMES = [
    *(("hqq", Scheme(bits=b, block=block, symmetric=False, zero_dtype="float", scale_dtype=dtype)) for b, dtype in ((1, "float32"), (2, "float16"), (3, "bfloat16"), (4, "float32"), (8, "float16"))
      for block in ((1, 32), (1, -1), (32, 1))),
    *(("aqlm", numerics.scheme_of(f"aqlm_{kind}")) for kind in ("1x8", "2x8", "1x10", "1x12")),
    ("bitnet", Scheme("ternary", 2, (-1, -1), act=W8A8)), ("bitnet", Scheme("ternary", 2, (-1, -1), scale_dtype="bfloat16", act=W8A8)),
    *(("torchao", Scheme(bits=b, block=block, symmetric=symmetric, scale_dtype=dtype)) for b, dtype in ((2, "float32"), (3, "float16"), (4, "bfloat16"), (8, "float32"))
      for block in ((1, 32), (1, -1)) for symmetric in (True, False)),
    ("torchao", Scheme(bits=4, block=(1, 32), symmetric=False, zero_dtype="float")), ("torchao", Scheme("fp8_e4m3", 8, (1, -1))), ("torchao", Scheme("fp8_e5m2", 8, (-1, -1))),
]  # fmt: skip


def weights(rows=64, columns=96):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def written(kind, qt, folder, bias=False):
    folder.mkdir(exist_ok=True)
    tensors = {NAME.replace("weight", "bias"): LazyTensor((qt.shape[0],), torch.float32, lambda start, stop: torch.ones(stop - start))} if bias else {}
    TARGETS[kind].write(Checkpoint("safetensors", None, {"dtype": qt.dtype}, tensors, {NAME: LazyQuantized(qt.scheme, qt.shape, getattr(torch, qt.dtype), lambda: qt)}), folder)
    return folder


def ids(value):
    return value.name + (f"-{value.scale_dtype}" if value.scale_dtype != "float32" else "") if isinstance(value, Scheme) else value


@pytest.mark.parametrize(("kind", "scheme"), SCHEMES, ids=ids)
def test_round_trip(tmp_path, kind, scheme):
    qt = numerics.quantize(weights().bfloat16(), scheme)
    opened = open_checkpoint(written(kind, qt, tmp_path))
    found = opened.quantized[NAME].load()
    assert opened.kind == kind and not opened.tensors and (found.scheme, found.shape, found.dtype) == (scheme, qt.shape, "bfloat16")
    assert found.parts.keys() == qt.parts.keys() and all(torch.equal(found.parts[part].float(), value.float()) for part, value in qt.parts.items())
    assert torch.equal(numerics.dequantize(found), numerics.dequantize(qt))
    TARGETS[kind].check(scheme, qt.shape, NAME)


def test_bitnet_with_biases_has_the_inverse_scale(tmp_path):
    """transformers' other class multiplies the bias by the scale, too. What is read again is an inverse of an inverse."""
    qt = numerics.quantize(weights(), Scheme("ternary", 2, (-1, -1), act=W8A8))
    folder = written("bitnet", qt, tmp_path, bias=True)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["linear_class"] == "bitlinear"
    found = open_checkpoint(folder).quantized[NAME].load()
    assert torch.equal(found.parts["codes"], qt.parts["codes"])
    torch.testing.assert_close(found.parts["scale"], qt.parts["scale"], rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("kind", "scheme", "shape", "message"),
    [
        ("hqq", Scheme(), (64, 96), "float zero-points"), ("hqq", Scheme(bits=5, symmetric=False, zero_dtype="float"), (64, 96), "cannot hold int5"),
        ("hqq", Scheme(block=(1, 40), symmetric=False, zero_dtype="float"), (64, 96), "whole groups"), ("aqlm", Scheme(), (64, 96), "additive codebooks"),
        ("bitnet", Scheme("ternary", 2, (-1, -1)), (64, 96), "inputs rounded"), ("bitnet", Scheme("ternary", 2, (1, -1), act=W8A8), (64, 96), "one scale"),
        ("bitnet", Scheme("ternary", 2, (-1, -1), act=W8A8), (63, 96), "multiple of 4"), ("torchao", Scheme(act=W8A8), (64, 96), "nothing rounded but weights"),
        ("torchao", Scheme(block=(-1, -1)), (64, 96), "Use channel"), ("torchao", Scheme(block=(1, 64)), (64, 96), "whole groups"), ("torchao", numerics.scheme_of("nf4"), (64, 96), "cannot hold nf4"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind, scheme, shape, message):
    with pytest.raises(LowbitError, match=message):
        TARGETS[kind].check(scheme, shape, NAME)


@pytest.mark.parametrize("value", [-9, 8])
def test_torchao_zero_points_beyond_the_codes(tmp_path, value):
    folder = written("torchao", numerics.quantize(weights(), Scheme(bits=4, block=(1, 32), symmetric=False)), tmp_path)
    tensors, metadata = load_file(folder / "model.safetensors"), read_metadata(folder)
    tensors[NAME.replace("weight", "_weight_zero_point")][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="zero-point is outside of 4 bits"):
        open_checkpoint(folder).quantized[NAME].load()


@pytest.mark.parametrize(("kind", "recipe"), [("bitnet", "bitnet"), ("awq", "int4-asym-g32-rtn"), ("torchao", "int4-sym-g32-rtn"), ("auto-round", "int4-sym-g32-rtn"), ("hqq", "int4-asym-g32-hqq")])
def test_dense_linears_are_named(model_folder, tmp_path, kind, recipe):
    """A vision tower stays as it is: without its names programs would look for packed weights there, and transformers fills what it does not find with random numbers."""
    lowbit.quantize(model_folder("gemma3-vision"), recipe, tmp_path / "out", target_name=kind)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if kind == "hqq":  # one set of parameters would be for all linear layers; with tags it is for those named
        assert "language_model.mlp.up_proj" in section["quant_config"] and not any("vision" in tag for tag in section["quant_config"])
    else:
        named = section.get("modules_to_not_convert") or section["extra_config"]
        assert "vision_tower.encoder.layers.0.mlp.fc1" in named and not any("language_model.layers" in name for name in named)


@pytest.mark.consumer
def test_transformers_leaves_a_vision_tower_of_bitnet_alone(model_folder, tmp_path):
    pytest.importorskip("accelerate", reason="transformers loads BitNet folders with accelerate")
    from transformers import AutoModelForImageTextToText

    lowbit.quantize(model_folder("gemma3-vision"), "bitnet", tmp_path / "out")
    with torch.compiler.set_stance("force_eager"):
        _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


MIXED = """scheme = "int4-sym-g32-rtn"
[[rules]]
match = "*.v_proj"
scheme = "keep"
[[rules]]
match = "*.down_proj"
scheme = "int8-sym-g32-rtn"
"""


@pytest.mark.consumer
@pytest.mark.parametrize("mixed", [False, True])
def test_transformers_finds_the_layers_of_a_vision_language_model_in_compressed_tensors(model_folder, tmp_path, mixed):
    """Its modules have other names than the file's tensors, so that the section's names are regexes there; the library's own decoding is ours."""
    pytest.importorskip("compressed_tensors")
    (tmp_path / "mixed.toml").write_text(MIXED)
    lowbit.quantize(model_folder("gemma3-vision"), tmp_path / "mixed.toml" if mixed else "int4-sym-g32-rtn", tmp_path / "out", target_name="compressed-tensors")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"re:.*vision_tower\.encoder\.layers\.0\.mlp\.fc1$" in section["ignore"] and "lm_head" in section["ignore"]
    assert len(open_checkpoint(tmp_path / "out").quantized) == (18 if mixed else 21)
    found = verify(tmp_path / "out")
    assert found.verdict == "passed" and found.equal == found.weights == (18 if mixed else 21), found


def plain_logits(folder, stream, ids):
    from lowbit.pipeline.streaming import Batch

    return stream(folder, [Batch(ids)])[0].view(*ids.shape, -1)


@pytest.mark.consumer
@pytest.mark.parametrize("recipe", ["int4-asym-g32-hqq", "int2-asym-g16-hqq", "int3-asym-g32-hqq"])
def test_hqq_loads_ours(save_model, tmp_path, stream, recipe):
    """hqq's own loader, given our safetensors by the lines of the model card, decodes and computes what we do."""
    pytest.importorskip("hqq.models.hf.base", reason="hqq, the consumer of this layout, is not installed")
    lowbit.quantize(save_model("llama", tmp_path / "model"), recipe, tmp_path / "out")

    checkpoint, card = open_checkpoint(tmp_path / "out"), {}
    exec(consumer_of(checkpoint).lines(str(tmp_path / "out"), "torch.float32"), card)
    model = card["model"]
    for name, entry in checkpoint.quantized.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).dequantize(), numerics.dequantize(entry.load()))
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits.float(), plain_logits(tmp_path / "out", stream, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.consumer
def test_transformers_loads_bitnet(save_model, tmp_path):
    pytest.importorskip("accelerate", reason="transformers loads BitNet folders with accelerate")
    from transformers import AutoModelForCausalLM
    tokens = torch.arange(20).view(1, 20)
    for model, biases in (("llama", False), ("qwen2", True)):
        lowbit.quantize(save_model(model, tmp_path / model), "bitnet", tmp_path / f"{model}-out")
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / f"{model}-out", output_loading_info=True)
            assert not any(info.values()), info
            ours = lowbit.load(tmp_path / f"{model}-out", dtype="float32")
            for name, module in ours.named_modules():
                if type(module).__name__ == "QuantLinear":  # same input to both, so that no input falls between two codes
                    x = torch.randn(9, module.in_features, generator=torch.Generator().manual_seed(0))
                    torch.testing.assert_close(loaded.get_submodule(name)(x), module(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(loaded(tokens).logits, ours(tokens).logits, rtol=0, atol=0.1)  # one that does changes its token by a 127th
        assert bool(biases) == (json.loads((tmp_path / f"{model}-out" / "config.json").read_text())["quantization_config"]["linear_class"] == "bitlinear")


@pytest.mark.consumer
@pytest.mark.parametrize("recipe", ["2x8-aqlm", "1x10-aqlm"])
def test_transformers_loads_aqlm(save_model, tmp_path, stream, text_file, recipe, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")  # its kernel for 256 entries adds up from several threads without a lock
    pytest.importorskip("aqlm", reason="aqlm, the consumer of this layout, is not installed")
    from aqlm.utils import _dequantize_weight, unpack_int_data
    from transformers import AutoModelForCausalLM

    lowbit.quantize(save_model("llama", tmp_path / "model"), recipe.replace("-aqlm", "-rtn"), tmp_path / "out", target_name="aqlm")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for name, entry in open_checkpoint(tmp_path / "out").quantized.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        theirs = _dequantize_weight(unpack_int_data(module.codes.data, module.nbits_per_codebook), module.codebooks.data, module.scales.data)
        torch.testing.assert_close(theirs, numerics.dequantize(entry.load()), rtol=1e-6, atol=1e-7)
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain_logits(tmp_path / "out", stream, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.consumer
@pytest.mark.parametrize("recipe", ["int4-sym-g32-rtn", "int3-asym-g32-rtn", "int8-sym-channel-rtn", "fp8-channel-rtn", "int4-asym-g32-hqq"])
def test_transformers_loads_torchao(save_model, tmp_path, stream, recipe):
    pytest.importorskip("torchao", reason="torchao, the consumer of this layout, is not installed")
    from transformers import AutoModelForCausalLM

    lowbit.quantize(save_model("llama", tmp_path / "model"), recipe, tmp_path / "out", target_name="torchao")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu", output_loading_info=True)
    assert not any(info.values()), info
    for name, entry in open_checkpoint(tmp_path / "out").quantized.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight.dequantize(), numerics.dequantize(entry.load()))
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain_logits(tmp_path / "out", stream, tokens), rtol=1e-4, atol=1e-5)


