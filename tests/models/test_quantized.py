"""Whole models from lowbit.load compute what the checkpoint says: buffers of the file, rounded inputs of dense weights."""

import pytest
import torch
import transformers

import lowbit
from lowbit import numerics
from lowbit.models.quantized import QuantLinear
from lowbit.numerics import activations
from lowbit.pipeline import recipes
from lowbit.stats import LayerStats

IDS = torch.arange(16).unsqueeze(0) * 7 % 256
DEEPSEEK = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def test_buffers_that_the_file_holds_are_taken_from_it(tmp_path, load_plain):
    """DeepSeek's routers add a correction that is a buffer; without it other experts are chosen."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**DEEPSEEK))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(lowbit.load(tmp_path / "model", dtype="float32")(IDS).logits, load_plain(tmp_path / "model")(IDS).logits, rtol=1e-5, atol=1e-5)


def test_dense_weights_read_their_inputs_rounded(model_folder, tmp_path, load_plain):
    """The same job as packed codes and as dense weights on their grid: what is measured is what runs."""
    for target in ("safetensors", "compressed-tensors"):
        lowbit.quantize(model_folder("llama"), "int8-sym-channel-rtn-a8", tmp_path / target, target_name=target)
    with torch.no_grad():
        dense, packed = (lowbit.load(tmp_path / target, dtype="float32")(IDS).logits for target in ("safetensors", "compressed-tensors"))
        assert float((load_plain(tmp_path / "safetensors")(IDS).logits - packed).abs().max()) > 0.01
    torch.testing.assert_close(dense, packed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["nf4-dq", "int4-asym-g32-rtn", "q4_0", "int8-sym-channel-rtn-a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_decodes_again(recipe, dtype):
    """Nothing of the weight's size is kept for the backward pass; gradients, and the forward pass bit for bit, are those of a dense layer."""
    torch.manual_seed(0)
    scheme = recipes.parse(recipe).recipe.scheme
    rounding = None if scheme.act is None else activations.settle(scheme.act, LayerStats())
    bias = torch.randn(96)
    layer = QuantLinear(numerics.quantize(torch.randn(96, 64), scheme), bias.to(dtype), rounding)
    x = torch.randn(2, 5, 64, dtype=dtype)
    inputs, kept = [x.clone().requires_grad_(), x.clone().requires_grad_()], []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        made = layer(inputs[0])
    assert max(kept, default=0) <= x.numel()
    rounded = inputs[1] if rounding is None else activations.fake_quantize(inputs[1], rounding)
    dense = torch.nn.functional.linear(rounded, layer.weight.to(dtype), layer.bias)
    assert torch.equal(made, dense)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.product(x if rounding is None else activations.fake_quantize(x, rounding)))
    upstream = torch.randn_like(made)
    made.backward(upstream)
    dense.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_backward_under_autocast():
    torch.manual_seed(0)
    layer = QuantLinear(numerics.quantize(torch.randn(96, 64), recipes.parse("nf4-dq").recipe.scheme), torch.randn(96))
    x = torch.randn(5, 64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        made, dense = layer(inputs[0]), torch.nn.functional.linear(inputs[1], layer.weight, layer.bias)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, dense)
    upstream = torch.randn_like(made)
    made.backward(upstream)
    dense.backward(upstream)
    assert inputs[0].grad.dtype == torch.float32
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_bias_can_be_trained():
    layer = QuantLinear(numerics.quantize(torch.randn(96, 64), recipes.parse("nf4-dq").recipe.scheme), torch.randn(96))
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 5, 64)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((96,), 10.0))
