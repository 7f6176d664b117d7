"""prepare, any loop, convert and write on models of every kind that can be trained."""

import pytest
import torch
import transformers

import lowbit
from lowbit import numerics, training
from lowbit.checkpoints import TARGETS
from lowbit.errors import FormatError, LowbitError, ModelError, RecipeError
from lowbit.models import quantized
from lowbit.models import skeleton as sk
from lowbit.models.quantized import QuantLinear
from lowbit.numerics import activations
from lowbit.training.modules import FakeQuantEmbedding, FakeQuantLinear
from lowbit.training.prepare import quantized_weights

DENSE = ("llama", "llama-tied", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "opt")
RECIPES = {"int3-asym-g32-rtn": "compressed-tensors", "q4_0-rtn": "gguf"}
IDS = torch.arange(48).view(3, 16) * 7 % 300  # no longer than a sliding window, which GGUF does not have of each


def layers_of(model) -> dict:
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear | FakeQuantEmbedding)}


def some_steps(model, count: int = 3, lr: float = 3e-3) -> list[float]:
    """A user's own loop."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    found = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def loaded(path):
    """What a file decodes to in float32, as a model. (lowbit.load rounds the weights of a GGUF file to float16, which they stand for.)"""
    checkpoint = lowbit.open(path)
    model = quantized.load(sk.build(checkpoint), torch.float32, decode_to=torch.float32)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    if f"{embedding}.weight" in checkpoint.quantized:
        model.get_input_embeddings().weight.data = numerics.dequantize(checkpoint.quantized[f"{embedding}.weight"].load())
    return model


@pytest.fixture(scope="module")
def folder_of(model_folder, save_model, tmp_path_factory):
    """The folder of a model of the table; Gemma as llama.cpp computes it."""
    gemma = save_model("gemma3", tmp_path_factory.mktemp("model") / "gemma3", layer_types=["sliding_attention"] * 3)
    return lambda name: gemma if name == "gemma3" else model_folder(name)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", DENSE)
def test_from_a_start_through_a_loop_to_the_file(name, recipe, folder_of, load_plain, tmp_path):
    folder, target = folder_of(name), RECIPES[recipe]
    if target == "gguf" and name == "opt":
        with pytest.raises(LowbitError, match="GGUF"):
            lowbit.quantize(folder, recipe, tmp_path / "no.gguf", target_name="gguf")
        return
    begin, out = (tmp_path / f"{part}{TARGETS[target].suffix}" for part in ("begin", "out"))
    lowbit.quantize(folder, recipe, begin, target_name=target)
    start = lowbit.open(begin)
    model = training.prepare(load_plain(folder), recipe, start=start, target_name=target)
    torch.testing.assert_close(logits(model), logits(loaded(begin)), rtol=0, atol=0 if target != "gguf" else 1e-5)  # some of GGUF's weights are turned
    layers = layers_of(model)
    assert {f"{key}.weight" for key in layers} >= set(start.quantized)
    for key, tensor in start.quantized.items():
        layer = model.get_submodule(key.removesuffix(".weight"))
        assert torch.equal(layer.view(layer.weight), numerics.dequantize(tensor.load())), key
        assert layer.weight.dtype == torch.float32

    losses = some_steps(model)
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    trained = logits(model)
    training.write(model, out, source=folder)
    read = lowbit.open(out)
    for key, tensor in quantized_weights(model).items():
        if key in read.quantized:
            assert torch.equal(numerics.dequantize(read.quantized[key].load()), numerics.dequantize(tensor)), key
    torch.testing.assert_close(logits(loaded(out)), trained, rtol=0, atol=0 if target != "gguf" else 1e-5)

    training.convert(model)
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules()) and any(isinstance(module, QuantLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=0)
    again = tmp_path / f"again{TARGETS[target].suffix}"
    training.write(model, again, source=folder)
    for key, tensor in lowbit.open(again).quantized.items():
        assert torch.equal(numerics.dequantize(tensor.load()), numerics.dequantize(read.quantized[key].load())), key


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_a_tied_head_shares_master_and_view(name, folder_of, load_plain):
    model = training.prepare(load_plain(folder_of(name)), "q4_0-rtn", target_name="gguf")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, FakeQuantEmbedding) and isinstance(head, FakeQuantLinear)
    assert embedding.weight is head.weight and embedding.view is head.view
    assert embedding.view.scheme.format == "q8_0"
    logits(model)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert embedding.weight.grad is not None and embedding.weight.grad.abs().sum() > 0


def test_a_rule_names_the_embedding(model_folder, load_plain, tmp_path):
    rules = tmp_path / "recipe.toml"
    rules.write_text(
        'scheme = "int4-asym-g32"\nalgorithm = "rtn"\ntarget = "lowbit"\n[[rules]]\nmatch = "model.embed_tokens"\nscheme = "int8-sym-channel"\n[[rules]]\nmatch = "*.0.*"\nscheme = "keep"\n'
    )
    folder = model_folder("llama-tied")
    model = training.prepare(load_plain(folder), rules)
    assert isinstance(model.lm_head, FakeQuantLinear) and model.lm_head.view.scheme.bits == 8
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    some_steps(model)
    trained = logits(model)
    training.write(model, tmp_path / "out", source=folder)
    assert torch.equal(logits(lowbit.load(tmp_path / "out", dtype="float32")), trained)


def test_without_a_start_it_begins_with_plain_rounding(model_folder, load_plain, tmp_path):
    folder = model_folder("llama")
    lowbit.quantize(folder, "int4-asym-g32-rtn", tmp_path / "rtn")
    model = training.prepare(load_plain(folder), "int4-asym-g32-rtn")
    assert torch.equal(logits(model), logits(lowbit.load(tmp_path / "rtn", dtype="float32")))


@pytest.mark.parametrize("scales", ["fixed", "minmax", "mse"])
def test_scales_that_are_not_learned(scales, model_folder, load_plain, tmp_path):
    model = training.prepare(load_plain(model_folder("llama")), "int4-asym-g32-rtn", scales=scales)
    before = quantized_weights(model)
    some_steps(model)
    after = quantized_weights(model)
    same = all(torch.equal(before[key].parts["scale"], after[key].parts["scale"]) for key in before)
    assert same == (scales == "fixed")
    assert not all(torch.equal(before[key].parts["codes"], after[key].parts["codes"]) for key in before)
    training.write(model, tmp_path / "out", source=model_folder("llama"))
    assert torch.equal(logits(lowbit.load(tmp_path / "out", dtype="float32")), logits(model))


def test_masters_are_kept_or_begin_with_the_decoded_values(model_folder, load_plain, tmp_path):
    folder = model_folder("llama")
    lowbit.quantize(folder, "int4-asym-g32-rtn", tmp_path / "rtn")
    plain, start = load_plain(folder), lowbit.open(tmp_path / "rtn")
    key = "model.layers.1.mlp.up_proj"
    kept = training.prepare(load_plain(folder), "int4-asym-g32-rtn", start=start).get_submodule(key).weight
    bare = training.prepare(load_plain(folder), "int4-asym-g32-rtn", start=start, masters=False).get_submodule(key).weight
    assert (kept == plain.get_submodule(key).weight).float().mean() > 0.99
    assert torch.equal(bare, numerics.dequantize(start.quantized[f"{key}.weight"].load()))


def test_rounded_inputs(model_folder, load_plain, text_file, tmp_path):
    """Per token they are rounded in the forward; a static scale is learned, and written."""
    folder = model_folder("llama")
    model = training.prepare(load_plain(folder), "int8-sym-channel-rtn-a8")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 64)
    assert torch.equal(layer(x), torch.nn.functional.linear(activations.fake_quantize(x, layer.act.rounding()), layer.view(layer.weight)))
    with pytest.raises(RecipeError, match="found by calibration. Start from a checkpoint"):
        training.prepare(load_plain(folder), "int8-sym-channel-rtn-a8-static")
    lowbit.quantize(folder, "int8-sym-channel-rtn-a8-static", tmp_path / "start", calibration=text_file, n_samples=4, seq_len=32)
    model = training.prepare(load_plain(folder), "int8-sym-channel-rtn-a8-static", start=lowbit.open(tmp_path / "start"))
    assert torch.equal(logits(model), logits(lowbit.load(tmp_path / "start", dtype="float32")))
    act = model.model.layers[0].self_attn.q_proj.act
    before = float(act.scale.detach())
    some_steps(model)
    assert float(act.scale.detach()) != before
    training.write(model, tmp_path / "out", source=folder)
    assert torch.equal(logits(lowbit.load(tmp_path / "out", dtype="float32")), logits(model))
    trained = logits(model)
    assert torch.equal(logits(training.convert(model)), trained)


def test_state_dict_round_trip(model_folder, load_plain):
    for name in ("qwen2", "llama-tied"):
        recipe, target = ("int3-asym-g32-rtn", None) if name == "qwen2" else ("q4_0-rtn", "gguf")
        one, two = (training.prepare(load_plain(model_folder(name)), recipe, target_name=target) for _ in range(2))
        names = set(one.state_dict())
        assert names >= set(load_plain(model_folder(name)).state_dict())  # masters keep their names
        some_steps(one)
        assert not torch.equal(logits(one), logits(two))
        two.load_state_dict(one.state_dict())
        assert torch.equal(logits(one), logits(two))


def test_half_precision_models_have_float32_masters(model_folder, load_plain, tmp_path):
    folder = model_folder("llama")
    model = training.prepare(load_plain(folder, torch.bfloat16), "int4-asym-g32-rtn", target_name="lowbit")
    layers = layers_of(model)
    assert all(layer.weight.dtype == torch.float32 for layer in layers.values())
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(layer.weight.grad.dtype == torch.float32 for layer in layers.values())
    training.write(model, tmp_path / "out", source=folder)
    read = lowbit.open(tmp_path / "out")
    for name, layer in layers.items():
        assert torch.equal(layer.view(layer.weight), numerics.dequantize(read.quantized[f"{name}.weight"].load()))


def test_refusals(model_folder, load_plain, tmp_path):
    llama = model_folder("llama")
    with pytest.raises(ModelError, match="experts in one tensor cannot be trained yet"):
        training.prepare(load_plain(model_folder("mixtral")), "int4-asym-g32-rtn")
    with pytest.raises(ModelError, match="GPT-2 keeps its weights in Conv1D"):
        training.prepare(load_plain(model_folder("gpt2")), "int4-asym-g32-rtn")
    for recipe, target, why in (
        ("aqlm-2x8", None, "cannot be trained: its codes are vectors"), ("quip-2", None, "cannot be trained"), ("int4-asym-g32-rtn-out2", "lowbit", "outlier channels"),
        ("int4-asym-g32-awq", None, "rewrites the model .awq."), ("int4-asym-g32-rtn", "safetensors", "holds dense weights"), ("int4-asym-g32-rtn", "gguf", "Train a type that GGUF has"),
        ("nf4-g64-rtn", "gptq", "gptq"), ("float16", None, "quantizes nothing that is trained"),
    ):  # fmt: skip
        model = load_plain(llama)
        with pytest.raises(LowbitError, match=why):
            training.prepare(model, recipe, target_name=target)
        assert not layers_of(model), recipe  # it is as it was
    with pytest.raises(RecipeError, match="expected one of learned, fixed, minmax, mse"):
        training.prepare(load_plain(llama), "int4-asym-g32-rtn", scales="frozen")
    lowbit.quantize(llama, "int4-asym-g32-rtn", tmp_path / "start")
    with pytest.raises(RecipeError, match="is int4-asym-g32 in .*, and int3-asym-g32 in the recipe"):
        training.prepare(load_plain(llama), "int3-asym-g32-rtn", start=lowbit.open(tmp_path / "start"))
    with pytest.raises(ModelError, match="is not quantized in"):
        training.prepare(load_plain(llama), "int3-asym-g32-rtn", start=lowbit.open(llama))
    with pytest.raises(ModelError, match="was not prepared"):
        training.write(load_plain(llama), tmp_path / "out", source=llama)
    model = training.prepare(load_plain(llama), "int4-asym-g32-rtn")
    with pytest.raises(LowbitError, match="exists already"):
        training.write(model, tmp_path / "start", source=llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*NaN"):
        training.write(model, tmp_path / "out", source=llama)
    assert not (tmp_path / "out").exists()


class Text(torch.utils.data.Dataset):
    def __init__(self, count: int = 8) -> None:
        self.ids = torch.randint(0, 300, (count, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.mark.parametrize("name", ["qwen2", "llama-tied"])
def test_in_transformers_trainer(name, model_folder, load_plain, tmp_path):
    """With its checkpoints: what it saves is resumed, and the file is what was trained."""
    pytest.importorskip("accelerate")
    folder = model_folder(name)
    recipe, target = ("int3-asym-g32-rtn", None) if name == "qwen2" else ("q4_0-rtn", "gguf")
    make = lambda: training.prepare(load_plain(folder), recipe, target_name=target)
    arguments = lambda steps: transformers.TrainingArguments(
        str(tmp_path / "runs"), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="constant", save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    whole = transformers.Trainer(make(), arguments(4), train_dataset=Text())
    whole.train()
    parts = transformers.Trainer(make(), arguments(4), train_dataset=Text())
    parts.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    trained = logits(whole.model.eval())
    assert torch.equal(logits(parts.model.eval()), trained)
    out = tmp_path / f"out{TARGETS[target or 'compressed-tensors'].suffix}"
    training.write(whole.model, out, source=folder)
    read = lowbit.open(out)
    for key, tensor in quantized_weights(whole.model).items():
        if key in read.quantized:
            assert torch.equal(numerics.dequantize(read.quantized[key].load()), numerics.dequantize(tensor))


@pytest.mark.consumer
@pytest.mark.filterwarnings("ignore")
def test_in_trl(model_folder, load_plain, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    folder = model_folder("qwen2")
    model = training.prepare(load_plain(folder), "int4-asym-g32-rtn")
    before = logits(model)
    rows = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "the quick fox"}, {"role": "assistant", "content": "the lazy dog"}]}] * 8)
    arguments = trl.SFTConfig(str(tmp_path / "runs"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_length=32)
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=transformers.AutoTokenizer.from_pretrained(folder))
    trainer.train()
    trained = logits(trainer.model.float().eval())
    assert not torch.equal(trained, before)
    training.write(trainer.model, tmp_path / "out", source=folder)
    for key, tensor in lowbit.open(tmp_path / "out").quantized.items():
        layer = trainer.model.get_submodule(key.removesuffix(".weight"))
        assert torch.equal(layer.view(layer.weight), numerics.dequantize(tensor.load()))
