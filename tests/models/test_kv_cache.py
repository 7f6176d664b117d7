"""The quantized cache in transformers' own generate(), and in the streamed evaluation."""

import pytest
import torch

from lowbit.errors import RecipeError
from lowbit.models.kv_cache import KVScheme, QuantizedKVLayer, encode, kv_cache


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_rounded_between_their_ends(bits):
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)) + 7
    decoded = encode(x, bits).decode(bits, torch.float32)
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert ((decoded - x).abs().amax(-1) <= 0.51 * step + 0.01).all()
    assert encode(torch.ones(2, 3, 8), bits).decode(bits, torch.float32).tolist() == torch.ones(2, 3, 8).tolist()


def test_keys_wait_until_a_stretch_is_full_and_bytes_are_fewer():
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedKVLayer(KVScheme(bits=4, stretch=16))
    keys, values = torch.randn(2, 3, 40, 32, generator=generator), torch.randn(2, 3, 40, 32, generator=generator)
    layer.update(keys[:, :, :10], values[:, :, :10])
    assert torch.equal(layer.keys, keys[:, :, :10]) and layer.old_keys is None
    for start in (10, 11, 20):
        stop = {10: 11, 11: 20, 20: 40}[start]
        got = layer.update(keys[:, :, start:stop], values[:, :, start:stop])
    assert got[0].shape == keys.shape and got[1].shape == values.shape and layer.get_seq_length() == 40
    assert torch.equal(got[0][:, :, 32:], keys[:, :, 32:])
    assert float((got[0] - keys).abs().mean()) < 0.12 and float((got[1] - values).abs().mean()) < 0.12
    assert layer.nbytes < 0.45 * (keys.nbytes + values.nbytes)
    layer.reorder_cache(torch.tensor([1, 0]))
    again = layer.update(keys[:, :, :0], values[:, :, :0])
    assert torch.equal(again[0], got[0].flip(0)) and torch.equal(again[1], got[1].flip(0))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mistral", "gpt2", "mixtral"])
def test_generation(kind, model_folder, load_plain):
    """8 bits continue as no rounding does; what it takes to get there is a cache of our own in transformers' generate."""
    model = load_plain(model_folder(kind))
    ids = torch.randint(3, 280, (2, 30), generator=torch.Generator().manual_seed(3))
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    errors = []
    for bits in (8, 4, 2):
        cache = kv_cache(model.config, KVScheme(bits=bits, stretch=8))
        made = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True, past_key_values=cache)
        errors.append(float((made.logits[1] - plain.logits[1]).abs().mean()))
        if bits == 8:
            assert (made.sequences == plain.sequences).float().mean() > 0.8
    assert 0 < errors[0] < errors[1] < errors[2] or kind in ("gemma3", "mistral")  # most of their layers have windows, which stay
    beams = model.generate(ids[:1], max_new_tokens=6, num_beams=2, do_sample=False, pad_token_id=0, past_key_values=kv_cache(model.config, KVScheme()))
    assert beams.shape == (1, 36)


def test_bad_schemes():
    with pytest.raises(RecipeError, match="bits is 1"):
        KVScheme(bits=1)
    with pytest.raises(RecipeError, match="groups of 24 do not divide heads of 32"):
        QuantizedKVLayer(KVScheme(group=24)).update(torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 2, 32))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_evaluation_with_a_quantized_cache(kind, model_folder, text_file):
    """KL against the same model grows as bits fall; 8 bits cost next to nothing."""
    from lowbit.pipeline.evaluate import compare

    kl = []
    for bits in (8, 4, 2):
        table = compare([model_folder(kind)], against=model_folder(kind), text=text_file, ctx=64, n_windows=4, noise_floor=False, kv_bits=bits)
        assert table.rows[1].name.endswith(f" kv{bits}")
        kl.append(table.rows[1].summaries["full"].kl_mean.value)
    assert 0 < kl[0] < 1e-3 and kl[0] < kl[1] < kl[2]
