"""AutoRound's fake quantization and its gradients against auto-round (tests/oracles/make_autoround.py), and what learning gains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit import numerics
from lowbit.algorithms.autoround import AutoRoundOptions, Task, _Layer, autoround
from lowbit.errors import RecipeError
from lowbit.pipeline.quantize import quantize
from lowbit.scheme import Scheme

ORACLE = load_file(Path(__file__).parent.parent / "oracles" / "autoround.safetensors")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_values_and_gradients_are_those_of_auto_round(bits, symmetric):
    layer = _Layer(ORACLE["W"], Scheme(bits=bits, block=(1, 32), symmetric=symmetric, range="full"))
    with torch.no_grad():
        layer.V.copy_(ORACLE["V"].view(12, 3, 32))
        layer.beta.copy_(ORACLE["min_scale"].view(12, 3))
        layer.alpha.copy_(ORACLE["max_scale"].view(12, 3))
    decoded = layer.decoded()
    (decoded * ORACLE["weight"]).sum().backward()
    key = f"{'sym' if symmetric else 'asym'}{bits}"
    assert torch.allclose(decoded, ORACLE[f"{key}.decoded"], atol=1e-6)
    assert torch.allclose(layer.V.grad, ORACLE[f"{key}.dV"].view(12, 3, 32), atol=1e-5)
    for ours, theirs in ((layer.beta.grad, "dmin"), (layer.alpha.grad, "dmax")):
        assert torch.allclose(ours, ORACLE[f"{key}.{theirs}"].view(12, 3), atol=1e-4, rtol=1e-3)
    made = layer.result("float32")
    assert torch.allclose(numerics.dequantize(made), decoded, atol=1e-6)


def problem():
    """Two layers with a nonlinearity between them, as a block."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(48, 64, generator=generator) / 8, torch.randn(32, 48, generator=generator) / 7
    X = torch.randn(6, 40, 64, generator=generator) @ (torch.eye(64) + 0.4 * torch.randn(64, 64, generator=generator))
    run = lambda values, n: torch.relu(X[n] @ values["a"].T) @ values["b"].T
    assigned = {}

    def loss(numbers):
        total = 0.0
        for n in numbers:
            mean = (run(assigned, n) - run({"a": A, "b": B}, n)).square().mean() / len(numbers)
            mean.backward()
            total += float(mean.detach())
        return total

    error = lambda values: sum(float((run(values, n) - run({"a": A, "b": B}, n)).square().mean()) for n in range(6))
    return {"a": A, "b": B}, Task(assigned.update, loss, lambda: error(assigned) / 6, 6, 1), error


SCHEMES = [Scheme(bits=3, block=(1, 16), symmetric=False), Scheme(bits=2, block=(1, 32)), Scheme(bits=4, block=(1, -1)), Scheme(bits=4, block=(-1, -1), range="full")]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_learning_beats_rounding_and_is_deterministic(scheme):
    weights, task, error = problem()
    before = {name: W.clone() for name, W in weights.items()}
    schemes = dict.fromkeys(weights, scheme)
    made, first, least = autoround(weights, schemes, task, AutoRoundOptions(iterations=150, batch=6), seed=0)
    again, _, _ = autoround(weights, schemes, task, AutoRoundOptions(iterations=150, batch=6), seed=0)
    rounded = {name: numerics.dequantize(numerics.quantize(W, scheme)) for name, W in weights.items()}
    assert error({name: numerics.dequantize(qt) for name, qt in made.items()}) < 0.8 * error(rounded)
    assert least < first
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert all(torch.equal(made[n].parts[k], again[n].parts[k]) for n in made for k in made[n].parts)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_whole_job(kind, model_folder, text_file, tmp_path, stream, assert_same):
    """Fewer errors than plain rounding; the same bytes again after it was stopped."""
    from lowbit.pipeline.streaming import Batch

    (tmp_path / "r.toml").write_text('scheme = "int3-asym-g32"\nalgorithm = "autoround"\ntarget = "safetensors"\n[options]\niterations = 40\n')
    ids = torch.randint(3, 280, (4, 48), generator=torch.Generator().manual_seed(3))
    original = stream(model_folder(kind), [Batch(ids)])[0]
    error = lambda path: float((stream(path, [Batch(ids)])[0] - original).square().mean())
    run = lambda name, recipe, **more: quantize(model_folder(kind), recipe, tmp_path / name, calibration=text_file, n_samples=16, seq_len=64, dtype="float32", target_name="safetensors", **more)
    made = run("learned", tmp_path / "r.toml")
    run("rounded", "int3-asym-g32-rtn")
    share = 1.2 if kind == "mixtral" else 0.9  # a router of random weights sends tokens elsewhere on the least change
    assert error(tmp_path / "learned") < share * error(tmp_path / "rounded")
    records = list(made.layers.values())
    assert all(record["block_mse"] <= record["rtn_block_mse"] for record in records)
    run("again", tmp_path / "r.toml")
    assert_same(tmp_path / "learned", tmp_path / "again")


def test_bad_options():
    with pytest.raises(RecipeError, match="iterations is 0"):
        AutoRoundOptions(iterations=0)
