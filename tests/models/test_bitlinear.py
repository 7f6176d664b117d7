"""BitLinear against the papers' formulas, written out."""

import pytest
import torch

from lowbit.errors import RecipeError
from lowbit.models.bitlinear import BitLinear
from lowbit.numerics import ternary
from lowbit.scheme import Scheme


@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_the_paper(kind, columns, dtype):
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(columns, 24, dtype=dtype)
    x = torch.randn(2, 5, columns, generator=g).to(dtype)
    x[0, 0] = 0
    W = layer.weight.detach().float()
    mean = W.abs().mean()
    weight = torch.sign(W - W.mean()) if kind == "binary" else torch.clamp(torch.round(W / (mean if mean else 1e-5)), -1, 1)
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    expected = (torch.round(x.float() * scale).clamp(-128, 127) / scale) @ (weight * mean).T + layer.bias.float()
    made = BitLinear.from_linear(layer, kind)
    torch.testing.assert_close(made(x).float(), expected.to(dtype).float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert made.packed.shape == (24, -(-columns // 16)) and made.packed.dtype == torch.int32
    assert torch.equal(made.signs(), weight)


def test_a_scale_for_each_channel_and_what_is_refused():
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9).unsqueeze(1)
    qt = ternary.quantize(W, Scheme("ternary", 2, (1, -1)))
    x = torch.eye(32)
    torch.testing.assert_close(BitLinear(qt)(x).T, ternary.dequantize(qt))
    with pytest.raises(RecipeError, match="binary and ternary weights"):
        BitLinear(ternary.quantize(W, Scheme("ternary", 2, (1, 16))))
