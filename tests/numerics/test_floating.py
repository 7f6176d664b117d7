"""Small floats against ml_dtypes (tests/oracles/make_floats.py) and the rules of the MX and NVFP4 formats."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import RecipeError
from lowbit.numerics import dequantize, floating, quantize, scheme_of
from lowbit.scheme import Scheme

ORACLE = load_file(Path(__file__).parent.parent / "oracles" / "floats.safetensors")
ELEMENTS = {"e2m1": floating.E2M1, "e2m3": floating.E2M3, "e3m2": floating.E3M2, "e4m3": floating.E4M3, "e5m2": floating.E5M2}


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_round_as_ml_dtypes(name):
    codes = floating.encode(ORACLE[f"{name}.x"], ELEMENTS[name])
    assert torch.equal(floating.decode(codes, ELEMENTS[name]), ORACLE[f"{name}.rounded"])
    assert torch.equal(codes, ORACLE[f"{name}.codes"])


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_saturate(name):
    top = ELEMENTS[name].largest
    assert floating.decode(floating.encode(torch.tensor([1e9, -1e9, top * 1.001]), ELEMENTS[name]), ELEMENTS[name]).tolist() == [top, -top, top]


@pytest.mark.parametrize("name", [name for name, kind in floating.KINDS.items() if kind.scale == "e8m0"])
def test_shared_exponents_follow_the_specification(name):
    """X = 2^(floor(log2 max|x|) - emax), OCP MX v1.0 section 6.3."""
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [2.0**20], [0.0]])
    made = quantize(W, scheme_of(name))
    absmax = W.view(4, 2, 32).abs().amax(-1).double()
    expected = torch.floor(torch.log2(absmax)) - floating.KINDS[name].element.top + 127
    assert torch.equal(made.parts["scale"][:3].double(), expected[:3])
    error = (dequantize(made) - W).abs().view(4, 2, 32).amax(-1)
    assert (error <= absmax * 2.0 ** -floating.KINDS[name].element.mantissa).all()


def test_nvfp4_scales():
    """Block scales are E4M3 numbers that reach 448, over 448 * 6 / max|W|."""
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    made = quantize(W, scheme_of("nvfp4"))
    assert made.parts["scale"].shape == (8, 4) and float(floating.decode(made.parts["scale"], floating.E4M3).max()) == 448
    assert float(made.parts["global_scale"]) == pytest.approx(2688 / float(W.abs().max()))
    assert float((dequantize(made) - W).square().sum() / W.square().sum()) < 0.015


def test_fp8_scales_are_per_channel_tensor_or_group():
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8).unsqueeze(1)
    errors = []
    for block in ((-1, -1), (1, -1), (1, 16)):
        made = quantize(W, Scheme("fp8_e4m3", 8, block))
        assert made.parts["scale"].shape == {(-1, -1): (1, 1), (1, -1): (8, 1), (1, 16): (8, 4)}[block]
        errors.append(float(((dequantize(made) - W).square().sum(1) / W.square().sum(1)).mean()))
    assert errors[0] > errors[1] and errors[2] < 1e-3


def test_a_fixed_block_is_fixed():
    with pytest.raises(RecipeError, match="mxfp4 has blocks of 32"):
        quantize(torch.zeros(2, 64), Scheme("mxfp4", 4, (1, 64)))
