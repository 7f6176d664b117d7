"""Whole folders that other programs wrote with their own writers (tests/oracles): read to the weights that they decode, run to the logits that they compute, written back as they were."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import lowbit
from lowbit import numerics
from lowbit.checkpoints import TARGETS, open_checkpoint
from lowbit.errors import CheckpointError
from lowbit.pipeline.convert import convert
from lowbit.pipeline.streaming import Batch

# fixture, variant, greatest difference of logits
FOLDERS = [("hqq_folder", "mixed", 1e-4), ("bitnet", "bitlinear", 1e-4), ("bitnet", "auto", 1e-4), ("aqlm_folder", "2x8", 2e-3), ("torchao", "weights", 1e-4),
           ("fp8", "blocks", 1e-4), ("fp8", "tensor", 1e-4), ("mxfp4", "gpt-oss", 2e-3)]
# folders of the programs that these layouts come from, with what their weights may differ by
WRITERS = [*(("llmcompressor", variant, 0) for variant in ("w4a16", "w4a16-asym", "w8a8", "fp8")), *(("gptqmodel_folder", variant, 0) for variant in ("sym", "act-order", "asym")),
           ("bitsandbytes_folder", "nf4-dq", 0), ("bitsandbytes_folder", "fp4", 0), ("bitsandbytes_folder", "int8", 2**-23)]  # of int8 they multiply by float32(1 / 127)
# what of the config lowbit writes otherwise: notes of the writer, and of compressed-tensors arguments that are at their defaults
OTHERWISE = {"llmcompressor": {"config_groups", "sparsity_config", "transform_config", "version"}, "gptqmodel_folder": {"meta", "method"}, "bitsandbytes_folder": {"llm_int8_skip_modules"}}


@pytest.mark.parametrize(("name", "variant", "tolerance"), FOLDERS)
def test_read_and_run(peer_folder, peer_ids, stream, name, variant, tolerance):
    folder, decoded, logits = peer_folder(name, variant)
    checkpoint = open_checkpoint(folder)
    assert decoded
    for key, value in decoded.items():
        weight = key if key.endswith(".weight") else f"{key}.weight"
        if name == "mxfp4":  # transformers holds the matrices [in, out] of all experts in one parameter
            found = torch.stack([checkpoint.dense(f"{key}.{expert}.weight").T for expert in range(len(value))])
            assert torch.equal(found.float(), value)
            continue
        if name == "fp8":
            torch.testing.assert_close(checkpoint.dense(weight).float(), value, rtol=1e-6, atol=1e-8)
            continue
        torch.testing.assert_close(numerics.dequantize(checkpoint.quantized[weight].load()), value, rtol=1e-6, atol=1e-8)
    found = stream(folder, [Batch(peer_ids)])[0].view_as(logits)  # weights of float16 checkpoints are rounded to float16 here, and not there
    torch.testing.assert_close(found, logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "variant", "unit"), WRITERS)
def test_writers_folders(peer_folder, peer_ids, stream, name, variant, unit):
    """Weights bit for bit, but for int8 of bitsandbytes; logits within 1e-5 of the largest, streamed and as lowbit.load gives them, rounded inputs of w8a8 and fp8 included."""
    folder, decoded, logits = peer_folder(name, variant)
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.quantized) == 14 and len(decoded) == 3
    for weight, value in decoded.items():
        torch.testing.assert_close(numerics.dequantize(checkpoint.quantized[weight].load()), value, rtol=unit, atol=0)
    close = lambda found: float((found - logits).abs().max()) <= 1e-5 * float(logits.abs().max())
    assert close(stream(folder, [Batch(peer_ids)], activations=variant != "int8")[0].view_as(logits))
    if variant != "int8":
        with torch.no_grad():
            assert close(lowbit.load(folder, dtype="float32")(peer_ids).logits)


def test_rounded_inputs_of_llm_int8(peer_folder, peer_ids, stream):
    """A code that rounds the other way in one layer moves others in the next: of what rounding does to the logits, half is found again (0.51 measured; 1.08 where inputs are not float16 first)."""
    folder, _, plain = peer_folder("bitsandbytes_folder", "int8")
    rounded = load_file(Path(__file__).parents[1] / "oracles" / "bitsandbytes_folder.safetensors")["int8.rounded"]
    found = stream(folder, [Batch(peer_ids)])[0].view_as(rounded)
    assert float((found - rounded).norm()) < 0.75 * float((plain - rounded).norm())


@pytest.mark.parametrize(("name", "variant", "unit"), WRITERS)
def test_writers_folders_written_back(peer_folder, tmp_path, name, variant, unit):
    """All tensors bit for bit, with two exceptions: zero-points of asymmetric GPTQ are written as v2, and SCB of int8 is 127 times a quotient by 127."""
    folder, _, _ = peer_folder(name, variant)
    checkpoint = open_checkpoint(folder)
    TARGETS[checkpoint.kind].write(checkpoint, tmp_path)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    different = {key for key in theirs if theirs[key].dtype != ours[key].dtype or not torch.equal(theirs[key], ours[key])}
    for key in [key for key in different if key.endswith(".SCB")]:
        torch.testing.assert_close(ours[key], theirs[key], rtol=unit, atol=0)
        different.remove(key)
    assert different == ({f"{key.removesuffix('.weight')}.qzeros" for key in checkpoint.quantized} if variant == "asym" else set())
    sections = [json.loads((where / "config.json").read_text())["quantization_config"] for where in (folder, tmp_path)]
    changed = {key for key, value in sections[0].items() if sections[1].get(key) != value}
    assert changed == OTHERWISE[name] | ({"checkpoint_format", "format"} if variant == "asym" else set())
    again = open_checkpoint(tmp_path)
    assert all(again.quantized[key].scheme == entry.scheme for key, entry in checkpoint.quantized.items()) and again.activations == checkpoint.activations


@pytest.mark.parametrize(("name", "variant"), [("hqq_folder", "mixed"), ("bitnet", "auto"), ("aqlm_folder", "2x8")])
def test_written_back_as_it_was(peer_folder, tmp_path, name, variant):
    """All tensors bit for bit, and the keys of quantization_config."""
    folder, _, _ = peer_folder(name, variant)
    checkpoint = open_checkpoint(folder)
    TARGETS[checkpoint.kind].write(checkpoint, tmp_path)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    different = [key for key in theirs if theirs[key].dtype != ours[key].dtype or not torch.equal(theirs[key], ours[key])]
    assert all(key.endswith(".round_zero") for key in different)  # hqq's note of an option that has no part in decoding
    sections = [json.loads((where / "config.json").read_text()).get("quantization_config", {}) for where in (folder, tmp_path)]
    assert sections[0].keys() <= sections[1].keys()


@pytest.mark.parametrize(
    ("name", "variant", "recipe"), [("fp8", "blocks", "int4-sym-g32-gptq"), ("fp8", "tensor", "q4_0-rtn"), ("mxfp4", "gpt-oss", "int4-sym-g32-gptq"), ("mxfp4", "gpt-oss", "nvfp4-rtn")]
)
def test_published_models_are_quantized(peer_folder, peer_ids, tmp_path, stream, text_file, name, variant, recipe):
    """To lowbit's own layout, which is read and run, and to dense weights, which transformers loads and computes the same with."""
    source, _, _ = peer_folder(name, variant)
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))  # a token for each byte: these models know 256
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    run = lambda kind: lowbit.quantize(source, recipe, tmp_path / kind, target_name=kind, calibration=text_file, n_samples=8, seq_len=32, dtype="float32")
    layers = run("lowbit").layers
    run("safetensors")
    assert any("experts" in layer for layer in layers) == (name == "mxfp4")
    logits = stream(tmp_path / "lowbit", [Batch(peer_ids)])[0].view(1, peer_ids.numel(), -1)
    with torch.no_grad():
        torch.testing.assert_close(lowbit.load(tmp_path / "lowbit", dtype="float32")(peer_ids).logits, logits, rtol=1e-4, atol=1e-4)
        dense, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "safetensors", dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(dense(peer_ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_stacked_experts_come_back_as_they_were(peer_folder, tmp_path):
    """A dense gpt-oss has all experts in one tensor; what lowbit writes dense has them so, too."""
    folder, decoded, _ = peer_folder("mxfp4", "gpt-oss")
    first = convert(folder, "safetensors", tmp_path / "first").path
    again = convert(first, "safetensors", tmp_path / "again").path
    tensors = load_file(again / "model.safetensors")
    for key, value in decoded.items():
        assert torch.equal(tensors[key].float(), value)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "variant", "change", "message"),
    [
        ("fp8", "blocks", lambda t, c: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "has no weight_scale_inv"),
        ("fp8", "blocks", lambda t, c: c.update(weight_block_size=[0, 1]), "weight_block_size"), ("fp8", "blocks", lambda t, c: c.update(weight_block_size=[64, 64]), "needs float32"),
        ("fp8", "blocks", lambda t, c: t.update({"x.weight_scale_inv": torch.ones(1)}), "belongs to no weight"),
        ("mxfp4", "gpt-oss", lambda t, c: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "missing"),
        ("mxfp4", "gpt-oss", lambda t, c: t.update({"x_scales": torch.ones(1)}), "belongs to no blocks"),
        ("mxfp4", "gpt-oss", lambda t, c: t["model.layers.0.mlp.experts.down_proj_scales"].fill_(255), "is NaN in E8M0"),
        ("torchao", "weights", lambda t, c: t.pop("model.layers.0.self_attn.q_proj._weight_scale"), "is missing"),
        ("torchao", "weights", lambda t, c: t["model.layers.0.self_attn.q_proj._weight_qdata"].fill_(100), "outside of 4 bits"), ("torchao", "activations", lambda t, c: None, "rounded inputs"),
        ("hqq_folder", "mixed", lambda t, c: t.pop("model.layers.0.self_attn.q_proj.zero"), "has no zero"),
        ("hqq_folder", "mixed", lambda t, c: t["model.layers.0.self_attn.q_proj.axis"].fill_(7), "axis 7"),
        ("hqq_folder", "mixed", lambda t, c: t["model.layers.0.self_attn.q_proj.shape"].fill_(-3), "expected [N, K]"),
        ("hqq_folder", "mixed", lambda t, c: t["model.layers.0.self_attn.q_proj.scale"].fill_(float("nan")), "NaN"),
        ("aqlm_folder", "2x8", lambda t, c: c.update(num_codebooks=3), "needs torch.int8"), ("aqlm_folder", "2x8", lambda t, c: c.update(out_group_size=2), "groups of 1 x 8"),
        ("bitnet", "auto", lambda t, c: t["model.layers.0.self_attn.q_proj.weight"].fill_(255), "code is 3"),
        ("bitnet", "auto", lambda t, c: t.pop("model.layers.0.self_attn.q_proj.weight_scale"), "has no weight_scale"),
        ("bitnet", "bitlinear", lambda t, c: t["model.layers.0.self_attn.q_proj.weight_scale"].fill_(0), "damaged"), ("bitnet", "auto", lambda t, c: c.update(use_rms_norm=True), "use_rms_norm"),
    ],
)  # fmt: skip
def test_damaged(peer_folder, name, variant, change, message):
    folder, _, _ = peer_folder(name, variant)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config.get("quantization_config", {}))
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as found:
        checkpoint = open_checkpoint(folder)
        for weight in checkpoint.shapes():
            checkpoint.dense(weight)
    assert message in str(found.value)
