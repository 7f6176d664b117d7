"""E8P against the authors' code (tests/oracles/make_quip.py): every point, rounding, codes; and the transform around it."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit import numerics
from lowbit.algorithms.ldlq import LdlqOptions, Solver, block_ldl, ldlq
from lowbit.numerics import lattice
from lowbit.scheme import Scheme
from lowbit.stats import LayerStats

NAMES = {"e8p2": "E8P12", "e8p3": "E8P12RVQ3B", "e8p4": "E8P12RVQ4B"}


@pytest.fixture(scope="module")
def stored():
    return load_file(Path(__file__).parents[1] / "oracles" / "quip.safetensors")


def test_all_points_are_the_authors(stored):
    assert torch.equal(lattice.magnitudes(), stored["codebook.abs"].float())
    grid = (4 * lattice.points()).to(torch.int8)
    assert hashlib.sha256(grid.numpy().tobytes()).digest() == bytes(stored["codebook.sha256"].tolist())
    assert torch.equal(grid[stored["codebook.codes"].long()], stored["codebook.rows4"])
    assert torch.equal((2 * lattice.e81b()).to(torch.int8), stored["codebook.e81b2"])


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_the_authors(stored, name):
    X, kind = stored["round.X"], lattice.KINDS[name]
    values, code, second = lattice.round_vectors(X, kind, kind.residual)
    code = code if second is None else code << 16 | second
    assert torch.equal(code, stored[f"round.{NAMES[name]}.codes"])
    torch.testing.assert_close(values, stored[f"round.{NAMES[name]}.values"])


@pytest.mark.parametrize("factor", [0.5, 2])
def test_rounding_inside_and_outside_of_the_ball(stored, factor):
    assert torch.equal(lattice.round_points(stored["round.X"][:500] * factor)[1], stored[f"round.E8P12.codes.{factor}"])


def test_rounding_is_the_nearest_of_all_points():
    X = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 1.0, 3.0]).repeat(100).unsqueeze(1)
    nearest = torch.cdist(X.double(), lattice.points().double()).argmin(1)
    assert torch.equal(lattice.encode(X), nearest) and torch.equal(lattice.round_points(X)[1], nearest)


@pytest.mark.parametrize("passes", [0, 10])
@pytest.mark.parametrize("name", NAMES)
def test_codes_of_ldlq_are_the_authors(stored, name, passes, monkeypatch):
    kind, case = lattice.KINDS[name], f"ldlq.{NAMES[name]}.{passes}"
    H = stored["ldlq.H"]
    L = block_ldl(H)
    torch.testing.assert_close(L, stored["ldlq.L"], rtol=1e-4, atol=1e-5)
    solver = Solver(stored["ldlq.W"] / stored[f"{case}.Wscale"], H, L, kind, kind.residual)
    solver.first()
    monkeypatch.setattr(solver, "error", iter([float(1000 - i) for i in range(100)]).__next__)  # they take every pass
    for _ in range(passes):
        solver.improve()
    codes = solver.codes if kind.residual is None else solver.codes << 16 | solver.seconds
    assert torch.equal(codes, stored[f"{case}.codes"])
    torch.testing.assert_close(solver.hat, stored[f"{case}.hatW"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "published"), [("e8p2", 0.0917), ("e8p3", 0.0297), ("e8p4", 0.0085)])
def test_distortion_of_gaussian_numbers(stored, name, published):
    """The least mean squared error that the authors' rounding has with any scale (2 bits: 0.0915 in their plots)."""
    size, residual = lattice.KINDS[name].best
    X = torch.randn(1 << 16, 8, generator=torch.Generator().manual_seed(0))
    error = float((lattice.round_vectors(X * size, lattice.KINDS[name], residual)[0] / size - X).square().mean())
    assert error <= published
    assert error <= 1.01 * float(stored[f"mse.{NAMES[name]}.best"][2])


def problem(rows=96, columns=144):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(600, columns, generator=g) @ (torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns))
    return torch.randn(rows, columns, generator=g), LayerStats(600, hessian=X.T @ X)


def output_error(qt, W, stats):
    D = numerics.dequantize(qt) - W
    return float(((D @ stats.hessian) * D).sum() / ((W @ stats.hessian) * W).sum())


@pytest.mark.parametrize("name", NAMES)
def test_ldlq_beats_plain_rounding_and_passes_and_the_search_help(name):
    W, stats = problem()
    scheme = numerics.scheme_of(name)
    error = {}
    for label, options in (("first", LdlqOptions(passes=0, search=False)), ("passes", LdlqOptions(search=False)), ("all", LdlqOptions())):
        error[label] = output_error(ldlq(W, scheme, stats, options, []), W, stats)
    assert error["first"] < 0.8 * output_error(numerics.quantize(W, scheme), W, stats)
    assert error["passes"] <= error["first"] and error["all"] <= 1.02 * error["passes"]


def test_an_outlier_does_not_hurt():
    """What the transform is for: one huge weight leaves the others where they are (plain 2-bit integers of a row lose everything)."""
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    W[5, 7] = 40
    error = lambda scheme: float((numerics.dequantize(numerics.quantize(W, scheme)) - W)[:, :7].square().mean())
    assert error(numerics.scheme_of("e8p2")) < 0.2 < error(Scheme(bits=2, block=(-1, -1)))


@pytest.mark.parametrize("case", ["64x48", "40x56"])
def test_the_transformed_matrices_are_the_authors(stored, case):
    get = lambda name: stored[f"incoherence.{case}.{name}"].float()
    W, H = get("W"), get("H")
    if f"incoherence.{case}.scaleWH" in stored:  # their option to rescale columns first, which is not ours
        W, H = W * get("scaleWH"), H / H.abs().max() / get("scaleWH") / get("scaleWH").unsqueeze(1)
    torch.testing.assert_close(lattice.incoherent(W, get("SV"), get("SU")), get("Wr"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lattice.incoherent(H, get("SU"), get("SU")), get("Hr"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lattice.coherent(get("Wr"), get("SV"), get("SU")), W, rtol=1e-4, atol=1e-4)


def test_a_whole_layer_is_the_authors(stored, monkeypatch):
    """From weights and Hessian to the values that stand for the weights: their quantize_linear with scale_override 0.9 and ten passes."""
    W, mu, columns, rows = stored["layer.W"], stored["layer.mu"], stored["layer.SU"].float(), stored["layer.SV"].float().sign()
    low = torch.tril_indices(len(mu), len(mu))
    H = torch.zeros(len(mu), len(mu))
    H[low[0], low[1]] = stored["layer.flatH"]
    H = H + H.tril(-1).T + mu[:, None] * mu
    H = H / H.diagonal().mean()
    H.diagonal().add_(0.01)
    turned = lattice.incoherent(W / W.square().mean().sqrt(), rows, columns)
    H = lattice.incoherent(H, columns, columns)
    scale = lattice.scale_of(turned, 0.9)
    solver = Solver(turned / scale, H, block_ldl(H), lattice.KINDS["e8p2"], None)
    solver.first()
    monkeypatch.setattr(solver, "error", iter([float(1000 - i) for i in range(100)]).__next__)  # they take every pass
    for _ in range(10):
        solver.improve()
    torch.testing.assert_close(lattice.coherent(solver.hat * scale, rows, columns), stored["layer.hatW"], rtol=1e-3, atol=1e-3)
