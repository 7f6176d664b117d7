"""A rotated model computes what the model computed, family by family; others are refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import ModelError, RecipeError
from lowbit.models import skeleton as sk
from lowbit.pipeline.hidden import HiddenStates
from lowbit.pipeline.streaming import Batch, Streamer
from lowbit.transforms import make_options
from lowbit.transforms.rotate import FAMILIES, RotateOptions, rotate

EXACT = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3-moe"]
IDS = torch.randint(3, 280, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(checkpoint):
    streamer = Streamer(sk.build(checkpoint), [Batch(IDS)], dtype=torch.float32)
    states = HiddenStates(streamer.shapes, streamer.hidden_size, torch.float32)
    streamer.record(states)
    for index in range(streamer.depth):
        streamer.run(streamer.load_block(index), index, states, states)
    return streamer.logits(IDS, states.read(0, streamer.device)), states.read(0, streamer.device)


@pytest.mark.parametrize("options", [RotateOptions(), RotateOptions(heads=False), RotateOptions(residual=False)], ids=["both", "residual", "heads"])
@pytest.mark.parametrize("kind", EXACT)
def test_logits_stay_and_the_stream_turns(model_folder, kind, options):
    checkpoint = open_checkpoint(model_folder(kind))
    if kind == "phi3" and not options.residual:
        with pytest.raises(ModelError, match="in one matrix, whose values are not rotated alone"):
            rotate(sk.build(checkpoint), options, seed=0)
        return
    rotated = rotate(sk.build(checkpoint), options, seed=0)
    before, stream = logits(checkpoint)
    after, turned = logits(rotated)
    assert float((after - before).norm()) <= 2e-5 * float(before.norm())
    torch.testing.assert_close(turned.norm(dim=-1), stream.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert torch.allclose(turned, stream, atol=1e-3) == (not options.residual)
    other = "model.layers.0.self_attn.qkv_proj.weight" if kind == "phi3" else "model.layers.0.self_attn.v_proj.weight"
    assert not torch.equal(rotated.dense(other), checkpoint.dense(other))
    some = rotated.lazy(other)
    assert torch.equal(some.read(3, 7), some.load()[3:7])


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "opt", "gemma3-vision"])
def test_where_it_would_not_be_exact_it_is_refused(model_folder, kind):
    with pytest.raises(ModelError, match=f"cannot be rotated: that is exact for {FAMILIES[0]}"):
        rotate(sk.build(open_checkpoint(model_folder(kind))), RotateOptions(), seed=0)


def test_a_rotated_file_is_an_ordinary_model_and_outliers_are_gone(save_model, load_plain, tmp_path, text_file):
    """A stream with a channel that dwarfs the others, as real models have: rounding survives it only when it is rotated."""
    model = save_model("llama-tied", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, 5] *= 40
        if "layernorm" in name:
            tensor[5] /= 40
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = {}
    for recipe in ("int4-sym-channel-rtn", "int4-sym-channel-rotate-rtn", "float32-rotate-rtn"):
        lowbit.quantize(model, recipe, tmp_path / recipe, target_name="safetensors", calibration=text_file)
        with torch.no_grad():
            error[recipe] = float((load_plain(tmp_path / recipe)(IDS).logits - load_plain(model)(IDS).logits).square().mean())
    plain, rotated, exact = error.values()
    assert exact < 1e-8 and rotated < 0.5 * plain


def test_options_are_checked():
    with pytest.raises(RecipeError, match="at least one of them true"):
        make_options("rotate", {"residual": False, "heads": False})


def test_rotate_goes_with_gptq_and_awq(model_folder, tmp_path, text_file):
    for recipe in ("int4-sym-g32-rotate-gptq", "int4-asym-g32-rotate-awq-rtn"):
        made = lowbit.quantize(model_folder("llama-tied"), recipe, tmp_path / recipe, calibration=text_file, n_samples=4, seq_len=64)
        assert made.provenance["recipe"]["transforms"]["rotate"] == {}
        assert lowbit.compare([made.path], against=model_folder("llama-tied"), text=text_file, ctx=64, n_windows=2, noise_floor=False).rows[1].summaries["full"].kl_mean.value < 0.3


def test_a_tied_weight_that_is_stored_as_the_head(save_model, tmp_path):
    model = save_model("llama-tied", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(model)
    before, after = logits(checkpoint)[0], logits(rotate(sk.build(checkpoint), RotateOptions(), seed=0))[0]
    assert float((after - before).norm()) <= 2e-5 * float(before.norm())


def test_plan_counts_the_head(model_folder, tmp_path, text_file):
    row = lowbit.plan(model_folder("llama-tied"), recipes=["int4-sym-g32-rotate-gptq"]).rows[0]
    made = lowbit.quantize(model_folder("llama-tied"), "int4-sym-g32-rotate-gptq", tmp_path / "out", calibration=text_file, n_samples=2, seq_len=32)
    assert row.exact and row.weights_bytes == open_checkpoint(made.path).tensor_bytes
