"""Uniform integers: textbook values, hand-computed ranges, odd shapes, extremes, and bounds that must always hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit import numerics
from lowbit.errors import FormatError, RecipeError, ShapeError
from lowbit.numerics import integer
from lowbit.scheme import RangeSearch, Scheme

TENSOR, CHANNEL = (-1, -1), (1, -1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signed(qt):
    return (qt.parts["codes"].to(torch.int32) - qt.scheme.zero_code).tolist()


def steps(W, qt):
    """The scale of every weight, [out, in]."""
    return integer.spread(qt.parts["scale"].float().abs(), qt.scheme, W.shape[1]).expand_as(W)


def test_textbook_example():
    """scale = 10.8 / 127 = 0.0850394; 8.5 / scale = 99.95, 3.08: 36.2, 3.02: 35.5, -7.59: -89.25."""
    W = torch.tensor([[8.5, 3.08, 3.02, -7.59, 10.8]])
    qt = numerics.quantize(W, Scheme(bits=8, block=TENSOR, range="textbook"))
    assert signed(qt) == [[100, 36, 36, -89, 127]]
    assert qt.parts["scale"].item() == pytest.approx(10.8 / 127, rel=1e-7)
    assert numerics.dequantize(qt)[0].tolist() == pytest.approx([8.503937, 3.061417, 3.061417, -7.568504, 10.8], abs=1e-5)


@pytest.mark.parametrize(
    ("range_", "scale", "codes", "values"),
    [
        # x / scale of [-6, 3, 1, -1.5]
        ("textbook", 6 / 7, [-7, 4, 1, -2], [-6, 24 / 7, 6 / 7, -12 / 7]),  # -7, 3.5 (half to even), 1.17, -1.75
        ("half", 6 / 7.5, [-8, 4, 1, -2], [-6.4, 3.2, 0.8, -1.6]),  # -7.5 (half to even), 3.75, 1.25, -1.875
        ("full", 0.75, [-8, 4, 1, -2], [-6, 3, 0.75, -1.5]),  # the extreme is negative: scale 6 / 8 positive; 1.33
    ],
)
def test_symmetric_ranges(range_, scale, codes, values):
    qt = numerics.quantize(torch.tensor([[-6.0, 3, 1, -1.5]]), Scheme(bits=4, block=(1, 4), range=range_))
    assert qt.parts["scale"].item() == pytest.approx(scale, rel=1e-6)
    assert signed(qt) == [codes]
    assert numerics.dequantize(qt)[0].tolist() == pytest.approx(values, abs=1e-6)


def test_full_range_keeps_a_positive_extreme_with_a_negative_scale():
    qt = numerics.quantize(torch.tensor([[6.0, -3, 1, 1.5]]), Scheme(bits=4, block=(1, 4), range="full"))
    assert qt.parts["scale"].item() == -0.75
    assert qt.parts["codes"].tolist() == [[0, 12, 7, 6]]
    assert numerics.dequantize(qt)[0].tolist() == [6, -3, 0.75, 1.5]


def test_half_range_clips_the_positive_extreme_by_half_a_step():
    qt = numerics.quantize(torch.tensor([[7.5, -7.5]]), Scheme(bits=4, block=(1, 2), range="half"))
    assert qt.parts["scale"].item() == 1 and numerics.dequantize(qt).tolist() == [[7, -8]]


@pytest.mark.parametrize(
    ("W", "scale", "zero", "codes"),
    [
        ([-1.0, 0, 2, 0.5], 0.2, 5, [0, 5, 15, 7]),  # (2 + 1) / 15; 1 / 0.2 = 5; 0.5 / 0.2 = 2.5 to even 2
        ([1.0, 2, 3, 1.5], 0.2, 0, [5, 10, 15, 8]),  # the range includes 0: 3 / 15; 1.5 / 0.2 = 7.5 to even 8
        ([-3.0, -1, -2, -0.5], 0.2, 15, [0, 10, 5, 13]),  # -0.5 / 0.2 = -2.5 to even -2
    ],
)
def test_asymmetric_formulas(W, scale, zero, codes):
    qt = numerics.quantize(torch.tensor([W], dtype=torch.float64), Scheme(bits=4, block=(1, 4), symmetric=False))
    assert qt.parts["scale"].item() == pytest.approx(scale, rel=1e-6)
    assert qt.parts["zero_point"].tolist() == [[zero]] and qt.parts["zero_point"].dtype == torch.uint8
    assert qt.parts["codes"].tolist() == [codes]
    expected = [scale * (code - zero) for code in codes]
    assert numerics.dequantize(qt)[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((576, 576), 5), ((830, 545), 5), ((3, 128), 1), ((1, 1), 1), ((2, 129), 2)])
def test_short_last_group(shape, groups, symmetric):
    """The last group of 576 or 545 columns has 64 or 33; it is rounded as if it stood alone."""
    W, scheme = normal(*shape), Scheme(bits=4, block=(1, 128), symmetric=symmetric)
    qt = numerics.quantize(W, scheme)
    assert qt.parts["scale"].shape == (shape[0], groups) and qt.parts["codes"].shape == shape
    tail = shape[1] - 128 * (groups - 1)
    alone = numerics.quantize(W[:, -tail:], scheme)
    assert torch.equal(numerics.dequantize(qt)[:, -tail:], numerics.dequantize(alone))


@pytest.mark.parametrize("search", ["mse", "golden", "percentile"])
@pytest.mark.parametrize("weighted", [False, True])
def test_short_last_group_in_the_searches(search, weighted):
    W, scheme = normal(6, 80), Scheme(bits=3, block=(1, 64))
    importance = torch.rand(80, generator=torch.Generator().manual_seed(1)) if weighted else None
    whole = numerics.quantize(W, scheme, RangeSearch(search, percentile=100), importance)
    alone = numerics.quantize(W[:, 64:], scheme, RangeSearch(search, percentile=100), None if importance is None else importance[64:])
    assert torch.equal(whole.parts["codes"][:, 64:], alone.parts["codes"])
    assert torch.allclose(whole.parts["scale"][:, 1:], alone.parts["scale"], rtol=1e-6)


@pytest.mark.parametrize(("block", "shape"), [(TENSOR, (1, 1)), (CHANNEL, (5, 1)), ((1, 8), (5, 3))])
def test_parameter_shapes(block, shape):
    qt = numerics.quantize(normal(5, 24), Scheme(bits=4, block=block, symmetric=False))
    assert qt.parts["scale"].shape == qt.parts["zero_point"].shape == shape


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range_", ["textbook", "half", "full"])
@pytest.mark.parametrize("method", ["minmax", "mse", "golden"])
def test_zeros_stay_zero(symmetric, range_, method):
    qt = numerics.quantize(torch.zeros(3, 40), Scheme(bits=3, block=(1, 16), symmetric=symmetric, range=range_), RangeSearch(method))
    assert torch.equal(numerics.dequantize(qt), torch.zeros(3, 40))
    assert torch.equal(qt.parts["scale"], torch.ones(3, 3))


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-30, -1e30])
def test_one_value_everywhere(value):
    W = torch.full((2, 32), value)
    textbook = numerics.dequantize(numerics.quantize(W, Scheme(bits=4, block=(1, 16), range="textbook")))
    asymmetric = numerics.dequantize(numerics.quantize(W, Scheme(bits=4, block=(1, 16), symmetric=False)))
    full = numerics.dequantize(numerics.quantize(W, Scheme(bits=4, block=(1, 16), range="full")))
    for decoded in (textbook, asymmetric, full):
        assert torch.allclose(decoded, W, rtol=1e-6, atol=0)


def test_extremes_of_float32():
    W = torch.tensor([[3.4e38, -3.4e38, 1e38, 0.0]])
    decoded = numerics.dequantize(numerics.quantize(W, Scheme(bits=8, block=(1, 4), range="textbook")))
    assert torch.allclose(decoded, W, rtol=0, atol=0.51 * 3.4e38 / 127)
    tiny = torch.tensor([[1e-45, -1e-40, 0, 1e-38]])
    assert bool(torch.isfinite(numerics.dequantize(numerics.quantize(tiny, Scheme(bits=4, block=(1, 4))))).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "search", [RangeSearch(), RangeSearch("clamp", clamp=1.0), RangeSearch("percentile", percentile=90), RangeSearch("mse"), RangeSearch("golden")]
)
def test_nan_and_infinity_are_refused(bad, symmetric, search):
    W = normal(2, 64)
    W[1, 5] = bad
    with pytest.raises(FormatError):
        numerics.quantize(W, Scheme(bits=4, block=(1, 32), symmetric=symmetric), search)
    with pytest.raises(FormatError, match=r"q_proj: 1 of 128 values are NaN or infinite"):
        numerics.refuse_bad_values(W, "q_proj")


def test_scale_that_overflows_float16():
    W = torch.tensor([[1e6, -1.0, 0, 0]])
    with pytest.raises(FormatError, match=r"a scale of 1.33e\+05 does not fit float16; use scale_dtype bfloat16 or float32"):
        numerics.quantize(W, Scheme(bits=4, block=(1, 4), scale_dtype="float16"))
    assert numerics.quantize(W, Scheme(bits=4, block=(1, 4), scale_dtype="bfloat16")).parts["scale"].item() == 133120  # 1e6 / 7.5, 8 bits of it


def test_scale_that_underflows_float16_becomes_its_smallest_number():
    qt = numerics.quantize(torch.tensor([[1e-9, -1e-9]]), Scheme(bits=4, block=(1, 2), scale_dtype="float16"))
    assert qt.parts["scale"].item() == 2.0**-24 and signed(qt) == [[0, 0]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_codes_are_chosen_for_the_stored_scale(dtype):
    W = normal(16, 64)
    qt = numerics.quantize(W, Scheme(bits=8, block=(1, 32), scale_dtype=dtype))
    scale = qt.parts["scale"]
    assert scale.dtype == getattr(torch, dtype)
    expected = (torch.round(W / scale.float().repeat_interleave(32, 1)) + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(qt.parts["codes"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "scheme", [Scheme(bits=4, block=(1, 16)), Scheme(bits=3, block=CHANNEL, symmetric=False), Scheme(bits=8, block=TENSOR), Scheme("float16")]
)
@pytest.mark.parametrize("method", ["minmax", "mse", "golden", "percentile", "clamp"])
def test_input_is_not_modified(dtype, scheme, method):
    W = normal(8, 40).to(dtype)
    kept, importance = W.clone(), torch.rand(40)
    kept_importance = importance.clone()
    qt = numerics.quantize(W, scheme, RangeSearch(method, clamp=1.0), importance)
    parts = {name: part.clone() for name, part in qt.parts.items()}
    numerics.dequantize(qt)
    assert torch.equal(W, kept) and torch.equal(importance, kept_importance)
    assert all(torch.equal(qt.parts[name], part) for name, part in parts.items())
    assert qt.dtype == str(dtype).removeprefix("torch.") and qt.shape == (8, 40)


matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False))


@settings(max_examples=150, deadline=None)
@given(matrices, st.integers(2, 8), st.sampled_from([TENSOR, CHANNEL, (1, 1), (1, 7), (1, 16)]), st.booleans())
def test_error_of_minmax_is_at_most_half_a_step(array, bits, block, symmetric):
    W = torch.from_numpy(array)
    qt = numerics.quantize(W, Scheme(bits=bits, block=block, symmetric=symmetric, range="textbook"))
    error, step = (W - numerics.dequantize(qt)).abs(), steps(W, qt)
    assert bool((error <= 0.5 * step * (1 + 1e-5) + 2e-7 * W.abs()).all()), float((error / step).max())
    assert int(qt.parts["codes"].max()) <= 2**bits - 1


@settings(max_examples=100, deadline=None)
@given(matrices, st.integers(2, 8), st.sampled_from(["half", "full"]))
def test_error_of_the_wider_ranges_is_at_most_one_step(array, bits, range_):
    """half: the extreme lies at 7.5 steps and the last code at 7; full: the far side of the extreme's sign is short of one step."""
    W = torch.from_numpy(array)
    qt = numerics.quantize(W, Scheme(bits=bits, block=(1, 16), range=range_))
    error, step = (W - numerics.dequantize(qt)).abs(), steps(W, qt)
    bound = 0.5 if range_ == "half" else 1.0
    assert bool((error <= bound * step * (1 + 1e-5) + 2e-7 * W.abs()).all()), float((error / step).max())


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(2, 8), st.booleans())
def test_quantizing_the_decoded_values_on_the_same_grid_changes_nothing(array, bits, symmetric):
    scheme = Scheme(bits=bits, block=(1, 16), symmetric=symmetric)
    qt = numerics.quantize(torch.from_numpy(array), scheme)
    again = integer.from_parameters(numerics.dequantize(qt), scheme, qt.parts["scale"], qt.parts.get("zero_point"))
    assert torch.equal(again.parts["codes"], qt.parts["codes"])


def test_more_bits_and_smaller_groups_err_less():
    """Signal-to-noise of normal weights: 13.1 dB at 3 bits, and about 6 dB more for each bit."""
    W = normal(64, 512)

    def snr(scheme):
        return 10 * torch.log10(W.square().mean() / (W - numerics.dequantize(numerics.quantize(W, scheme))).square().mean()).item()

    by_bits = [snr(Scheme(bits=bits, block=(1, 64))) for bits in range(3, 9)]
    assert by_bits[0] == pytest.approx(13.1, abs=0.2)
    assert np.diff(by_bits).tolist() == pytest.approx([6.2] * 5, abs=0.5)
    by_group = [snr(Scheme(bits=4, block=block)) for block in ((1, 16), (1, 64), (1, 256), TENSOR)]
    assert by_group == sorted(by_group, reverse=True)


def test_bits_per_weight():
    shape = (576, 576)
    assert numerics.bits_per_weight(Scheme(bits=4, block=(1, 64), scale_dtype="float16"), shape) == 4.25
    assert numerics.bits_per_weight(Scheme(bits=4, block=(1, 64), symmetric=False, scale_dtype="float16"), shape) == 4.3125
    assert numerics.bits_per_weight(Scheme(bits=8, block=CHANNEL), shape) == 8 + 32 / 576
    assert numerics.nbytes(Scheme(bits=3, block=TENSOR), (830, 545)) == -(-(830 * 545 * 3 + 32) // 8)
    assert numerics.nbytes(Scheme(bits=4, block=(1, 128), scale_dtype="bfloat16"), (830, 545)) == (830 * 545 * 4 + 830 * 5 * 16) // 8


def test_casts():
    W = torch.tensor([[1.0, 1 / 3, -65504.0]])
    qt = numerics.quantize(W, Scheme("float16"))
    assert qt.parts["weight"].dtype == torch.float16 and numerics.dequantize(qt).tolist() == [[1.0, 0.333251953125, -65504.0]]
    with pytest.raises(FormatError, match=r"a value of 7e\+04 does not fit float16"):
        numerics.quantize(torch.tensor([[7e4]]), Scheme("float16"))
    with pytest.raises(FormatError, match="NaN"):
        numerics.quantize(torch.tensor([[float("nan")]]), Scheme("bfloat16"))


def test_refusals():
    with pytest.raises(ShapeError, match=r"got \[4\]"):
        numerics.quantize(torch.zeros(4), Scheme())
    with pytest.raises(RecipeError, match="bits is 9"):
        Scheme(bits=9)
    with pytest.raises(RecipeError, match="'nf9' is not known"):
        numerics.quantize(torch.zeros(2, 2), Scheme("nf9"))
