"""HQQ against the hqq package (tests/oracles/make_hqq.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit import numerics
from lowbit.algorithms.hqq import HqqOptions, hqq
from lowbit.errors import RecipeError
from lowbit.scheme import Scheme

ORACLE = load_file(Path(__file__).parent.parent / "oracles" / "hqq.safetensors")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equal_to_the_hqq_package(bits, axis):
    W, key = ORACLE["W"], f"{bits}.{axis}"
    made = hqq(W, Scheme(bits=bits, block=(1, 64) if axis else (64, 1), symmetric=False, zero_dtype="float"), None, HqqOptions(), [])
    assert torch.allclose(made.parts["scale"].view(-1), ORACLE[f"{key}.scale"].view(-1), rtol=1e-6)
    assert torch.allclose(made.parts["zero_point"].view(-1), ORACLE[f"{key}.zero"].view(-1), rtol=1e-4, atol=1e-4)
    theirs = ORACLE[f"{key}.decoded"]
    different = ((numerics.dequantize(made) - theirs).abs() > 1e-3 * theirs.abs().max()).float().mean()
    assert float(different) <= 1e-4  # a code on the border between two


def test_fitting_lowers_the_norm_that_it_fits():
    W = ORACLE["W"]
    scheme = Scheme(bits=3, block=(1, 64), symmetric=False, zero_dtype="float")
    norm = lambda options: float((numerics.dequantize(hqq(W, scheme, None, options, [])) - W).abs().pow(0.7).sum())
    assert norm(HqqOptions()) < norm(HqqOptions(iterations=0))


def test_whole_zero_points_where_the_scheme_wants_them():
    made = hqq(ORACLE["W"], Scheme(bits=4, block=(1, 64), symmetric=False), None, HqqOptions(), [])
    assert made.parts["zero_point"].dtype == torch.uint8


def test_bad_options():
    with pytest.raises(RecipeError, match="has none; use asym"):
        hqq(ORACLE["W"], Scheme(bits=4, block=(1, 64)), None, HqqOptions(), [])
    with pytest.raises(RecipeError, match="p is 0"):
        HqqOptions(p=0)
