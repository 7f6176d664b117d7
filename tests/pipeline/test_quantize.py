"""The main job on tiny models of every architecture: what is quantized, what is kept, what is recorded, what is refused before work."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from lowbit import numerics
from lowbit.checkpoints import TARGETS, open_checkpoint
from lowbit.checkpoints.gguf import read_header
from lowbit.errors import CheckpointError, FormatError, JobError, LowbitError, ModelError, RecipeError, ResourceError, ShapeError
from lowbit.models import skeleton as sk
from lowbit.models.linears import find_linears
from lowbit.pipeline import resources
from lowbit.pipeline.convert import convert
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.streaming import Batch, Streamer
from lowbit.progress import Progress
from lowbit.recipe import Calibration, Recipe
from lowbit.scheme import Scheme

SMALL = {"n_samples": 4, "seq_len": 32, "dtype": "float32"}


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def run(folder, recipe, out, text_file, **options):
    return quantize(folder, recipe, out, **{"calibration": text_file, **SMALL, **options})


def matrices(folder) -> dict[str, tuple[int, int]]:
    skeleton = sk.build(open_checkpoint(folder))
    return {linear.name: linear.shape for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index)}


@pytest.fixture
def logits(stream):
    """logits(folder): of the streamed model on a few tokens."""
    ids = torch.randint(3, 280, (2, 24), generator=torch.Generator().manual_seed(3))
    return lambda folder: stream(folder, [Batch(ids)])[0]


def test_every_architecture_goes_through(any_model, model_folder, text_file, tmp_path, logits):
    folder = model_folder(any_model)
    if any_model == "gpt2":
        with pytest.raises(ModelError, match="Conv1D layers .*, which no program reads from compressed-tensors"):
            run(folder, "int4-sym-g32-gptq", tmp_path / "out", text_file)
        return
    result = run(folder, "int4-sym-g32-gptq", tmp_path / "out", text_file)
    wanted, original = matrices(folder), open_checkpoint(folder)
    made = open_checkpoint(result.path)
    assert set(made.quantized) == set(wanted) == set(result.layers)
    assert set(made.tensors) == set(original.tensors) - set(wanted)
    for key in made.tensors:
        assert torch.equal(made.dense(key), original.dense(key))
    for key, entry in made.quantized.items():
        assert entry.shape == wanted[key] and entry.scheme.name == "int4-sym-g32"
        record = result.layers[key]
        assert record["shape"] == list(wanted[key]) and record["algorithm"] == "gptq" and 0 < record["weight_error"] < 0.2
        if record.get("tokens") != 0:
            assert record["output_error"] <= record["rtn_output_error"] * 1.05
    assert result.provenance["calibration"]["tokens"] == 4 * 32
    difference = logits(result.path) - logits(folder)
    assert 0 < difference.std() < logits(folder).std()
    assert (result.path / "tokenizer.json").is_file() and (result.path / "generation_config.json").is_file()
    assert not (tmp_path / "out.work").exists() and not (tmp_path / "out.tmp").exists()


def test_the_codes_of_the_file_are_those_that_were_streamed(model_folder, text_file, tmp_path):
    """Every block's output with the file's weights is what the next block was calibrated on: dequantized weights equal the codes."""
    out = run(model_folder("llama"), "int4-asym-g32-gptq", tmp_path / "out", text_file).path
    made = open_checkpoint(out)
    for name, entry in made.quantized.items():
        qt = entry.load()
        codes, scale, zero = qt.parts["codes"].double(), qt.parts["scale"].double(), qt.parts["zero_point"].double()
        spread = [p.repeat_interleave(32, dim=1) for p in (scale, zero)]
        assert torch.equal(made.dense(name), (spread[0] * (codes - spread[1])).float()), name
        assert int(qt.parts["codes"].max()) <= 15
    raw = load_file(out / "model.safetensors")
    assert raw["model.layers.0.self_attn.q_proj.weight_packed"].shape == (64, 8)


@pytest.mark.parametrize(
    ("recipe", "target_name"),
    [("int4-sym-g32-rtn", "gguf"), ("q4_0", "gguf"), ("int8-channel-rtn", None), ("int3-sym-g48-rtn", "safetensors"), ("bf16", None), ("int2-tensor-rtn", None)],
)
def test_rounding_needs_no_data(recipe, target_name, model_folder, tmp_path, logits):
    out = tmp_path / ("out.gguf" if target_name == "gguf" else "out")
    result = quantize(model_folder("llama"), recipe, out, target_name=target_name)
    assert result.provenance["calibration"] is None
    assert (logits(out) - logits(model_folder("llama"))).abs().max() > 0


def test_rounding_equals_the_number_format(model_folder, tmp_path):
    folder = model_folder("gpt2")
    quantize(folder, "int4-sym-g32-rtn", tmp_path / "out", target_name="safetensors")
    made, original = open_checkpoint(tmp_path / "out"), open_checkpoint(folder)
    for name in matrices(folder):
        scheme = Scheme(bits=4, block=(1, 32), scale_dtype="float32")
        expected = numerics.dequantize(numerics.quantize(original.dense(name).T.contiguous(), scheme))
        assert torch.equal(made.dense(name), expected.T), name


@pytest.mark.parametrize("target_name", ["safetensors", "gguf"])
def test_transposed_weights_reach_every_target(target_name, model_folder, text_file, tmp_path, load_plain, logits):
    """GPT-2 stores [in, out]; square matrices would be wrong without an error."""
    folder, out = model_folder("gpt2"), tmp_path / ("out.gguf" if target_name == "gguf" else "out")
    run(folder, "int4-sym-g32-gptq", out, text_file, target_name=target_name)
    assert (logits(out) - logits(folder)).std() < 0.5 * logits(folder).std()
    if target_name == "safetensors":
        ids = torch.arange(3, 27).view(1, 24)
        with torch.no_grad():
            assert (load_plain(out)(ids).logits - load_plain(folder)(ids).logits).std() < 0.5 * logits(folder).std()
    convert(out, "safetensors", tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "dense"), logits(out)) or target_name == "gguf"  # GGUF decodes to float16
    assert (logits(tmp_path / "dense") - logits(out)).abs().max() < 0.01


def test_the_same_job_gives_the_same_bytes(model_folder, text_file, tmp_path, assert_same):
    for name in ("a", "b"):
        run(model_folder("llama"), "int4-sym-g32-gptq", tmp_path / name, text_file)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_model_in_memory_with_its_tokenizer(model_folder, text_file, tmp_path, logits):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    run(model, "int4-sym-g32-gptq", tmp_path / "a", text_file)
    run(model_folder("llama"), "int4-sym-g32-gptq", tmp_path / "b", text_file)
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_a_model_in_memory_cannot_be_resumed(model_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with pytest.raises(RecipeError, match="cannot be resumed"):
        quantize(model, "int4-sym-g32-rtn", tmp_path / "out", resume=True)


def test_an_embedding_in_integers_is_refused_where_nobody_reads_it(model_folder, tmp_path):
    (tmp_path / "r.toml").write_text('scheme = "int4-sym-g32"\nalgorithm = "rtn"\n[[rules]]\nmatch = "model.embed_tokens"\nscheme = "int8-sym-g32"\n')
    with pytest.raises(RecipeError, match="embedding model.embed_tokens.weight, which no program reads"):
        quantize(model_folder("llama"), tmp_path / "r.toml", tmp_path / "out")


def test_padded_calibration(model_folder, tmp_path):
    """Padding changes no statistic: texts padded together give what the same texts, one by one, give."""
    records = ["some words and a few more of them", "the quick brown fox", "lazy dog, lazy dog"]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in records))
    recipe = Recipe("padded", Scheme(bits=4, block=(1, 32), scale_dtype="float32"), calibration=Calibration(str(path), 3, 64, pad=True))
    for name in ("llama", "mixtral"):
        result = quantize(model_folder(name), recipe, tmp_path / name, dtype="float32")
        tokens = result.provenance["calibration"]["tokens"]
        longest = result.provenance["calibration"]["length"]
        assert tokens < 3 * longest
        seen = [record["tokens"] for key, record in result.layers.items() if "q_proj" in key]
        assert set(seen) == {tokens}
        routed = [r["tokens"] for k, r in result.layers.items() if "experts" in k and k.startswith("model.layers.0") and k.endswith("w1.weight")]
        assert not routed or sum(routed) == 2 * tokens


def test_self_calibration(model_folder, tmp_path):
    result = quantize(model_folder("llama"), "int4-sym-g32-gptq", tmp_path / "out", calibration="self", **SMALL)
    assert result.provenance["recipe"]["calibration"]["source"] == "self" and result.provenance["calibration"]["tokens"] > 16


@pytest.mark.parametrize("target_name", ["compressed-tensors", "gguf", "safetensors"])
@pytest.mark.parametrize("source", ["gguf", "gguf-q8_0", "compressed-tensors"])
def test_what_was_quantized_before_can_be_quantized(source, target_name, model_folder, text_file, tmp_path, logits):
    recipe = {"gguf": "float16", "gguf-q8_0": "q8_0", "compressed-tensors": "int8-channel-rtn"}[source]
    first = quantize(model_folder("llama-tied"), recipe, tmp_path / ("first.gguf" if "gguf" in source else "first")).path
    out = tmp_path / ("out.gguf" if target_name == "gguf" else "out")
    progress = Notes()
    result = run(first, "int4-sym-g32-gptq", out, text_file, target_name=target_name, progress=progress)
    assert set(result.layers) >= set(matrices(model_folder("llama-tied")))
    assert any("quantized already" in note for note in progress.notes) == (source != "gguf")
    assert (logits(out) - logits(first)).std() < 0.5 * logits(first).std()
    if target_name != "gguf":
        assert transformers.AutoTokenizer.from_pretrained(out)("the fox")["input_ids"] == transformers.AutoTokenizer.from_pretrained(model_folder("llama"))("the fox")["input_ids"]


def test_tensors_that_the_model_does_not_use_are_left_out_and_said(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.mtp.weight": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    result = quantize(folder, "int4-g32-rtn", tmp_path / "out")
    assert "model.mtp.weight" not in open_checkpoint(result.path).tensors
    assert result.provenance["notes"] == ["LlamaForCausalLM does not use 1 tensors of the checkpoint, which are left out: model.mtp.weight."]


# ---- rules


def rules(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_rules_keep_and_change_layers(model_folder, text_file, tmp_path, logits):
    recipe = rules(
        tmp_path,
        'scheme = "int4-sym-g32-gptq"\n[[rules]]\nmatch = "model.layers.0.*"\nscheme = "keep"\n'
        '[[rules]]\nmatch = "*.down_proj"\nscheme = "int8-g64-rtn"\n[[rules]]\nmatch = "*.layers.1.self_attn.k_proj"\nscheme = "int3-asym-g64-gptq"\n'
        '[[rules]]\nmatch = "lm_head"\nscheme = "int8-channel"\n',
    )
    folder = model_folder("llama")
    result = run(folder, recipe, tmp_path / "out", text_file)
    made = open_checkpoint(result.path)
    schemes = {name.removeprefix("model.layers."): entry.scheme.name for name, entry in made.quantized.items()}
    assert not [name for name in schemes if name.startswith("0.")]
    assert schemes["1.mlp.down_proj.weight"] == schemes["2.mlp.down_proj.weight"] == "int8-sym-g64"
    assert schemes["1.self_attn.k_proj.weight"] == "int3-asym-g64" and schemes["2.self_attn.k_proj.weight"] == "int4-sym-g32"
    assert schemes["lm_head.weight"] == "int8-sym-channel"
    assert result.layers["model.layers.1.mlp.down_proj.weight"]["algorithm"] == "rtn"
    assert torch.equal(made.dense("model.layers.0.mlp.up_proj.weight"), open_checkpoint(folder).dense("model.layers.0.mlp.up_proj.weight"))
    assert torch.isfinite(logits(result.path)).all()


def test_keeping_one_of_a_group_changes_nothing_for_the_others(model_folder, text_file, tmp_path):
    recipe = rules(tmp_path, 'scheme = "int4-sym-g32-gptq"\n[[rules]]\nmatch = "*.q_proj"\nscheme = "keep"\n')
    some = open_checkpoint(run(model_folder("llama"), recipe, tmp_path / "a", text_file).path)
    every = open_checkpoint(run(model_folder("llama"), "int4-sym-g32-gptq", tmp_path / "b", text_file).path)
    for name in ("k_proj", "v_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        assert torch.equal(some.dense(key), every.dense(key))


def test_q4_k_falls_back_and_says_so(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m", hidden_size=192, intermediate_size=256, num_attention_heads=6)
    result = quantize(folder, "q4_k", tmp_path / "out.gguf")
    up, down = (result.layers[f"model.layers.0.mlp.{name}.weight"] for name in ("up_proj", "down_proj"))
    assert up["scheme"] == "q5_0" and up["notes"] == ["q4_k cannot hold rows of 192: q5_0 was used, as llama-quantize does"]
    assert down["scheme"] == "q4_k" and "notes" not in down
    assert open_checkpoint(result.path).quantized["model.layers.0.mlp.up_proj.weight"].scheme.format == "q5_0"


@pytest.mark.parametrize(("recipe", "file_type"), [("q4_k_m", 15), ("q3_k_l-gptq", 13), ("q2_k_s", 21)])
def test_a_mixture_is_written_as_llama_quantize_would(save_model, text_file, tmp_path, recipe, file_type):
    """The types of oracles/mixtures.json for a Llama of this shape."""
    folder = save_model("llama", tmp_path / "m", hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    result = run(folder, recipe, tmp_path / "out.gguf", text_file)
    header = read_header(result.path)
    assert header.get("general.file_type") == file_type
    expected = json.loads((Path(__file__).parents[1] / "oracles" / "mixtures.json").read_text())["llama, 2 layers"]["types"][recipe.split("-")[0]]
    for name, info in header.tensors.items():
        if len(info.shape) > 1:
            leaf, kind = name.split(".")[-2], GGMLQuantizationType(info.type_id).name.lower()
            others = dict(word.split(":") for word in expected[leaf].split()[1:])
            assert kind == (next((k for k, layers in others.items() if name.startswith(f"blk.{layers}.")), expected[leaf].split()[0])), name
    assert {r["algorithm"] for n, r in result.layers.items() if ".layers." in n} == {"gptq" if "gptq" in recipe else "rtn"}


def test_q2_k_s_without_importance_is_refused(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m", hidden_size=256, intermediate_size=256)
    refused(RecipeError, "q2_k_s leaves 21 matrices in Q2_K, which are garbage without importance .* Use q2_k_s-weighted", folder, "q2_k_s-rtn", tmp_path / "out.gguf")


# ---- files of a largest size


SHARDED = {
    "gguf": "q4_0", "compressed-tensors": "int4-sym-g32-rtn", "gptq": "int4-sym-g32-rtn", "awq": "int4-asym-g32-rtn", "auto-round": "int4-sym-g32-rtn", "bitsandbytes": "nf4",
    "hqq": "int4-hqq-g32", "aqlm": "1x8-rtn", "bitnet": "bitnet", "torchao": "int8-sym-g32-rtn", "lowbit": "int4-sym-g32-rtn", "safetensors": "int4-sym-g32-rtn",
}  # fmt: skip


def test_every_target_is_sharded():
    assert SHARDED.keys() == TARGETS.keys()


@pytest.mark.parametrize(("target_name", "recipe"), SHARDED.items())
def test_a_shard_size_is_kept(model_folder, tmp_path, target_name, recipe):
    """The same model as in one piece; GGUF parts in a folder, which is opened as one."""
    folder = model_folder("llama")
    whole = quantize(folder, recipe, tmp_path / ("one.gguf" if target_name == "gguf" else "one"), target_name=target_name)
    made = quantize(folder, recipe, tmp_path / "many", target_name=target_name, max_shard_size="20kB")
    files = sorted(path for path in made.path.iterdir() if path.suffix in (".gguf", ".safetensors"))
    assert len(files) > 2 and files[0].name == f"model{'.lowbit' if target_name == 'lowbit' else ''}-00001-of-{len(files):05d}{files[0].suffix}"
    ours, theirs = open_checkpoint(made.path), open_checkpoint(whole.path)
    assert ours.shapes() == theirs.shapes() and all(torch.equal(ours.dense(name), theirs.dense(name)) for name in theirs.shapes())
    assert made.provenance == whole.provenance
    for kind in ("gguf", "safetensors") if target_name == "gguf" else ("safetensors",):
        again = convert(made.path, kind, tmp_path / f"again-{kind}", max_shard_size=20_000).path
        assert len(list(again.glob("model-000??-of-*"))) > 2 and open_checkpoint(again).shapes() == theirs.shapes()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.work"))


def test_shard_sizes_that_cannot_be(model_folder, tmp_path):
    folder = model_folder("llama")
    message = "becomes several files, which go into a folder, and .*out.gguf is named like a file. Give -o a folder's name, and --to gguf"
    refused(RecipeError, message, folder, "q4_0", tmp_path / "out.gguf", max_shard_size="1GB")
    refused(ResourceError, "the size 'big' is not understood", folder, "int4-sym-g32-rtn", tmp_path / "out", max_shard_size="big")
    refused(RecipeError, "max_shard_size is 0; expected a size such as 5GB", folder, "int4-sym-g32-rtn", tmp_path / "out", max_shard_size=0)


# ---- true-sequential


class Counter:
    def __init__(self, monkeypatch):
        self.calls = []
        original = Streamer.run_block

        def run_block(streamer, block, index, number, hidden):
            self.calls.append((index, number))
            return original(streamer, block, index, number, hidden)

        monkeypatch.setattr(Streamer, "run_block", run_block)

    def take(self):
        calls, self.calls = self.calls, []
        return calls


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_true_sequential_costs_at_most_2_6_times_the_passes(name, save_model, text_file, tmp_path, monkeypatch, logits):
    monkeypatch.setattr("lowbit.pipeline.calibration.Windows.batches.__defaults__", (32,))
    folder = save_model(name, tmp_path / "m", num_hidden_layers=8)
    counter = Counter(monkeypatch)
    plain = Recipe("plain", Scheme(bits=3, block=(1, 32), scale_dtype="float32"), calibration=Calibration(str(text_file), 4, 32))
    turns = Recipe("turns", plain.scheme, calibration=plain.calibration, true_sequential=True)
    once = quantize(folder, plain, tmp_path / "a", dtype="float32")
    passes = len(counter.take())
    sequential = quantize(folder, turns, tmp_path / "b", dtype="float32")
    more = len(counter.take())
    assert passes == 1 + 4 * (2 * 8 - 1)  # one to find out what shares an input; nothing follows the last block
    assert passes < more <= 2.6 * passes
    assert set(once.layers) == set(sequential.layers)
    changed = [k for k in once.layers if once.layers[k]["weight_error"] != sequential.layers[k]["weight_error"]]
    first = [k for k in once.layers if k.startswith("model.layers.0") and ("q_proj" in k or "k_proj" in k)]
    assert changed and not set(first) & set(changed)  # what comes first in the block has seen nothing quantized
    assert torch.isfinite(logits(tmp_path / "b")).all()


# ---- experts


def test_tokens_of_every_expert_are_recorded_and_scarce_ones_noted(model_folder, text_file, tmp_path):
    for name in ("mixtral", "qwen3-moe"):
        result = run(model_folder(name), "int4-sym-g32-gptq", tmp_path / name, text_file)
        experts = {k: r for k, r in result.layers.items() if ".experts." in k}
        chosen = sum(r["tokens"] for k, r in experts.items() if k.startswith("model.layers.0") and ("w1." in k or "gate_proj" in k))
        assert chosen == 2 * 4 * 32
        for key, record in experts.items():
            scarce = record["tokens"] < record["shape"][1]
            assert any(f"this expert saw {record['tokens']} tokens of" in note for note in record.get("notes", [])) == scarce, key


@pytest.mark.parametrize("sequential", [False, True])
def test_an_expert_that_saw_no_token(sequential, save_model, text_file, tmp_path, logits):
    folder = save_model("mixtral", tmp_path / "m", num_hidden_layers=1, num_experts_per_tok=1)
    tensors = load_file(folder / "model.safetensors")
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"].zero_()
    gate[0, 0], gate[1, 0] = 3.0, -3.0  # the sign of one channel chooses between two of the four experts
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe("r", Scheme(bits=4, block=(1, 32), scale_dtype="float32"), calibration=Calibration(str(text_file), 4, 32), true_sequential=sequential)
    result = quantize(folder, recipe, tmp_path / "out", dtype="float32")
    unseen = {k: r for k, r in result.layers.items() if ".experts." in k and r["tokens"] == 0}
    assert len(unseen) == 2 * 3
    assert all("this expert saw 0 tokens of" in r["notes"][-1] and "mixed in" in r["notes"][-1] for r in unseen.values())
    assert all("rtn_output_error" in r for r in unseen.values())
    assert torch.isfinite(logits(result.path)).all()


# ---- refused before work


def refused(error, message, folder, recipe, out, **options):
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        quantize(folder, recipe, out, **{**SMALL, **options})
    assert isinstance(caught.value, LowbitError)
    assert sorted(p.name for p in out.parent.iterdir()) == before  # no folder, no log, no unfinished job
    return str(caught.value)


def test_a_group_that_does_not_fit_is_refused_before_work(model_folder, tmp_path, text_file):
    text = refused(ShapeError, "64 is not one of 128", model_folder("llama"), "int4-sym-g128-gptq", tmp_path / "out", calibration=text_file)
    assert "Use g64, g32, g16 or channel" in text and "q_proj" in text


@pytest.mark.parametrize(
    ("recipe", "options", "error", "message"),
    [
        ("int4-gtpq", {}, RecipeError, "'gtpq' is not known"),
        ("int4-sym-g32-gptq", {"target_name": "onnx"}, RecipeError, "target 'onnx'"),
        ("int4-sym-g32-gptq", {"calibration": "absent.txt"}, LowbitError, "'absent.txt' is no file"),
        ("int4-sym-g32-gptq", {"seq_len": 4096}, ModelError, "seq_len is 4096, and this model takes at most 128 tokens"),
        ("int4-sym-g32-gptq", {"n_samples": 0}, RecipeError, "n_samples is 0"),
        ("int4-sym-g32-gptq", {"dtype": "int8"}, ResourceError, "dtype 'int8' is not known"),
        ("int4-sym-g32-gptq", {"device": "cuda:77"}, ResourceError, "device 'cuda:77' cannot be used"),
        ("q4_k", {"target_name": "compressed-tensors"}, RecipeError, "cannot hold q4_k"),
    ],
)
def test_bad_options_are_refused_before_work(recipe, options, error, message, model_folder, tmp_path):
    refused(error, message, model_folder("llama"), recipe, tmp_path / "out", **options)


def test_a_recipe_that_quantizes_nothing(model_folder, tmp_path):
    recipe = rules(tmp_path, 'scheme = "int4-g32-rtn"\n[[rules]]\nmatch = "model.layers.*"\nscheme = "keep"\n')
    refused(RecipeError, "recipe 'mine' quantizes nothing", model_folder("llama"), recipe, tmp_path / "out")


def test_a_model_that_is_not_there(tmp_path):
    refused(CheckpointError, "does not exist", tmp_path / "absent" / "model", "int4-g32", tmp_path / "out")


def test_a_gguf_of_an_architecture_that_llama_cpp_lacks(save_model, tmp_path):
    folder = save_model("opt", tmp_path / "m")
    refused(CheckpointError, "(?i)opt", folder, "int4-g32-rtn", tmp_path / "out.gguf")


def test_no_tokenizer(save_model, tmp_path, text_file):
    folder = save_model("llama", tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(CheckpointError, "has no tokenizer that transformers can load", folder, "int4-g32-gptq", tmp_path / "out", calibration=text_file)


def test_too_little_memory_and_disk(model_folder, tmp_path, monkeypatch, text_file):
    with monkeypatch.context() as patch:
        patch.setattr(resources, "available_memory", lambda: 10_000)
        refused(ResourceError, r"needs about .* of memory, and 10\.0 kB are available", model_folder("llama"), "int4-g32-gptq", tmp_path / "out", calibration=text_file)
    with monkeypatch.context() as patch:
        patch.setattr(resources.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        refused(ResourceError, r"needs .* on the disk of .*, and 1\.0 kB are free", model_folder("llama"), "int4-g32-rtn", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("recipe", ["int4-g32-gptq", "int4-g32-rtn"])
def test_nan_outside_the_blocks_is_named_before_work(name, recipe, save_model, tmp_path, text_file):
    folder = save_model("llama", tmp_path / "m")
    damage(folder, name)
    refused(FormatError, f"{name}: 1 of .* values are NaN or infinite", folder, recipe, tmp_path / "out", calibration=text_file)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.2.input_layernorm.weight"])
@pytest.mark.parametrize("recipe", ["int4-g32-gptq", "int4-g32-rtn"])
def test_nan_inside_a_block_is_named_and_nothing_is_written(name, recipe, save_model, tmp_path, text_file):
    folder = save_model("llama", tmp_path / "m")
    damage(folder, name)
    with pytest.raises(FormatError, match=f"{name}: 1 of .* values are NaN or infinite"):
        run(folder, recipe, tmp_path / "out", text_file)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def damage(folder, name, value=torch.nan):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_activations_that_overflow_are_named(save_model, tmp_path, text_file):
    folder = save_model("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 3e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj.*: the activations that reach it are infinite or NaN.*float32"):
        run(folder, "int4-g32-gptq", tmp_path / "out", text_file, dtype="float16")
    run(folder, "int4-g32-gptq", tmp_path / "whole", text_file)


def test_truncated_shard(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m", shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(CheckpointError, f"{shard.name} is not a whole safetensors file", folder, "int4-g32-rtn", tmp_path / "out")


# ---- outputs that are in the way


def test_an_existing_output_is_refused_and_left_as_it_is(model_folder, tmp_path, text_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    refused(JobError, r"out exists already\. Choose another -o, or --overwrite", model_folder("llama"), "int4-g32-gptq", tmp_path / "out", calibration=text_file)
    refused(JobError, "exists already", model_folder("llama"), "int4-g32-gptq", tmp_path / "out", calibration=text_file, resume=True)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    with pytest.raises(JobError, match="exists already"):
        convert(model_folder("llama"), "safetensors", tmp_path / "out")


def test_overwrite_replaces_it_when_the_new_one_is_whole(save_model, model_folder, tmp_path, text_file):
    damaged = save_model("llama", tmp_path / "m")
    damage(damaged, "model.layers.2.mlp.up_proj.weight")
    quantize(model_folder("llama"), "int8-g32-rtn", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(FormatError):
        run(damaged, "int4-g32-gptq", tmp_path / "out", text_file, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    quantize(model_folder("llama"), "int4-g32-rtn", tmp_path / "out", overwrite=True)
    assert open_checkpoint(tmp_path / "out").provenance["recipe"]["name"] == "int4-g32-rtn"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out", "out.log"]


def test_the_model_itself_is_no_output(save_model, tmp_path):
    folder = save_model("llama", tmp_path / "m")
    for out in (folder, tmp_path):
        with pytest.raises(JobError, match="is where the model itself is"):
            quantize(folder, "int4-g32-rtn", out, overwrite=True)
    assert (folder / "model.safetensors").is_file()


def test_an_unwritable_target(model_folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(JobError, match=r"cannot be written.*Not a directory|Not a directory"):
        quantize(model_folder("llama"), "int4-g32-rtn", tmp_path / "file" / "out")
    with pytest.raises(LowbitError, match="/proc"):
        quantize(model_folder("llama"), "int4-g32-rtn", "/proc/out")


def test_convert_keeps_the_codes(model_folder, text_file, tmp_path, logits):
    out = run(model_folder("llama"), "int4-sym-g32-gptq", tmp_path / "ct", text_file).path
    convert(out, "safetensors", tmp_path / "dense")
    assert torch.equal(logits(out), logits(tmp_path / "dense"))


# ---- what the user is told


def test_notes(model_folder, text_file, tmp_path):
    progress = Notes()
    run(model_folder("llama"), "int4-sym-gptq", tmp_path / "out", text_file, n_samples=10_000, progress=progress)
    assert progress.notes[0].startswith("Group size not given: int4-sym-g64")
    assert any("instead of 10000" in note for note in progress.notes)


def test_provenance_names_no_path_and_no_time(model_folder, text_file, tmp_path):
    result = run(model_folder("llama"), "int4-sym-g32-gptq", tmp_path / "out", text_file)
    text = json.dumps(result.provenance)
    assert str(tmp_path) not in text and "/tmp" not in text
    assert result.provenance["recipe"]["calibration"]["source"] == "text.txt"
    assert result.seconds > 0 and result.peak_memory_bytes > 0
    assert "block 3 of 3 done" in (tmp_path / "out.log").read_text()
