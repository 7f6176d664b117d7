"""The oracles that hold whole folders of other packages: the package that wrote one reads the folder made from it again, and computes the logits that are kept with it."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

PLAIN = [("bitnet", "bitlinear"), ("bitnet", "auto"), ("fp8", "blocks"), ("fp8", "tensor"), ("mxfp4", "gpt-oss")]  # transformers alone reads these
OTHERS = [
    ("aqlm_folder", "2x8", "aqlm"), ("torchao", "weights", "torchao"), ("torchao", "activations", "torchao"), ("llmcompressor", "w4a16", "compressed_tensors"),
    ("llmcompressor", "w8a8", "compressed_tensors"), ("llmcompressor", "fp8", "compressed_tensors"), ("bitsandbytes_folder", "nf4-dq", "bitsandbytes"),
    ("bitsandbytes_folder", "fp4", "bitsandbytes"), ("bitsandbytes_folder", "int8", "bitsandbytes"),
]  # fmt: skip  # of llmcompressor not w4a16-asym, whose packed zero-points transformers 5.23 does not expect


def check(peer_folder, peer_ids, name, variant):
    folder, decoded, logits = peer_folder(name, variant)
    torch.compiler.set_stance("force_eager")  # transformers compiles its BitNet layers
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").train(name == "bitsandbytes_folder")
        with torch.no_grad():
            found = model(peer_ids).logits
    finally:
        torch.compiler.set_stance("default")
    assert decoded and float(logits.std()) > 0.1
    assert float((found - logits).abs().max()) < 1e-5


@pytest.mark.consumer
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "variant"), PLAIN)
def test_transformers_reads_it_again(peer_folder, peer_ids, name, variant):
    pytest.importorskip("accelerate", reason="transformers asks for accelerate here")
    check(peer_folder, peer_ids, name, variant)


@pytest.mark.consumer
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "variant", "package"), OTHERS)
def test_transformers_reads_it_again_with_the_package(peer_folder, peer_ids, monkeypatch, name, variant, package):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")  # aqlm's CPU kernel adds to one vector from several threads
    pytest.importorskip(package, reason=f"needs {package}")
    check(peer_folder, peer_ids, name, variant)


@pytest.mark.consumer
@pytest.mark.filterwarnings("default")
def test_hqq_reads_it_again(peer_folder, peer_ids):
    """hqq's loader takes a pickle; the tensors of the folder go into it as they are."""
    base = pytest.importorskip("hqq.models.hf.base", reason="needs hqq")
    folder, decoded, logits = peer_folder("hqq_folder", "mixed")
    modules: dict = {}
    for name, value in load_file(folder / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = value

    class FromSafetensors(base.AutoHQQHFModel):
        get_weight_file = classmethod(lambda cls, folder: f"{folder}/model.safetensors")
        load_weights = classmethod(lambda cls, folder, map_location=None: modules)

    model = FromSafetensors.from_quantized(folder, compute_dtype=torch.float32, device="cpu")
    for name, weight in decoded.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).dequantize(), weight)
    with torch.no_grad():
        assert float((model(peer_ids).logits - logits).abs().max()) < 1e-5


@pytest.mark.consumer
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", ["sym", "act-order", "asym"])
def test_gptqmodel_reads_it_again(peer_folder, peer_ids, monkeypatch, variant):
    """Through transformers with optimum: GPTQModel's own loader asks for a tokenizer."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # it asks for two, and by itself gives one on two cores
    pytest.importorskip("gptqmodel", reason="needs gptqmodel")
    pytest.importorskip("optimum", reason="needs optimum")
    folder, decoded, logits = peer_folder("gptqmodel_folder", variant)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu").eval()
    torch.nn.Module.float(model)  # transformers refuses it of quantized models
    for name, weight in decoded.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).dequantize_weight().T, weight)
    with torch.no_grad():
        assert float((model(peer_ids).logits - logits).abs().max()) < 1e-5
