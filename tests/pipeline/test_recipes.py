"""Recipes: every spelling that is meant, and a clear refusal of every other."""

import pytest

from lowbit.algorithms import ALGORITHMS
from lowbit.errors import LowbitError, RecipeError, ShapeError
from lowbit.pipeline import recipes
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme

LAYERS = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.layers.0.mlp.down_proj.weight": (64, 128)}
OUTSIDE = {"model.embed_tokens.weight": (320, 64)}
LLAMA = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}  # the mixtures look at it


def settled(text, *, target_name=None, linears=LAYERS, model_dtype="bfloat16") -> Recipe:
    recipe, _ = recipes.settle(recipes.parse(text, target_name=target_name), linears, model_dtype)
    return recipe


def resolved(text, *, target_name=None, linears=LAYERS, outside=OUTSIDE):
    return recipes.resolve(settled(text, target_name=target_name, linears=linears), linears, outside, LLAMA)


def toml(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- short forms


@pytest.mark.parametrize(
    ("text", "scheme", "algorithm"),
    [
        ("int4-sym-g64-gptq", Scheme(bits=4, block=(1, 64)), "gptq"),
        ("gptq-g64-int4-sym", Scheme(bits=4, block=(1, 64)), "gptq"),
        ("INT4-SYM-G64-GPTQ", Scheme(bits=4, block=(1, 64)), "gptq"),
        ("int3-asym-g32", Scheme(bits=3, block=(1, 32), symmetric=False), "gptq"),
        ("int8-channel", Scheme(bits=8, block=(1, -1)), "rtn"),
        ("int2-tensor-rtn", Scheme(bits=2, block=(-1, -1)), "rtn"),
        ("int8-sym-tensor-rtn-textbook", Scheme(bits=8, block=(-1, -1), range="textbook"), "rtn"),
        ("int5-full-g16-rtn", Scheme(bits=5, block=(1, 16), range="full"), "rtn"),
        ("bf16", Scheme(format="bfloat16", bits=16), "rtn"),
        ("float16", Scheme(format="float16", bits=16), "rtn"),
    ],
)
def test_short_form(text, scheme, algorithm):
    draft = recipes.parse(text)
    assert (draft.recipe.scheme, draft.recipe.algorithm, draft.recipe.name) == (scheme, algorithm, text)


@pytest.mark.parametrize("search", ["minmax", "percentile", "mse", "golden"])
def test_range_search_is_a_word(search):
    assert recipes.parse(f"int4-rtn-{search}").recipe.options == {"search": search}


@pytest.mark.parametrize("preset", recipes.PRESETS)
def test_presets_parse_and_resolve(preset):
    wide = dict.fromkeys(LAYERS, (512, 512))
    mixture = recipes.parse(preset).recipe.mixture
    plans = resolved(preset, linears=wide, target_name="gguf" if mixture else None)
    assert set(plans) == ({**wide, **OUTSIDE}.keys() if mixture else wide.keys())
    assert recipes.parse(preset).recipe.name == preset


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4-sym-g64-gtpq", ["'gtpq' is not known", "gptq", "rtn", "int2..int8", "q4_k", "minmax"]),
        ("int9", ["'int9' is not known", "int2..int8"]),
        ("int1-sym", ["'int1' is not known"]),
        ("int4-g0", ["'g0' is not known", "g64"]),
        ("int4-g", ["'g' is not known"]),
        ("int4-g-32", ["'g' is not known"]),
        ("int4--sym", ["'' is not known"]),
        ("", ["'' is not known"]),
        ("w4a17", ["'w4a17' is not known", "w4a16"]),
        ("q4_x", ["'q4_x' is not known", "q4_0"]),
        ("int4-sym-asym", ["'asym' contradicts", "symmetric"]),
        ("int4-int8", ["'int8' contradicts", "format"]),
        ("int4-q4_0", ["'q4_0' contradicts"]),
        ("int4-g64-channel", ["'channel' contradicts", "group"]),
        ("int4-g64-g128", ["'g128' contradicts"]),
        ("int4-gptq-rtn", ["'rtn' contradicts", "algorithm"]),
        ("int4-textbook-full", ["'full' contradicts", "range"]),
        ("int4-mse-golden", ["'golden' contradicts", "search"]),
        ("gptq-g64", ["names no number format", "int4", "q4_k", "float16"]),
        ("sym", ["names no number format"]),
        ("q4_0-g32", ["q4_0 fixes that itself; leave out gN, channel and tensor"]),
        ("q4_k-asym", ["q4_k fixes that itself; leave out sym and asym"]),
        ("bf16-sym", ["bfloat16 fixes that itself"]),
        ("q4_k-hqq", ["hqq makes int and not q4_k; use rtn"]),
        ("int4-rtn-guided", ["guided belongs to gptq"]),
        ("int4-dq", ["dq (double quantization) belongs to nf4 and fp4"]),
        ("mxfp4-g32", ["mxfp4 fixes that itself"]),
        ("float16-gptq", ["gptq makes int, q4_0", "and not float16"]),
        ("int4-asym-half", ["half", "symmetric"]),
        ("int4-asym-full", ["full", "symmetric"]),
        ("q4_0-full", ["q4_0 fixes that itself; leave out words for ranges"]),
        ("q4_k_m-q5_k_m", ["'q5_k_m' contradicts", "mixture"]),
        ("q4_k-q4_k_m", ["'q4_k_m' contradicts", "mixture"]),
        ("q4_k_m-pure", ["pure is one ggml type throughout; it goes with q4_0"]),
        ("int4-pure", ["pure is one ggml type throughout"]),
        ("int4-gptq-weighted", ["unknown key 'weighted'"]),
    ],
)
def test_refused_words(text, words):
    with pytest.raises(RecipeError) as caught:
        recipes.parse(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert repr(text) in str(caught.value) or " makes " in str(caught.value) or "options of" in str(caught.value)


@pytest.mark.parametrize(("text", "instead"), [("iq2_xxs", "q2_k"), ("iq3_s-gptq", "q3_k"), ("ggml_nvfp4", "ggml_mxfp4")])
def test_types_that_are_only_read_are_refused_with_what_fits(tmp_path, text, instead):
    message = rf"^{text.partition('-')[0]} is read from GGUF files and not made: .* Use {instead}, the nearest type that it makes\.$"
    with pytest.raises(RecipeError, match=message):
        recipes.parse(text, target_name="gguf")
    rule = toml(tmp_path, f'scheme = "q4_k"\n[[rules]]\nmatch = "*"\nscheme = "{text}"\n')
    with pytest.raises(RecipeError, match=message):
        recipes.parse(rule, target_name="gguf")


def test_a_preset_in_a_longer_form_is_explained():
    with pytest.raises(RecipeError, match="'w4a16' is not known"):
        recipes.parse("w4a16-asym")


# ---- what was left out


@pytest.mark.parametrize(("widths", "block"), [((256, 512), (1, 128)), ((64, 128), (1, 64)), ((96, 64), (1, 32)), ((100, 64), (1, -1))])
def test_default_group_divides_every_layer(widths, block):
    linears = {f"l{i}.weight": (8, width) for i, width in enumerate(widths)}
    recipe, notes = recipes.settle(recipes.parse("int4-sym"), linears, "float32")
    assert recipe.scheme.block == block
    assert len(notes) == 1 and recipe.scheme.name in notes[0]


def test_default_group_of_gguf_is_32_and_scales_are_float16():
    recipe = settled("int4-sym", target_name="gguf")
    assert (recipe.scheme.block, recipe.scheme.scale_dtype) == ((1, 32), "float16")


@pytest.mark.parametrize(
    ("text", "q_proj", "down_proj", "embedding", "algorithm", "options"),
    [
        ("q3_k_m", "q3_k", "q4_k", "q6_k", "rtn", {}),
        ("q3_k_m-gptq-guided", "q3_k", "q4_k", "q6_k", "gptq", {"guided": True}),
        ("q2_k", "q2_k", "q3_k", "q6_k", "rtn", {}),
        ("q2_k-pure-gptq", "q2_k", "q2_k", "q8_0", "gptq", {}),
        ("q4_0", "q4_0", "q4_0", "q6_k", "rtn", {}),
        ("q4_0-weighted", "q4_0", "q4_1", "q6_k", "rtn", {"weighted": True}),
        ("q4_0-pure-weighted", "q4_0", "q4_0", "q8_0", "rtn", {"weighted": True}),
        ("q4_k", "q4_k", "q4_k", "q8_0", "rtn", {}),
    ],
)
def test_mixtures_choose_types_and_pure_is_one_type(text, q_proj, down_proj, embedding, algorithm, options):
    """In the first of eight layers, of a tied model."""
    wide = dict.fromkeys((*LAYERS, *OUTSIDE), (512, 512))
    plans = resolved(text, target_name="gguf", linears={n: wide[n] for n in LAYERS}, outside={n: wide[n] for n in OUTSIDE})
    assert [plans[name].scheme.format for name in wide] == [q_proj, down_proj, embedding]
    assert [plans[name].algorithm for name in wide] == [algorithm, algorithm, "rtn"]
    assert settled(text, target_name="gguf").options == options


def test_rules_win_over_a_mixture_and_name_one_type(tmp_path):
    text = 'scheme = "q4_k_m"\ntarget = "gguf"\n[[rules]]\nmatch = "*.down_proj"\nscheme = "q5_0"\n[[rules]]\nmatch = "*.embed_tokens"\nscheme = "keep"\n'
    plans = resolved(toml(tmp_path, text))
    assert [one.scheme.format for one in plans.values()] == ["q5_0", "q5_0"]  # the first is q4_k that fell back
    assert plans["model.layers.0.self_attn.q_proj.weight"].notes
    with pytest.raises(RecipeError, match="q3_k_l is a mixture, which chooses a type for every weight of a model; expected one type, such as q3_k"):
        resolved(toml(tmp_path, text.replace('"q5_0"', '"q3_k_l"')))


def test_a_mixture_is_for_gguf_only():
    with pytest.raises(RecipeError, match="q4_k_m is a mixture of block types, which only a GGUF file holds. Write it with --to gguf"):
        settled("q4_k_m", target_name="compressed-tensors")
    assert settled("q4_k_m").target == "gguf"
    assert settled("q4_0", target_name="safetensors").mixture is None
    with pytest.raises(RecipeError, match="mixture 'q9_k' is not known; expected one of q2_k, "):
        recipes.resolve(Recipe("mine", Scheme(format="q4_k"), "rtn", mixture="q9_k", target="gguf"), LAYERS, OUTSIDE, LLAMA)


def test_scales_take_the_models_dtype():
    assert settled("int4-g32").scheme.scale_dtype == "bfloat16"


def test_none_is_the_targets_default():
    assert recipes.parse(None).recipe.name == "int4-sym-g64-gptq"
    assert recipes.parse(None, target_name="gguf").recipe.name == "int4-sym-g32-gptq"


def test_a_recipe_object_is_taken_as_it_is():
    mine = Recipe("mine", Scheme(bits=3, block=(1, 16), scale_dtype="float32"), algorithm="rtn")
    draft = recipes.parse(mine)
    assert recipes.settle(draft, LAYERS, "bfloat16")[0] == mine
    assert recipes.parse(mine, target_name="gguf").recipe.target == "gguf"


@pytest.mark.parametrize("target_name", ["onnx", "GGUF", ""])
def test_unknown_target(target_name):
    with pytest.raises(RecipeError, match=r"target '.*' is not known; expected one of compressed-tensors, gguf, gptq, awq, auto-round, bitsandbytes, hqq, aqlm, bitnet, torchao, lowbit, safetensors"):
        recipes.parse("int4-g32", target_name=target_name or "x")


# ---- shapes


def test_group_that_does_not_divide_is_refused_naming_what_fits():
    with pytest.raises(ShapeError, match=r"q_proj: .* 64 is not one of 128\.\nUse g64, g32, g16 or channel .*rule"):
        resolved("int4-sym-g128-rtn")


def test_dense_safetensors_hold_any_group():
    plans = resolved("int4-sym-g48-rtn", target_name="safetensors")
    assert {plan.scheme.group_size for plan in plans.values()} == {48}


def test_k_quants_fall_back_as_llama_quantize_does():
    plans = resolved("q4_k", target_name="gguf", linears={"a.weight": (64, 576), "b.weight": (64, 512)})
    assert plans["a.weight"].scheme.format == "q5_0"
    assert plans["a.weight"].notes == ("q4_k cannot hold rows of 576: q5_0 was used, as llama-quantize does",)
    assert plans["b.weight"].scheme.format == "q4_k" and not plans["b.weight"].notes


@pytest.mark.parametrize(("text", "other"), [("iq4_xs", "iq4_nl"), ("tq2_0", "q4_0"), ("tq1_0", "q4_0")])
def test_types_of_256_fall_back_as_llama_quantize_does(text, other):
    plans = resolved(f"{text}-pure", target_name="gguf", linears={"a.weight": (64, 576), "b.weight": (64, 512), "c.weight": (64, 545)})
    assert [plan.scheme.format for plan in plans.values()][:3] == [other, text, "float16"]


def test_ggml_types_belong_into_gguf():
    with pytest.raises(RecipeError, match="compressed-tensors cannot hold q4_0"):
        resolved("q4_0", target_name="compressed-tensors")


def test_embedding_of_a_gguf_is_q8_0_and_kept_elsewhere():
    assert resolved("int4-g32-rtn", target_name="gguf")["model.embed_tokens.weight"].scheme.format == "q8_0"
    assert "model.embed_tokens.weight" not in resolved("int4-g32-rtn")


def test_routers_are_kept():
    linears = {**LAYERS, "model.layers.0.mlp.gate.weight": (8, 64)}
    assert set(resolved("int4-g32-rtn", linears=linears)) == set(LAYERS)


# ---- TOML


FULL = """
scheme = "int4-asym-g32"
algorithm = "gptq"
scale_dtype = "float32"
true_sequential = true
target = "safetensors"

[options]
damp = 0.02
order = "activation"

[calibration]
source = "default"
n_samples = 8
seq_len = 64
pad = true

[[rules]]
match = "*.down_proj"
scheme = "int8-sym-g64-rtn"
options = { search = "mse" }

[[rules]]
match = "*.layers.0.*"
scheme = "keep"
"""


def test_toml_with_everything(tmp_path):
    recipe = settled(toml(tmp_path, FULL))
    assert recipe.name == "mine"
    assert recipe.scheme == Scheme(bits=4, block=(1, 32), symmetric=False, scale_dtype="float32")
    assert (recipe.algorithm, recipe.options, recipe.true_sequential, recipe.target) == ("gptq", {"damp": 0.02, "order": "activation"}, True, "safetensors")
    assert (recipe.calibration.n_samples, recipe.calibration.seq_len, recipe.calibration.pad) == (8, 64, True)
    plans = resolved(toml(tmp_path, FULL))
    assert set(plans) == {"model.layers.0.mlp.down_proj.weight"}  # the first rule that matches wins, the second keeps the rest
    plan = plans["model.layers.0.mlp.down_proj.weight"]
    assert (plan.scheme, plan.algorithm, plan.options.search) == (Scheme(bits=8, block=(1, 64), scale_dtype="float32"), "rtn", "mse")


def test_a_given_target_wins_over_the_files(tmp_path):
    assert settled(toml(tmp_path, FULL), target_name="compressed-tensors").target == "compressed-tensors"


def test_a_rule_takes_the_recipes_algorithm_and_group_when_it_names_none(tmp_path):
    plans = resolved(toml(tmp_path, 'scheme = "int4-g32-rtn-mse"\n[[rules]]\nmatch = "*q_proj"\nscheme = "int3-asym"\n'))
    q, down = plans["model.layers.0.self_attn.q_proj.weight"], plans["model.layers.0.mlp.down_proj.weight"]
    assert (q.algorithm, q.scheme.bits, q.scheme.symmetric, q.scheme.group_size, q.options.search) == ("rtn", 3, False, 32, "mse")
    assert (down.algorithm, down.scheme.bits) == ("rtn", 4)


def test_a_rule_without_a_group_takes_the_settled_one(tmp_path):
    plans = resolved(toml(tmp_path, 'scheme = "int4-sym-rtn"\n[[rules]]\nmatch = "*q_proj"\nscheme = "int8"\n'))
    assert {plan.scheme.group_size for plan in plans.values()} == {64}


def test_a_rule_whose_format_the_algorithm_cannot_make_is_rounded(tmp_path):
    plans = resolved(toml(tmp_path, 'scheme = "int4-sym-g32-gptq"\n[[rules]]\nmatch = "*q_proj"\nscheme = "bf16"\n'))
    assert plans["model.layers.0.self_attn.q_proj.weight"].algorithm == "rtn"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["scheme", "short form"]),
        ("scheme = 4", ["scheme", "short form", "4"]),
        ('scheme = "int4-gtpq"', ["'gtpq' is not known"]),
        ('scheme = "int4-g32"\nalgoritm = "rtn"', ["unknown key 'algoritm'", "algorithm", "calibration", "rules"]),
        ('scheme = "int4-g32"\nalgorithm = "awq"', ["algorithm 'awq' is not known", "rtn, gptq"]),
        ('scheme = "int4-g32"\nalgorithm = 7', ["algorithm", "7"]),
        ('scheme = "q4_0"\nalgorithm = "hqq"', ["hqq makes int and not q4_0"]),
        ('scheme = "int4-g32"\n[options]\ndampp = 1', ["options of gptq", "unknown key 'dampp'", "damp"]),
        ('scheme = "int4-g32"\n[options]\ndamp = 7.0', ["damp is 7.0", "0 to 1"]),
        ('scheme = "int4-g32"\n[options]\ndamp = "a lot"', ["damp"]),
        ('scheme = "int4-g32"\n[options]\norder = "random"', ["order is 'random'", "natural, activation, groups"]),
        ('scheme = "int4-g32"\n[options]\nsearch = "best"', ["'best' is not known", "minmax"]),
        ('scheme = "int4-g32"\noptions = 3', ["options"]),
        ('scheme = "int4-g32"\nscale_dtype = "fp8"', ["scale_dtype is 'fp8'", "float32, float16, bfloat16"]),
        ('scheme = "int4-g32"\ntarget = "onnx"', ["target 'onnx' is not known"]),
        ('scheme = "int4-g32"\ntrue_sequential = "yes"', ["true_sequential", "'yes'"]),
        ('scheme = "int4-g32"\nseed = 3', ["unknown key 'seed'"]),
        ('scheme = "int4-g32"\nname = "x"', ["name"]),
        ('scheme = "int4-g32"\ntransforms = ["awq"]', ["transforms: expected a table"]),
        ('scheme = "int4-g32"\nkv_cache = 8', ["kv_cache is reserved"]),
        ('scheme = "int4-g32"\n[calibration]\nsamples = 3', ["calibration", "unknown key 'samples'", "n_samples"]),
        ('scheme = "int4-g32"\n[calibration]\nn_samples = 0', ["n_samples is 0"]),
        ('scheme = "int4-g32"\n[calibration]\nn_samples = "many"', ["n_samples", "'many'"]),
        ('scheme = "int4-g32"\n[calibration]\nseq_len = 2.5', ["seq_len", "2.5"]),
        ('scheme = "int4-g32"\n[calibration]\nsource = 7', ["source", "7"]),
        ('scheme = "int4-g32"\n[calibration]\npad = 1', ["pad", "1"]),
        ('scheme = "int4-g32"\ncalibration = "text.txt"', ["calibration", "text.txt"]),
        ('scheme = "int4-g32"\n[rules]\nmatch = "*"', ["rules"]),
        ('scheme = "int4-g32"\nrules = ["*"]', ["rule 1"]),
        ('scheme = "int4-g32"\n[[rules]]\nscheme = "keep"', ["rule 1: match"]),
        ('scheme = "int4-g32"\n[[rules]]\nmatch = "*"', ["rule 1: scheme"]),
        ('scheme = "int4-g32"\n[[rules]]\nmatch = "*"\nscheme = "int44"', ["'int44' is not known"]),
        ('scheme = "int4-g32"\n[[rules]]\nmatch = "*"\nscheme = "keep"\nbits = 3', ["rule 1", "unknown key 'bits'", "match, scheme and options"]),
        ('scheme = "int4-g32"\n[[rules]]\nmatch = "*"\nscheme = "int8-rtn"\noptions = {damp = 1}', ["options of rtn", "unknown key 'damp'"]),
        ("scheme = ", ["cannot be read as TOML"]),
        ('scheme = "a"\nscheme = "b"', ["cannot be read as TOML"]),
    ],
)
def test_refused_files(text, words, tmp_path):
    with pytest.raises(RecipeError) as caught:
        resolved(toml(tmp_path, text))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(RecipeError, match="absent.toml does not exist"):
        recipes.parse(tmp_path / "absent.toml")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as TOML"):
        recipes.parse(tmp_path / "x.toml")
    with pytest.raises(RecipeError, match="is no file"):
        (tmp_path / "d.toml").mkdir()
        recipes.parse(tmp_path / "d.toml")


def test_a_rule_that_matches_nothing(tmp_path):
    with pytest.raises(RecipeError, match=r"no weight matches the rule 'layers\.9\.\*'; weights are called like model\.layers\.0"):
        resolved(toml(tmp_path, 'scheme = "int4-g32"\n[[rules]]\nmatch = "layers.9.*"\nscheme = "keep"\n'))


def test_every_algorithm_is_a_word():
    for name in ALGORITHMS:
        words = {"ldlq": "e8p2", "aqlm": "2x8"}.get(name, "int4-g32")
        assert recipes.parse(f"{words}-{name}").recipe.algorithm == name
        if words != "int4-g32":
            assert recipes.parse(words).recipe.algorithm == name


def test_errors_are_lowbit_errors():
    assert issubclass(RecipeError, LowbitError)


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        ("int4-sym-g32-rtn", "compressed-tensors"), ("nf4-dq", "bitsandbytes"), ("llm-int8", "bitsandbytes"), ("hqq-int2", "hqq"), ("aqlm-2x8", "aqlm"), ("bitnet", "bitnet"), ("quip-2", "lowbit"),
        ("mxfp6-rtn", "lowbit"), ("int4-sym-g32-out8-rtn", "lowbit"), ("q4_k", "gguf"), ("w8a8-smooth", "compressed-tensors"), ("ternary-rtn", "lowbit"),
    ],
)  # fmt: skip
def test_natural_target(recipe, target):
    """Without --to a result goes into the layout that the field has for it."""
    assert recipes.parse(recipe).recipe.target == target
