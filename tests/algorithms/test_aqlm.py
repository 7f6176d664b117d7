"""AQLM against the authors' code (tests/oracles/make_aqlm.py): decoding and beam search exactly, the error with the same number of rounds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit import numerics
from lowbit.algorithms.aqlm import AqlmOptions, _State, aqlm
from lowbit.numerics import additive
from lowbit.stats import LayerStats

CASES = ("2x8", "1x10")


@pytest.fixture(scope="module")
def stored():
    return load_file(Path(__file__).parents[1] / "oracles" / "aqlm.safetensors")


def start(stored, case, kind="init."):
    codes, books = stored[f"{case}.{kind}codes"].long(), stored[f"{case}.{kind}codebooks"].squeeze(2)
    return codes, books, stored[f"{case}.{kind}scales"].view(-1)


def error(W, H, decoded):
    D = (decoded - W).double()
    return float(((D @ H.double()) * D).sum() / ((W.double() @ H.double()) * W).sum())


@pytest.mark.parametrize("case", CASES)
def test_decoding(stored, case):
    assert torch.equal(additive.decode(*start(stored, case, "")), stored[f"{case}.weight"])


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_one_search_finds_the_authors_codes(stored, case, beam):
    W, H = stored["W"], stored["XTX"]
    state = _State(W, H, *start(stored, case))
    state.search(beam)
    assert torch.equal(state.codes, stored[f"{case}.beam_{beam}"].long())
    assert error(W, H, state.decoded()) == pytest.approx(float(stored[f"{case}.beam_errors"][{1: 1, 4: 2}[beam]]), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_codebooks_are_fitted_to_their_optimum(stored, case):
    """One fit is at least as good as the authors' 100 steps of Adam from the same start, and more steps gain nothing more."""
    W, H = stored["W"], stored["XTX"]
    state = _State(W, H / H.diagonal().mean(), *start(stored, case))
    state.fit(8)
    first = error(W, H, state.decoded())
    assert first <= float(stored[f"{case}.errors_fitted"][0])
    state.fit(40)
    assert error(W, H, state.decoded()) == pytest.approx(first, rel=0.03)


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_at_most_the_authors(stored, case):
    W, H = stored["W"], stored["XTX"]
    scheme, stats = numerics.scheme_of(f"aqlm_{case}"), LayerStats(1024, hessian=H)
    ours = [error(W, H, numerics.dequantize(aqlm(W, scheme, stats, AqlmOptions(seed=seed, tolerance=0.0), []))) for seed in range(5)]
    theirs = stored[f"{case}.errors_by_seed"]  # after 20 rounds each
    assert sum(ours) / 5 <= 1.01 * float(theirs.mean()), (ours, theirs.tolist())


def test_a_wider_beam_finds_no_worse(stored):
    W, stats = stored["W"], LayerStats(1024, hessian=stored["XTX"])
    found = [error(W, stored["XTX"], numerics.dequantize(aqlm(W, numerics.scheme_of("aqlm_2x8"), stats, AqlmOptions(beam=beam), []))) for beam in (1, 4)]
    assert found[1] < 1.02 * found[0]
