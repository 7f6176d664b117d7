"""plan against the files that quantize writes (to the byte), and against the textbook's figures."""

import json
from pathlib import Path

import pytest
import torch

from lowbit.checkpoints import open_checkpoint
from lowbit.checkpoints.gguf import read_header
from lowbit.checkpoints.gguf_arch import ROPE_TENSORS
from lowbit.errors import CheckpointError, ModelError, RecipeError
from lowbit.pipeline.plan import DEFAULT_RECIPES, Plan, plan, plan_parameters, textbook
from lowbit.pipeline.quantize import quantize

# A width that g64 does not divide.
SMALL = {
    "model_type": "llama", "dtype": "bfloat16", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA_2_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_2_70B = {**LLAMA_2_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def folder(save_model, tmp_path_factory):
    """kind -> a tiny random model in bfloat16, in variants that llama.cpp computes too."""
    gemma = {
        "vocab_size": 320, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "query_pre_attn_scalar": 16,
    }  # fmt: skip
    changes = {"qwen3-moe": {"mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 4}, "gemma3-vision": {"text_config": gemma}}
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(kind, tmp_path_factory.mktemp("plan") / kind, dtype=torch.bfloat16, **changes.get(kind, {}))
        return made[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("llama", "int4-sym-g32-rtn"),
        ("llama", "int4-asym-g32-rtn"),
        ("llama", "int3-asym-channel-rtn"),
        ("llama", "int8-asym-tensor-rtn"),
        ("llama", "bfloat16"),
        ("llama", "q8_0"),
        ("llama", "q4_0"),
        ("llama", "q4_k"),
        ("llama", "q4_k_m"),
        ("llama-tied", "q3_k_m"),
        ("mixtral", "q2_k"),
        ("llama-tied", "int5-sym-g32-rtn"),
        ("llama-tied", "q4_0"),
        ("mixtral", "int4-asym-g32-rtn"),
        ("mixtral", "q4_0"),
        ("qwen3-moe", "int4-sym-g32-rtn"),
        ("qwen3-moe", "q8_0"),
        ("gpt2", "q4_0"),
        ("gemma3-vision", "int4-sym-g32-rtn"),
        ("gemma3-vision", "q8_0"),
    ],
)
def test_bytes_are_those_of_the_file(folder, tmp_path, kind, recipe):
    """Of the config alone (copied away from its weights)."""
    (tmp_path / "config.json").write_bytes((folder(kind) / "config.json").read_bytes())
    row = plan(tmp_path / "config.json", recipes=[recipe], context=64).rows[0]
    suffix = ".gguf" if row.target == "gguf" else ""
    made = quantize(folder(kind), recipe, tmp_path / f"out{suffix}").path
    assert row.exact
    assert row.weights_bytes == _stored_bytes(made)


def _stored_bytes(path: Path) -> int:
    """Of a GGUF from its header: what is stored transposed (GPT-2) is opened as float16."""
    if path.is_dir():
        return open_checkpoint(path).tensor_bytes
    return sum(info.nbytes for info in read_header(path).tensors.values() if info.name not in ROPE_TENSORS)


@pytest.mark.parametrize("recipe", ["int4-sym-g32-rtn", "q4_0"])
def test_a_quantized_source_is_planned_as_it_is_quantized(folder, tmp_path, recipe):
    """From a GGUF (dense tensors are float32 there) and from a compressed-tensors folder."""
    for source in (quantize(folder("llama-tied"), "q8_0", tmp_path / "in.gguf").path, quantize(folder("llama-tied"), "int8-sym-channel-rtn", tmp_path / "in").path):
        row = plan(source, recipes=[recipe]).rows[0]
        out = tmp_path / (f"{source.name}-out" + (".gguf" if row.target == "gguf" else ""))
        assert row.weights_bytes == _stored_bytes(quantize(source, recipe, out).path)


def test_a_folder_a_file_and_a_dict_give_the_same_plan(folder, tmp_path):
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    plans = [plan(x, recipes=["int4-sym-g32", "q4_0"], memory=10**9) for x in (path, path / "config.json", config)]
    assert plans[0].rows == plans[1].rows == plans[2].rows
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert plan(tmp_path, recipes=["int4-sym-g32", "q4_0"], memory=10**9).rows == plans[0].rows


def test_llama_2_7b():
    """Parameters and bfloat16 bytes of the published checkpoint; 2 x 32 layers x 32 heads x 128 x 4096 tokens x 2 bytes of cache."""
    found = plan(LLAMA_2_7B, memory=16 * 10**9)
    rows = {row.recipe: row for row in found.rows}
    assert tuple(rows) == DEFAULT_RECIPES
    assert found.parameters == 6_738_415_616
    assert rows["bfloat16"].weights_bytes == 13_476_831_232 and rows["bfloat16"].exact
    assert rows["float32"].weights_bytes == 4 * 6_738_415_616 and not rows["float32"].exact
    assert rows["bfloat16"].kv_cache_bytes == 2_147_483_648
    assert rows["q4_0"].bits_per_weight == pytest.approx(4.5 + 2.0625 * 32000 * 4096 / 6_738_415_616, abs=2e-3)  # the head at 6.5625
    assert not rows["float32"].fits and rows["int8-sym-channel-rtn"].fits
    assert found.best_fit.total_bytes <= 16 * 10**9
    for row in found.rows:
        assert row.total_bytes == row.weights_bytes + row.kv_cache_bytes + row.overhead_bytes
    assert plan(LLAMA_2_7B, recipes=["q4_0"], context=1024, kv_bits=8).rows[0].kv_cache_bytes == 2_147_483_648 // 8


def test_a_70b_model_at_4_bits_and_grouped_query_attention():
    found = plan(LLAMA_2_70B, recipes=["bfloat16", "int4-sym-g128"], memory=40 * 10**9)
    assert found.parameters == 68_976_648_192
    assert found.rows[0].weights_bytes == 137_953_296_384
    assert found.rows[0].kv_cache_bytes == 2 * 80 * 8 * 128 * 4096 * 2
    assert 35e9 < found.rows[1].weights_bytes < 37e9 and found.rows[1].fits


def test_textbook_figures():
    assert [textbook(70 * 10**9, bits) for bits in (32, 16, 8, 4, 2)] == [280 * 10**9, 140 * 10**9, 70 * 10**9, 35 * 10**9, 17_500_000_000]
    assert textbook(110_000_000, 32) == 440_000_000
    rows = plan_parameters("70e9", memory=80 * 10**9)
    assert [(row.bits, row.weights_bytes / 1e9) for row in rows] == [(32, 280), (16, 140), (8, 70), (4, 35), (2, 17.5)]
    assert [row.fits for row in rows] == [False, False, True, True, True]
    assert plan_parameters("110M", (32,))[0].weights_bytes == plan_parameters(110e6, (32,))[0].weights_bytes == 440_000_000
    assert plan_parameters("1.1b", (8,))[0].weights_bytes == 1_100_000_000


@pytest.mark.parametrize("text", ["many", "70X", "-1", "0", "", "nan", "e9"])
def test_what_is_no_number_of_parameters(text):
    with pytest.raises(RecipeError, match="expected a number such as 70e9, 70B or 110M"):
        plan_parameters(text)


def test_bert_base_is_an_estimate_of_440_mb():
    """An encoder: lowbit does not quantize it, but its size is known."""
    found = plan({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, recipes=["float32", "int8-sym-channel-rtn", "q8_0"])
    assert found.rows[0].weights_bytes == pytest.approx(440e6, rel=0.01)
    assert not any(row.exact for row in found.rows)
    assert "lowbit quantizes decoders" in found.notes[0]


def test_sliding_windows_hold_a_window():
    """Gemma 3: five of six layers see the last 512 tokens only."""
    base = {key: value for key, value in SMALL.items() if key != "model_type"}
    gemma = {**base, "model_type": "gemma3_text", "num_hidden_layers": 12, "head_dim": 32, "sliding_window": 512, "max_position_embeddings": 32768}
    assert plan(gemma, recipes=["q8_0"], context=8192).rows[0].kv_cache_bytes == 2 * 2 * 32 * 2 * (10 * 512 + 2 * 8192)
    mistral = {**base, "model_type": "mistral", "sliding_window": 256, "max_position_embeddings": 4096}
    assert plan(mistral, recipes=["q8_0"]).rows[0].kv_cache_bytes == 2 * 2 * 16 * 2 * 2 * 256
    latent = {**base, "model_type": "deepseek_v3", "kv_lora_rank": 32, "qk_rope_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
    assert plan(latent, recipes=["int8-sym-channel"], context=100).rows[0].kv_cache_bytes == 2 * (32 + 8) * 100 * 2


def test_a_group_that_does_not_divide_is_replaced_and_said():
    """96 columns hold g32, not g64; quantize refuses int4-sym-g64, so the number is an estimate."""
    row = plan(SMALL, recipes=["int4-sym-g64"]).rows[0]
    assert not row.exact
    assert row.notes == ("int4-sym-g64 cannot hold rows of 96: int4-sym-g32 is counted for 2 matrices (say so with a rule in a recipe file).",)
    finer, coarser = plan(SMALL, recipes=["int4-sym-g32"]).rows[0], plan(SMALL, recipes=["int4-sym-channel"]).rows[0]
    assert coarser.weights_bytes < row.weights_bytes < finer.weights_bytes and finer.exact


def test_k_quants_fall_back_as_llama_quantize_does():
    row = plan(SMALL, recipes=["q4_k"]).rows[0]
    assert row.exact
    said = "matrices: q4_k cannot hold rows of {}: q5_0 was used, as llama-quantize does."
    assert row.notes == ("12 " + said.format(64), "2 " + said.format(96))


def test_a_model_that_gguf_does_not_know_is_an_estimate(folder):
    int4, q4 = plan(folder("opt"), recipes=["int4-sym-g32", "q4_0"], context=64).rows
    assert int4.exact and not q4.exact
    assert q4.notes[0] == "q4_0 is counted throughout: what the mixture q4_0 chooses is not known." and "cannot be written as GGUF" in q4.notes[1]


def test_what_llama_cpp_computes_otherwise_is_an_estimate(save_model, tmp_path):
    path = save_model("qwen3-moe", tmp_path, norm_topk_prob=False, mlp_only_layers=[])
    row = plan(path, recipes=["q8_0"]).rows[0]
    assert not row.exact and "norm_topk_prob = False" in row.notes[-1]


def test_a_model_that_cannot_be_quantized_is_an_estimate():
    found = plan({**SMALL, "model_type": "mamba2", "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1}, recipes=["bfloat16", "int4-sym-g32"])
    assert "mamba2 cannot be quantized yet" in found.notes[0]
    assert not any(row.exact for row in found.rows)
    assert found.rows[1].weights_bytes < found.rows[0].weights_bytes


def test_the_vision_tower_is_kept_by_compressed_tensors_and_left_out_by_gguf(folder):
    int4, q8 = plan(folder("gemma3-vision"), recipes=["int4-sym-g32", "q8_0"]).rows
    assert int4.notes == () and q8.notes[0].endswith("tensors of the vision tower are not part of the file.")


def test_a_long_context_is_mentioned():
    assert plan(SMALL, recipes=["q8_0"], context=1000).notes == ("The context of 1,000 tokens is longer than the 128 that the model was made for.",)


def test_nothing_fits_in_no_memory():
    found = plan(SMALL, memory=1)
    assert isinstance(found, Plan) and found.best_fit is None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"hidden_size": 64}, CheckpointError, "has no model_type"),
        ({"model_type": "no_such_model"}, ModelError, "is not known to transformers"),
        ({**SMALL, "hidden_size": "many"}, ModelError, "cannot build a model of this config"),
        ("no/such/config.json", CheckpointError, "does not exist"),
        ("no-such-file.gguf", CheckpointError, "does not exist"),
    ],
)
def test_bad_configs(config, error, message):
    with pytest.raises(error, match=message):
        plan(config)


def test_bad_options():
    with pytest.raises(RecipeError, match="context is 0"):
        plan(SMALL, context=0)
    with pytest.raises(RecipeError, match="the word 'int99' is not known"):
        plan(SMALL, recipes=["int99"])
