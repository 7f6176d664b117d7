"""Rounded activations from recipe to evaluation: quantized, written, opened again, and run."""

import json

import pytest
import torch

import lowbit
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import CheckpointError, RecipeError
from lowbit.pipeline import recipes
from lowbit.pipeline.convert import convert
from lowbit.pipeline.streaming import Batch
from lowbit.scheme import Activation, Rounding

RECIPES = [
    "w8a8", "w8a8-smooth", "w4a8", "fp8", "llm-int8", "nvfp4-anvfp4-rtn", "int8-sym-channel-rtn-a8-static_kl", "int8-sym-channel-rtn-a8-aasym-static_mse",
    "int8-sym-channel-gptq-a8-static_average",
]  # fmt: skip


def kl(folder, model, text_file):
    return lowbit.compare([folder], against=model, text=text_file, ctx=64, n_windows=4, noise_floor=False).rows[1].summaries["full"].kl_mean.value


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_is_written_runs_with_rounded_activations(model_folder, tmp_path, text_file, recipe, kind):
    model = model_folder(kind)
    made = lowbit.quantize(model, recipe, tmp_path / "out", calibration=text_file, n_samples=4, seq_len=64)
    found = open_checkpoint(tmp_path / "out").activations
    assert set(found) == set(made.layers)
    assert all((rounding.scale is not None) == rounding.act.static for rounding in found.values())
    assert kl(tmp_path / "out", model, text_file) < 0.2


def test_logits_are_those_of_a_plain_model_whose_linears_round_their_inputs(model_folder, load_plain, stream, tmp_path, text_file):
    lowbit.quantize(model_folder("llama"), "w8a8", tmp_path / "out", target_name="safetensors", calibration=text_file)
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = load_plain(tmp_path / "out")

    def rounded(module, args):
        scale = args[0].abs().amax(-1, keepdim=True) / 127.5
        return (torch.clamp(torch.round(args[0] / scale), -128, 127) * scale,)

    for block in plain.model.layers:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(rounded)
    with torch.no_grad():
        expected = plain(ids).logits
    torch.testing.assert_close(stream(tmp_path / "out", [Batch(ids)])[0], expected, rtol=1e-4, atol=1e-4)


def test_outlier_features_break_plain_rounding_and_not_llm_int8(save_model, tmp_path, text_file):
    """Norms that make a few input channels some 60 times as large as the others, as in large models (arXiv:2208.07339, section 4)."""
    from safetensors.torch import load_file, save_file

    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[[3, 17, 40]] *= 60
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, [3, 17, 40]] /= 60
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = {}
    for recipe in ("int8-sym-channel-textbook-rtn", "int8-sym-channel-textbook-rtn-a8", "llm-int8", "w8a8-smooth"):
        lowbit.quantize(model, recipe, tmp_path / recipe, target_name="safetensors", calibration=text_file, n_samples=4, seq_len=64)
        found[recipe] = kl(tmp_path / recipe, model, text_file)
    weights_only, plain, mixed, smooth = found.values()
    assert mixed < 1.1 * weights_only and plain > 4 * mixed and plain > 10 * smooth, found


def test_a_rule_rounds_activations_of_some_layers_only(model_folder, tmp_path, text_file):
    recipe = tmp_path / "r.toml"
    activations = '[activations]\nbits = 8\nstatic = true\nper = "tensor"\nobserver = "percentile"\n'
    recipe.write_text(f'scheme = "int8-sym-channel-rtn"\n{activations}[[rules]]\nmatch = "*.down_proj"\nscheme = "int8-sym-channel-rtn-a6"\n')
    lowbit.quantize(model_folder("llama"), recipe, tmp_path / "out", target_name="safetensors", calibration=text_file, n_samples=4, seq_len=64)
    found = open_checkpoint(tmp_path / "out").activations
    assert {rounding.act.name for name, rounding in found.items() if "down_proj" in name} == {"a6"}
    assert {rounding.act.name for name, rounding in found.items() if "down_proj" not in name} == {"a8-static_percentile"}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int8-sym-channel-static", "observer of activations is given, and not their format"),
        ("int8-a8-a4", "contradicts an earlier one"),
        ("int8-a8-aasym-static_kl", "needs symmetric"),
        ("int8-a8-static-t6", "without a threshold"),
        ("int8-a1", "the word 'a1' is not known"),
    ],
)
def test_words_that_cannot_be(recipe, message):
    with pytest.raises(RecipeError, match=message):
        recipes.parse(recipe)


@pytest.mark.parametrize(("recipe", "target"), [("llm-int8", "compressed-tensors"), ("int4-sym-g32-rtn-afp8", "compressed-tensors"), ("int8-sym-g32-rtn-a8", "gguf")])
def test_files_that_cannot_say_it_refuse(model_folder, tmp_path, recipe, target):
    with pytest.raises(RecipeError, match="--to safetensors"):
        lowbit.quantize(model_folder("llama"), recipe, tmp_path / f"out{'.gguf' if target == 'gguf' else ''}", target_name=target)


@pytest.mark.parametrize("bad", [{"act": {"bits": "8"}}, {"act": {"static": True, "per": "tensor"}}, {"act": {}, "scale": -1.0}, {"act": {"colour": 1}}, 7, {"act": {}, "scale": float("nan")}])
def test_a_damaged_provenance_is_refused(model_folder, tmp_path, text_file, bad):
    lowbit.quantize(model_folder("llama"), "w8a8", tmp_path / "out", target_name="safetensors")
    file = tmp_path / "out" / "lowbit.json"
    provenance = json.loads(file.read_text())
    next(iter(provenance["layers"].values()))["activation"] = bad
    file.write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match=r"lowbit\.json: activations"):
        open_checkpoint(tmp_path / "out")


def test_smoothquant_searches_an_alpha_for_each_place(model_folder, tmp_path, text_file):
    """The searched scale is that of some alpha of the grid, and no worse than the fixed one on the inputs that it saw."""
    from lowbit.scheme import Activation, Scheme
    from lowbit.stats import LayerStats
    from lowbit.transforms.awq import Reader
    from lowbit.transforms.smoothquant import SmoothQuantOptions, _error, smooth_scale

    g = torch.Generator().manual_seed(0)
    X = torch.randn(256, 64, generator=g) * torch.logspace(-1, 1.5, 64)
    reader = Reader(torch.randn(32, 64, generator=g), Scheme(bits=4, block=(1, -1), act=Activation()), LayerStats(256, absmax=X.abs().amax(0), sample=X))
    scales = [smooth_scale([reader], SmoothQuantOptions(alpha=step / 20), lambda s: s) for step in range(21)]
    found = smooth_scale([reader], SmoothQuantOptions(search=True), lambda s: s)
    errors = [_error(reader, scale) for scale in scales]
    assert torch.equal(found, scales[errors.index(min(errors))]) and min(errors) < errors[10]
    recipe = tmp_path / "r.toml"
    recipe.write_text('scheme = "int8-sym-channel-smoothquant-rtn-a8"\n[transforms.smoothquant]\nsearch = true\nlinears = true\n')
    lowbit.quantize(model_folder("llama"), recipe, tmp_path / "out", target_name="safetensors", calibration=text_file, n_samples=4, seq_len=64)
    assert kl(tmp_path / "out", model_folder("llama"), text_file) < 0.01
    layers = json.loads((tmp_path / "out" / "lowbit.json").read_text())["layers"]
    assert all("smoothquant" in layer["transforms"] for layer in layers.values())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"format": "bogus"}, "format is 'bogus'"), ({"format": "q4_0"}, "format is 'q4_0'"), ({"range": "full", "static": True, "per": "tensor"}, "scales of either sign"),
        ({"format": "fp8_e4m3", "symmetric": False}, "only integers can be asymmetric"), ({"threshold": 10**400}, "threshold is"), ({"percentile": 5}, "percentile is"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be(table, message):
    with pytest.raises(RecipeError, match=message):
        Activation.from_dict(table)


@pytest.mark.parametrize("given", [{"scale": 10**400}, {"scale": 1e300}, {"scale": 1e-300}, {"scale": 1.0, "zero_point": 1e308}, {"scale": 1.0, "zero_point": -1}])
def test_numbers_of_a_file_are_bounded(given):
    with pytest.raises(RecipeError, match="scale is|zero_point is"):
        Rounding.from_dict({"act": {"static": True, "per": "tensor", "symmetric": False}, **given})


def test_a_table_adds_to_the_words_and_casts_stay_precise(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('scheme = "int8-sym-channel-rtn-a8-static_percentile"\n[activations]\npercentile = 99.0\n[[rules]]\nmatch = "*.down_proj"\nscheme = "bf16"\n')
    made = recipes.parse(recipe).recipe
    assert made.scheme.act == Activation(per="tensor", static=True, observer="percentile", percentile=99.0) and made.rules[0].scheme.act is None


def test_later_layers_see_what_rounded_layers_hand_on(model_folder, tmp_path, text_file):
    """Calibration runs through rounded inputs: from the second block on, statistics differ from those of a job that rounds weights alone."""
    run = lambda name, recipe: lowbit.quantize(model_folder("llama"), recipe, tmp_path / name, target_name="safetensors", calibration=text_file, n_samples=4, seq_len=64).layers
    plain, rounded = run("plain", "int4-sym-g32-gptq"), run("rounded", "int4-sym-g32-gptq-a3")
    same = lambda layer: plain[layer]["output_error"] == rounded[layer]["output_error"]
    assert same("model.layers.0.self_attn.q_proj.weight") and not same("model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize("match", ["*.w1", "*.w2"])
def test_each_matrix_of_an_expert_rounds_its_own_inputs(model_folder, stream, tmp_path, text_file, match):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'scheme = "float32"\n[[rules]]\nmatch = "{match}"\nscheme = "int8-sym-channel-rtn-a3"\n')
    lowbit.quantize(model_folder("mixtral"), recipe, tmp_path / "out", target_name="safetensors", calibration=text_file)
    ids = [Batch(torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0)))]
    rounded, plain = stream(tmp_path / "out", ids)[0], stream(tmp_path / "out", ids, activations=False)[0]
    assert float((rounded - plain).norm()) > 1e-3 * float(plain.norm())


def test_an_expert_that_saw_no_token_takes_the_scale_of_its_layer(model_folder, tmp_path, text_file):
    for name, observer in (("a", "static"), ("b", "static_mse"), ("c", "static_average")):
        made = lowbit.quantize(model_folder("qwen3-moe"), f"int8-sym-channel-rtn-a8-{observer}", tmp_path / name, target_name="safetensors", calibration=text_file, n_samples=1, seq_len=2)
        unseen = [layer for layer in made.layers.values() if any("saw no token" in note for note in layer.get("notes", []))]
        assert unseen and all(layer["activation"]["scale"] > 0 for layer in unseen)


def test_an_input_that_rounds_is_said_and_dropped(model_folder, tmp_path, text_file):
    lowbit.quantize(model_folder("llama"), "int8-sym-channel-rtn-a4", tmp_path / "first", target_name="compressed-tensors")
    second = lowbit.quantize(tmp_path / "first", "int8-sym-channel-rtn", tmp_path / "second")
    assert any("rounds the inputs" in note for note in second.provenance["notes"]) and not open_checkpoint(second.path).activations
    dense = convert(tmp_path / "first", "safetensors", tmp_path / "dense").path
    assert len(open_checkpoint(dense).activations) == 21
    with pytest.raises(RecipeError, match="would not say"):
        convert(dense, "compressed-tensors", tmp_path / "out")


def test_rescaling_and_learning_exclude_each_other(model_folder, tmp_path, text_file):
    with pytest.raises(RecipeError, match="take one of them"):
        lowbit.quantize(model_folder("llama"), "int4-sym-g32-autoround-smoothquant-a8", tmp_path / "out", target_name="safetensors", calibration=text_file)


@pytest.mark.parametrize("recipe", ["int8-sym-channel-smoothquant-rtn-a8-static_kl", "int4-sym-g32-rotate-gptq-guided4", "e8p2-ldlq"])
def test_a_stopped_job_goes_on_to_the_same_bytes(model_folder, tmp_path, text_file, assert_same, monkeypatch, recipe):
    from lowbit.pipeline.job import Job

    run = lambda name, **more: lowbit.quantize(model_folder("llama-tied"), recipe, tmp_path / name, calibration=text_file, n_samples=4, seq_len=32, **more)
    run("whole")
    real, calls = Job.save, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Job, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(Job, "save", real)
    run("stopped", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
