"""Conversions: what is lossless is said to be and is, what is not is refused, or rounded anew when asked."""

import pytest
import torch

import lowbit
from lowbit import numerics
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import FormatError, LowbitError, RecipeError
from lowbit.pipeline.convert import convert
from lowbit.pipeline.streaming import Batch


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory):
    found = {}

    def make(target, recipe, model="llama"):
        if (target, recipe, model) not in found:
            out = tmp_path_factory.mktemp("made") / ("m.gguf" if target == "gguf" else "out")
            found[target, recipe, model] = lowbit.quantize(model_folder(model), recipe, out, target_name=target).path
        return found[target, recipe, model]

    return make


def same(a, b):
    one, other = open_checkpoint(a), open_checkpoint(b)
    return all(torch.equal(numerics.dequantize(entry.load()), numerics.dequantize(other.quantized[name].load())) for name, entry in one.quantized.items() if name in other.quantized)


@pytest.mark.parametrize("recipe", ["q4_0-pure-rtn", "q5_0-pure-rtn", "q8_0-rtn", "int4-sym-g64-rtn"])
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "auto-round", "lowbit"])
def test_gguf_to_other_layouts_and_back(made, tmp_path, recipe, target):
    """Symmetric blocks are integers; embedding and head, which only a GGUF file quantizes, are decoded."""
    if recipe == "q5_0-pure-rtn" and target in ("gptq", "auto-round"):
        pytest.skip("these have no 5 bits")
    source = made("gguf", recipe)
    first = convert(source, target, tmp_path / "out")
    assert first.exact == first.matrices >= 21 and "Lossless" in first.statement and same(source, first.path)
    assert target == "lowbit" or "decoded" in first.notes[0]
    again = convert(first.path, "gguf", tmp_path / "again.gguf")
    assert again.exact == again.matrices and same(source, again.path)


def test_asymmetric_integers_in_gguf(made, tmp_path):
    """Minima are products rounded to float16: what comes of it is stated; back to integers it is exact where the product was."""
    made_one = convert(made("gptq", "int4-asym-g32-rtn"), "gguf", tmp_path / "m.gguf")
    assert made_one.exact < made_one.matrices and 0 < made_one.largest_difference < 2**-11 and "rounding of their minima" in made_one.statement
    back = convert(made_one.path, "gptq", tmp_path / "back")
    assert back.matrices == 21 and same(made("gptq", "int4-asym-g32-rtn"), back.path)


def test_minima_that_are_no_steps_are_refused(made, tmp_path):
    with pytest.raises(FormatError, match=r"no whole number of steps below zero.*--requantize"):
        convert(made("gguf", "q4_1-pure-rtn"), "compressed-tensors", tmp_path / "out")
    with pytest.raises(RecipeError, match=r"cannot hold q4_k.*|gptq cannot hold.*--requantize"):
        convert(made("lowbit", "e8p2-rtn"), "gptq", tmp_path / "out")
    with pytest.raises(LowbitError, match="--requantize"):
        convert(made("hqq", "int4-asym-g32-hqq"), "gptq", tmp_path / "out")  # float zero-points
    assert not (tmp_path / "out").exists()


def test_requantize_reports_the_added_error(made, tmp_path):
    made_one = convert(made("lowbit", "e8p2-rtn"), "gptq", tmp_path / "out", requantize="int4-sym-g32")
    assert 1e-4 < made_one.error < 0.02 and made_one.statement.startswith("Rounded anew: 21 matrices")
    checkpoint = open_checkpoint(made_one.path)
    assert {entry.scheme.name for entry in checkpoint.quantized.values()} == {"int4-sym-g32"}
    source = open_checkpoint(made("lowbit", "e8p2-rtn"))
    errors = []
    for name, entry in checkpoint.quantized.items():
        before, after = numerics.dequantize(source.quantized[name].load()), numerics.dequantize(entry.load())
        errors.append(float((before - after).square().sum() / before.square().sum()))
    assert made_one.error == pytest.approx(sum(errors) / len(errors))
    with pytest.raises(RecipeError, match="has no data"):
        convert(made("lowbit", "e8p2-rtn"), "gptq", tmp_path / "other", requantize="int4-sym-g32-gptq")


def test_mxfp4_blocks_are_mxfp4(made, tmp_path):
    source = made("gguf", "mxfp4-rtn")
    made_one = convert(source, "compressed-tensors", tmp_path / "out")
    assert made_one.exact == made_one.matrices and {entry.scheme.format for entry in open_checkpoint(made_one.path).quantized.values()} == {"mxfp4"}


def test_dense_is_exact_in_the_models_own_dtype(made, tmp_path, stream):
    source = made("compressed-tensors", "int3-asym-g32-rtn", "mixtral")
    made_one = convert(source, "safetensors", tmp_path / "out")
    assert made_one.exact == made_one.matrices > 30
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(stream(source, [Batch(ids)])[0], stream(made_one.path, [Batch(ids)])[0])


def test_nothing_quantized(model_folder, tmp_path):
    assert "No matrix is quantized" in convert(model_folder("llama"), "lowbit", tmp_path / "out").statement


def test_rounded_inputs_are_said_or_refused(made, tmp_path):
    """Dense weights whose inputs are rounded stay so only in dense folders."""
    source = made("safetensors", "int8-sym-channel-rtn-a8")
    with pytest.raises(RecipeError, match="rounds the inputs of 21 layers"):
        convert(source, "lowbit", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(source, "safetensors", tmp_path / "dense")
    assert open_checkpoint(tmp_path / "dense").activations == open_checkpoint(source).activations != {}


@pytest.mark.parametrize("target", ["lowbit", "safetensors", "compressed-tensors"])
def test_requantize_rounds_inputs_as_the_recipe_says(made, tmp_path, target):
    convert(made("lowbit", "int4-sym-g32-rtn"), target, tmp_path / "out", requantize="int8-sym-channel-a8")
    found = open_checkpoint(tmp_path / "out").activations
    assert len(found) == 21 and {rounding.act.bits for rounding in found.values()} == {8}


def test_requantize_says_what_becomes_of_rounded_inputs(made, tmp_path):
    source = made("compressed-tensors", "int8-sym-channel-rtn-a8")
    dropped = convert(source, "gguf", tmp_path / "m.gguf", requantize="q8_0")
    assert "rounds the inputs of 21 layers" in dropped.notes[0] and not open_checkpoint(dropped.path).activations
    kept = convert(source, "lowbit", tmp_path / "kept", requantize="int4-sym-g32")
    assert not kept.notes and open_checkpoint(kept.path).activations == open_checkpoint(source).activations
    assert {entry.scheme.format for entry in open_checkpoint(dropped.path).quantized.values()} == {"q8_0"}
    with pytest.raises(RecipeError, match=r"q4_k_m is a mixture.*expected one type, such as q4_k\."):
        convert(source, "gguf", tmp_path / "mixed.gguf", requantize="q4_k_m")
    with pytest.raises(RecipeError, match="conversion has no data"):
        convert(source, "compressed-tensors", tmp_path / "static", requantize="int8-sym-channel-a8-static")


def test_gptq_has_no_place_for_a_dense_layer(save_model, tmp_path):
    source = tmp_path / "kept.toml"
    source.write_text('scheme = "int4-sym-g32"\nalgorithm = "rtn"\nscale_dtype = "float16"\n[[rules]]\nmatch = "*.1.mlp.down_proj"\nscheme = "keep"\n')
    made = lowbit.quantize(save_model("llama", tmp_path / "model"), str(source), tmp_path / "mixed", target_name="compressed-tensors").path
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.down_proj.*GPTQ folder"):
        convert(made, "gptq", tmp_path / "out")
    convert(made, "awq", tmp_path / "awq")
    assert 'layers.1.mlp.down_proj"' in (tmp_path / "awq" / "config.json").read_text()


@pytest.mark.parametrize("target", ["lowbit", "hqq"])
def test_real_zero_points_in_bfloat16_go_on_from_torchao(save_model, tmp_path, target):
    lowbit.quantize(save_model("llama", tmp_path / "model", dtype=torch.bfloat16), "int4-asym-g32-hqq", tmp_path / "torchao", target_name="torchao")
    made_one = convert(tmp_path / "torchao", target, tmp_path / "out")
    assert made_one.exact == made_one.matrices == 21
