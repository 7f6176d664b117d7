"""What every algorithm of the table promises, on hard inputs."""

from dataclasses import replace

import pytest
import torch

from lowbit import numerics
from lowbit.algorithms import ALGORITHMS, algorithm, make_options
from lowbit.algorithms.autoround import Task
from lowbit.errors import LowbitError, ShapeError
from lowbit.scheme import INT, Scheme
from lowbit.stats import LayerStats

SCHEMES = [Scheme(bits=4, block=(1, 32)), Scheme(bits=2, block=(1, -1), symmetric=False), Scheme(bits=8, block=(1, 128))]
COLUMNS = 64


def scheme_for(name, scheme):
    """A scheme that the algorithm makes: HQQ fits zero-points; lattices and codebooks have formats of their own."""
    if name == "ldlq":
        return numerics.scheme_of({8: "e8p4", 4: "e8p3", 2: "e8p2"}[scheme.bits])
    if name == "aqlm":
        return numerics.scheme_of({8: "aqlm_4x8", 4: "aqlm_2x8", 2: "aqlm_1x8"}[scheme.bits])
    return replace(scheme, symmetric=False, zero_dtype="float") if name == "hqq" else scheme


def run(name, W, scheme, stats, options, notes):
    """The algorithm on one matrix; a block-level one learns it as a block of its own, on the output error that the Hessian says."""
    entry = algorithm(name)
    if entry.level == "weight":
        return entry.run(W, scheme, stats, options, notes)
    assigned = {}

    def measured():
        D = assigned["W"] - W.float()
        return ((D @ (stats.hessian / stats.n_tokens)) * D).mean()

    def loss(numbers):
        total = measured()
        total.backward()
        return float(total.detach())

    return entry.run({"W": W}, {"W": scheme}, Task(assigned.update, loss, lambda: float(measured()), 1, 1), options, seed=0)[0]["W"]


def options_of(name):
    return make_options(name, {"iterations": 10} if name == "autoround" else {})


def inputs():
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(16, COLUMNS, generator=g)
    hot = torch.zeros(16, COLUMNS)
    hot[3, 5] = 7.0
    outlier = normal.clone()
    outlier[2] *= 1000
    return {
        "normal": normal, "zeros": torch.zeros(16, COLUMNS), "one hot value": hot, "constant": torch.full((16, COLUMNS), 0.3), "row of outliers": outlier,
        "one row": normal[:1], "float16": normal.half(), "bfloat16": normal.bfloat16(), "tiny": normal * 1e-12, "830x545": torch.randn(830, 545, generator=g),
    }  # fmt: skip


def hessian(columns, kind):
    X = torch.randn(200 if kind != "fewer samples than dimensions" else 5, columns, generator=torch.Generator().manual_seed(1))
    if kind == "badly scaled":
        X = X * torch.logspace(-6, 6, columns)
    if kind == "dead channel":
        X[:, 3] = 0
    return LayerStats(n_tokens=len(X), sum_sq=X.square().sum(0), absmax=X.abs().amax(0), hessian=X.T @ X)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("label", inputs())
def test_hard_weights(name, scheme, label):
    W, scheme = inputs()[label], scheme_for(name, scheme)
    before = W.clone()
    stats = hessian(W.shape[1], "plain")
    options = options_of(name)
    if W.shape[1] % numerics.entry(scheme).multiple:
        with pytest.raises(ShapeError, match=f"needs in_features to be a multiple of {numerics.entry(scheme).multiple}, and {W.shape[1]} is not"):
            run(name, W, scheme, stats, options, [])
        return
    made = run(name, W, scheme, stats, options, [])
    again = run(name, W, scheme, stats, options, [])
    decoded = numerics.dequantize(made)
    assert made.shape == tuple(W.shape) and made.dtype == str(W.dtype).removeprefix("torch.")
    assert torch.isfinite(decoded).all()
    assert torch.equal(W, before)
    assert all(torch.equal(made.parts[key], again.parts[key]) for key in made.parts)
    if scheme.format == INT and scheme.bits == 8 and label != "tiny":
        assert float((decoded - W.float()).square().sum()) <= 1e-3 * float(W.float().square().sum())


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kind", ["badly scaled", "dead channel", "fewer samples than dimensions"])
def test_hard_statistics(name, kind):
    W, notes = inputs()["normal"], []
    made = run(name, W, scheme_for(name, SCHEMES[0]), hessian(COLUMNS, kind), options_of(name), notes)
    assert torch.isfinite(numerics.dequantize(made)).all()
    assert float((numerics.dequantize(made) - W).square().mean()) < 0.5


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_refused(name, bad):
    W = inputs()["normal"]
    W[1, 1] = bad
    with pytest.raises(LowbitError):
        run(name, W, scheme_for(name, SCHEMES[0]), hessian(COLUMNS, "plain"), options_of(name), [])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unknown_option_is_refused(name):
    with pytest.raises(LowbitError, match="unknown key 'dampening'; expected one of"):
        make_options(name, {"dampening": 1})


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("ldlq",)])
def test_scales_that_overflow_float16_are_refused(name):
    scheme = scheme_for(name, Scheme(bits=4, block=(1, 32), scale_dtype="float16"))
    with pytest.raises(LowbitError, match="float16"):
        run(name, inputs()["normal"] * 1e7, scheme, hessian(COLUMNS, "plain"), options_of(name), [])


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if "hessian" in algorithm(name).needs(make_options(name, {}))])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_hessian_of_nothing_is_noted(name, bad):
    notes = []
    stats = LayerStats(n_tokens=5, hessian=torch.full((COLUMNS, COLUMNS), bad))
    made = run(name, inputs()["normal"], scheme_for(name, SCHEMES[0]), stats, options_of(name), notes)
    assert torch.isfinite(numerics.dequantize(made)).all() and notes
