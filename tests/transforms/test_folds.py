"""A fold changes nothing: every architecture, every fold, in float32; and AWQ and SmoothQuant do what they promise."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import numerics
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import RecipeError
from lowbit.models import skeleton as sk
from lowbit.pipeline.hidden import HiddenStates
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.streaming import Batch, Streamer
from lowbit.scheme import Scheme
from lowbit.stats import LayerStats
from lowbit.transforms import folds, make_options
from lowbit.transforms.awq import AwqOptions, Reader, awq_scale, clipped
from lowbit.transforms.smoothquant import SmoothQuantOptions, smooth_scale

FOLDS = {
    "llama": 4, "llama-tied": 4, "qwen2": 4, "qwen3": 4, "mistral": 4, "gemma3": 4, "phi3": 2, "gpt2": 2, "opt": 3, "opt-projected": 2, "mixtral": 4, "qwen3-moe": 4, "gemma3-vision": 4,
}  # fmt: skip
plain = lambda scale: scale


def test_every_fold_is_exact(any_model, model_folder):
    ids = torch.randint(3, 280, (2, 24), generator=torch.Generator().manual_seed(3))
    streamer = Streamer(sk.build(open_checkpoint(model_folder(any_model))), [Batch(ids)], dtype=torch.float32)
    states = HiddenStates(streamer.shapes, streamer.hidden_size, torch.float32)
    streamer.record(states)
    generator = torch.Generator().manual_seed(0)
    block = streamer.load_block(0)
    before = streamer.run_block(block, 0, 0, states.read(0, streamer.device))
    found = folds.find_folds(block)
    for fold in found:
        name, _, part = fold.consumers[0].partition(":")
        module = block.get_submodule(name)
        width = getattr(module, part).shape[-1] if part else module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]
        for expert in range(module.num_experts) if fold.producer.endswith(":up") else [None]:
            scale = folds.tie(fold, block, (torch.rand(width, generator=generator) + 0.25) * 2)
            assert folds.apply(block, fold, scale, expert)
        after = streamer.run_block(block, 0, 0, states.read(0, streamer.device))
        assert (after - before).norm() <= 1e-5 * before.norm(), fold
    assert len(found) >= FOLDS[any_model] - 1


def problem():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 64, generator=generator)
    X[:, 5] *= 30
    W = torch.randn(32, 64, generator=generator)
    stats = LayerStats(n_tokens=400, sum_abs=X.abs().sum(0), absmax=X.abs().amax(0), hessian=X.T @ X)
    return W, X, stats


def output_error(W, made, X):
    return float(((made - W) @ X.T).square().sum())


def test_awq_scales_the_channel_that_carries_the_outputs():
    W, X, stats = problem()
    scheme = Scheme(bits=3, block=(1, 64), symmetric=False)
    scale = awq_scale([Reader(W, scheme, stats)], AwqOptions(), plain)
    assert int(scale.argmax()) == 5
    rounded = numerics.dequantize(numerics.quantize(W, scheme))
    scaled = numerics.dequantize(numerics.quantize(W * scale, scheme)) / scale
    assert output_error(W, scaled, X) < 0.6 * output_error(W, rounded, X)


def test_awq_leaves_alone_what_it_cannot_better():
    W = torch.eye(64)[:32]  # on the grid already
    assert awq_scale([Reader(W, Scheme(bits=4, block=(1, 64), range="textbook"), problem()[2])], AwqOptions(), plain) is None


def test_clipping_lowers_the_output_error():
    W, X, stats = problem()
    W[3, 7] = 12.0
    scheme = Scheme(bits=3, block=(1, 32), symmetric=False)
    error = lambda V: output_error(W, numerics.dequantize(numerics.quantize(V, scheme)), X)
    assert error(clipped(W, scheme, stats.hessian, AwqOptions())) < error(W)
    assert clipped(W, numerics.scheme_of("nf4"), stats.hessian, AwqOptions()) is W


def test_smoothquant_is_equation_4():
    W, X, stats = problem()
    scale = smooth_scale([Reader(W, Scheme(bits=8, block=(1, -1)), stats)], SmoothQuantOptions(alpha=0.5), plain)
    assert torch.allclose(scale, (X.abs().amax(0) / W.abs().amax(0)).sqrt())
    assert float((X / scale).abs().amax()) < 0.5 * float(X.abs().amax())


@pytest.fixture(scope="module")
def with_outliers(save_model, tmp_path_factory):
    """folder(kind): a tiny model in which a few channels that the norms write are thirty times as large as the others."""

    def make(kind):
        folder = tmp_path_factory.mktemp("outliers") / kind
        if not folder.exists():
            save_model(kind, folder)
            tensors = load_file(folder / "model.safetensors")
            for name, value in tensors.items():
                if "layernorm.weight" in name or "layer_norm.weight" in name:
                    value[[5, 17]] *= 30
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral", "qwen3-moe", "opt"])
@pytest.mark.parametrize(("recipe", "share"), [("int4-asym-g32-awq-rtn", 0.95), ("int4-sym-g32-awq-gptq", 1.6)])
def test_awq_in_a_whole_job(kind, recipe, share, with_outliers, text_file, tmp_path, stream):
    """Plain rounding gains, and GPTQ, which sees the outliers itself, does not lose much; what changes beside the matrices are norms, biases and routers."""
    folder = with_outliers(kind)
    ids = torch.randint(3, 280, (4, 48), generator=torch.Generator().manual_seed(3))
    original = stream(folder, [Batch(ids)])[0]
    error = lambda path: float((stream(path, [Batch(ids)])[0] - original).square().mean())
    run = lambda name, words: quantize(folder, words, tmp_path / name, calibration=text_file, n_samples=16, seq_len=64, dtype="float32")
    made = run("awq", recipe)
    run("plain", recipe.replace("-awq", ""))
    assert any("awq" in record.get("transforms", {}) for record in made.layers.values())
    assert error(tmp_path / "awq") < share * error(tmp_path / "plain")
    changed = [n for n, t in open_checkpoint(tmp_path / "awq").tensors.items() if not torch.equal(t.load(), open_checkpoint(folder).dense(n))]
    assert changed and all("norm" in name or "gate" in name or "bias" in name for name in changed)


def test_bad_options():
    with pytest.raises(RecipeError, match="alpha is 2"):
        make_options("smoothquant", {"alpha": 2})
    with pytest.raises(RecipeError, match="transform 'rotate-it' is not known"):
        make_options("rotate-it", {})
    with pytest.raises(RecipeError, match="n_grid is 0"):
        make_options("awq", {"n_grid": 0})


def test_kept_experts_cannot_be_rescaled(model_folder, text_file, tmp_path):
    """They are joined from many tensors of the checkpoint: a norm that was divided for them would be wrong without a word."""
    (tmp_path / "r.toml").write_text('scheme = "int4-asym-g32-awq-rtn"\n[[rules]]\nmatch = "*.experts.*.w1"\nscheme = "keep"\n')
    with pytest.raises(RecipeError, match="of which the recipe keeps .*experts"):
        quantize(model_folder("mixtral"), tmp_path / "r.toml", tmp_path / "out", calibration=text_file, n_samples=4, seq_len=32, dtype="float32")


def test_statistics_follow_the_scale():
    """Those of x / s, as if x had been seen scaled."""
    from lowbit.pipeline.transform import _rescale

    X, scale = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 4, 16)
    made = lambda x: LayerStats(50, sum_abs=x.abs().sum(0), sum_sq=x.square().sum(0), absmax=x.abs().amax(0), hessian=x.T @ x, cross=x.T @ x, sample=x[:8].clone())
    stats, expected = made(X), made(X / scale)
    _rescale(stats, scale)
    for name in ("sum_abs", "sum_sq", "absmax", "hessian", "cross", "sample"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
