"""Range searches: hand-computed bounds, never worse than min-max, and the gain where an outlier is planted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit import numerics
from lowbit.errors import FormatError, RecipeError
from lowbit.numerics import integer, ranges
from lowbit.scheme import RangeSearch, Scheme


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(W, scheme, search, importance=None):
    """Weighted squared error of every group, [out, groups]; float64."""
    error = (W - numerics.dequantize(numerics.quantize(W, scheme, search, importance))).double().square()
    if importance is not None:
        error *= importance
    groups, _ = integer.to_groups(error, scheme)
    if W.shape[1] % groups.shape[-1] and scheme.block != (-1, -1):
        groups[:, -1, W.shape[1] % groups.shape[-1] :] = 0
    return groups.sum(-1)


def test_percentile_is_the_interpolated_quantile():
    """0..100 at 90%: the tails of 5% cut at 5 and 95; asymmetric scale = 95 / 15 (the range includes 0)."""
    groups = torch.arange(101.0)[None]
    scale, zero = ranges.fit(groups, Scheme(bits=4, symmetric=False), RangeSearch("percentile", percentile=90))
    assert scale.item() == pytest.approx(95 / 15, rel=1e-6) and zero.item() == 0
    scale, _ = ranges.fit(groups - 50, Scheme(bits=4, range="textbook"), RangeSearch("percentile", percentile=90))
    assert scale.item() == pytest.approx(45 / 7, rel=1e-6)


def test_percentile_equals_torch_quantile():
    groups = normal(7, 3, 129)
    for percentile in (50.0, 90.0, 99.9, 100.0):
        tail = (100 - percentile) / 200
        low, high = torch.quantile(groups, tail, dim=-1), torch.quantile(groups, 1 - tail, dim=-1)
        found = ranges.fit(groups, Scheme(bits=8, range="textbook"), RangeSearch("percentile", percentile=percentile))[0]
        assert torch.allclose(found, torch.maximum(-low, high) / 127, rtol=1e-5)


def test_percentile_of_100_is_minmax():
    W, scheme = normal(8, 96), Scheme(bits=4, block=(1, 32))
    assert torch.equal(numerics.quantize(W, scheme, RangeSearch("percentile", percentile=100)).parts["codes"], numerics.quantize(W, scheme).parts["codes"])


def test_percentile_of_more_values_than_torch_quantile_takes():
    """2^24 + 2 values under one scale."""
    W = torch.zeros(2, 2**23 + 1)
    W[0, 0] = 1000.0
    qt = numerics.quantize(W, Scheme(bits=8, block=(-1, -1), range="textbook"), RangeSearch("percentile", percentile=99))
    assert qt.parts["scale"].item() == 1 and numerics.dequantize(qt)[0, 0].item() == 127


def test_clamp_bounds_the_range():
    W = torch.tensor([[0.5, -3.0, 7.0, 1.0]])
    qt = numerics.quantize(W, Scheme(bits=4, block=(1, 4), range="textbook"), RangeSearch("clamp", clamp=1.4))
    assert qt.parts["scale"].item() == pytest.approx(0.2, rel=1e-6)
    assert numerics.dequantize(qt)[0].tolist() == pytest.approx([0.4, -1.6, 1.4, 1.0], abs=1e-6)  # 0.5 / 0.2 = 2.5 to even 2; code -8 exists
    wide = numerics.quantize(W, Scheme(bits=4, block=(1, 4)), RangeSearch("clamp", clamp=100.0))
    assert torch.equal(wide.parts["codes"], numerics.quantize(W, Scheme(bits=4, block=(1, 4))).parts["codes"])


@pytest.mark.parametrize("search", [RangeSearch("percentile", percentile=90), RangeSearch("clamp", clamp=1.0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_the_range_cuts_off_is_still_refused(search, bad):
    W = normal(1, 4096)
    W[0, 7] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        numerics.quantize(W, Scheme(bits=4, block=(1, -1)), search)


matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False))
schemes = st.builds(
    lambda bits, block, symmetric, range_: Scheme(bits=bits, block=block, symmetric=symmetric, range=range_),
    st.integers(2, 8), st.sampled_from([(-1, -1), (1, -1), (1, 8), (1, 16)]), st.booleans(), st.sampled_from(["textbook", "half", "full"]),
)  # fmt: skip


@pytest.mark.parametrize("method", ["mse", "golden"])
@settings(max_examples=60, deadline=None)
@given(array=matrices, scheme=schemes, weighted=st.booleans())
def test_searches_are_never_worse_than_minmax(method, array, scheme, weighted):
    W = torch.from_numpy(array)
    importance = torch.linspace(0.1, 3, W.shape[1]) if weighted else None
    found = squared_error(W, scheme, RangeSearch(method), importance)
    minmax = squared_error(W, scheme, RangeSearch(), importance)
    slack = 1e-6 * (W.double().square().amax() * W.numel() * 1e-3 + minmax)  # the searches sum in float32
    assert bool((found <= minmax + slack).all()), (found, minmax)


@pytest.mark.parametrize("method", ["percentile", "clamp", "mse", "golden"])
def test_planted_outlier(method):
    """int4, one column at 100 sigma whose error does not count: min-max rounds nearly all else to zero (mean squared error 0.97);
    every other method cuts the outlier off and errs by at most 0.02."""
    W, scheme = normal(64, 64), Scheme(bits=4, block=(1, 64), range="textbook")
    W[:, 5] = 100.0
    importance = torch.ones(64)
    importance[5] = 0

    def mean(search):
        return squared_error(W, scheme, search, importance).mean().item() / 64

    assert 0.9 <= mean(RangeSearch()) <= 1.1
    assert mean(RangeSearch(method, percentile=95.0, clamp=3.0, max_shrink=0.99, grid=60)) <= 0.02


@pytest.mark.parametrize("method", ["mse", "golden"])
def test_searches_gain_on_heavy_tails(method):
    """int3, groups of 128 of Student t with 4 degrees of freedom: at least 1.3 times less squared error than min-max."""
    generator = torch.Generator().manual_seed(3)
    normals = torch.randn(5, 64, 512, generator=generator)
    W = normals[0] / (normals[1:].square().mean(0)).sqrt()
    scheme = Scheme(bits=3, block=(1, 128))
    ratio = squared_error(W, scheme, RangeSearch()).sum() / squared_error(W, scheme, RangeSearch(method)).sum()
    assert ratio >= 1.3


def test_mse_finds_the_exact_grid():
    """Values that lie on a grid of step 0.3 but for one outlier that does not count: the search finds 0.3 and errs by nothing."""
    W = 0.3 * torch.arange(-8.0, 8.0)[None].repeat(4, 1)
    W[:, 0] = 5.0
    importance = torch.ones(16)
    importance[0] = 0
    qt = numerics.quantize(W, Scheme(bits=4, block=(1, 16)), RangeSearch("mse"), importance)
    assert torch.allclose(qt.parts["scale"], torch.full((4, 1), 0.3), rtol=1e-5)
    assert torch.allclose(numerics.dequantize(qt)[:, 1:], W[:, 1:], atol=1e-5)


def test_importance_moves_the_error_to_the_columns_that_matter_less():
    W = normal(32, 64) * torch.linspace(0.2, 3, 64)
    scheme, importance = Scheme(bits=3, block=(1, 64)), torch.cat([torch.full((48,), 10.0), torch.full((16,), 0.01)])
    plain = (W - numerics.dequantize(numerics.quantize(W, scheme, RangeSearch("mse")))).square()
    weighted = (W - numerics.dequantize(numerics.quantize(W, scheme, RangeSearch("mse"), importance))).square()
    assert weighted[:, :48].sum() < 0.9 * plain[:, :48].sum()
    assert (weighted * importance).sum() < (plain * importance).sum()


def test_refusals():
    for bad, message in (
        ({"method": "best"}, "'best' is not known"), ({"percentile": 0}, "percentile is 0"), ({"clamp": -1.0}, "clamp is -1.0"), ({"grid": 1}, "grid 1"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            RangeSearch(**bad)
