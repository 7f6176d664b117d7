"""Rounded activations and their observers against bitsandbytes, compressed-tensors, torch.ao, onnxruntime and TensorRT's calibrator (tests/oracles/make_*.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit import numerics
from lowbit.errors import FormatError, RecipeError
from lowbit.numerics import activations
from lowbit.numerics.activations import fake_quantize, kl_threshold, percentile, settle
from lowbit.pipeline.collect import accumulate
from lowbit.scheme import Activation, Rounding, Scheme
from lowbit.stats import BINS, Histogram, LayerStats

ORACLES = Path(__file__).parents[1] / "oracles"
LLM_INT8 = Activation(range="textbook", threshold=6.0)


@pytest.fixture(scope="module")
def bnb():
    return load_file(ORACLES / "llm_int8.safetensors")


@pytest.fixture(scope="module")
def stored():
    return load_file(ORACLES / "observers.safetensors")


def test_weights_of_llm_int8_are_bitsandbytes_codes(bnb):
    made = numerics.quantize(bnb["W"], Scheme(bits=8, block=(1, -1), range="textbook"))
    codes = made.parts["codes"].int() - 128
    differs = codes != bnb["W.codes"].int()
    scaled = bnb["W"].half().float() / (bnb["W.stats"] / 127).clamp(min=1e-9).unsqueeze(1)
    assert not differs[(scaled % 1 - 0.5).abs() > 0.06].any()  # bitsandbytes rounds weights to float16 first, which moves those near a half
    assert float(differs.float().mean()) < 0.02
    torch.testing.assert_close(numerics.dequantize(made), bnb["W.decoded"], rtol=0, atol=1.01 * float(bnb["W.stats"].max()) / 127)


@pytest.mark.parametrize("threshold", [0, 6])
@pytest.mark.parametrize("rows", ["all", "one"])
def test_outputs_of_llm_int8_are_bitsandbytes(bnb, threshold, rows):
    act = LLM_INT8 if threshold else Activation(range="textbook")
    X = bnb["X"] if rows == "all" else bnb["X"][8:9]
    X = X if threshold else X.half().float()  # which bitsandbytes does first, and we where there is a threshold
    Y = fake_quantize(X, Rounding(act)) @ (bnb["W.codes"].float() * bnb["W.stats"].unsqueeze(1) / 127).T + bnb["bias"]
    expected = bnb[f"Y.{threshold}.float32{'' if rows == 'all' else '.one'}"]
    assert float((Y - expected).norm()) <= 1e-3 * float(expected.norm())


def test_why_outliers_are_kept(bnb):
    """Rounded like the rest they cost the tokens that hold one most of their precision."""
    X, W = bnb["X"], bnb["W"]
    tokens = (X.abs() >= 6).any(1)
    error = lambda act: float(((fake_quantize(X, Rounding(act)) - X) @ W.T)[tokens].square().mean())
    assert error(Activation(range="textbook")) > 20 * error(LLM_INT8)


def test_columns_with_an_outlier_pass_unchanged(bnb):
    X = bnb["X"].half().float()
    made = fake_quantize(X, Rounding(LLM_INT8))
    kept = (made == X).all(0).nonzero().flatten().tolist()
    assert kept == bnb["X.6.columns"].tolist() == [17, 60, 131]
    codes = torch.round(made / (bnb["X.6.stats"].clamp(min=1e-9) / 127).unsqueeze(1))
    others = [c for c in range(X.shape[1]) if c not in kept]
    assert float((codes - bnb["X.6.codes"].float())[:, others].abs().max()) <= 1  # ties: bitsandbytes multiplies by 127 / s
    assert float(((codes - bnb["X.6.codes"].float())[:, others] != 0).float().mean()) < 2e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "act"), [("int8-sym", Activation()), ("int8-asym", Activation(symmetric=False)), ("fp8", Activation("fp8_e4m3"))])
def test_dynamic_rounding_is_compressed_tensors(stored, name, act, dtype):
    x = stored["ct.x"].to(getattr(torch, dtype))
    expected = stored[f"ct.dynamic.{name}.{dtype}"].float()
    made = fake_quantize(x, Rounding(act)).float()
    step = stored[f"ct.dynamic.{name}.{dtype}.scale"].float().expand_as(expected)
    if dtype == "float32":
        torch.testing.assert_close(made[1:], expected[1:], rtol=1e-5, atol=1e-9)
    close = (made - expected).abs() <= 1.01 * step + expected.abs() / 64 if act.format == "int" else (made - expected).abs() <= expected.abs() / 8 + step
    assert close[1:].all()  # in bfloat16 theirs rounds every step, scales included
    assert not made[0, 0].any()


@pytest.mark.parametrize(("name", "act"), [("int8-sym", Activation(static=True, per="tensor")), ("fp8", Activation("fp8_e4m3", static=True, per="tensor"))])
def test_static_rounding_is_compressed_tensors(stored, name, act):
    scale = float(stored[f"ct.static.{name}.float32.scale"])
    torch.testing.assert_close(fake_quantize(stored["ct.x"], Rounding(act, scale)), stored[f"ct.static.{name}.float32"], rtol=1e-5, atol=1e-9)


def test_static_asymmetric_rounding_is_compressed_tensors(stored):
    key = "ct.static.int8-asym.float32"
    rounding = Rounding(Activation(symmetric=False, static=True, per="tensor"), float(stored[f"{key}.scale"]), float(stored[f"{key}.zero_point"]) + 128)
    torch.testing.assert_close(fake_quantize(stored["ct.x"], rounding), stored[key], rtol=1e-5, atol=1e-9)


def observed(batches, needs=("range", "average", "histogram")):
    stats = LayerStats()
    for batch in batches:
        accumulate(stats, batch, needs)
    return stats


@pytest.mark.parametrize("data", ["silu", "sym"])
@pytest.mark.parametrize("observer", ["minmax", "average"])
def test_extremes_are_torchs(stored, data, observer):
    stats = observed(stored[data])
    sym = settle(Activation(static=True, per="tensor", observer=observer), stats)
    assert sym.scale == pytest.approx(float(stored[f"{data}.torch.{observer}.qint8-symmetric.scale"]), rel=1e-5)
    asym = settle(Activation(symmetric=False, static=True, per="tensor", observer=observer), stats)
    assert asym.scale == pytest.approx(float(stored[f"{data}.torch.{observer}.quint8-affine.scale"]), rel=1e-5)
    assert asym.zero_point == float(stored[f"{data}.torch.{observer}.quint8-affine.zero_point"])


@pytest.mark.parametrize("data", ["silu", "sym"])
def test_a_histogram_counts_what_was_seen_in_any_order(stored, data):
    X = stored[data]
    whole = Histogram.of(X)
    parts = observed(X).histogram
    backwards = observed(X.flip(0)).histogram
    assert torch.equal(whole.counts, parts.counts) and torch.equal(whole.counts, backwards.counts) and whole.exponent == parts.exponent
    assert int(whole.counts.sum()) == X.numel()
    edges = (torch.arange(2 * BINS + 1) - BINS) * whole.width
    assert torch.equal(whole.counts.double(), torch.histogram(X.double().flatten(), edges.double()).hist)
    assert Histogram.of(torch.zeros(3)).counts[BINS] == 3


@pytest.mark.parametrize("data", ["silu", "sym"])
@pytest.mark.parametrize("share", [99.0, 99.9])
def test_percentiles_are_those_of_all_values_and_onnxruntimes(stored, data, share):
    histogram = Histogram.of(stored[data])
    exact = float(torch.quantile(stored[data].abs().flatten(), share / 100))
    assert float(percentile(histogram, share, symmetric=True)[1]) == pytest.approx(exact, abs=5 * histogram.width)
    theirs = stored[f"{data}.ort.percentile.{share:g}.sym.once"] if f"{data}.ort.percentile.{share:g}.sym.once" in stored else stored[f"{data}.ort.percentile.{share}.sym.once"]
    width = float(stored[data].abs().max()) / 2048
    assert float(percentile(histogram, share, symmetric=True)[1]) == pytest.approx(float(theirs.abs().max()), abs=2 * (histogram.width + width))
    low, high = percentile(histogram, share, symmetric=False)
    for ours, q in ((low, (100 - share) / 200), (high, 1 - (100 - share) / 200)):
        assert float(ours) == pytest.approx(float(torch.quantile(stored[data].flatten(), q)), abs=5 * histogram.width)


@pytest.mark.parametrize("data", ["silu", "sym"])
def test_the_mse_range_is_tensorrts_and_no_worse(stored, data):
    """NVIDIA's calibrator minimises the same error over its own bins with codes of -127 to 127; expected error on the data itself, ours at most theirs."""
    X = stored[data]
    for bits in (8, 4):
        act = Activation(bits=bits, range="textbook", static=True, per="tensor", observer="mse")
        ours = settle(act, observed(X))
        theirs = Rounding(act, float(stored[f"{data}.nv.mse.{bits}"]) / (2 ** (bits - 1) - 1))
        error = lambda rounding: float((fake_quantize(X, rounding) - X).square().mean())
        assert error(ours) <= 1.01 * error(theirs)
        assert error(ours) <= error(settle(Activation(bits=bits, range="textbook", static=True, per="tensor"), observed(X)))


@pytest.mark.parametrize("data", ["silu", "sym"])
def test_the_kl_threshold_is_near_tensorrts(stored, data):
    ours = float(kl_threshold(Histogram.of(stored[data])))
    candidates = [float(stored[f"{data}.nv.entropy.8"]), float(stored[f"{data}.ort.entropy.2048.256.once"].abs().max()), float(stored[f"{data}.ort.entropy.2048.128.once"].abs().max())]
    assert 0.5 * min(candidates) <= ours <= 1.3 * max(candidates), (ours, candidates)


def test_kl_finds_where_a_flat_histogram_ends():
    """Values spread evenly up to 1, and a few outliers at 8: clipping them costs less than rounding all others eight times as coarsely."""
    X = torch.cat([torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.tensor([8.0, -8.0])])
    assert float(kl_threshold(Histogram.of(X))) == pytest.approx(1.0, abs=0.1)  # all but the outliers
    few = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert 2 < float(kl_threshold(Histogram.of(few))) <= 4.5


@pytest.mark.parametrize("act", [Activation(), Activation(bits=4, symmetric=False), Activation("fp8_e4m3"), Activation("nvfp4", 4), Activation(per="tensor"), LLM_INT8], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_dtypes_zeros_and_gradients(act, dtype):
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    made = fake_quantize(x, Rounding(act))
    assert made.shape == x.shape and made.dtype == dtype and torch.equal(x, before)
    assert 0 < float((made.float() - x.float()).abs().max()) < 0.6
    assert not fake_quantize(torch.zeros_like(x), Rounding(act)).any() and fake_quantize(x[:0], Rounding(act)).shape == (0, 3, 64)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, Rounding(act)).float().sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_a_layer_that_saw_nothing_is_refused():
    with pytest.raises(FormatError, match="no token of the calibration text reached"):
        activations.settle(Activation(static=True, per="tensor", observer="mse"), None)
    with pytest.raises(RecipeError, match="unknown key"):
        Activation.from_dict({"bit": 8})


def test_fewer_bits_clip_more():
    histogram = Histogram.of(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert float(kl_threshold(histogram, 8)) < 0.9 * float(kl_threshold(histogram, 128))


def test_tokens_do_not_depend_on_each_other():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 3, 5).unsqueeze(1)
    for act in (Activation(), Activation("fp8_e4m3", 8), Activation("nvfp4", 4), Activation("mxfp4", 4)):
        whole = fake_quantize(x, Rounding(act))
        torch.testing.assert_close(torch.cat([fake_quantize(row.unsqueeze(0), Rounding(act)) for row in x]), whole)
        assert float(((whole - x).norm(dim=1) / x.norm(dim=1)).max()) < 0.25
