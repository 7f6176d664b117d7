"""The importance matrix that lowbit collects against llama-imatrix's, and files quantized with one."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from lowbit.checkpoints import gguf, open_checkpoint
from lowbit.checkpoints.imatrix import of_model, read_imatrix
from lowbit.errors import CheckpointError, JobError, RecipeError
from lowbit.numerics import ggml
from lowbit.pipeline.convert import convert
from lowbit.pipeline.imatrix import imatrix
from lowbit.pipeline.quantize import quantize
from lowbit.progress import Progress

ORACLES = Path(__file__).parents[1] / "oracles"
TEXT = "\n".join(f"{i}. the quick brown fox jumps over the lazy dog; what is {i} + 345?  it's {345 + i}." for i in range(8))  # this and the models as in make_imatrix.py
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None}
MODELS = {
    "llama": ({**COMMON, "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}, "Llama 2's kind"),
    "mixtral": ({**COMMON, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}, "GPT-2's kind"),
}
SMALL = {"seq_len": 32, "n_samples": 4, "dtype": "float32"}


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    first = sum(map(ord, name))
    scale = 1.0 if len(shape) == 1 else 0.1 if "embed" not in name else 0.5
    return torch.sin(torch.arange(shape.numel(), dtype=torch.float64).mul_(12.9898).add_(first).sin_().mul_(43758.5453)).mul_(scale).float().reshape(shape)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """Name and folder of a model that llama-imatrix has seen, and the text."""
    config, tokenizer = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    stored = json.loads((ORACLES / "converter.json").read_text(encoding="utf-8"))["tokenizers"][tokenizer]
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config, vocab_size=stored["rows"]))
    for name, parameter in made.named_parameters():
        parameter.data = weights(name, parameter.shape)
    made.save_pretrained(folder / "hf")
    for file, text in stored["files"].items():
        (folder / "hf" / file).write_text(text, encoding="utf-8")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return request.param, folder / "hf", folder / "text.txt"


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_it_is_llama_imatrixs(model, tmp_path, form):
    """Sums within 1e-4, counts of tokens and of those of each expert exactly; a tokenizer with BOS, and experts."""
    name, folder, text = model
    made = imatrix(folder, tmp_path / f"m.{form}", calibration=text, **SMALL)
    ours, theirs = read_imatrix(made.path), read_imatrix(ORACLES / f"imatrix-{name}.{form}")
    assert (ours.datasets, ours.chunks, ours.chunk_size) == (theirs.datasets, theirs.chunks, theirs.chunk_size)
    routers = {"blk.0.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight"} if name == "mixtral" else set()  # which nobody quantizes
    assert theirs.entries.keys() - ours.entries.keys() == routers and len(ours.entries) == made.entries == 14
    for key, entry in ours.entries.items():
        assert torch.equal(entry.counts, theirs.entries[key].counts), key
        torch.testing.assert_close(entry.sums, theirs.entries[key].sums, rtol=1e-4, atol=1e-6)
    assert made.tokens == 128 and made.unseen == 0


def test_a_stopped_job_goes_on_and_gives_the_same_bytes(model, tmp_path):
    _, folder, text = model
    whole = imatrix(folder, tmp_path / "whole.gguf", calibration=text, **SMALL).path.read_bytes()

    class Stop(Progress):
        def step(self, title, total):
            class Context:
                def __enter__(self):
                    done = []

                    def advance(n=1):
                        done.append(n)
                        if len(done) == 4:  # in the second block
                            raise KeyboardInterrupt

                    return advance

                def __exit__(self, *_):
                    return None

            return Context()

    out = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        imatrix(folder, out, calibration=text, progress=Stop(), **SMALL)
    assert not out.exists() and (tmp_path / "m.gguf.work" / "sums-00000.safetensors").exists() and not (tmp_path / "m.gguf.work" / "sums-00001.safetensors").exists()
    with pytest.raises(JobError, match="holds an unfinished job. Go on with --resume"):
        imatrix(folder, out, calibration=text, **SMALL)
    assert imatrix(folder, out, calibration=text, resume=True, **SMALL).path.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]
    with pytest.raises(JobError, match="exists already"):
        imatrix(folder, out, calibration=text, **SMALL)
    with pytest.raises(RecipeError, match="says no form of importance matrix; expected a name that ends in .gguf, or in .dat"):
        imatrix(folder, tmp_path / "m.bin", calibration=text, **SMALL)


# ------------------------------------------------------------------------------------------------------------------- quantizing


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_every_matrix_is_encoded_with_its_importance(model, tmp_path, form):
    name, folder, _ = model
    file = ORACLES / f"imatrix-{name}.{form}"
    result = quantize(folder, "q4_0-pure", tmp_path / "m.gguf", imatrix=file)
    source, made = open_checkpoint(folder), open_checkpoint(result.path)
    stats = of_model(read_imatrix(file), source.config, {key: entry.shape for key, entry in made.quantized.items()})
    assert len(stats) == (14 if name == "llama" else 8 + 2 * 6 * 3)
    for key, entry in stats.items():
        wanted = ggml.encode(source.dense(key), "q4_0", importance=entry.importance())
        assert torch.equal(made.quantized[key].load().parts["blocks"], wanted), key
        assert not torch.equal(wanted, ggml.encode(source.dense(key), "q4_0")), key
    said = result.provenance["imatrix"]
    assert (said["file"], said["datasets"], said["chunks"], said["entries"]) == (file.name, ["text.txt"], 4, 14 if name == "llama" else 16)
    header = gguf.read_header(result.path)
    assert [header.get(f"quantize.imatrix.{key}") for key in ("file", "dataset", "chunks_count")] == [file.name, "text.txt", 4]
    assert result.provenance["calibration"] is None


def test_a_mixture_knows_that_it_is_weighted(model, tmp_path):
    """llama-quantize gives the first ffn_down of eight to Q4_1 then; of two layers there is no such, of eight there is (test_gguf_mixtures)."""
    name, folder, _ = model
    result = quantize(folder, "q4_0", tmp_path / "m.gguf", imatrix=ORACLES / f"imatrix-{name}.gguf")
    assert result.provenance["recipe"]["options"] == {"weighted": True} and result.provenance["recipe"]["mixture"] == "q4_0"


def test_what_a_matrix_does_not_hold_is_said(model, tmp_path, monkeypatch):
    name, folder, _ = model
    file = ORACLES / f"imatrix-{name}.gguf"
    found = read_imatrix(file)
    del found.entries["blk.1.attn_output.weight"]
    monkeypatch.setattr("lowbit.pipeline.setup.read_imatrix", lambda path: found)
    result = quantize(folder, "q4_0", tmp_path / "m.gguf", imatrix=file)
    noted = {key: record["notes"] for key, record in result.layers.items() if any("importance matrix" in note for note in record.get("notes", []))}
    key = "model.layers.1.self_attn.o_proj.weight"
    assert noted == {key: ["the importance matrix does not hold it: all inputs count the same"]}
    assert torch.equal(open_checkpoint(result.path).quantized[key].load().parts["blocks"], ggml.encode(open_checkpoint(folder).dense(key), "q4_0"))


@pytest.mark.parametrize(
    ("recipe", "options", "error", "message"),
    [
        ("q4_0-gptq", {}, RecipeError, r"this recipe collects statistics of its own \(hessian\). Leave one of the two out, or take a recipe such as q4_k_m"),
        (None, {"target_name": "gguf"}, RecipeError, r"statistics of its own \(hessian\)"),
        ("q4_0", {"calibration": "default"}, RecipeError, "calibration text would not be read"),
    ],
)
def test_an_importance_matrix_is_for_plain_rounding(model, tmp_path, recipe, options, error, message):
    name, folder, _ = model
    with pytest.raises(error, match=message):
        quantize(folder, recipe, tmp_path / "m.gguf", imatrix=ORACLES / f"imatrix-{name}.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_foreign_one_is_refused_before_work(model, tmp_path):
    _, folder, _ = model
    with pytest.raises(CheckpointError, match="absent.dat: No such file"):
        quantize(folder, "q4_0", tmp_path / "m.gguf", imatrix=tmp_path / "absent.dat")
    (tmp_path / "other.dat").write_bytes(b"\x01\0\0\0\x01\0\0\0a" + bytes([1, 0, 0, 0, 1, 0, 0, 0]) + bytes(4))
    with pytest.raises(CheckpointError, match="holds none of this model's weights; it has a. It belongs to another model"):
        quantize(folder, "q4_0", tmp_path / "m.gguf", imatrix=tmp_path / "other.dat")
    assert [path.name for path in tmp_path.iterdir()] == ["other.dat"]


@pytest.mark.consumer
@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_llama_quantize_takes_it(model, tmp_path, form, llama_program):
    """Q8_0 has no use for importance, so the file has our bytes; what Q4_0 loses by the importance is not more of ours than of theirs."""
    _, folder, text = model
    file = imatrix(folder, tmp_path / f"m.{form}", calibration=text, **SMALL).path
    gguf.write(open_checkpoint(folder), tmp_path / "f32.gguf")
    for kind in ("Q8_0", "Q4_0"):
        outside = ("--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0")
        llama_program("llama-quantize", "--pure", *outside, "--imatrix", file, tmp_path / "f32.gguf", tmp_path / "theirs.gguf", kind, 1)
        quantize(folder, f"{kind.lower()}-pure", tmp_path / "ours.gguf", imatrix=file, overwrite=True)
        ours, theirs, source = (open_checkpoint(path) for path in (tmp_path / "ours.gguf", tmp_path / "theirs.gguf", folder))
        assert gguf.read_header(theirs.path).get("quantize.imatrix.entries_count") == 14
        assert {key: entry.scheme for key, entry in ours.quantized.items()} == {key: entry.scheme for key, entry in theirs.quantized.items()}
        stats = of_model(read_imatrix(file), source.config, {key: entry.shape for key, entry in ours.quantized.items()})
        for key, entry in ours.quantized.items():
            if kind == "Q8_0":
                assert torch.equal(entry.load().parts["blocks"], theirs.quantized[key].load().parts["blocks"]), key
            elif key in stats:
                lost = [float((stats[key].importance() * (made.dense(key).float() - source.dense(key)).square()).sum()) for made in (ours, theirs)]
                assert lost[0] <= 1.02 * lost[1], key


def test_the_model_itself_is_not_overwritten(model_folder, tmp_path):
    file = convert(model_folder("llama"), "gguf", tmp_path / "model.gguf").path
    before = file.read_bytes()
    with pytest.raises(JobError, match="where the model itself is"):
        imatrix(file, file, n_samples=2, seq_len=32, overwrite=True)
    assert file.read_bytes() == before
