"""GPTQ against the authors' code (tests/oracles/make_gptq.py) and against what it promises."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit import numerics
from lowbit.algorithms.gptq import GptqOptions, factorize, gptq
from lowbit.algorithms.rtn import RtnOptions, rtn
from lowbit.errors import RecipeError
from lowbit.native import native
from lowbit.numerics import grids
from lowbit.scheme import CASTS, Scheme
from lowbit.stats import LayerStats

ORACLE = load_file(Path(__file__).parent.parent / "oracles" / "gptq.safetensors")
CASES = {
    "int4-sym-g32": (Scheme(bits=4, block=(1, 32)), "natural"),
    "int4-asym-g32": (Scheme(bits=4, block=(1, 32), symmetric=False), "natural"),
    "int4-sym-g16": (Scheme(bits=4, block=(1, 16)), "natural"),  # two groups in one of our blocks: the second must not be stale
    "int3-asym-row": (Scheme(bits=3, block=(1, -1), symmetric=False), "natural"),
    "int2-asym-g32": (Scheme(bits=2, block=(1, 32), symmetric=False), "natural"),
    "int8-sym-row": (Scheme(bits=8, block=(1, -1)), "natural"),
    "int4-sym-g32-act": (Scheme(bits=4, block=(1, 32)), "activation"),
    "int3-asym-g32-act": (Scheme(bits=3, block=(1, 32), symmetric=False), "activation"),
}


def problem(rows=40, columns=96, tokens=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), LayerStats(n_tokens=tokens, hessian=X.T @ X)


def loss(W, qt, H):
    D = numerics.dequantize(qt) - W
    return float(((D @ H) * D).sum())


@pytest.mark.parametrize("name", CASES)
def test_same_codes_as_the_authors(name):
    scheme, order = CASES[name]
    W, H = ORACLE["W"], ORACLE["H"]
    made = gptq(W, scheme, LayerStats(n_tokens=400, hessian=H), GptqOptions(order=order, search="minmax", sweeps=0), [])
    different = (numerics.dequantize(made) - ORACLE[name]).abs() > 1e-4
    rows = int(different.any(1).sum())
    assert rows <= 1, f"{rows} of {len(W)} rows differ; one may, where a tie is rounded the other way and the rest of its row follows"


@pytest.mark.parametrize("options", [GptqOptions(), GptqOptions(order="natural"), GptqOptions(order="activation"), GptqOptions(sweeps=2)])
@pytest.mark.parametrize("scheme", [Scheme(bits=4, block=(1, 32)), Scheme(bits=3, block=(1, 40), symmetric=False), Scheme(bits=2, block=(1, -1), symmetric=False), Scheme(bits=4, block=(-1, -1))])
def test_less_output_error_than_rounding(scheme, options):
    W, stats = problem()
    rounded = rtn(W, scheme, None, RtnOptions(search="mse"), [])
    made = gptq(W, scheme, stats, options, [])
    assert loss(W, made, stats.hessian) < 0.8 * loss(W, rounded, stats.hessian)


def test_sweeps_only_lower_the_loss():
    W, stats = problem()
    scheme = Scheme(bits=3, block=(1, 32))
    losses = [loss(W, gptq(W, scheme, stats, GptqOptions(sweeps=n), []), stats.hessian) for n in (0, 1, 3)]
    assert losses[0] > losses[1] >= losses[2]


EVERY_GRID = [numerics.scheme_of(name) for name in grids.FORMATS if name not in ("int", *CASTS)] + [
    Scheme(bits=4, block=(1, 32), symmetric=False, zero_dtype="int"), Scheme("fp8_e4m3", 8, (-1, -1)), Scheme("nf4", 4, (1, 32), nested=256),
]  # fmt: skip


@pytest.mark.parametrize("order", ["natural", "groups", "activation"])
@pytest.mark.parametrize("scheme", EVERY_GRID, ids=lambda s: s.name)
def test_every_grid_beats_its_own_rounding(scheme, order):
    """On every number format, with the codes on its grid: rounding the decoded values once more with the stored scales changes nothing."""
    W, stats = problem(rows=24, columns=512, tokens=2000)
    rounded = numerics.quantize(W, scheme, importance=stats.importance())
    made = gptq(W, scheme, stats, GptqOptions(order=order), [])
    assert made.scheme == scheme and {k: (v.shape, v.dtype) for k, v in made.parts.items()} == {k: (v.shape, v.dtype) for k, v in rounded.parts.items()}
    ratio = loss(W, made, stats.hessian) / loss(W, rounded, stats.hessian)
    assert ratio < (1.0 if scheme.format in ("q2_k", "q3_k") and order == "activation" else 0.9), ratio


def test_identity_hessian_is_plain_rounding():
    W, _ = problem()
    scheme = Scheme(bits=4, block=(1, 32))
    stats, rounded = LayerStats(n_tokens=1, hessian=torch.eye(96)), rtn(W, scheme, None, RtnOptions(), [])
    made = gptq(W, scheme, stats, GptqOptions(search="minmax", sweeps=0), [])
    assert torch.equal(made.parts["codes"], rounded.parts["codes"])
    swept = gptq(W, scheme, stats, GptqOptions(search="minmax"), [])  # the largest value of a group lies halfway between two codes
    assert torch.allclose((numerics.dequantize(swept) - W).abs(), (numerics.dequantize(rounded) - W).abs(), atol=1e-6)


def test_singular_hessian_is_damped_more_and_noted():
    W, _ = problem()
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)) * 1e3
    notes = []
    made = gptq(W, Scheme(bits=4, block=(1, 32)), LayerStats(n_tokens=3, hessian=x.T @ x), GptqOptions(damp=0.0), notes)
    assert "damping raised from 0" in notes[0]
    assert torch.isfinite(numerics.dequantize(made)).all()


def test_hopeless_hessian_falls_back_to_rounding_and_is_noted():
    W, _ = problem()
    notes = []
    made = gptq(W, Scheme(bits=4, block=(1, 32)), LayerStats(n_tokens=3, hessian=torch.full((96, 96), float("nan"))), GptqOptions(), notes)
    assert "plain rounding was used" in notes[0]
    assert float((numerics.dequantize(made) - W).abs().max()) < 1


def test_dead_columns_become_zero():
    W, stats = problem()
    H = stats.hessian.clone()
    H[7], H[:, 7] = 0, 0
    notes = []
    made = gptq(W, Scheme(bits=4, block=(1, 32)), LayerStats(n_tokens=300, hessian=H), GptqOptions(), notes)
    assert notes == ["1 dead input columns"]
    assert float(numerics.dequantize(made)[:, 7].abs().max()) == 0


def test_inverse_factor():
    _, stats = problem()
    factor = factorize(stats.hessian, 32, GptqOptions(order="activation"))
    product = factor.U.T @ factor.U @ factor.H
    assert float((product - torch.eye(96)).abs().max()) < 1e-3
    assert torch.equal(factor.order.sort().values, torch.arange(96))


@pytest.mark.parametrize("shape", [(83, 545), (1, 64), (5, 33)])
def test_odd_shapes_determinism_and_untouched_input(shape):
    W, stats = problem(*shape, tokens=64)
    before, H = W.clone(), stats.hessian.clone()
    a = gptq(W, Scheme(bits=3, block=(1, 128), symmetric=False), stats, GptqOptions(sweeps=1), [])
    b = gptq(W, Scheme(bits=3, block=(1, 128), symmetric=False), stats, GptqOptions(sweeps=1), [])
    assert all(torch.equal(a.parts[key], b.parts[key]) for key in a.parts)
    assert torch.equal(W, before) and torch.equal(stats.hessian, H)


@pytest.mark.skipif(native() is None, reason="no native extension")
@pytest.mark.parametrize("options", [GptqOptions(), GptqOptions(order="natural", sweeps=0), GptqOptions(order="activation"), GptqOptions(alpha=0.5, sweeps=2)])
@pytest.mark.parametrize("scheme", [Scheme(bits=4, block=(1, 64)), Scheme(bits=3, block=(1, 24), symmetric=False), Scheme(bits=2, block=(-1, -1)), *map(numerics.scheme_of, ("q4_1", "ternary"))])
def test_the_loop_in_cpp_is_that_of_torch(scheme, options, monkeypatch):
    """Their sums differ in the last bit where a processor fuses products, so a code here and there may."""
    W, stats = problem(37, 480, 700)
    H = stats.hessian
    stats.cross = torch.randn(480, 480, generator=torch.Generator().manual_seed(3)) * H.diagonal().mean() * 0.01 if options.alpha else None
    ours = gptq(W, scheme, stats, options, [])
    monkeypatch.setattr(import_module("lowbit.algorithms.gptq"), "native", lambda: None)
    goal = gptq(W, scheme, stats, options, [])
    assert loss(W, ours, H) == pytest.approx(loss(W, goal, H), rel=5e-3)
    codes = [qt.parts.get("codes", qt.parts.get("blocks")) for qt in (ours, goal)]
    assert float((codes[0] == codes[1]).float().mean()) > 0.98


def test_options_are_checked():
    with pytest.raises(RecipeError, match="order is 'best'; expected one of natural, activation, groups"):
        GptqOptions(order="best")
    with pytest.raises(RecipeError, match="damp is 2"):
        GptqOptions(damp=2)


GPTAQ = load_file(Path(__file__).parent.parent / "oracles" / "gptaq.safetensors")


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("bits", [3, 4])
def test_alpha_gives_the_codes_of_gptaqs_authors(bits, order):
    W, stats = GPTAQ["W"], LayerStats(n_tokens=400, hessian=GPTAQ["H"], cross=GPTAQ["cross"])
    scheme = Scheme(bits=bits, block=(1, -1), range="textbook")
    made = gptq(W, scheme, stats, GptqOptions(order=order, search="minmax", sweeps=0, alpha=0.25), [])
    different = (numerics.dequantize(made) - GPTAQ[f"{bits}.{order}"]).abs() > 1e-4
    assert int(different.any(1).sum()) <= 1  # a tie rounded the other way, which the rest of the row follows
    plain = gptq(W, scheme, stats, GptqOptions(order=order, search="minmax", sweeps=0), [])
    assert float((numerics.dequantize(plain) - numerics.dequantize(made)).abs().max()) > 0.1


def test_alpha_1_and_sweeps_lower_the_distance_to_the_original_outputs():
    """||W X_original - What X||^2 = tr(dW H dW^T) + 2 tr(dW cross^T W^T) + const, dW = W - What."""
    W, H, cross = GPTAQ["W"], GPTAQ["H"], GPTAQ["cross"]
    stats = LayerStats(n_tokens=400, hessian=H, cross=cross)

    def distance(made):
        D = W - numerics.dequantize(made)
        return float(((D @ H) * D).sum() + 2 * ((W @ cross) * D).sum())

    scheme = Scheme(bits=4, block=(1, 32))
    plain = distance(gptq(W, scheme, stats, GptqOptions(), []))
    assert distance(gptq(W, scheme, stats, GptqOptions(alpha=1.0), [])) < plain
    assert distance(gptq(W, scheme, stats, GptqOptions(alpha=1.0, sweeps=3), [])) <= distance(gptq(W, scheme, stats, GptqOptions(alpha=1.0), []))


def test_alpha_without_the_original_inputs_is_noted():
    W, stats = problem()
    notes = []
    gptq(W, Scheme(bits=4, block=(1, 32)), stats, GptqOptions(alpha=0.25), notes)
    assert "the error of the inputs was not counted" in notes[0]
