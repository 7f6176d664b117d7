"""Adapters merged into decoded bases: what peft merges, what a file without loss holds, what bad adapters are told."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import numerics
from lowbit.checkpoints import open_checkpoint
from lowbit.checkpoints.adapter import open_adapter
from lowbit.errors import CheckpointError, JobError, LowbitError, RecipeError
from lowbit.models import skeleton as sk
from lowbit.pipeline.convert import convert
from lowbit.pipeline.quantize import quantize
from lowbit.progress import Progress
from lowbit.training.merge import merge, merged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
peft = pytest.importorskip("peft", reason='peft is not installed: pip install "lowbit[train]"')
SMALL = {"n_samples": 4, "seq_len": 32, "dtype": "float32"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def save_adapter(model, folder, *, spread=0.2, seed=1, **settings):
    """A random adapter of peft on a model, saved; the model with it."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings}))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * spread
    adapted.save_pretrained(folder)
    return adapted.eval()


def decoded(folder, out):
    """A folder of the dense float32 weights that a checkpoint decodes to."""
    convert(folder, "safetensors", out)
    return out


def weights_of(checkpoint):
    return {name: checkpoint.dense(name) for name in (*checkpoint.tensors, *checkpoint.quantized)}


def close(a, b):
    """Equal, but for a float32 unit (products of other shapes are summed in another order)."""
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=2.0**-22, atol=float(b.abs().max()) * 2.0**-22)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("llama", {}),
        ("llama-tied", {"target_modules": ATTENTION}),
        ("qwen2", {"use_rslora": True}),  # has biases
        ("llama", {"rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2, r"layers\.2\.mlp\..*_proj": 3}, "alpha_pattern": {"v_proj": 3, "q_proj": 5}}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("opt", {"target_modules": ["q_proj", "fc1", "fc2"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=["llama", "tied", "rslora and biases", "patterns", "conv1d", "opt", "ends", "mixtral"],
)  # fmt: skip
def test_dense_weights_are_those_that_peft_merges(name, settings, model_folder, load_plain, tmp_path):
    folder = model_folder(name)
    adapted = save_adapter(load_plain(folder), tmp_path / "adapter", **settings)
    found = merged(open_checkpoint(folder), open_adapter(tmp_path / "adapter"), whole=True)
    adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = weights_of(open_checkpoint(tmp_path / "theirs"))
    ours = weights_of(found)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        close(ours[key], value)
    assert sum(not torch.equal(ours[key], value) for key, value in weights_of(open_checkpoint(folder)).items()) >= 2


@pytest.mark.parametrize("recipe, target", [("nf4-dq", "bitsandbytes"), ("int4-sym-g32-gptq", "gptq"), ("q4_k_m", "gguf"), ("int4-asym-g32", "lowbit")])
def test_the_base_is_what_its_file_decodes_to(recipe, target, model_folder, load_plain, text_file, tmp_path):
    name = "base.gguf" if target == "gguf" else "base"
    base = quantize(model_folder("llama"), recipe, tmp_path / name, target_name=target, calibration=None if "gptq" not in recipe else text_file, **(SMALL if "gptq" in recipe else {})).path
    plain = load_plain(decoded(base, tmp_path / "decoded"))
    adapted = save_adapter(plain, tmp_path / "adapter")
    ours = weights_of(merged(open_checkpoint(base), open_adapter(tmp_path / "adapter"), whole=True))
    for key, value in adapted.merge_and_unload().state_dict().items():
        close(ours[key].float(), value)


def test_a_dense_base_is_rounded_first_as_bitsandbytes_does(model_folder, load_plain, tmp_path, text_file):
    """Merging into the dense base with --base-recipe gives the file that merging into the NF4 folder gives."""
    folder = model_folder("llama")
    nf4 = quantize(folder, "nf4-dq", tmp_path / "nf4").path
    save_adapter(load_plain(folder), tmp_path / "adapter")
    options = {"recipe": "int4-asym-g32-gptq", "calibration": text_file, "measure": False, **SMALL}
    a = merge(folder, tmp_path / "adapter", tmp_path / "a", base_recipe="nf4-dq", **options)
    b = merge(nf4, tmp_path / "adapter", tmp_path / "b", **options)
    c = merge(folder, tmp_path / "adapter", tmp_path / "c", **options)
    assert not a.notes and not b.notes and "trained on a quantized base" in c.notes[0]
    one, two, three = (open_checkpoint(made.path) for made in (a, b, c))
    for key in one.quantized:
        assert torch.equal(one.dense(key), two.dense(key))
    assert not all(torch.equal(one.dense(key), three.dense(key)) for key in one.quantized)
    assert a.provenance["merged"]["base_recipe"] == "nf4-dq" and b.provenance["merged"]["base_format"] == "bitsandbytes"


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_is_adapted_alone_becomes_two(target, model_folder, load_plain, tmp_path):
    folder = model_folder("llama-tied")
    adapted = save_adapter(load_plain(folder), tmp_path / "adapter", target_modules=["q_proj", target])
    ids = torch.arange(24).unsqueeze(0) * 7 % 300
    with torch.no_grad():
        wanted = adapted(ids).logits
    made = merged(open_checkpoint(folder), open_adapter(tmp_path / "adapter"), whole=True)
    assert made.config["tie_word_embeddings"] is False
    skeleton = sk.build(made)
    model = sk.model_class(skeleton.config)(skeleton.config).eval()
    model.load_state_dict({name: sk.load_parameter(skeleton, name, torch.float32) for name in skeleton.sources}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.consumer
def test_base_and_adapter_are_what_peft_runs_on_bitsandbytes(model_folder, load_plain, tmp_path):
    """The weights that are merged into are those that bitsandbytes multiplies with: its NF4 base with peft's adapter gives the merged model's logits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    base = quantize(model_folder("llama"), "nf4-dq", tmp_path / "nf4").path
    save_adapter(load_plain(model_folder("llama")), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_plain(base), tmp_path / "adapter").train()  # in eval mode its kernel for the CPU multiplies in bfloat16
    ids = torch.arange(24).unsqueeze(0) * 7 % 300
    with torch.no_grad():
        wanted = theirs(ids).logits
    skeleton = sk.build(merged(open_checkpoint(base), open_adapter(tmp_path / "adapter"), whole=True))
    model = load_plain(model_folder("llama"))
    with torch.no_grad():
        for name in skeleton.sources:
            model.get_parameter(name).copy_(sk.load_parameter(skeleton, name, torch.float32))
        difference = (model(ids).logits - wanted).abs().max() / wanted.abs().max()
        alone = (load_plain(model_folder("llama"))(ids).logits - wanted).abs().max() / wanted.abs().max()
    assert type(theirs.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert difference < 1e-4 < alone


# ------------------------------------------------------------------------------------------------------------------ what it costs


@pytest.fixture(scope="module")
def trained(model_folder, load_plain, text_file, tmp_path_factory):
    """(NF4 folder, adapter folder): an adapter trained for some steps on the decoded NF4 base."""
    from lowbit.pipeline.locate import load_tokenizer

    folder = tmp_path_factory.mktemp("trained")
    base = quantize(model_folder("llama"), "nf4-dq", folder / "nf4").path
    model = load_plain(decoded(base, folder / "decoded"))
    adapted = save_adapter(model, folder / "adapter", spread=0.05).train()
    ids = torch.tensor(load_tokenizer(open_checkpoint(base), folder).encode(text_file.read_text(encoding="utf-8"))[: 48 * 64]).view(48, 64)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(30):
        rows = ids[step % 12 * 4 : step % 12 * 4 + 4]
        loss = adapted(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def test_error_feedback_loses_less_than_plain_rounding(trained, text_file, tmp_path):
    base, adapter = trained
    made = merge(base, adapter, tmp_path / "out", recipe="int3-asym-g32-gptq", calibration=text_file, n_samples=24, seq_len=64, dtype="float32", n_windows=8)
    assert 0 < made.kl.value < 0.8 * made.naive.value
    said = made.provenance["merged"]
    assert said["ranks"] == [4] and said["matrices"] == 21 and len(said["sha256"]) == 64 and said["base_format"] == "bitsandbytes"
    assert "mean KL to base + adapter" in (made.path / "README.md").read_text() and "adapter, merged into" in (made.path / "README.md").read_text()
    again = merge(base, adapter, tmp_path / "out", recipe="int3-asym-g32-gptq", calibration=text_file, n_samples=24, seq_len=64, dtype="float32", n_windows=8, resume=True)
    assert again.kl == made.kl and again.naive == made.naive
    with pytest.raises(JobError, match="exists already"):
        merge(base, adapter, tmp_path / "out")
    plain = merge(base, adapter, tmp_path / "plain", recipe="int3-asym-g32-rtn", dtype="float32", n_windows=8)
    assert plain.kl.value == pytest.approx(made.naive.value, rel=0.02)  # merged in float32 there, as it is here


def test_the_command_line(trained, text_file, tmp_path):
    base, adapter = trained
    words = ["merge", base, adapter, "--recipe", "int4-sym-g32-gptq", "--calibration", text_file, "--n-samples", "4", "--seq-len", "32", "--windows", "2", "-o", tmp_path / "out", "--json"]
    done = subprocess.run([sys.executable, "-m", "lowbit", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["kl"]["value"] > 0 and made["provenance"]["merged"]["ranks"] == [4] and made["windows"] == 2


def test_into_gguf(trained, text_file, tmp_path):
    base, adapter = trained
    made = merge(base, adapter, tmp_path / "out.gguf", recipe="q4_0-gptq", calibration=text_file, n_windows=2, **SMALL)
    assert made.kl.value <= made.naive.value * 1.2 and {q.scheme.format for q in open_checkpoint(made.path).quantized.values()} >= {"q4_0"}
    assert (tmp_path / "out.gguf.README.md").is_file()


# ------------------------------------------------------------------------------------------------------------------ without loss


def save_qalora(model, folder, group, *, spread=0.1):
    """A QA-LoRA adapter as peft 0.21.2 stores it: A [r, in_features / group]. peft pools in layers of GPTQ only; its own layer class is put around each linear."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, use_qalora=True, qalora_group_size=group, task_type="CAUSAL_LM", peft_type="LORA")
    config.save_pretrained(folder)
    stored = {}
    generator = torch.Generator().manual_seed(5)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in ALL:
            continue
        wrapped = GPTQLoraLinear.__new__(GPTQLoraLinear)
        torch.nn.Module.__init__(wrapped)
        module.qweight = None
        GPTQLoraLinear.__init__(wrapped, module, "default", config=config, r=4, lora_alpha=8)
        for key in ("lora_A", "lora_B"):
            weight = getattr(wrapped, key)["default"].weight
            weight.data = torch.randn(weight.shape, generator=generator) * spread
            stored[f"base_model.model.{name}.{key}.weight"] = weight.data.clone()
        model.set_submodule(name, wrapped)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return model.eval()


@pytest.mark.parametrize("recipe, target, group", [("int4-asym-g32-hqq", "hqq", 32), ("int4-asym-g16-hqq", "hqq", 32), ("int2-asym-g32-hqq", "lowbit", 32), ("q4_1", "gguf", 32), ("q5_1", "gguf", 64)])
def test_without_loss_it_is_peft_s_forward(recipe, target, group, model_folder, load_plain, tmp_path):
    name = "base.gguf" if target == "gguf" else "base"
    base = quantize(model_folder("llama"), recipe, tmp_path / name, target_name=target).path
    checkpoint = open_checkpoint(base)
    model = load_plain(model_folder("llama"))
    with torch.no_grad():
        for key in checkpoint.quantized:
            model.get_parameter(key).copy_(numerics.dequantize(checkpoint.quantized[key].load()))
    adapted = save_qalora(model, tmp_path / "adapter", group)
    made = merge(base, tmp_path / "adapter", tmp_path / f"out{'.gguf' if target == 'gguf' else ''}", lossless=True, n_windows=2)
    found = open_checkpoint(made.path)
    assert found.kind == checkpoint.kind and "of 21 adapted matrices" in made.statement and "Every code is as it was" in made.statement
    for layer, wrapped in adapted.named_modules():
        if not hasattr(wrapped, "lora_A"):
            continue
        weight = numerics.dequantize(found.quantized[f"{layer}.weight"].load())
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            wanted = wrapped(x) - (0 if wrapped.base_layer.bias is None else wrapped.base_layer.bias)
        tolerance = 1e-6 if target != "gguf" else 1e-3
        assert float((x @ weight.T - wanted).abs().max() / wanted.abs().max()) < tolerance
        before, after = checkpoint.quantized[f"{layer}.weight"].load(), found.quantized[f"{layer}.weight"].load()
        if target != "gguf":
            assert torch.equal(before.parts["codes"], after.parts["codes"]) and torch.equal(before.parts["scale"], after.parts["scale"])
    assert made.kl.value < (1e-5 if target == "gguf" else 1e-7) and made.naive is not None
    assert {key: value for key, value in made.provenance.items() if key != "merged"} == checkpoint.provenance


def test_zero_points_in_half_precision_are_said(save_model, load_plain, tmp_path):
    folder = save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    base = quantize(folder, "int4-asym-g32-hqq", tmp_path / "base", target_name="hqq").path
    save_qalora(load_plain(folder), tmp_path / "adapter", 32)
    made = merge(base, tmp_path / "adapter", tmp_path / "out", lossless=True, measure=False)
    assert "within the rounding of their zero-points to bfloat16" in made.statement


def test_a_qalora_adapter_is_merged_with_data_too(model_folder, load_plain, text_file, tmp_path):
    folder = model_folder("llama")
    adapted = save_qalora(load_plain(folder), tmp_path / "adapter", 16)
    ours = merged(open_checkpoint(folder), open_adapter(tmp_path / "adapter"), whole=True)
    layer = adapted.get_submodule("model.layers.1.mlp.down_proj")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        torch.testing.assert_close(x @ ours.dense("model.layers.1.mlp.down_proj.weight").T, layer(x), rtol=1e-5, atol=1e-5)


def test_without_loss_is_refused_where_it_cannot_be(model_folder, load_plain, tmp_path):
    folder = model_folder("llama")
    save_qalora(load_plain(folder), tmp_path / "pooled", 32)
    save_adapter(load_plain(folder), tmp_path / "plain")
    bases = {recipe: quantize(folder, recipe, tmp_path / f"{recipe}{suffix}", target_name=target).path for recipe, target, suffix in
             (("int4-asym-g32", "lowbit", ""), ("int4-sym-g32", "compressed-tensors", ""), ("int4-asym-g64-hqq", "hqq", ""), ("q4_0", "gguf", ".gguf"), ("nf4-dq", "bitsandbytes", ""))}  # fmt: skip
    for recipe, words in (("int4-asym-g32", "whole zero-points"), ("int4-sym-g32", "no float zero-point"), ("nf4-dq", "no float zero-point"), ("int4-asym-g64-hqq", "multiple of 64")):
        with pytest.raises(RecipeError, match=words):
            merge(bases[recipe], tmp_path / "pooled", tmp_path / "out", lossless=True)
    with pytest.raises(RecipeError, match="no float zero-point"):
        merge(bases["q4_0"], tmp_path / "pooled", tmp_path / "out.gguf", lossless=True)
    with pytest.raises(RecipeError, match="end in .gguf"):
        merge(bases["q4_0"], tmp_path / "pooled", tmp_path / "out", lossless=True)
    with pytest.raises(RecipeError, match="ordinary LoRA"):
        merge(bases["int4-asym-g64-hqq"], tmp_path / "plain", tmp_path / "out", lossless=True)
    with pytest.raises(RecipeError, match="no float zero-points"):
        merge(folder, tmp_path / "pooled", tmp_path / "out", lossless=True)
    with pytest.raises(RecipeError, match="recipe would say nothing"):
        merge(bases["int4-asym-g64-hqq"], tmp_path / "pooled", tmp_path / "out", lossless=True, recipe="int4-gptq")
    with pytest.raises(RecipeError, match="is quantized in .* already"):
        merge(bases["nf4-dq"], tmp_path / "plain", tmp_path / "out", base_recipe="nf4-dq")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------ adapters of strangers


def changed(**settings):
    return lambda config, tensors: config.update(settings)


def on_tensors(change):
    return lambda config, tensors: change(tensors)


FIRST = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
BAD = {
    "another kind": (changed(peft_type="IA3"), "only LORA"),
    "no kind": (lambda config, tensors: config.pop("peft_type"), "only LORA"),
    "DoRA": (changed(use_dora=True), "DoRA"),
    "modules_to_save": (changed(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (changed(bias="all"), "bias is 'all'"),
    "PiSSA": (changed(init_lora_weights="pissa_niter_4"), "changed the base"),
    "fused experts": (changed(target_parameters=["experts.up_proj"]), "target_parameters"),
    "rank of a text": (changed(r="4"), "the rank is '4'"),
    "another rank": (changed(r=8), "the config says rank 8"),
    "alpha NaN": (changed(lora_alpha=float("nan")), "lora_alpha of .* is nan"),
    "alpha a list": (changed(lora_alpha=[1]), "lora_alpha of .* is \\[1\\]"),
    "rslora a text": (changed(use_rslora="yes"), "use_rslora is 'yes'"),
    "patterns a list": (changed(rank_pattern=["q_proj"]), "rank_pattern is"),
    "a pattern that takes for ever": (
        lambda config, tensors: [config.update(alpha_pattern={"(a|aa)+": 3}), [tensors.update({k.replace("layers.0.mlp.up_proj", "a" * 60 + "!"): tensors.pop(k)}) for k in list(tensors)]],
        "takes too long",
    ),
    "a pattern that is none": (changed(alpha_pattern={"(": 3}), "not a regular expression"),
    "pool of zero": (changed(use_qalora=True, qalora_group_size=0), "qalora_group_size is 0"),
    "pool that does not fit": (lambda config, tensors: [config.update(use_qalora=True, qalora_group_size=7), tensors.update({FIRST: torch.zeros(4, 9)})], "for a weight of"),
    "NaN": (on_tensors(lambda t: t[FIRST].fill_(float("nan"))), "NaN or infinite"),
    "wrong input": (on_tensors(lambda t: t.update({FIRST: torch.zeros(4, 65)})), "\\[128, 65\\]"),
    "wrong rank": (on_tensors(lambda t: t.update({FIRST: torch.zeros(3, 64)})), "the config says rank 4"),
    "a vector": (on_tensors(lambda t: t.update({FIRST: torch.zeros(4)})), "A \\[4\\]"),
    "integers": (on_tensors(lambda t: t.update({FIRST: torch.zeros(4, 64, dtype=torch.int8)})), "expected floating"),
    "half of a pair": (on_tensors(lambda t: t.pop(FIRST)), "alone"),
    "a path": (on_tensors(lambda t: t.update({FIRST.replace("model.layers.0", "../../etc"): t.pop(FIRST)})), "alone|is no layer"),
    "a path for both": (on_tensors(lambda t: [t.update({k.replace("model.layers.0.mlp.up_proj", "../x"): t.pop(k)}) for k in list(t) if "layers.0.mlp.up_proj" in k]), "'../x' is no layer"),
    "another model's layer": (on_tensors(lambda t: [t.update({k.replace("layers.0.", "layers.9."): t.pop(k)}) for k in list(t)]), "is no layer"),
    "a norm": (on_tensors(lambda t: [t.update({k.replace("layers.0.mlp.up_proj", "norm"): t.pop(k)}) for k in list(t) if "layers.0.mlp.up_proj" in k]), "expected a linear layer"),
    "another name": (on_tensors(lambda t: t.update({"weight": torch.zeros(2)})), "is no part of a LoRA adapter"),
    "nothing": (on_tensors(lambda t: t.clear()), "no tensors of an adapter|not a whole"),
}


@pytest.fixture(scope="module")
def sound(model_folder, load_plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save_adapter(load_plain(model_folder("llama")), folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_one_error(case, sound, model_folder, tmp_path):
    change, words = BAD[case]
    config, tensors = json.loads((sound / "adapter_config.json").read_text()), load_file(sound / "adapter_model.safetensors")
    change(config, tensors)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(LowbitError, match=words):
        merge(model_folder("llama"), folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_folder_of_an_adapter(sound, model_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        open_adapter(model_folder("llama"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((sound / "adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        open_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        open_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(sound / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="leads out"):
        open_adapter(folder)
    assert replace(open_adapter(sound), copies={}).ranks == [4]


# ------------------------------------------------------------------------------------------------------------------ stopped jobs


class Stopping(Progress):
    """Stops the job, as Ctrl-C does, when two blocks are done."""

    @contextmanager
    def step(self, title, total):
        done = 0

        def advance(n=1):
            nonlocal done
            done += n
            if title == "Quantizing blocks" and done >= 0.7 * total:
                raise KeyboardInterrupt

        yield advance


def test_a_stopped_merge_goes_on(trained, sound, text_file, tmp_path, assert_same):
    base, adapter = trained
    options = {"recipe": "int4-asym-g32-gptq", "calibration": text_file, "measure": False, **SMALL}
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "out", progress=Stopping(), **options)
    assert (tmp_path / "out.work" / "block-00000.json").exists() and not (tmp_path / "out").exists()
    with pytest.raises(JobError, match="its model, merged differ"):
        merge(base, sound, tmp_path / "out", resume=True, **options)
    merge(base, adapter, tmp_path / "out", resume=True, **options)
    merge(base, adapter, tmp_path / "whole", **options)
    assert_same(tmp_path / "out", tmp_path / "whole")
    with pytest.raises(JobError, match="of another merge"):
        merge(base, sound, tmp_path / "out", resume=True, **options)
