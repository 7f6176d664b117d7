"""BitNet's formulas, by hand."""

import torch

from lowbit.numerics import bits_per_weight, dequantize, quantize, scheme_of

W = torch.tensor([[0.9, -0.2, 0.1, -1.4], [0.3, 0.0, -0.6, 0.5]])


def test_ternary_is_absmean():
    made = quantize(W, scheme_of("ternary"))
    mean = float(W.abs().mean())  # 0.5
    assert abs(mean - 0.5) < 1e-6
    assert made.parts["codes"].tolist() == [[2, 1, 1, 0], [2, 1, 0, 2]]
    assert torch.allclose(dequantize(made), torch.tensor([[0.5, 0, 0, -0.5], [0.5, 0, -0.5, 0.5]]))


def test_binary_is_the_sign_of_what_is_above_the_mean():
    made = quantize(W, scheme_of("binary"))
    assert dequantize(made).sign().tolist() == (W - W.mean()).sign().tolist()
    assert torch.allclose(dequantize(made).abs(), W.abs().mean().expand(2, 4))


def test_a_scale_for_each_group():
    made = quantize(W, scheme_of("ternary", block=(1, 2)))
    assert torch.allclose(made.parts["scale"], torch.tensor([[0.55, 0.75], [0.15, 0.55]]))


def test_bits():
    assert bits_per_weight(scheme_of("ternary"), (1000, 1000)) == 2 + 32e-6
    assert bits_per_weight(scheme_of("binary"), (1000, 1000)) == 1 + 32e-6
