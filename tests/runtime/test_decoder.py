"""The native decoder against transformers: logits and greedy text of every family, dense and quantized; long prompts, kept prefixes, windows."""

import pytest
import torch
import transformers

import lowbit
from lowbit import kernels
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import ModelError, RecipeError
from lowbit.models import skeleton as sk
from lowbit.models.quantized import PackedLinear, QuantLinear
from lowbit.runtime import Sampling, generate, open_model, why_not_native
from lowbit.runtime.decoder import forward_many, open_native

pytestmark = pytest.mark.skipif(kernels.native() is None, reason=f"no native extension: {kernels.why_not()}")
IDS = torch.randint(5, 90, (1, 48), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
OTHERS = {
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0, 1], "no_rope_layer_interval": 3}),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2}),
    "llama3": ("LlamaConfig", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "wide": ("LlamaConfig", {"head_dim": 32}),
    "bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def other_folder(tokenizer_folder, tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            kind, values = OTHERS[name]
            kept = {key: value for key, value in SMALL.items() if key != "head_dim" or name.startswith("gemma")}
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**kept, "pad_token_id": 0, **values}))
            for parameter in model.parameters():
                parameter.data += torch.randn_like(parameter) * 0.1
            made[name] = tmp_path_factory.mktemp("other") / name
            model.save_pretrained(made[name])
            for file in tokenizer_folder.iterdir():
                (made[name] / file.name).write_bytes(file.read_bytes())
        return made[name]

    return folder


def native_model(path, context=512, **more):
    return open_native(sk.build(open_checkpoint(path)), context=context, **more)


def reference_logits(path, ids=IDS):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma3", "phi3", *OTHERS])
def test_every_family_gives_transformers_logits(name, model_folder, other_folder):
    """Float32 weights; keys and values are float16 here, which is what differs. In one go, token by token, and in every instruction set."""
    path = other_folder(name) if name in OTHERS else model_folder(name)
    goal = reference_logits(path)
    for isa in kernels.instruction_sets():
        model = native_model(path, isa=isa)
        whole = model.forward(IDS[0].tolist(), 0, every=True)
        assert (whole - goal).abs().max() < 2e-3 * goal.abs().max()
        single = torch.cat([model.forward([token], at) for at, token in enumerate(IDS[0].tolist())])
        assert (single - goal).abs().max() < 2e-3 * goal.abs().max()
        assert torch.equal(model.forward(IDS[0, 40:].tolist(), 40), model.forward(IDS[0, 40:].tolist(), 40))  # what the cache holds from there on is replaced


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_same_logits_with_any_number_of_threads(model_folder, isa):
    """One thread, two and five (more than this model has heads of keys) give the same bits, for a prompt and for single tokens after it."""
    found = []
    for threads in (1, 2, 5):
        model = native_model(model_folder("llama"), threads=threads, isa=isa)
        found.append(torch.cat([model.forward(IDS[0, :40].tolist(), 0, every=True), *(model.forward([int(IDS[0, at])], at) for at in range(40, 48))]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_texts_of_several_slots_in_one_pass(model_folder, other_folder, name, isa):
    """One token each of three texts of different lengths gives what they give one by one, and leaves the same caches."""
    path = (other_folder if name in OTHERS else model_folder)(name)
    texts = [IDS[0, :30].tolist(), IDS[0, 5:12].tolist(), IDS[0, 20:].tolist()]
    one = native_model(path, isa=isa)
    slots = [one, one.another(1), one.another(7)]
    for slot, text in zip(slots, texts, strict=True):
        slot.forward(text[:-3], 0)
    for left in (3, 2, 1):
        found = forward_many(slots, [text[-left] for text in texts], [len(text) - left for text in texts])
    for text, logits in zip(texts, found, strict=True):
        alone = native_model(path, isa=isa).forward(text, 0)[0]
        assert (logits - alone).abs().max() < 1e-3 * alone.abs().max()
    with pytest.raises(ValueError, match="different"):
        forward_many([one, one], [1, 2], [3, 4])


def test_prompts_of_several_chunks(model_folder):
    ids = torch.randint(5, 90, (1, 300), generator=torch.Generator().manual_seed(1))
    model = native_model(model_folder("llama"))
    goal = reference_logits(model_folder("llama"), ids)
    assert (model.forward(ids[0].tolist(), 0, every=True) - goal).abs().max() < 2e-3 * goal.abs().max()
    assert (model.forward(ids[0].tolist(), 0)[0] - goal[-1]).abs().max() < 2e-3 * goal.abs().max()


@pytest.mark.parametrize(
    ("recipe", "target"), [("int4-asym-g32-rtn", "compressed-tensors"), ("int8-sym-channel-rtn", "compressed-tensors"), ("nf4", "bitsandbytes"), ("q4_0", "gguf"), ("int2-asym-g16-rtn", "lowbit")]
)
def test_quantized_models_differ_by_rounded_inputs_alone(model_folder, tmp_path, load_plain, recipe, target):
    """Against the decoded weights in float32: what 8 bits for each block of inputs leave."""
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    lowbit.quantize(model_folder("llama"), recipe, out, target_name=target)
    model = native_model(out)
    with torch.no_grad():
        goal = lowbit.load(out, dtype="float32")(input_ids=IDS).logits[0]
    found = model.forward(IDS[0].tolist(), 0, every=True)
    assert (found - goal).norm() < 0.03 * goal.norm()
    assert model.nbytes < 4 * sum(p.numel() for p in load_plain(model_folder("llama")).parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_greedy_text_is_that_of_transformers(model_folder, name):
    """Token for token; also where the second text shares its beginning with the first, whose keys and values are kept."""
    engines = [open_model(model_folder(name), native=chosen, context=128) for chosen in (True, False)]
    assert [engine.reason == "" for engine in engines] == [True, False]
    for prompt in (IDS[0, :20].tolist(), IDS[0, :12].tolist() + [7, 8, 9], IDS[0, :12].tolist() + [7, 8, 9]):
        made = []
        for engine in engines:
            engine.stops = frozenset()
            *_, (_, text) = generate(engine, prompt, sampling=Sampling(temperature=0), max_tokens=24)
            made.append(text.tokens)
        assert made[0] == made[1] and len(made[0]) == 24


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.15)])
def test_rounded_keys_and_values(other_folder, bits, most):
    """A quarter to a half of the memory; logits near those of float16, in every instruction set the same within its sums."""
    path = other_folder("wide")
    goal = native_model(path).forward(IDS[0].tolist(), 0, every=True)
    found = [native_model(path, cache_bits=bits, isa=isa).forward(IDS[0].tolist(), 0, every=True) for isa in kernels.instruction_sets()]
    assert 0 < (found[0] - goal).norm() < most * goal.norm()
    assert all((one - found[0]).abs().max() < 0.02 * goal.abs().max() for one in found[1:])
    plain, rounded = native_model(path).decoder.cache_bytes, native_model(path, cache_bits=bits).decoder.cache_bytes
    assert rounded == plain * (bits + 1) / 16


def test_rounded_caches_where_they_cannot_be(model_folder):
    with pytest.raises(RecipeError, match="expected one of fp16, int8, int4"):
        open_model(model_folder("llama"), kv_cache="fp8")
    with pytest.raises(ModelError, match="no multiple of 32"):
        open_model(model_folder("llama"), kv_cache="int8")
    engine = open_model(model_folder("gpt2"), context=64, kv_cache="int8")
    engine.stops = frozenset()
    *_, (_, text) = generate(engine, IDS[0, :9].tolist(), sampling=Sampling(temperature=0), max_tokens=8)
    assert len(text.tokens) == 8


def test_other_architectures_run_through_transformers(model_folder):
    engine = open_model(model_folder("gpt2"), context=64)
    assert "gpt2 is not among" in engine.reason
    engine.stops = frozenset()
    *_, (_, text) = generate(engine, IDS[0, :9].tolist(), sampling=Sampling(temperature=0), max_tokens=8)
    again = generate(engine, IDS[0, :9].tolist() + text.tokens[:3], sampling=Sampling(temperature=0), max_tokens=5)
    assert [made.tokens for _, made in again][-1] == text.tokens[3:]
    with pytest.raises(ModelError, match="cannot run in the native decoder: gpt2"):
        open_model(model_folder("gpt2"), native=True)


@pytest.mark.parametrize(("name", "recipe"), [("gpt2", "int4-asym-g32-rtn"), ("opt", "q8_0"), ("mixtral", "nf4-g32-rtn")])
def test_other_architectures_multiply_with_the_kernels(model_folder, tmp_path, name, recipe):
    """Their quantized layers are packed; what they compute differs by the rounding of inputs alone."""
    lowbit.quantize(model_folder(name), recipe, tmp_path / "out", target_name="lowbit")
    exact, packed = lowbit.load(tmp_path / "out", dtype="float32"), lowbit.load(tmp_path / "out", dtype="float32", kernels=True)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) >= 8 and not any(isinstance(module, QuantLinear) for module in packed.modules())
    goal, found = exact(IDS).logits, packed(IDS).logits
    assert float((found - goal).norm() / goal.norm()) < 0.03
    engine = open_model(tmp_path / "out", context=64)
    assert engine.reason and sum(isinstance(module, PackedLinear) for module in engine.model.model.modules()) == len(layers)
    exactly = open_model(tmp_path / "out", context=64, native=False)
    assert not any(isinstance(module, PackedLinear) for module in exactly.model.model.modules())


def test_what_is_refused(model_folder):
    model = native_model(model_folder("llama"), context=32)
    for tokens, start in (([5] * 33, 0), ([5], 32), ([5], -1), ([10**6], 0), ([], 0)):
        with pytest.raises(ValueError):
            model.forward(tokens, start)
    engine = open_model(model_folder("llama"), context=32)
    with pytest.raises(RecipeError, match="the context is 32"):
        next(generate(engine, [5] * 32))
    with pytest.raises(RecipeError, match="empty"):
        next(generate(engine, []))
    with pytest.raises(RecipeError, match="top_p 0"):
        Sampling(top_p=0)
    built = sk.build(open_checkpoint(model_folder("mixtral")))
    assert "mixtral" in why_not_native(built)
