"""Building models on meta and filling them: refusals by name, ties, names of experts, buffers that are in no checkpoint."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowbit.checkpoints import open_checkpoint
from lowbit.errors import CheckpointError, FormatError, ModelError
from lowbit.models import skeleton as sk
from lowbit.models.linears import find_linears, get_weight, set_weight


def edit_config(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def build(folder):
    return sk.build(open_checkpoint(folder))


def test_every_parameter_and_matrix_has_the_plain_models_values(any_model, model_folder, load_plain):
    folder = model_folder(any_model)
    skeleton, plain = build(folder), load_plain(folder)
    assert skeleton.parameter_count() == sum(p.numel() for p in plain.parameters())
    for index in range(len(skeleton.blocks)):
        block = sk.load_module(skeleton, skeleton.block_name(index), torch.float32, torch.device("cpu"))
        theirs = dict(plain.get_submodule(skeleton.block_name(index)).named_parameters())
        for key, value in block.named_parameters():
            assert torch.equal(value, theirs[key]), key
        for linear in find_linears(skeleton, index):
            stored = skeleton.checkpoint.dense(linear.name)
            assert torch.equal(get_weight(block, linear), stored.T if linear.transposed else stored)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_each_expert_is_a_matrix_of_its_own(name, model_folder):
    skeleton = build(model_folder(name))
    experts = skeleton.text_config.num_local_experts
    inside = [linear for linear in find_linears(skeleton, 0) if linear.expert is not None]
    assert len(inside) == 3 * experts
    assert {linear.expert for linear in inside} == set(range(experts))
    assert all(f".experts.{linear.expert}." in linear.name for linear in inside)


def test_set_weight_writes_through_transposition(model_folder):
    skeleton = build(model_folder("gpt2"))
    block = sk.load_module(skeleton, skeleton.block_name(0), torch.float32, torch.device("cpu"))
    linear = find_linears(skeleton, 0)[0]
    assert linear.transposed and linear.shape == (192, 64)
    value = torch.arange(192 * 64, dtype=torch.float32).view(192, 64)
    set_weight(block, linear, value)
    assert torch.equal(block.attn.c_attn.weight, value.T)


def test_a_loaded_module_is_a_copy_and_not_the_file(model_folder):
    skeleton = build(model_folder("llama"))
    name = f"{skeleton.block_name(0)}.self_attn.q_proj.weight"
    before = skeleton.checkpoint.dense(name).clone()
    block = sk.load_module(skeleton, skeleton.block_name(0), torch.float32, torch.device("cpu"))
    block.self_attn.q_proj.weight.data.zero_()
    assert torch.equal(skeleton.checkpoint.dense(name), before)


def test_language_part_of_a_vision_model(model_folder):
    skeleton = build(model_folder("gemma3-vision"))
    assert skeleton.blocks_name == "model.language_model.layers"
    assert not any("vision" in linear.name for index in range(3) for linear in find_linears(skeleton, index))


def test_count_of_parameters_survives_streaming(model_folder):
    from lowbit.pipeline.streaming import Batch, Streamer

    skeleton = build(model_folder("llama"))
    before = skeleton.parameter_count()
    Streamer(skeleton, [Batch(torch.arange(8).view(1, 8))], dtype=torch.float32)
    assert skeleton.parameter_count() == before


# ---- refusals


def gemma3n(folder, **changes):
    config = {"model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"], **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def test_gemma3n_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="gemma3n_text cannot be quantized yet: its later blocks reuse the keys and values"):
        build(gemma3n(tmp_path / "m"))


def test_shared_keys_and_values_are_refused(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    edit_config(folder, num_kv_shared_layers=2)
    with pytest.raises(ModelError, match="llama with num_kv_shared_layers = 2 cannot be streamed: its last blocks reuse"):
        build(folder)


@pytest.mark.parametrize(("model_type", "message"), [("t5", "t5 is an encoder-decoder"), ("bart", "bart is an encoder-decoder")])
def test_encoder_decoders_are_refused(model_type, message, save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=message):
        build(folder)


@pytest.mark.parametrize("model_type", ["bert", "vit", "whisper", "mamba"])
def test_what_is_no_decoder_is_refused_with_its_name(model_type, save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=f"(?i){model_type}"):
        build(folder)


def test_unknown_model_type(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    edit_config(folder, model_type="llama9")
    with pytest.raises(ModelError, match=f"model_type 'llama9' is not known to transformers {transformers.__version__}"):
        build(folder)


def test_no_model_type(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no model_type"):
        build(folder)


@pytest.mark.parametrize("changes", [{"hidden_size": "many"}, {"hidden_size": 63}, {"num_attention_heads": 0}, {"hidden_act": "nonsense"}])
def test_config_that_makes_no_model(changes, save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match="cannot build a model of this config"):
        build(folder)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.norm.weight"),
        ("llama-tied", "model.embed_tokens.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
    ],
)
def test_missing_weight(name, gone, save_model, tmp_path):
    folder = save_model(name, tmp_path / "m")
    edit_weights(folder, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=r"are not in the checkpoint, the first is .*\. It is incomplete or of another model"):
        build(folder)


def test_missing_expert(save_model, tmp_path):
    folder = save_model("mixtral", tmp_path / "m")
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises((CheckpointError, ModelError), match="expected 4 experts of .* found 3"):
        find_linears(build(folder), 0)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.weight", "model.norm.weight"])
def test_wrong_shape(name, save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")

    def change(tensors):
        tensors[name] = torch.zeros(48, *tensors[name].shape[1:])

    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[48.*, and the config asks for"):
        build(folder)


def test_experts_that_cannot_be_watched_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "head_dim": 16, "vocab_size": 64}
    config = transformers.Llama4TextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Llama4TextExperts runs its experts itself"):
        find_linears(build(tmp_path), 0)


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_may_be_stored_under_either_name(stored, save_model, tmp_path, load_plain):
    folder = save_model("llama-tied", tmp_path / "m")
    plain = load_plain(folder)

    def change(tensors):
        tensors[stored] = tensors.pop("model.embed_tokens.weight")

    edit_weights(folder, change)
    from lowbit.pipeline.streaming import Batch, Streamer

    ids = torch.arange(10).view(1, 10)
    streamer = Streamer(build(folder), [Batch(ids)], dtype=torch.float32)
    assert torch.equal(streamer.skeleton.text.get_input_embeddings()(ids), plain.model.embed_tokens(ids))


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_nan_is_named_when_a_module_is_loaded(name, save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")

    def change(tensors):
        tensors[name].view(-1)[3] = torch.nan

    edit_weights(folder, change)
    skeleton = build(folder)
    with pytest.raises(FormatError, match=f"{name.removesuffix('.weight')}.*: 1 of .* values are NaN or infinite"):
        sk.load_module(skeleton, skeleton.block_name(1), torch.float32, torch.device("cpu"))
