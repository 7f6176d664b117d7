"""The streamed backward sweep against autograd through the whole model, and what its weights do."""

import math

import pytest
import torch

from lowbit.checkpoints import open_checkpoint
from lowbit.models import skeleton as sk
from lowbit.models.linears import find_linears
from lowbit.pipeline import guidance, recipes
from lowbit.pipeline.collect import Current, InputGroup
from lowbit.pipeline.job import Job
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.streaming import Batch, Streamer
from lowbit.progress import SILENT


def sweep(folder, batches, tmp_path, *, dtype=torch.float32, recipe="int4-sym-g32-gptq-guided"):
    """Stored squared gradient norms by block and module."""
    streamer = Streamer(sk.build(open_checkpoint(folder)), batches, dtype=dtype)
    linears = [find_linears(streamer.skeleton, index) for index in range(streamer.depth)]
    job = Job(tmp_path / "out", {}, resume=False, overwrite=True)
    shapes = {linear.name: linear.shape for block in linears for linear in block}
    plans = recipes.resolve(recipes.settle(recipes.parse(recipe, target_name="safetensors"), shapes, "float32")[0], shapes, {})
    guidance.sweep(streamer, linears, plans, job, seed=0, progress=SILENT)
    return [job.tensors(f"loss-{index:05d}") for index in range(streamer.depth)], job


def by_autograd(model, blocks_name, batches):
    """The same through transformers' plain forward, with the same draws."""
    found: dict[str, list] = {}

    def watch(name):
        def see(_m, _a, output):
            output.register_hook(lambda g: found.setdefault(name, []).append(g.square().sum(-1).flatten()))

        return see

    wanted = ("q_proj", "o_proj", "up_proj", "down_proj", "c_attn", "c_fc", "experts")
    modules = {name: module for name, module in model.named_modules() if name.startswith(blocks_name + ".") and name.rpartition(".")[2] in wanted}
    for name, module in modules.items():
        module.register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        embedded = model.get_input_embeddings()(batch.ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=batch.mask).logits
        gradients = []
        for row in logits.detach():
            p = row.softmax(-1)
            drawn = torch.searchsorted(p.cumsum(-1), torch.rand(len(p), 1, generator=generator) * p.cumsum(-1)[:, -1:]).clamp(max=p.shape[1] - 1)
            gradients.append(p.scatter_add(1, drawn, torch.full(drawn.shape, -1.0)))
        gradient = torch.stack(gradients)
        if batch.mask is not None:
            gradient[~batch.mask] = 0
        logits.backward(gradient)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("kept_bytes", [1 << 40, 0], ids=["all inputs kept", "every second"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral"])
def test_the_sweep_equals_autograd(kind, kept_bytes, model_folder, load_plain, tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "KEPT_BYTES", kept_bytes)
    ids = torch.randint(3, 280, (5, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 20:] = False
    batches = [Batch(ids[:3], mask[:3] if kind == "llama" else None), Batch(ids[3:], mask[3:] if kind == "llama" else None)]
    stored, job = sweep(model_folder(kind), batches, tmp_path)
    model = load_plain(model_folder(kind))
    model.requires_grad_(False)
    blocks_name = sk.build(open_checkpoint(model_folder(kind))).blocks_name
    expected = by_autograd(model, blocks_name, batches)
    assert len(expected) >= 6
    for name, value in expected.items():
        index, _, module = name.removeprefix(blocks_name + ".").partition(".")
        ours = stored[int(index)][module]
        assert ours.shape == (120, 1)
        assert torch.allclose(ours[:, 0], value, rtol=2e-3, atol=1e-7 * float(value.max())), name
    assert not list(job.folder.glob("loss-hidden*"))


def test_weights_have_mean_one_and_a_cap():
    squared = torch.tensor([1.0, 0.0, 9.0, 90.0])
    assert torch.allclose(guidance.token_weights(squared, power=1.0, cap=0), squared / 25)
    halved = guidance.token_weights(squared, power=0.5, cap=0)
    assert float(halved.mean()) == pytest.approx(1) and float(halved[3] / halved[2]) == pytest.approx(math.sqrt(10))
    capped = guidance.token_weights(squared, power=1.0, cap=2.0)
    assert float(capped.mean()) == pytest.approx(1) and float(capped[3] / capped[2]) == pytest.approx(2 * 25 / 9)
    assert torch.equal(guidance.token_weights(torch.zeros(3), power=1.0, cap=0), torch.ones(3))
    masked = guidance.token_weights(squared, power=1.0, cap=0, mask=torch.tensor([True, True, True, False]))
    assert float(masked[:3].mean()) == pytest.approx(1)


def test_hessians_are_weighted(model_folder, tmp_path):
    """Once by hand: the Hessian of a group is the sum over tokens of w x x^T."""
    from lowbit.pipeline.collect import Collector, symmetrize
    from lowbit.pipeline.hidden import HiddenStates

    ids = torch.randint(3, 280, (2, 24), generator=torch.Generator().manual_seed(3))
    streamer = Streamer(sk.build(open_checkpoint(model_folder("llama"))), [Batch(ids)], dtype=torch.float32)
    source = HiddenStates(streamer.shapes, streamer.hidden_size, torch.float32)
    streamer.record(source)
    block = streamer.load_block(0)
    linears = find_linears(streamer.skeleton, 0)
    down = next(linear for linear in linears if linear.name.endswith("down_proj.weight"))
    weights = torch.rand(48, generator=torch.Generator().manual_seed(0))
    group = InputGroup([down], weights=weights)
    seen = []
    block.mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(48, -1)))
    from contextlib import suppress

    from lowbit.pipeline.collect import StopBlock

    with Collector(block, [down]).collect([group], ("hessian",), Current(None, slice(0, 48))), suppress(StopBlock):
        streamer.run_block(block, 0, 0, source.read(0, streamer.device))
    expected = (seen[0] * weights[:, None]).T @ seen[0]
    assert torch.allclose(symmetrize(group.stats.hessian), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_guided_quantization_resumes_and_is_recorded(model_folder, text_file, tmp_path, assert_same, monkeypatch):
    folder = model_folder("llama")
    run = lambda name, **more: quantize(folder, "int4-sym-g32-gptq-guided", tmp_path / name, calibration=text_file, n_samples=4, seq_len=32, dtype="float32", **more)
    result = run("a")
    assert result.provenance["recipe"]["options"] == {"guided": True}
    plain = quantize(folder, "int4-sym-g32-gptq", tmp_path / "plain", calibration=text_file, n_samples=4, seq_len=32, dtype="float32")
    assert any(result.layers[name]["output_error"] != plain.layers[name]["output_error"] for name in plain.layers)
    calls = []
    real = guidance._backward

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(guidance, "_backward", stop)
    with pytest.raises(KeyboardInterrupt):
        run("b")
    monkeypatch.setattr(guidance, "_backward", real)
    run("b", resume=True)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_disk_that_the_sweep_takes(monkeypatch):
    monkeypatch.setattr(guidance, "KEPT_BYTES", 1000)
    assert guidance.kept_bytes(100, 10) == 1000 and guidance.kept_bytes(101, 10) == 101 * 8


def test_groups_of_outputs_have_hessians_of_their_own(model_folder, text_file, tmp_path):
    """Norms of all groups add up to the whole; each group's rows are those of GPTQ alone with that group's Hessian."""
    from lowbit import numerics
    from lowbit.algorithms import make_options
    from lowbit.algorithms.gptq import gptq
    from lowbit.scheme import Scheme
    from lowbit.stats import LayerStats

    batches = [Batch(torch.randint(3, 280, (3, 24), generator=torch.Generator().manual_seed(3)))]
    whole, _ = sweep(model_folder("llama"), batches, tmp_path / "one")
    parts, _ = sweep(model_folder("llama"), batches, tmp_path / "four", recipe="int4-sym-g32-gptq-guided4")
    for one, four in zip(whole, parts, strict=True):
        for module, value in one.items():
            assert four[module].shape == (72, 4)
            torch.testing.assert_close(four[module].sum(1, keepdim=True), value)
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(3, 200, 64, generator=generator), torch.randn(10, 64, generator=generator)
    H, options = X.transpose(1, 2) @ X, make_options("gptq", {"guided": True, "guide_groups": 3})
    made = numerics.dequantize(gptq(W, Scheme(bits=3, block=(1, 32)), LayerStats(200, hessian=H), options, []))
    alone = [numerics.dequantize(gptq(rows, Scheme(bits=3, block=(1, 32)), LayerStats(200, hessian=own), options, [])) for rows, own in zip(W.tensor_split(3), H, strict=True)]
    assert torch.equal(made, torch.cat(alone))
    result = quantize(model_folder("llama"), "int4-sym-g32-gptq-guided4", tmp_path / "out", calibration=text_file, n_samples=4, seq_len=32, dtype="float32")
    plain = quantize(model_folder("llama"), "int4-sym-g32-gptq-guided", tmp_path / "plain", calibration=text_file, n_samples=4, seq_len=32, dtype="float32")
    assert all(layer["output_error"] < layer["rtn_output_error"] for layer in result.layers.values())
    assert any(result.layers[name]["output_error"] != plain.layers[name]["output_error"] for name in plain.layers)


def test_each_group_of_outputs_gets_its_own_weights(model_folder, tmp_path):
    streamer = Streamer(sk.build(open_checkpoint(model_folder("llama"))), [Batch(torch.zeros(1, 6, dtype=torch.int64))], dtype=torch.float32)
    linears = find_linears(streamer.skeleton, 0)
    shapes = {linear.name: linear.shape for linear in linears}
    plans = recipes.resolve(recipes.settle(recipes.parse("int4-sym-g32-gptq-guided4", target_name="safetensors"), shapes, "float32")[0], shapes, {})
    job = Job(tmp_path / "out", {}, resume=False, overwrite=True)
    squared = {linear.module: torch.rand(6, 4, generator=torch.Generator().manual_seed(n)) for n, linear in enumerate(linears)}
    job.save_tensors("loss-00000", squared)
    groups = guidance.weigh([InputGroup(linears[:3]), InputGroup(linears[3:4])], plans, job, 0, streamer.batches)
    assert [len(group.linears) for group in groups] == [1, 1, 1, 1]
    for group in groups:
        for g in range(4):
            assert torch.equal(group.weights[:, g], guidance.token_weights(squared[group.linears[0].module][:, g], power=0.75, cap=0))
