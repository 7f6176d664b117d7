"""Every target and every number format on four small models: what a target holds is read back part by part and written again byte for byte, and the rest is refused with the reason."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from lowbit import numerics
from lowbit.checkpoints import TARGETS, open_checkpoint
from lowbit.checkpoints.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models import skeleton as sk
from lowbit.models.linears import find_linears
from lowbit.numerics import FORMATS, ggml
from lowbit.pipeline import recipes
from lowbit.pipeline.convert import LEGACY, convert
from lowbit.pipeline.output import with_rounded
from lowbit.scheme import CASTS, INT, SCALE_DTYPES, Rounding, Scheme
from lowbit.tensor import QuantizedTensor

MODELS = {  # embeddings tied and rows of 256 for ggml's k-types; biases; experts; rows of 96 and 80
    "tied": ("llama-tied", torch.bfloat16, {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}),
    "biases": ("qwen2", torch.float16, {"num_hidden_layers": 2}),
    "experts": ("mixtral", torch.float32, {"num_hidden_layers": 1, "num_local_experts": 2}),
    "odd": ("llama", torch.float32, {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 80}),
}
SHARD_BYTES = 40_000

SYMMETRIC = ("int2-sym-g32", "int3-sym-g32", "int4-sym-g32", "int8-sym-g32")
ASYMMETRIC = ("int2-asym-g32", "int3-asym-g32", "int4-asym-g32", "int8-asym-g32")
FIVE = ("int5-sym-g32", "int5-asym-g32")
ANY_WIDTH = ("int4-sym-g16", "int4-sym-channel", "int4-asym-channel", "int8-sym-channel")
WHOLE = ("int8-sym-tensor", "int4-asym-tensor")
FITTED = ("int4-asym-g32-hqq", "int2-asym-g32-hqq", "int4-asym-channel-hqq")
BLOCK_32 = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "ggml_mxfp4")
BLOCK_256 = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0", "tq2_0")
INT8_INPUTS = ("int4-sym-g32-a8", "int8-sym-channel-a8", "int8-sym-channel-a8-static", "int8-sym-channel-a8-static-aasym")
LLM_INT8 = "int8-sym-channel-textbook-a8-t6"
FP8 = ("fp8-channel", "fp8-tensor")
FP8_INPUTS = ("fp8-channel-afp8", "fp8-channel-afp8-static")
MX = ("mxfp4", "mxfp8", "mxfp4-amxfp4")
BLOCKS_OF_ALL = ("nf4-g64", "nf4-g64-dq", "fp4-g64", "fp4-g32-dq")
HALVES = ("float16", "bfloat16")
AQLM = ("1x8", "2x8")
LATTICES = ("e8p2", "e8p3")
ONLY_LOWBIT = ("int4-sym-g32-out2", "fp8_e5m2-channel-afp8", "mxfp6", "ternary", "binary")

# What each target holds; the product with all others is refused.
HELD: dict[str, tuple[str, ...]] = {
    "compressed-tensors": (*SYMMETRIC, *ASYMMETRIC, *FIVE, *ANY_WIDTH, *WHOLE, *INT8_INPUTS, *FP8, *FP8_INPUTS, "nvfp4", *MX, *HALVES),
    "gguf": (*SYMMETRIC, *ASYMMETRIC[:3], *FIVE, *ANY_WIDTH[1:], *WHOLE, *FITTED, "mxfp4", *HALVES, *BLOCK_32, *BLOCK_256),
    "gptq": (*SYMMETRIC, *ASYMMETRIC, *ANY_WIDTH),
    "awq": ("int4-sym-g32", "int4-asym-g32", *ANY_WIDTH[:3]),
    "auto-round": (*SYMMETRIC, *ASYMMETRIC, *ANY_WIDTH),
    "bitsandbytes": (LLM_INT8, *BLOCKS_OF_ALL),
    "hqq": FITTED,
    "aqlm": AQLM,
    "bitnet": ("ternary-a8",),
    "torchao": (*SYMMETRIC, *ASYMMETRIC, *FIVE, *ANY_WIDTH, *FITTED, *FP8, "fp8_e5m2-channel"),
}  # fmt: skip
WORDS = tuple(dict.fromkeys([*(words for held in HELD.values() for words in held), *LATTICES, *ONLY_LOWBIT]))
HELD |= {"lowbit": WORDS, "safetensors": WORDS}

# The dtypes of scales that a target holds, where formats have a choice; all others take any.
SCALES = {"gguf": ("float16",), "gptq": ("float16",), "awq": ("float16",), "auto-round": ("float16",), "bitsandbytes": ("float32",)}

# What no row of 80 or 96 goes into (of the model "odd"), and what needs rows of 256 (of all but "tied").
GROUPS_OF_32 = (*SYMMETRIC, *ASYMMETRIC, *FIVE, "int4-sym-g32-a8", *FITTED[:2], *MX, "mxfp6", *BLOCK_32, *BLOCK_256)
NOT_ODD: dict[str, tuple[str, ...]] = {
    "compressed-tensors": tuple(words for words in GROUPS_OF_32 if words in HELD["compressed-tensors"]),
    "gguf": tuple(words for words in HELD["gguf"] if words not in HALVES),
    "gptq": HELD["gptq"], "awq": HELD["awq"], "auto-round": HELD["auto-round"],
    "hqq": FITTED[:2], "torchao": tuple(words for words in GROUPS_OF_32 if words in HELD["torchao"]),
    "lowbit": (*MX, "mxfp6", *BLOCK_32, *BLOCK_256), "safetensors": (*MX, "mxfp6", *BLOCK_32, *BLOCK_256), "bitsandbytes": (), "aqlm": (), "bitnet": (),
}  # fmt: skip
NO_SHAPE = r"multiple of|multiples of 32|whole groups"
REASONS: dict[str, str] = {
    "compressed-tensors": r"compressed-tensors (cannot hold|has no (place|layout) for|has whole zero-points)",
    "gguf": r"GGUF has no (type|place) for|does not say how activations|scale for every 32 weights|GGUF stores scales as float16",
    "gptq": r"gptq (cannot hold|packs every linear|stores scales in float16)",
    "awq": r"awq (cannot hold|packs every linear|stores scales in float16)",
    "auto-round": r"auto-round (cannot hold|packs every linear|stores scales in float16)",
    "bitsandbytes": r"bitsandbytes (cannot hold|packs every linear)",
    "hqq": "hqq cannot hold", "aqlm": "aqlm cannot hold", "bitnet": "bitnet cannot hold", "torchao": "torchao cannot hold|torchao's integers have a scale per group or channel",
}  # fmt: skip

# What is said in another way by a file than it was given: the scheme that is read. Codes and values are the same.
AS_READ: dict[str, Callable[[Scheme, str], Scheme]] = {
    "gguf": lambda scheme, model: numerics.scheme_of(_ggml_type(scheme)),
    "torchao": lambda scheme, model: scheme if scheme.format == INT else replace(scheme, scale_dtype="float32"),
    "bitnet": lambda scheme, model: replace(scheme, scale_dtype="float32") if model == "biases" else scheme,  # the inverse of a scale is no number of its dtype
}


def _ggml_type(scheme: Scheme) -> str:
    if scheme.format != INT:
        return {"mxfp4": "ggml_mxfp4"}.get(scheme.format, scheme.format)
    return {True: {2: "q4_0", 3: "q4_0", 4: "q4_0", 5: "q5_0", 8: "q8_0"}, False: {2: "q4_1", 3: "q4_1", 4: "q4_1", 5: "q5_1"}}[scheme.symmetric][scheme.bits]


def scheme_of(words: str) -> Scheme:
    return recipes.parse(words if words.endswith("-hqq") else f"{words}-rtn").recipe.scheme


def schemes_of(words: str) -> list[Scheme]:
    """The scheme with each dtype of scales where it has a choice."""
    scheme = scheme_of(words)
    return [replace(scheme, scale_dtype=dtype) for dtype in SCALE_DTYPES] if scheme.format in (INT, "fp8_e4m3", "fp8_e5m2", "ternary", "binary") else [scheme]


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Thousands of files that need not outlive a power failure."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def held(target: str, words: str) -> list[Scheme]:
    """Those of schemes_of(words) that a target holds."""
    schemes = schemes_of(words) if words in HELD[target] else []
    return schemes if len(schemes_of(words)) == 1 else [scheme for scheme in schemes if scheme.scale_dtype in SCALES.get(target, SCALE_DTYPES)]


@dataclass(frozen=True)
class Source:
    """A dense model, and its matrices that are quantized."""

    folder: Path
    checkpoint: Checkpoint
    names: list[str]


@pytest.fixture(scope="module")
def sources(save_model, tmp_path_factory):
    made = {}
    for model, (name, dtype, changes) in MODELS.items():
        skeleton = sk.build(open_checkpoint(save_model(name, tmp_path_factory.mktemp("source") / model, dtype=dtype, **changes)))
        names = [linear.name for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index) if not linear.name.endswith("gate.weight")]
        made[model] = Source(skeleton.checkpoint.path, skeleton.checkpoint, names)
    return made


@pytest.fixture(scope="module")
def rounded(sources):
    """rounded(model, scheme): the checkpoint with every matrix rounded, once for all targets."""
    kept: dict[tuple[str, Scheme], Checkpoint] = {}

    def make(model: str, scheme: Scheme) -> Checkpoint:
        if (model, scheme) not in kept:
            source = sources[model]
            plan = recipes.LayerPlan(scheme, "rtn", recipes.make_options("rtn", {}))
            made = with_rounded(source.checkpoint, dict.fromkeys(source.names, plan))
            quantized = {name: replace(entry, load=_once(entry.load)) for name, entry in made.quantized.items()}
            inputs = {} if scheme.act is None else dict.fromkeys(source.names, Rounding(scheme.act, *((0.0625, 0.0 if scheme.act.symmetric else 3.0) if scheme.act.static else ())))
            kept[model, scheme] = replace(made, quantized=quantized, activations=inputs)
        return kept[model, scheme]

    return make


def _once(load):
    found: list[QuantizedTensor] = []
    return lambda: found[0] if found else found.append(load()) or found[0]


def write(checkpoint: Checkpoint, target: str, folder: Path, shard_bytes: int | None = None) -> Path:
    """The written folder, or file where the target makes one."""
    folder.mkdir(parents=True)
    path = folder / f"model{TARGETS[target].suffix}" if TARGETS[target].suffix and shard_bytes is None else folder
    TARGETS[target].write(checkpoint, path, shard_bytes=shard_bytes)
    return path


def assert_parts(target: str, before: QuantizedTensor, after: QuantizedTensor, scheme: Scheme) -> None:
    """Every part bit for bit; in a GGUF file integers lie in blocks, and minima are products rounded to float16."""
    assert after.scheme == scheme and after.shape == before.shape and after.dtype == (before.dtype if target != "gguf" else "float16")
    if before.scheme.format == INT and target == "gguf":
        codes, scale, minimum = ggml.unpack_codes(scheme.format, after.parts["blocks"])
        old_scale = _per_block(before.parts["scale"], before)
        shift = 0 if minimum is not None else 2 ** (LEGACY[scheme.format][0] - 1) - before.scheme.zero_code
        assert torch.equal(codes, before.parts["codes"] + shift) and torch.equal(scale, old_scale)
        assert minimum is None or torch.equal(minimum, (-old_scale.float() * _per_block(before.parts["zero_point"], before).float()).half())
        return
    if before.scheme.format != scheme.format:
        assert torch.equal(numerics.dequantize(before), numerics.dequantize(after))
        return
    assert after.parts.keys() == before.parts.keys()
    for part, value in before.parts.items():
        found = after.parts[part]
        if scheme.scale_dtype != before.scheme.scale_dtype and part == "scale":
            torch.testing.assert_close(found, value.float(), rtol=2**-23 if target == "bitnet" else 0, atol=0)
        else:
            assert found.dtype == value.dtype and torch.equal(found, value), part


def _per_block(values: torch.Tensor, qt: QuantizedTensor) -> torch.Tensor:
    groups = qt.shape[1] // 32
    return (values if values.shape[1] == 1 else values.repeat_interleave(groups // values.shape[1], 1)).expand(qt.shape[0], groups)


def assert_rest(target: str, before: Checkpoint, after: Checkpoint) -> None:
    """The tensors that are not quantized; GGUF has vectors, norms and routers in float32."""
    assert set(before.tensors) == set(after.tensors) - set(before.quantized)
    for name in before.tensors:
        one, other = before.dense(name), after.dense(name)
        assert torch.equal(one.float(), other.float()) and (one.dtype == other.dtype or (target == "gguf" and other.dtype == torch.float32)), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("target", "words"), [(target, words) for target, held in HELD.items() for words in held])
def test_what_is_held_comes_back(rounded, tmp_path, assert_same, target, words, model):
    """Written, read, and from there written again whole and in shards: the same parts and the same bytes."""
    small = words in NOT_ODD[target] and model == "odd" or words in BLOCK_256 and model != "tied"
    schemes = {scheme.scale_dtype: scheme for scheme in held(target, words)}
    scheme = schemes.get(str(MODELS[model][1]).removeprefix("torch."), next(iter(schemes.values())))  # so that each dtype of scales is some model's
    checkpoint = rounded(model, scheme)
    if small:
        with pytest.raises(LowbitError, match=NO_SHAPE):
            write(checkpoint, target, tmp_path / "first")
        return
    first = write(checkpoint, target, tmp_path / "first")
    opened = open_checkpoint(first)
    kept = set() if target == "safetensors" or (words in CASTS and target != "lowbit") else set(checkpoint.quantized)
    assert set(opened.quantized) == kept and opened.kind == (target if kept or target == "gguf" else "safetensors")
    as_read = AS_READ.get(target, lambda scheme, model: scheme)(scheme, model) if kept else scheme
    for name, entry in checkpoint.quantized.items():
        if name in kept:
            assert_parts(target, entry.load(), opened.quantized[name].load(), as_read)
        else:
            assert torch.equal(opened.dense(name), checkpoint.dense(name) if words not in CASTS or target == "safetensors" else entry.load().parts["weight"])
    assert_rest(target, checkpoint, opened)
    assert opened.activations == (checkpoint.activations if target != "gguf" else {})
    assert_same(first, write(opened, target, tmp_path / "again"))
    if model in ("tied", "odd"):
        return  # in shards the others do
    parts = write(opened, target, tmp_path / "parts", SHARD_BYTES)
    assert len(list(parts.glob("*-of-*"))) > 1
    reopened = open_checkpoint(parts)
    assert_same(first, write(reopened, target, tmp_path / "whole"))
    assert_same(parts, write(reopened, target, tmp_path / "parts-again", SHARD_BYTES))


@pytest.mark.parametrize("target", REASONS)
def test_all_else_is_refused(rounded, tmp_path, target):
    """The rest of the product of targets, formats and dtypes of scales, before anything is written."""
    refused = 0
    for words in WORDS:
        for number, scheme in enumerate(schemes_of(words)):
            if scheme in held(target, words):
                continue
            with pytest.raises(LowbitError, match=REASONS[target]):
                write(rounded("tied", scheme), target, tmp_path / f"{words}-{number}")
            assert not list((tmp_path / f"{words}-{number}").iterdir())
            refused += 1
    assert refused == sum(len(schemes_of(words)) - len(held(target, words)) for words in WORDS) > 0


def test_the_tables_are_whole():
    """A new target or number format has to be put into them."""
    assert set(HELD) == set(TARGETS) == set(NOT_ODD) and set(REASONS) == set(TARGETS) - {"lowbit", "safetensors"}
    alike = {
        "float32",
        "e8p4",
        "mxfp8_e5m2",
        "mxfp6_e3m2",
        "aqlm_1x10",
        "aqlm_1x12",
        "aqlm_2x12",
        "aqlm_1x16",
        "aqlm_2x16",
        "aqlm_3x8",
        "aqlm_4x8",
    }  # to others that are here; large codebooks take minutes
    assert {name for name, entry in FORMATS.items() if entry.quantize is not None} == {scheme_of(words).format for words in WORDS} | alike


@pytest.mark.parametrize("target", TARGETS)
def test_convert_writes_the_same(sources, rounded, tmp_path, target):
    """Through the command's own function, of a target's first format, the weights and the config are the same again."""
    model = "experts"
    words = {"aqlm": "1x8"}.get(target, HELD[target][0])
    first = write(rounded(model, held(target, words)[0]), target, tmp_path / "first")
    again = convert(first, target, tmp_path / "again.gguf" if TARGETS[target].suffix else tmp_path / "again")
    assert again.exact == again.matrices
    if first.is_file():
        assert first.read_bytes() == again.path.read_bytes()
    else:
        assert {file.name: file.read_bytes() for file in first.iterdir()} == {file.name: file.read_bytes() for file in again.path.iterdir() if file.name != "README.md"}
