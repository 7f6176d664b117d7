"""Hadamard matrices by their definition, and the transform by that of orthogonality."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import ShapeError
from lowbit.numerics import hadamard


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 40, 44, 52, 60, 64, 68, 76, 84, 92, 96, 100, 108, 116, 124, 140, 148, 156, 172, 184, 252, 344, 576])
def test_rows_are_orthogonal(order):
    H = hadamard.hadamard(order).to(torch.int32)
    assert set(H.unique().tolist()) <= {1, -1}
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.int32))


@pytest.mark.parametrize("order", [0, 3, 6, 18, 188])
def test_other_orders_are_refused(order):
    with pytest.raises(ShapeError, match=f"order {order}"):
        hadamard.hadamard(order)


@pytest.mark.parametrize("n", [1, 2, 96, 128, 256, 512, 545, 576, 1536, 4096, 11008, 14336, 8 * 47])
def test_the_transform_is_orthogonal_and_spreads_a_single_value(n):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = hadamard.mix(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)
    torch.testing.assert_close(hadamard.unmix(y), x)
    one = torch.zeros(n, dtype=torch.float64)
    one[n // 3] = 1
    peak = float(hadamard.mix(one).abs().max()) * n**0.5
    assert peak == pytest.approx(1) if hadamard.is_flat(n) else peak <= 2**0.5 + 1e-9
    assert hadamard.is_flat(n) or n in (545, 8 * 47)


def test_a_power_of_two_is_sylvesters():
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hadamard.mix(x), x @ hadamard.hadamard(256).float().T / 16)


@pytest.mark.parametrize("n", [64, 24, 40, 56, 72, 104, 120, 216, 232, 248, 280, 312, 344])
def test_it_is_quip_sharps_transform(n):
    """Made by the authors' code (tests/oracles/make_quip.py), twice the order of each of their twelve matrices."""
    stored = load_file(Path(__file__).parents[1] / "oracles" / "quip.safetensors")
    x = stored[f"hadamard.{n}.x"]
    torch.testing.assert_close(hadamard.mix(x), stored[f"hadamard.{n}.Ux"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard.unmix(x), stored[f"hadamard.{n}.Utx"], rtol=1e-5, atol=1e-5)
