"""From what a user writes (a preset, a TOML file, a short form like int4-asym-g128-gptq) to what is done to each weight of a model."""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .. import numerics
from ..algorithms import ALGORITHMS, check_format, make_options
from ..checkpoints import TARGETS, gguf_mixtures, holds, target
from ..checkpoints.gguf import fallback
from ..errors import RecipeError
from ..models.arch import ROUTERS
from ..numerics import additive, codebook, floating, lattice, ternary
from ..numerics.ggml import BLOCK_TYPES, WRITTEN
from ..recipe import Calibration, Recipe, Rule, from_dict
from ..scheme import CASTS, INT, OBSERVERS, Activation, Scheme
from ..transforms import TRANSFORMS, of_blocks
from ..transforms import make_options as make_transform_options

PRESETS: dict[str, tuple[str, str]] = {
    "w4a16": ("int4-sym-g128-gptq", "4 bits in groups of 128, the usual file for vLLM"),
    "w8a16": ("int8-sym-channel-rtn", "8 bits with a scale per output channel; nearly lossless, no data needed"),
    "textbook-int8": ("int8-sym-tensor-rtn-textbook", "the formula of the textbooks: one scale per matrix, max|x| / 127"),
    "gptq-int4": ("int4-sym-gptq", "GPTQ, 4 bits, symmetric"),
    "gptq-int3": ("int3-asym-gptq", "GPTQ, 3 bits, asymmetric"),
    "guided-int4": ("int4-sym-gptq-guided", "GPTQ whose Hessians weigh each token by the gradient of the loss; a backward sweep more, half the loss"),
    "awq-int4": ("int4-asym-awq-rtn", "AWQ: activation-aware scales and clipping, then plain rounding"),
    "hqq-int4": ("int4-asym-g64-hqq", "HQQ, 4 bits; no data needed"),
    "hqq-int2": ("int2-asym-g64-hqq", "HQQ, 2 bits; no data needed"),
    "w8a8": ("int8-sym-channel-rtn-a8", "8-bit weights and activations (each token on its own scale); no data needed"),
    "w8a8-smooth": ("int8-sym-channel-smoothquant-rtn-a8", "SmoothQuant: activation outliers moved into the weights, then 8 bits for both"),
    "w8a8-static": ("int8-sym-channel-smoothquant-rtn-a8-static", "the same with one scale per layer for the activations, found in calibration"),
    "w4a8": ("int4-sym-gptq-a8", "GPTQ to 4 bits, activations of 8 bits"),
    "fp8": ("fp8-channel-rtn-afp8", "FP8 weights and activations; no data needed"),
    "llm-int8": ("int8-sym-channel-textbook-rtn-a8-t6", "LLM.int8(): 8-bit weights and activations, columns with outliers in full precision"),
    "gptaq-int4": ("int4-sym-gptaq", "GPTQ that counts the error of its inputs, too"),
    "autoround-int4": ("int4-sym-g128-full-autoround", "AutoRound with its published settings: 200 steps for each block; hours on a CPU"),
    "guided-int3": ("int3-asym-g64-gptq-guided", "guided GPTQ, 3 bits"),
    "guided-int2": ("int2-asym-g64-gptq-guided", "guided GPTQ, 2 bits"),
    "nf4-dq": ("nf4-g64-dq-rtn", "NF4 with double quantization; no data needed"),
    "mxfp4": ("mxfp4-gptq", "MXFP4, codes by GPTQ"),
    "nvfp4": ("nvfp4-gptq", "NVFP4, codes by GPTQ"),
    "quip-2": ("e8p2-ldlq", "QuIP#: randomized Hadamard transform, lattice points, 2 bits"),
    "quip-3": ("e8p3-ldlq", "QuIP# with a residual stage, 3 bits"),
    "quip-4": ("e8p4-ldlq", "QuIP# with a residual stage, 4 bits"),
    "aqlm-2x8": ("2x8-aqlm", "AQLM: sums of vectors from two codebooks of 256, 2 bits and the codebooks"),
    "aqlm-1x16": ("1x16-aqlm", "AQLM with one codebook of 65,536: for large matrices, and for patience"),
    "quarot-int4": ("int4-sym-rotate-gptq", "QuaRot's rotations that weights can hold, then GPTQ to 4 bits"),
    "bitnet": ("ternary-rtn-a8", "b1.58 weights and 8-bit activations; an ordinary model does not survive this without training"),
    "rtn-int4": ("int4-sym-rtn", "plain rounding to 4 bits; no data needed"),
    "rtn-int8": ("int8-sym-rtn", "plain rounding to 8 bits; no data needed"),
    **{name: (f"{name}-{'weighted-' * (name == 'q2_k_s')}rtn", f"llama-quantize's mixture: {gguf_mixtures.MIXTURES[name].description}") for name in gguf_mixtures.known()},
}
FORMAT_ALIASES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "fp8": "fp8_e4m3", "mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3"}
RANGE_WORDS = {"textbook": "textbook", "half": "half", "full": "full"}
GPTAQ_ALPHA = 0.25
NATURAL = ("compressed-tensors", "bitsandbytes", "hqq", "aqlm", "bitnet")  # where a result goes when no target is named, in this order
GUIDED = ("gptq", "ldlq", "aqlm")
SEARCH_WORDS = ("minmax", "percentile", "mse", "golden")
AUTO_GROUPS = (128, 64, 32)
FILE_BYTES, LINE_LENGTH = 100_000, 10_000  # of a recipe file
FILE_KEYS = ("scheme", "algorithm", "options", "transforms", "activations", "scale_dtype", "rules", "calibration", "true_sequential", "target")


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one weight."""

    scheme: Scheme
    algorithm: str
    options: object
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A recipe as written, and which words were left out: they are filled in when the target and the model are known."""

    recipe: Recipe
    group_given: bool
    scale_given: bool
    target_given: bool
    rule_groups_given: tuple[bool, ...] = ()


def parse(text: str | Path | Recipe | None, *, target_name: str | None = None) -> Draft:
    """Read a recipe: None (the target's default), a preset's name, a path to a TOML file, the short form, or a Recipe."""
    if isinstance(text, Recipe):
        return Draft(text if target_name is None else replace(text, target=target_name), True, True, True)
    chosen = target_name or "compressed-tensors"
    if text is None:
        text = target(chosen).default_recipe
    text = str(text)
    if text in PRESETS:
        draft = _short(PRESETS[text][0], name=text)
    elif text.endswith(".toml"):
        draft = _toml(Path(text))
    else:
        draft = _short(text, name=text)
    if target_name is None and draft.target_given:
        target(draft.recipe.target)
        return draft
    target(chosen)
    if target_name is None:
        chosen = _natural_target(draft.recipe)
    return replace(draft, recipe=replace(draft.recipe, target=chosen), target_given=True)


def _natural_target(recipe: Recipe) -> str:
    """The first layout of the field that holds all schemes of a recipe, else lowbit's own."""
    schemes = {recipe.scheme, *(rule.scheme for rule in recipe.rules if rule.scheme is not None)}
    if any(scheme.format in BLOCK_TYPES for scheme in schemes):
        return "gguf"
    several = {"compressed-tensors", "hqq"} if len(schemes) > 1 else set(TARGETS)  # the other layouts have one scheme for all layers
    return next((name for name in NATURAL if name in several and all(holds(name, scheme) for scheme in schemes)), "lowbit")


def _short(text: str, *, name: str) -> Draft:
    """Words in any order joined by "-": a number format, sym|asym, gN|channel|tensor, an algorithm, a range convention, a range search."""
    found = _words(text)
    scheme = _scheme(found, text)
    own = {**dict.fromkeys(lattice.KINDS, "ldlq"), **dict.fromkeys(additive.KINDS, "aqlm")}.get(scheme.format)
    algorithm = found.get("algorithm") or own or ("rtn" if of_blocks(_word_transforms(found)) else "gptq" if "guided" in found or scheme.format == INT and scheme.bits < 8 else "rtn")
    options = _word_options(found)
    check_format(algorithm, scheme)
    _check_options(algorithm, options)
    recipe = Recipe(name=name, scheme=scheme, algorithm=algorithm, options=options, mixture=found.get("mixture"), transforms=_word_transforms(found))
    return Draft(recipe, group_given="group" in found or scheme.format != INT, scale_given=False, target_given=False)


def _words(text: str) -> dict[str, Any]:
    """What the words of a short form say: format, symmetric, group, algorithm, range, search."""
    found: dict[str, Any] = {}

    def put(key: str, value: object, word: str) -> None:
        if key in found and found[key] != value:
            raise RecipeError(f"recipe {text!r}: the word {word!r} contradicts an earlier one (both say {key}).")
        found[key] = value

    for word in text.lower().split("-"):
        _word(word, text, put)
    if "guided" in found and found.get("algorithm", "gptq") not in GUIDED:
        raise RecipeError(f"recipe {text!r}: guided belongs to {', '.join(GUIDED)} (Hessians weighted by the gradient of the loss).")
    if "format" not in found:
        raise RecipeError(f"recipe {text!r} names no number format; expected a word like int4, q4_k, q8_0, float16.")
    fmt, _ = found["format"]
    if "pure" in found and found.pop("mixture", "") not in (None, fmt):
        raise RecipeError(f"recipe {text!r}: pure is one ggml type throughout; it goes with {', '.join(BLOCK_TYPES)}.")
    free = {INT: {"symmetric", "group", "range", "search"}, **dict.fromkeys(codebook.CODES, {"group", "search"})}.get(fmt, set())
    if fmt in ternary.KINDS:
        free = {"group"}
    if fmt in floating.KINDS:
        free = {"search"} if floating.KINDS[fmt].block else {"group", "search"}
    if surplus := {"symmetric", "group", "range", "search"} & set(found) - free:
        words = {"symmetric": "sym and asym", "group": "gN, channel and tensor", "range": "words for ranges", "search": "words for searches"}
        raise RecipeError(f"recipe {text!r}: {fmt} fixes that itself; leave out {', '.join(words[key] for key in sorted(surplus))}.")
    if "nested" in found and fmt not in codebook.CODES:
        raise RecipeError(f"recipe {text!r}: dq (double quantization) belongs to {' and '.join(codebook.CODES)}.")
    if found.get("symmetric") is False and found.get("range") in ("half", "full"):
        raise RecipeError(f"recipe {text!r}: {found['range']} is a range of symmetric integers, and contradicts asym.")
    return found


def _word(word: str, text: str, put) -> None:
    if match := re.fullmatch(r"int([2-8])", word):
        put("format", (INT, int(match[1])), word)
    elif word in gguf_mixtures.known():
        put("mixture", word, word)
        put("format", (gguf_mixtures.MIXTURES[word].type, 0), word)
    elif word in ("pure", "weighted"):
        put(word, True, word)
    elif word in BLOCK_TYPES:
        put("mixture", None, word)
        put("format", (word, 0), word)
    elif word in CASTS or word in codebook.CODES or word in floating.KINDS or word in ternary.KINDS:
        put("format", (word, 0), word)
    elif f"aqlm_{word}" in additive.KINDS:
        put("format", (f"aqlm_{word}", 0), word)
    elif word in lattice.KINDS or word in additive.KINDS:
        put("format", (word, 0), word)
    elif word in FORMAT_ALIASES:
        put("format", (FORMAT_ALIASES[word], 0), word)
    elif word == "dq":
        put("nested", codebook.NESTED_BLOCK, word)
    elif match := re.fullmatch(r"out([1-9][0-9]{0,8})(?:b(8|16))?", word):
        put("outliers", (int(match[1]), int(match[2] or 16)), word)
    elif _activation_word(word, put):
        pass
    elif word in ("sym", "asym"):
        put("symmetric", word == "sym", word)
    elif match := re.fullmatch(r"g([1-9][0-9]{0,8})", word):
        put("group", (1, int(match[1])), word)
    elif word in ("channel", "tensor"):
        put("group", (1, -1) if word == "channel" else (-1, -1), word)
    elif word in ALGORITHMS:
        put("algorithm", word, word)
    elif word in RANGE_WORDS:
        put("range", word, word)
    elif word in SEARCH_WORDS:
        put("search", word, word)
    elif word in TRANSFORMS:
        put(f"transform {word}", True, word)
    elif word == "gptaq":
        put("algorithm", "gptq", word)
        put("alpha", GPTAQ_ALPHA, word)
    elif match := re.fullmatch(r"guided([1-9][0-9]{0,8})?", word):
        put("guided", True, word)
        if match[1]:
            put("guide_groups", int(match[1]), word)
    else:
        formats = (*WRITTEN, *codebook.CODES, *floating.KINDS, *ternary.KINDS, *lattice.KINDS, *(name.removeprefix("aqlm_") for name in additive.KINDS), *CASTS)
        raise RecipeError(
            f"recipe {text!r}: the word {word!r} is not known. A recipe is a preset ({', '.join(PRESETS)}), a .toml file, or words joined by '-': "
            f"int2..int8 or {', '.join(formats)}; one of llama-quantize's mixtures (q4_k_m, ...); pure, weighted (of ggml types); dq; "
            f"sym or asym; g32, g64, g128, channel or tensor; {', '.join(ALGORITHMS)}; {', '.join(RANGE_WORDS)}; {', '.join(SEARCH_WORDS)}; "
            f"outN, outNb8; a8, a4, afp8, ... (activations), static, static_kl, ..., aasym, atensor, t6; gptaq; guided, guided4 (Hessians by groups of outputs); {', '.join(TRANSFORMS)}."
        )


def _activation_word(word: str, put) -> bool:
    """Whether a word says something of rounded activations; it is put under its field of Activation."""
    if match := re.fullmatch(r"a([2-8])", word):
        put("act format", (INT, int(match[1])), word)
    elif word.startswith("a") and FORMAT_ALIASES.get(word[1:], word[1:]) in floating.KINDS:
        name = FORMAT_ALIASES.get(word[1:], word[1:])
        put("act format", (name, floating.KINDS[name].element.bits), word)
    elif word == "aasym":
        put("act symmetric", False, word)
    elif word == "atensor":
        put("act per", "tensor", word)
    elif match := re.fullmatch(rf"static(?:_({'|'.join(OBSERVERS)}))?", word):
        put("act observer", match[1] or "minmax", word)
    elif match := re.fullmatch(r"t([0-9]+(?:\.[0-9]+)?)", word):
        put("act threshold", float(match[1]), word)
    else:
        return False
    return True


def _word_activation(found: dict, text: str) -> Activation | None:
    given = {key.removeprefix("act "): value for key, value in found.items() if key.startswith("act ")}
    if not given:
        return None
    if "format" not in given:
        raise RecipeError(f"recipe {text!r}: {', '.join(given)} of activations is given, and not their format; add a8 (or a4, afp8, anvfp4, ...).")
    fmt, bits = given.pop("format")
    static = {"static": True, "per": "tensor"} if "observer" in given else {}
    textbook = {"range": "textbook"} if fmt == INT and (found.get("range") == "textbook" or found["format"][0] in ternary.KINDS) else {}
    return Activation(fmt, bits, **{**textbook, **static, **given})


def _word_options(found: dict) -> dict:
    """Options of the algorithm that words stand for."""
    return {key: found[key] for key in ("search", "weighted", "guided", "guide_groups", "alpha") if key in found}


def _word_transforms(found: dict[str, Any]) -> dict[str, dict]:
    return {name: {} for name in TRANSFORMS if f"transform {name}" in found}


def _scheme(found: dict[str, Any], text: str) -> Scheme:
    count, bits = found.get("outliers", (None, 16))
    return replace(_scheme_of_all(found), outliers=count, outlier_bits=bits, act=_word_activation(found, text))


def _scheme_of_all(found: dict[str, Any]) -> Scheme:
    fmt, bits = found["format"]
    if fmt == INT:
        fitted = found.get("algorithm") == "hqq"
        symmetric = found.get("symmetric", not fitted)
        return Scheme(INT, bits, found.get("group", (1, AUTO_GROUPS[0])), symmetric, found.get("range", "half"), zero_dtype="float" if fitted else "int")
    given = {"block": found["group"]} if "group" in found else {}
    return numerics.scheme_of(fmt, **given, **({"nested": found["nested"]} if "nested" in found else {}))


def _toml(path: Path) -> Draft:
    """A recipe file: see docs/recipes.md. Unknown keys and wrong types are errors."""
    if not path.is_file():
        raise RecipeError(f"{path} {'is no file' if path.exists() else 'does not exist'}.")
    if path.stat().st_size > FILE_BYTES:
        raise RecipeError(f"{path} has {path.stat().st_size:,} bytes; a recipe has at most {FILE_BYTES:,}.")
    try:
        text = path.read_text(encoding="utf-8")
        if max(map(len, text.splitlines()), default=0) > LINE_LENGTH:  # a key of thousands of parts takes minutes
            raise ValueError(f"a line is longer than {LINE_LENGTH:,} characters")
        data = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from error
    where = str(path)
    for key in data:
        if key == "kv_cache":
            raise RecipeError(f"{where}: {key} is reserved for a later version; leave it out.")
        if key not in FILE_KEYS:
            raise RecipeError(f"{where}: unknown key {key!r}; expected one of {', '.join(FILE_KEYS)}.")
    base = _short(_text(data.get("scheme"), f"{where}: scheme"), name=path.stem)
    algorithm = _text(data.get("algorithm", base.recipe.algorithm), f"{where}: algorithm", example="gptq")
    scheme = replace(base.recipe.scheme, scale_dtype=data.get("scale_dtype", base.recipe.scheme.scale_dtype))
    if "activations" in data:
        words = {} if scheme.act is None else asdict(scheme.act)
        scheme = replace(scheme, act=Activation.from_dict({**words, **_table(data["activations"], f"{where}: activations")}))
    check_format(algorithm, scheme)
    options = {**base.recipe.options, **_table(data.get("options", {}), f"{where}: options")}
    _check_options(algorithm, options)
    calibration = _table(data.get("calibration", {}), f"{where}: calibration")
    _refuse_wrong_types(Calibration, calibration, f"{where}: calibration")
    plain = {key: data[key] for key in ("true_sequential", "target") if key in data}
    _refuse_wrong_types(Recipe, plain, where)
    recipe = Recipe(path.stem, scheme, algorithm, options, mixture=base.recipe.mixture, calibration=from_dict(Calibration, calibration, where=f"{where}: calibration"), **plain)
    transforms = {**base.recipe.transforms, **_table(data.get("transforms", {}), f"{where}: transforms")}
    for name, given in transforms.items():
        make_transform_options(name, _table(given, f"{where}: transforms.{name}"))
    if of_blocks(transforms) and recipe.true_sequential:
        raise RecipeError(f"{where}: transforms rescale a block from one pass over it, and true_sequential collects statistics in several; take one of them.")
    recipe = replace(recipe, transforms=transforms)
    entries = data.get("rules", [])
    if not isinstance(entries, list):
        raise RecipeError(f"{where}: rules is a single table; write [[rules]] for each.")
    rules = [_rule(entry, f"{where}: rule {i}", recipe) for i, entry in enumerate(entries, 1)]
    recipe = replace(recipe, rules=tuple(rule for rule, _ in rules))
    return Draft(recipe, base.group_given, "scale_dtype" in data, "target" in data, tuple(given for _, given in rules))


def _text(value: object, where: str, *, example: str = "int4-sym-g64") -> str:
    if not isinstance(value, str):
        raise RecipeError(f'{where}: expected a short form such as "{example}", got {value!r}.')
    return value


def _table(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a table, got {value!r}.")
    return value


def _rule(entry: object, where: str, recipe: Recipe) -> tuple[Rule, bool]:
    """A rule and whether it names its groups. What its words leave out is as in the recipe."""
    entry = _table(entry, where)
    for key in entry:
        if key not in ("match", "scheme", "options"):
            raise RecipeError(f"{where}: unknown key {key!r}; expected match, scheme and options.")
    match, words = _text(entry.get("match"), f"{where}: match", example="*.down_proj"), _text(entry.get("scheme"), f"{where}: scheme")
    if words == "keep":
        return Rule(match, None), True
    found = _words(words)
    one_type(found.get("mixture"), where)
    both = found["format"][0] == recipe.scheme.format == INT
    inherited = {"symmetric": recipe.scheme.symmetric, "group": recipe.scheme.block, "range": recipe.scheme.range} if both else {}
    scheme = _scheme({**inherited, **found}, words)
    if scheme.act is None and scheme.format not in CASTS:
        scheme = replace(scheme, act=recipe.scheme.act)
    formats = ALGORITHMS[recipe.algorithm].formats
    algorithm = found.get("algorithm") or (recipe.algorithm if formats is None or scheme.format in formats else "rtn")
    check_format(algorithm, scheme)
    own = {**_word_options(found), **_table(entry.get("options", {}), f"{where}: options")}
    options = {**(recipe.options if algorithm == recipe.algorithm and "algorithm" not in found else {}), **own}
    _check_options(algorithm, options)
    return Rule(match, scheme, algorithm, options), "group" in found or scheme.format != INT


def one_type(mixture: str | None, where: str) -> None:
    """Raise RecipeError for a mixture where a single type is wanted; a mixture that has a type's name stands for the type there."""
    if mixture is not None and mixture not in BLOCK_TYPES:
        raise RecipeError(f"{where}: {mixture} is a mixture, which chooses a type for every weight of a model; expected one type, such as {gguf_mixtures.MIXTURES[mixture].type}.")


def _check_options(algorithm: str, options: dict) -> None:
    """Raise RecipeError on an option that the algorithm does not have, or a value that it cannot take."""
    _refuse_wrong_types(ALGORITHMS[algorithm].options, options, f"options of {algorithm}")
    make_options(algorithm, options)


_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "dict": (dict, "a table"),
}


def _refuse_wrong_types(cls: type, data: dict, where: str) -> None:
    """Raise RecipeError when a value is not of the type that the dataclass declares for it."""
    for declared in fields(cls):
        if declared.name not in data or declared.type not in _TYPES:
            continue
        value, (kind, expected) = data[declared.name], _TYPES[declared.type]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RecipeError(f"{where}: {declared.name} is {value!r}; expected {expected}.")


def settle(draft: Draft, linears: dict[str, tuple[int, int]], model_dtype: str) -> tuple[Recipe, list[str]]:
    """Fill in what was left out, from the target and the model's shapes: group size and dtype of scales. Returns what to tell the user."""
    recipe, notes = draft.recipe, []
    if recipe.mixture is not None and recipe.target != "gguf":
        if recipe.mixture not in BLOCK_TYPES:
            raise RecipeError(f"{recipe.mixture} is a mixture of block types, which only a GGUF file holds. Write it with --to gguf, or take one type, such as {recipe.scheme.format}.")
        recipe = replace(recipe, mixture=None)
    scheme = recipe.scheme
    if scheme.format == INT and not draft.group_given:
        widths = sorted({shape[1] for shape in linears.values()})
        fitting = [32] if recipe.target == "gguf" else [g for g in AUTO_GROUPS if all(w % g == 0 for w in widths)]
        block = (1, fitting[0]) if fitting else (1, -1)
        scheme = replace(scheme, block=block)
        why = "what Q4_0 stores" if recipe.target == "gguf" else f"the largest of {', '.join(map(str, AUTO_GROUPS))} that divides every layer"
        notes.append(f"Group size not given: {scheme.name} ({why})." if fitting else f"No group size divides every layer: {scheme.name}.")
    stored_as_model = {"fp8_e4m3": "compressed-tensors", "fp8_e5m2": "compressed-tensors", "ternary": "bitnet"}  # formats whose scales a target casts to the model's dtype
    if (scheme.format == INT or stored_as_model.get(scheme.format) == recipe.target) and not draft.scale_given:
        scheme = replace(scheme, scale_dtype=TARGETS[recipe.target].scale_dtype or model_dtype)
    given = draft.rule_groups_given or (True,) * len(recipe.rules)
    rules = tuple(_settle_rule(rule, scheme, own_group) for rule, own_group in zip(recipe.rules, given, strict=True))
    return replace(recipe, scheme=scheme, rules=rules), notes


def _settle_rule(rule: Rule, scheme: Scheme, group_given: bool) -> Rule:
    """A rule of integers with the recipe's dtype of scales, and its groups where the rule names none."""
    if rule.scheme is None or rule.scheme.format != INT:
        return rule
    block = rule.scheme.block if group_given or scheme.format != INT else scheme.block
    return replace(rule, scheme=replace(rule.scheme, scale_dtype=scheme.scale_dtype, block=block))


def resolve(recipe: Recipe, linears: dict[str, tuple[int, int]], outside: dict[str, tuple[int, int]], config: dict | None = None) -> dict[str, LayerPlan]:
    """What is done to every weight that is quantized; raises now on a rule or shape that cannot be.

    linears: matrices of the blocks. outside: embedding and head, kept unless a rule or a mixture names them (gguf: q8_0, as its users expect).
    config: of the model; needed for a mixture.
    """
    mixed = _mixed(recipe, {**linears, **outside}, config)
    plans: dict[str, LayerPlan] = {}
    used: set[str] = set()
    for name, shape in {**linears, **outside}.items():
        rule = next((rule for rule in recipe.rules if fnmatchcase(name.removesuffix(".weight"), rule.match)), None)
        if rule is not None:
            used.add(rule.match)
            if rule.scheme is None:
                continue
            algorithm = "rtn" if name in outside else rule.algorithm or recipe.algorithm
            scheme = replace(rule.scheme, act=None) if name in outside else rule.scheme
            plans[name] = _plan(scheme, algorithm, rule.options if algorithm == rule.algorithm else {}, name, shape, recipe.target)
        elif name in linears and not _stays_dense(name):
            plans[name] = _plan(mixed.get(name, recipe.scheme), recipe.algorithm, recipe.options, name, shape, recipe.target)
        elif name in outside and recipe.target == "gguf":
            plans[name] = _plan(mixed.get(name, numerics.scheme_of("q8_0")), "rtn", {}, name, shape, recipe.target)
    idle = [rule.match for rule in recipe.rules if rule.match not in used]
    if idle:
        some = ", ".join(sorted(name.removesuffix(".weight") for name in list(linears)[:3]))
        raise RecipeError(f"no weight matches the rule {idle[0]!r}; weights are called like {some}.")
    return plans


def weighted(recipe: Recipe) -> Recipe:
    """The recipe with all its plain rounding weighted by importance."""
    own = lambda algorithm, options: {**options, "weighted": True} if algorithm == "rtn" else options
    rules = tuple(replace(rule, options=own(rule.algorithm or recipe.algorithm, rule.options)) for rule in recipe.rules)
    return replace(recipe, options=own(recipe.algorithm, recipe.options), rules=rules)


def _mixed(recipe: Recipe, shapes: dict[str, tuple[int, int]], config: dict | None) -> dict[str, Scheme]:
    """The scheme that the recipe's mixture gives to each weight; empty without one."""
    if recipe.mixture is None:
        return {}
    if recipe.mixture not in gguf_mixtures.known():
        raise RecipeError(f"mixture {recipe.mixture!r} is not known; expected one of {', '.join(gguf_mixtures.known())}.")
    if config is None:
        raise RecipeError(f"the mixture {recipe.mixture} looks at the model, and its config was not given.")
    types = gguf_mixtures.types(recipe.mixture, config, shapes, weighted=bool(recipe.options.get("weighted")))
    return {name: replace(numerics.scheme_of(kind), act=recipe.scheme.act, outliers=recipe.scheme.outliers) for name, kind in types.items()}


def _stays_dense(name: str) -> bool:
    """Routers and gates of a few outputs are kept: they cost nothing and decide everything."""
    return name.removesuffix(".weight").rpartition(".")[2] in ROUTERS


def _plan(scheme: Scheme, algorithm: str, options: dict, name: str, shape: tuple[int, int], target_name: str) -> LayerPlan:
    notes: tuple[str, ...] = ()
    if scheme.format in BLOCK_TYPES and target_name == "gguf":
        other = fallback(scheme.format, shape[1])
        if other != scheme.format:
            notes = (f"{scheme.format} cannot hold rows of {shape[1]}: {other} was used, as llama-quantize does",)
            scheme = numerics.scheme_of(other)
            formats = ALGORITHMS[algorithm].formats
            if formats is not None and other not in formats:
                algorithm, options = "rtn", {}
    check_format(algorithm, scheme)
    TARGETS[target_name].check(scheme, shape, name.removesuffix(".weight"))
    numerics.check_shape(scheme, shape, name=name.removesuffix(".weight"))
    return LayerPlan(scheme, algorithm, make_options(algorithm, options), notes)
