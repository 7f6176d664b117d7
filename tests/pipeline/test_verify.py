"""verify and its parts: files that are right pass, files that are wrong fail, a consumer that is absent is said to be; the rules that are read in vLLM's source."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import CheckpointError, FormatError, VerificationError
from lowbit.pipeline import consumers, llama_cpp, verify, vllm_rules


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory):
    """made(target, recipe): a result on disk, made once."""
    found = {}

    def make(target, recipe):
        if (target, recipe) not in found:
            out = tmp_path_factory.mktemp("made") / ("m.gguf" if target == "gguf" else "out")
            found[target, recipe] = lowbit.quantize(model_folder("llama"), recipe, out, target_name=target).path
        return found[target, recipe]

    return make


@pytest.mark.parametrize(("target", "recipe"), [("safetensors", "int4-sym-g32-rtn"), ("lowbit", "e8p2-rtn"), ("lowbit", "int8-sym-channel-rtn-a8")])
def test_what_is_right_passes(made, target, recipe):
    out = made(target, recipe)
    found = verify.verify(out)
    assert (found.verdict, found.problems) == ("passed", ()) and found.versions["transformers"]
    assert found.weights == found.equal == (21 if target == "lowbit" else 0) and found.logits_difference < 1e-5
    assert json.loads((out / "verification.json").read_text())["verdict"] == "passed"
    assert found.rules[vllm_rules.NAME].startswith("rules kept" if target == "safetensors" else "refused")


@pytest.mark.consumer
@pytest.mark.parametrize("recipe", ["int4-sym-g32-rtn", "int4-asym-g32-rtn", "w8a8", "fp8", "nvfp4-rtn", "mxfp4-rtn"])
def test_compressed_tensors(made, recipe):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, the consumer of this layout, is not installed")
    found = verify.verify(made("compressed-tensors", recipe), write=False)
    assert (found.verdict, found.problems, found.weights, found.equal) == ("passed", (), 21, 21)


@pytest.mark.consumer
def test_llama_cpp(made):
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    out = made("gguf", "q4_0-pure-rtn")
    found = verify.verify(out)
    assert (found.verdict, found.problems) == ("passed", ()) and found.weights == found.equal >= 21 and 0 < found.kl < 0.01
    assert (out.with_name("m.gguf.verification.json")).is_file()


@pytest.mark.consumer
def test_llama_cpp_of_a_split_file(model_folder, tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    lowbit.quantize(model_folder("llama"), "q4_0-pure-rtn", tmp_path / "parts", target_name="gguf", max_shard_size="20kB")
    first = min((tmp_path / "parts").glob("*.gguf"))
    for path, beside in ((tmp_path / "parts", "verification.json"), (first, f"{first.name}.verification.json")):
        found = verify.verify(path)
        assert (found.verdict, found.problems) == ("passed", ()) and found.weights == found.equal >= 21
        assert (tmp_path / "parts" / beside).is_file() and f"{'parts/' if path.is_dir() else ''}{first.name}" in found.lines


def test_a_consumer_that_computes_otherwise_fails(made, tmp_path, monkeypatch):
    """The consumer is given lines that change one weight, and lines that stop."""
    out = made("lowbit", "e8p2-rtn")
    plain = consumers.consumer_of
    wrong = "\nwith torch.no_grad():\n    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(64))"

    def changed(addition):
        return lambda checkpoint: consumers.Consumer("a test", plain(checkpoint).code + addition, {"lowbit": "lowbit"})

    monkeypatch.setattr(verify, "consumer_of", changed(wrong))
    found = verify.verify(out, write=False)
    assert found.verdict == "failed" and "logits differ" in found.problems[0]
    monkeypatch.setattr(verify, "consumer_of", changed("\nmodel.model.layers[0].self_attn.q_proj._points += 1"))
    found = verify.verify(out, write=False)
    assert found.verdict == "failed" and found.equal == 20 and "q_proj.weight" in found.problems[0]
    monkeypatch.setattr(verify, "consumer_of", changed("\nraise SystemExit('enough')"))
    found = verify.verify(out, write=False)
    assert found.verdict == "failed" and "SystemExit: enough" in found.problems[0]
    monkeypatch.setattr(verify, "consumer_of", changed("\nimport os\nos._exit(9)"))
    assert "ended with code 9" in verify.verify(out, write=False).problems[0]


def test_an_absent_consumer_is_said_to_be(made, monkeypatch):
    monkeypatch.setattr(verify, "consumer_of", lambda checkpoint: consumers.Consumer("nothing", "", {"no_such_package": "no-such-package"}))
    found = verify.verify(made("lowbit", "e8p2-rtn"), write=False)
    assert found.verdict == "not run" and "pip install" in found.notes[-1] and "no-such-package" in found.notes[-1]
    with pytest.raises(VerificationError, match="cannot be run"):
        verify.verify(made("lowbit", "e8p2-rtn"), python="/usr/bin/false", write=False)


def test_damage_is_an_error(made, tmp_path):
    out = made("safetensors", "int4-sym-g32-rtn")
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * float("nan")}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        verify.verify(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify.verify(tmp_path / "nowhere")


def test_available_names_what_is_missing():
    found = {one.kind: one for one in verify.available()}
    assert not found["safetensors"].missing and not found["lowbit"].missing and found["hqq"].consumer == "hqq"
    assert verify.available(sys.executable)[0].missing == ()


def test_kl_is_zero_only_for_the_same():
    ours = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert verify.kl(ours, ours) == pytest.approx(0, abs=1e-12) and verify.kl(ours, ours + 7) == pytest.approx(0, abs=1e-12)
    assert verify.kl(ours, ours.roll(1, -1)) > 0.1


def test_an_answer_within_a_character_counts_for_nothing():
    assert llama_cpp._first_token({"choices": [{"logprobs": None}], "usage": {"completion_tokens": 4}}) is None
    content = [{"top_logprobs": [{"id": 1, "logprob": -1.0}]}]
    assert llama_cpp._first_token({"choices": [{"logprobs": {"content": content}}], "usage": {"completion_tokens": 1}}) == content[0]["top_logprobs"]
    with pytest.raises(VerificationError, match="answered"):
        llama_cpp._first_token({"error": "no"})


@pytest.mark.parametrize(
    ("target", "recipe", "verdict"),
    [
        ("compressed-tensors", "int4-sym-g32-rtn", "rules kept"), ("compressed-tensors", "int3-asym-g32-rtn", "rules kept"),
        ("compressed-tensors", "int4-tensor-rtn", "is refused for packed integers"),
        ("compressed-tensors", "int4-sym-g32-rtn-a8", "8-bit weights"), ("compressed-tensors", "w8a8", "rules kept"), ("gptq", "int3-asym-g32-rtn", "symmetric 4 and 8 bits"),
        ("gptq", "int4-sym-g32-rtn", "rules kept"), ("gptq", "int4-sym-g64-rtn", "rules kept"), ("awq", "int4-asym-g32-rtn", "rules kept"), ("auto-round", "int4-asym-g32-rtn", "rules kept"),
        ("auto-round", "int3-asym-g32-rtn", "packing_format"), ("hqq", "int4-asym-g32-hqq", "refused"), ("bitsandbytes", "nf4-rtn", "plugin"), ("compressed-tensors", "nvfp4-rtn", "rules kept"),
    ],
)  # fmt: skip
def test_vllms_rules(made, target, recipe, verdict):
    assert verdict in vllm_rules.verdicts(open_checkpoint(made(target, recipe)))[vllm_rules.NAME]


def test_vllms_rule_of_fused_layers(model_folder, tmp_path):
    (tmp_path / "r.toml").write_text('scheme = "int4-sym-g32-rtn"\n[[rules]]\nmatch = "*.v_proj"\nscheme = "int8-sym-g32-rtn"\n')
    lowbit.quantize(model_folder("llama"), tmp_path / "r.toml", tmp_path / "out")
    assert "self_attn.q_proj and self_attn.k_proj and self_attn.v_proj become one layer" in vllm_rules.verdicts(open_checkpoint(tmp_path / "out"))[vllm_rules.NAME]


def test_the_lines_of_every_layout_are_python(made):
    """What the card shows compiles, whatever the folder is called."""
    for target, recipe in [("compressed-tensors", "int4-asym-g32-rtn"), ("gptq", "int4-sym-g32-rtn"), ("hqq", "int4-asym-g32-hqq"), ("bitsandbytes", "nf4-rtn"), ("lowbit", "e8p2-rtn")]:
        consumer = consumers.consumer_of(open_checkpoint(made(target, recipe)))
        compile(consumer.lines('a "quoted" \\ name'), "card", "exec")


@pytest.mark.parametrize("recipe", ["nvfp4-rtn", "nvfp4-gptq"])
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_nvfp4s_factor_is_shared_by_the_parts_of_one_layer(model_folder, tmp_path, text_file, model, recipe):
    """vLLM takes the largest of the factors for all of q, k and v, and of gate and up."""
    out = lowbit.quantize(model_folder(model), recipe, tmp_path / "out", calibration=text_file, n_samples=4, seq_len=32).path
    assert vllm_rules.verdicts(open_checkpoint(out))[vllm_rules.NAME].startswith("rules kept")
    checkpoint = open_checkpoint(out)
    factors = {name: float(checkpoint.quantized[f"model.layers.0.self_attn.{name}_proj.weight"].load().parts["global_scale"]) for name in "qkvo"}
    assert factors["q"] == factors["k"] == factors["v"] != factors["o"]
