"""Outlier channels: exact to float16, counted, chosen by what rounding them costs; with every algorithm that can leave columns out."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import numerics
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import RecipeError
from lowbit.numerics import outliers
from lowbit.pipeline.quantize import quantize
from lowbit.scheme import Scheme

SCHEMES = [Scheme(bits=3, block=(1, 32), outliers=4), Scheme("nf4", 4, (1, 32), outliers=4), Scheme("mxfp4", 4, (1, 32), outliers=4), Scheme(bits=4, block=(-1, -1), symmetric=False, outliers=2)]


def weights():
    W = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    W[:, 40] *= 20
    return W


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_kept_exactly_and_counted(scheme):
    W = weights()
    made = numerics.quantize(W, scheme)
    index = made.parts["outlier_index"].long()
    decoded = numerics.dequantize(made)
    assert 40 in index and len(index) == scheme.outliers
    assert torch.equal(decoded[:, index], W[:, index].half().float())
    plain = numerics.dequantize(numerics.quantize(W, outliers.plain(scheme)))
    assert float((decoded - W).square().sum()) < 0.7 * float((plain - W).square().sum())
    extra = numerics.bits_per_weight(scheme, (16, 96)) - numerics.bits_per_weight(outliers.plain(scheme), (16, 96))
    assert extra == pytest.approx(scheme.outliers * (16 * 16 + 32) / (16 * 96))


def test_chosen_by_importance_where_there_is_one():
    W = weights()
    importance = torch.ones(96)
    importance[7] = 1e6
    assert 7 in outliers.choose(W, 1, importance) and 40 in outliers.choose(W, 1)


@pytest.mark.parametrize("recipe", ["int3-asym-g32-gptq-out4", "int3-asym-g32-gptq-out4b8", "int3-asym-g32-rtn-out4", "int3-asym-g32-hqq-out4", "nf4-g32-gptq-out4"])
def test_in_a_whole_job(recipe, save_model, text_file, tmp_path, stream):
    """A model whose norms write a few huge channels: the error falls by far when those are kept."""
    from lowbit.pipeline.streaming import Batch

    folder = save_model("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "layernorm.weight" in name:
            value[[5, 17]] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(3, 280, (4, 48), generator=torch.Generator().manual_seed(3))
    original = stream(folder, [Batch(ids)])[0]
    error = lambda path: float((stream(path, [Batch(ids)])[0] - original).square().mean())
    run = lambda name, words: quantize(folder, words, tmp_path / name, calibration=text_file, n_samples=16, seq_len=64, dtype="float32", target_name="safetensors")
    made = run("kept", recipe)
    run("plain", recipe.removesuffix("b8").removesuffix("-out4"))
    share = 0.95 if "gptq" in recipe else 1.05  # without data the channels are chosen by the weights, which do not show the outliers
    assert error(tmp_path / "kept") < share * error(tmp_path / "plain")
    assert all(record["scheme"].endswith(recipe.rpartition("-")[2]) and "notes" not in record for record in made.layers.values())
    assert open_checkpoint(tmp_path / "kept").tensors


def test_where_it_cannot_be(model_folder, text_file, tmp_path):
    with pytest.raises(RecipeError, match="compressed-tensors has no place for outlier channels"):
        quantize(model_folder("llama"), "int4-g32-rtn-out4", tmp_path / "out", target_name="compressed-tensors")
    with pytest.raises(RecipeError, match="GGUF has no place for outlier channels"):
        quantize(model_folder("llama"), "q4_0-out4", tmp_path / "out.gguf")
    with pytest.raises(RecipeError, match="autoround learns a block as a whole"):
        quantize(model_folder("llama"), "int4-g32-autoround-out4", tmp_path / "out", calibration=text_file)
    with pytest.raises(RecipeError, match="outliers is 0"):
        Scheme(outliers=0)


def test_in_eight_bits():
    """Half the bytes, and an error of at most half a code of the channel's own scale."""
    W = weights()
    scheme = Scheme(bits=3, block=(1, 32), outliers=4, outlier_bits=8)
    made = numerics.quantize(W, scheme)
    index = made.parts["outlier_index"].long()
    step = W[:, index].abs().amax(0) / 127
    assert ((numerics.dequantize(made) - W)[:, index].abs() <= 0.51 * step).all()
    assert numerics.nbytes(scheme, (16, 96)) == sum(-(-p.numel() * (3 if key == "codes" else 8 * p.element_size()) // 8) for key, p in made.parts.items())
    assert scheme.name == "int3-sym-g32-out4b8"
    with pytest.raises(RecipeError, match="expected 8 or 16"):
        Scheme(outliers=4, outlier_bits=4)
