"""Attention of csrc/bf16.cpp against float64, and no worse than torch's own in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from lowbit.kernels import native
from lowbit.kernels.attention import attend, can_attend
from lowbit.models.attention import NAME, use_native

pytestmark = pytest.mark.skipif(native() is None or not native().attention_supported(), reason="needs the extension and a processor with AVX-512 BF16")
# batch, heads, heads of keys, queries, keys, dim, causal
SHAPES = (
    (2, 3, 3, 512, 512, 64, True),
    (1, 2, 2, 77, 77, 96, True),
    (2, 4, 2, 130, 130, 128, True),
    (1, 2, 1, 49, 200, 32, False),
    (1, 1, 1, 333, 333, 256, True),
    (1, 2, 2, 1, 65, 64, False),
    (1, 6, 2, 63, 63, 64, True),
)


def made(batch, heads, kv_heads, queries, keys, dim, contiguous=False, sharp=1.0):
    generator = torch.Generator().manual_seed(queries + dim)
    draw = lambda heads, length: torch.randn(batch, length, heads, dim, generator=generator).bfloat16().transpose(1, 2)
    q, k, v, g = draw(heads, queries) * sharp, draw(kv_heads, keys), draw(kv_heads, keys), draw(heads, queries)
    return [x.contiguous() for x in (q, k, v, g)] if contiguous else [q, k, v, g]


def gradients(function, q, k, v, g, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(g.to(dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def off(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("contiguous", (False, True))
@pytest.mark.parametrize("sharp", (1.0, 8.0))
def test_outputs_and_gradients(shape, contiguous, sharp):
    *sizes, causal = shape
    q, k, v, g = made(*sizes, contiguous=contiguous, sharp=sharp)
    assert can_attend(q, k, v, causal)
    torchs = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, scale=0.1)
    exact = gradients(torchs, q, k, v, g, torch.float64)
    peer = gradients(torchs, q, k, v, g, torch.bfloat16)
    ours = gradients(lambda q, k, v: attend(q, k, v, 0.1, causal), q, k, v, g, torch.bfloat16)
    for name, mine, theirs, reference in zip(("out", "q", "k", "v"), ours, peer, exact, strict=True):
        assert mine.shape == reference.shape
        assert off(mine, reference) <= 1.1 * off(theirs, reference) + 1e-3, name
        assert off(mine, reference) < 0.01, name


def test_same_bytes_with_any_number_of_threads():
    q, k, v, g = made(1, 4, 4, 200, 200, 64)
    before, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(gradients(lambda q, k, v: attend(q, k, v, 0.1, True), q, k, v, g, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("which", (0, 1, 2))
def test_nan_is_not_swallowed(which):
    """A NaN in a query, key or value reaches every output of its head that reads it, and the gradients; of the others that multiply it with 0 only those that a plain product spoils, too."""
    tensors = made(1, 2, 2, 100, 100, 64)
    tensors[which][0, 1, 50, 3] = float("nan")
    out, *rest = gradients(lambda q, k, v: attend(q, k, v, 0.1, True), *tensors, torch.bfloat16)
    hit = out.isnan().any(-1)
    assert not hit[0, 0].any() and (which == 2 or not hit[0, 1, :50].any())  # 0 times a NaN among the values is NaN
    assert hit[0, 1, 50] and (which == 0 or bool(hit[0, 1, 50:].all()))
    assert any(bool(each[0, 1].isnan().any()) for each in rest) and not any(bool(each[0, 0].isnan().any()) for each in rest)


def test_what_it_does_not_take():
    q, k, v, _ = made(1, 2, 2, 32, 32, 64)
    assert not can_attend(q.float(), k.float(), v.float(), True)
    assert not can_attend(q[..., :48], k[..., :48], v[..., :48], True)
    assert not can_attend(q[:, :, :31], k, v, True)  # causal, but fewer queries than keys
    with pytest.raises(ValueError, match="as many queries as keys"):
        attend(q[:, :, :31], k, v, 0.1, True)
    with pytest.raises(ValueError, match="another shape"):
        attend(q, k, v[:, :, :31], 0.1, False)


@pytest.mark.parametrize("padded", (False, True))
def test_a_model_through_it(padded, monkeypatch):
    """Logits and gradients of a Llama in bfloat16 as with sdpa, which is taken where there is a mask."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    ids, mask = torch.randint(64, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    if padded:
        mask[1, 30:] = 0
    called = []
    monkeypatch.setattr("lowbit.models.attention.attend", lambda *given: called.append(0) or attend(*given))

    def run():
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=ids)
        output.loss.backward()
        return output.logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    logits, gradient = run()
    use_native(model)
    assert model.config._attn_implementation == NAME
    ours, our_gradient = run()
    assert len(called) == (0 if padded else 2)
    assert off(ours, logits.double()) < 0.01
    assert off(our_gradient, gradient.double()) < 0.02
