"""What a model takes in memory under each recipe, from its config alone: weights, KV cache and overhead, before anything is downloaded.

    weights     the tensors of the file that `lowbit quantize` would write; exact to the byte where it says so
    KV cache    2 (K and V) x layers x KV heads x head_dim x context x kv_bits / 8; a layer with a sliding window holds at most the window
    overhead    an estimate: the program itself, and the float32 logits and activations of a batch of BATCH_TOKENS tokens

The total is that of a program which keeps the weights packed (llama.cpp, vLLM). One that decodes them first needs what the row of its
dtype says.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from .. import numerics
from ..checkpoints import Checkpoint, LazyQuantized, LazyTensor, ct_layouts, gguf, gguf_arch, open_checkpoint, safetensors
from ..checkpoints.ct_layouts import layout_of
from ..errors import CheckpointError, ModelError, RecipeError, ShapeError
from ..models import skeleton as sk
from ..models.linears import find_linears, outside_matrices
from ..numerics.ggml import BLOCK_TYPES
from ..recipe import Recipe
from ..scheme import CASTS, INT, Scheme
from . import resources
from .recipes import parse, resolve, settle

DEFAULT_RECIPES = (
    "float32", "bfloat16", "int8-sym-channel-rtn", "int4-sym-g128", "int4-sym-g64", "int3-asym-g64", "int2-asym-g64",
    "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k",
)  # fmt: skip
GROUP_SIZES = (128, 64, 32, 16)  # tried in turn where a group does not divide a matrix
MOST_MODULES = 20_000  # of a config alone; the largest models have some thousands
BATCH_TOKENS = 512  # of llama.cpp's and of our own passes over a prompt
PROGRAM_BYTES = 300_000_000  # RssAnon of a Python process with torch and transformers, less the model's (pipeline/latency.py); llama.cpp's takes less
_CONTEXT_FREE = ("linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding")
_COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class PlanRow:
    """What one recipe takes.

    target: the layout of the file. weights_bytes: of all its tensors (without the header, which holds the tokenizer in a GGUF).
    bits_per_weight: 8 x weights_bytes / all parameters. exact: whether weights_bytes is what quantize writes to the byte, else an estimate
    and notes say why. fits: whether total_bytes, the sum of the three, is at most the memory of the plan.
    """

    recipe: str
    target: str
    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    total_bytes: int
    bits_per_weight: float
    exact: bool
    fits: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A model and what it takes under each recipe. parameters: tied ones once; linear_parameters: those of the matrices that are quantized."""

    name: str
    architecture: str
    parameters: int
    linear_parameters: int
    context: int
    kv_bits: int
    memory_bytes: int
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def best_fit(self) -> PlanRow | None:
        """The row with the most bytes for weights that fits; None when none does."""
        return max((row for row in self.rows if row.fits), key=lambda row: row.weights_bytes, default=None)


@dataclass(frozen=True)
class ParameterRow:
    """A round figure: a number of parameters at a number of bits each, nothing else counted."""

    bits: float
    weights_bytes: int
    fits: bool


def plan(
    config: dict | str | Path,
    *,
    recipes: list[str] | None = None,
    context: int = 4096,
    memory: int | None = None,
    kv_bits: int = 16,
) -> Plan:
    """What a model takes under each recipe; no weight is read, and of a hub id only config.json is downloaded.

    config: the contents of a config.json, its path, a model folder (with or without weights; where they are, their headers say the dtypes),
    a GGUF file or a hub id. recipes: as quantize takes them; None: DEFAULT_RECIPES. context: tokens in the KV cache. memory: bytes; None:
    this machine's. kv_bits: of an element of the KV cache.
    Raises CheckpointError or ModelError for what is no language model, RecipeError for a bad recipe or option.
    """
    for name, value in (("context", context), ("kv_bits", kv_bits)):
        if value < 1:
            raise RecipeError(f"{name} is {value}; expected at least 1.")
    model = _read(config)
    limit = resources.total_memory() if memory is None else memory
    kv_bytes, kv_notes = _kv_cache(model.config, context, kv_bits)
    overhead = _overhead(model.config, context)
    rows = tuple(_row(model, text, kv_bytes, overhead, limit) for text in recipes or DEFAULT_RECIPES)
    notes = tuple(note for note in (model.refused, model.note, *kv_notes) if note)
    return Plan(model.name, model.architecture, model.parameters, _count(model.linears), context, kv_bits, limit, rows, notes)


def plan_parameters(parameters: float | str, bits_list: tuple[float, ...] = (32, 16, 8, 4, 2), *, memory: int | None = None) -> tuple[ParameterRow, ...]:
    """The textbook's round figures for a number of parameters (70e9, "70e9", "70B", "110M"), without a config."""
    count = parameter_count(parameters)
    limit = resources.total_memory() if memory is None else memory
    return tuple(ParameterRow(bits, textbook(count, bits), textbook(count, bits) <= limit) for bits in bits_list)


def textbook(parameters: int, bits: float) -> int:
    """Bytes of so many parameters at so many bits each: 70e9 at 4 bits are 35 GB."""
    return round(parameters * bits / 8)


def parameter_count(text: float | str) -> int:
    """70e9, "70e9", "70B", "1.1b" or "110M" as a number of parameters."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmbt]?)", str(text).strip().lower())
    count = round(float(match[1]) * _COUNTS[match[2]]) if match else 0
    if count < 1:
        raise RecipeError(f"parameters is {text!r}; expected a number such as 70e9, 70B or 110M.")
    return count


# ------------------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class _Model:
    """A model without weights. refused: why lowbit cannot quantize it, when its matrices are only an estimate."""

    name: str
    architecture: str
    config: object
    checkpoint: Checkpoint
    parameters: int
    linears: dict[str, tuple[int, int]]
    outside: dict[str, tuple[int, int]]
    unused: frozenset[str] = frozenset()
    refused: str = ""
    note: str = ""

    @property
    def dtype(self) -> str:
        """Of the matrices, as quantize sees it."""
        entry = self.checkpoint.lazy(next(iter(self.linears)))
        name = str(entry.dtype).removeprefix("torch.")
        return name if name in CASTS else "float32"


def _read(config: dict | str | Path) -> _Model:
    checkpoint = _open(config)
    try:
        skeleton = sk.build(checkpoint)
        found = [linear for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index)]
    except ModelError as error:
        return _estimated(checkpoint, str(error))
    architecture, linears = type(skeleton.model).__name__, {linear.name: linear.shape for linear in found}
    made = _Model(checkpoint.path.name, architecture, skeleton.text_config, skeleton.checkpoint, skeleton.parameter_count(), linears, outside_matrices(skeleton), frozenset(skeleton.unused))
    return replace(made, note=f"{architecture}'s Conv1D layers are written as GGUF or dense; no program reads them from compressed-tensors.") if found and found[0].transposed else made


def _open(config: dict | str | Path) -> Checkpoint:
    """A checkpoint of real headers where weights are at hand, else a stand-in made from the config."""
    if isinstance(config, dict):
        return stand_in(config, str(config.get("_name_or_path") or config.get("model_type")))
    path = Path(config).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return open_checkpoint(path)
    if path.is_file():
        return stand_in(safetensors.read_json(path.resolve()), path.absolute().parent.name)
    if not path.is_dir():
        return stand_in(safetensors.read_json(_hub_config(str(config))), str(config))
    if not (path / "config.json").is_file():
        return open_checkpoint(path)
    data = safetensors.read_json(path / "config.json")
    method = safetensors.quant_method(data, path)
    if method in (None, "compressed-tensors") and any(path.glob("*.safetensors")):
        return open_checkpoint(path)
    return stand_in(data, path.absolute().name)


def _hub_config(name: str) -> Path:
    """config.json of a hub id, downloaded or from the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", name) or name.endswith((".gguf", ".json", ".safetensors")):
        raise CheckpointError(f"{name} does not exist. Expected a config.json, a folder that holds one, a .gguf file, or a hub id such as org/name.")
    try:
        return Path(hf_hub_download(name, "config.json"))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name} is neither a path here nor a model on the hub (or it is private: run `hf auth login`).") from error
    except LocalEntryNotFoundError as error:
        raise _no_hub(name, error) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{name} on the hub has no config.json. Give the path of its GGUF file, or the model that it was made from.") from error
    except (HfHubHTTPError, OSError) as error:
        raise _no_hub(name, error) from error


def _no_hub(name: str, error: Exception) -> CheckpointError:
    reason = f"the Hugging Face hub cannot be reached ({type(error).__name__})"
    return CheckpointError(f"{name} is no path here, and {reason}. Give the path of a config.json, or try again with a network.")


def stand_in(config: dict, name: str) -> Checkpoint:
    """A checkpoint without weights: the names, shapes and dtypes that save_pretrained would write for this config."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    model = _on_meta(Checkpoint("config", Path(name), config, tensors={}))
    state = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    return _of_tensors(revert_weight_conversion(model, state), name, config)


def _on_meta(checkpoint: Checkpoint):
    """The model of a checkpoint's config, without weights and without asking whether lowbit can quantize it."""
    settings = sk.read_config(checkpoint)
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or settings.get_text_config().dtype
    dtype = getattr(torch, str(dtype).removeprefix("torch."), None)
    model = sk.on_meta(checkpoint, sk.model_class(settings), settings, dtype if isinstance(dtype, torch.dtype) else torch.float32, modules=MOST_MODULES)
    model.tie_weights()
    return model


def _of_tensors(tensors: dict[str, torch.Tensor], name: str, config: dict) -> Checkpoint:
    return Checkpoint("config", Path(name), config, {key: LazyTensor(tuple(value.shape), value.dtype, _nothing) for key, value in tensors.items()})


def _nothing(*_: object):
    raise CheckpointError("a plan has no weights to read.")


def _estimated(checkpoint: Checkpoint, reason: str) -> _Model:
    """A model that lowbit cannot quantize: every linear layer and every expert outside of towers and embeddings is taken for quantized."""
    model = _on_meta(checkpoint)
    head, linears = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if sk.is_tower(name) or module is head:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            linears[f"{name}.weight"] = tuple(module.weight.shape)[:: -1 if isinstance(module, Conv1D) else 1]
        elif "expert" in name:
            linears |= {f"{name}.{key}": (p.shape[0] * p.shape[1], p.shape[2]) for key, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if not linears:
        raise ModelError(f"{type(model).__name__} has no linear layer. {reason}")
    tensors = dict(model.named_parameters())
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), head) if module is not None}
    outside = {key: tuple(p.shape) for key, p in tensors.items() if id(p) in embeddings}
    found = _of_tensors(tensors, checkpoint.path.name, checkpoint.config)
    return _Model(checkpoint.path.name, type(model).__name__, model.config.get_text_config(), found, sum(p.numel() for p in tensors.values()), linears, outside, refused=reason)


def _count(shapes: dict[str, tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


# --------------------------------------------------------------------------------------------------- what is there beside weights


def _kv_cache(config, context: int, bits: int) -> tuple[int, list[str]]:
    """Bytes of the cache of context tokens, and what to say about them. config: of the text model."""
    notes = []
    limit = getattr(config, "max_position_embeddings", None)
    if limit and context > limit:
        notes.append(f"The context of {context:,} tokens is longer than the {limit:,} that the model was made for.")
    if getattr(config, "kv_lora_rank", None):
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        notes.append("The KV cache is that of a program which keeps the latents of this attention (llama.cpp, vLLM); transformers keeps far more.")
        return config.num_hidden_layers * latent * context * bits // 8, notes
    kinds, settings = get_layer_types_and_kwargs(config)
    elements = states = 0
    for kind, setting, layer in zip(kinds, settings, config.per_layer_config, strict=True):
        if kind in _CONTEXT_FREE:
            states += 1
        if kind in ("dummy", "linear_attention", "conv", "mamba"):
            continue
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        elements += 2 * heads * head_dim * min(context, setting.get("sliding_window") or context)
    if states:
        notes.append(f"{states} of {len(kinds)} layers keep a state of fixed size, which is not counted.")
    return elements * bits // 8, notes


def _overhead(config, context: int) -> int:
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(width) if isinstance(width, list | tuple) else width
    return PROGRAM_BYTES + 4 * min(BATCH_TOKENS, context) * (config.vocab_size + 4 * config.hidden_size + 3 * width)


# -------------------------------------------------------------------------------------------------------- the weights of a recipe


def _row(model: _Model, text: str, kv_bytes: int, overhead: int, memory: int) -> PlanRow:
    draft = parse(text)
    if draft.recipe.scheme.format in BLOCK_TYPES:
        draft = parse(text, target_name="gguf")
    recipe, _ = settle(draft, model.linears, model.dtype)
    if recipe.scheme.format in CASTS and not recipe.rules:
        target, (weights, exact, notes) = "safetensors", _cast(model, recipe.scheme.format)
    else:
        target, (weights, exact, notes) = recipe.target, _quantized(model, recipe)
        if "rotate" in recipe.transforms and getattr(model.config, "tie_word_embeddings", False):
            (rows, columns), dtype = next(iter(model.outside.values())), model.dtype
            weights, exact = weights + rows * columns * getattr(torch, dtype).itemsize, recipe.target != "gguf" and exact
            notes = [*notes, "Rotated, the tied head is a tensor of its own."]
    total = weights + kv_bytes + overhead
    return PlanRow(str(text), target, weights, kv_bytes, overhead, total, 8 * weights / model.parameters, exact and not model.refused, total <= memory, tuple(notes))


def _cast(model: _Model, dtype: str) -> tuple[int, bool, list[str]]:
    """The whole model in one dtype."""
    entries = [model.checkpoint.lazy(name) for name in model.checkpoint.shapes() if name not in model.unused]
    floats = [entry for entry in entries if entry.dtype.is_floating_point]
    size = sum(entry.numel for entry in floats) * getattr(torch, dtype).itemsize + sum(entry.nbytes for entry in entries if not entry.dtype.is_floating_point)
    exact = all(entry.dtype == getattr(torch, dtype) for entry in floats)
    note = f"The whole model in {dtype}; the recipe {dtype} converts the linear layers and leaves the others as they are."
    return size, exact, [] if exact else [note]


def _quantized(model: _Model, recipe: Recipe) -> tuple[int, bool, list[str]]:
    schemes, notes, refused = _schemes(model, recipe)
    checkpoint = _as_written(model, recipe.target, schemes)
    if recipe.target == "safetensors":
        return sum(checkpoint.lazy(name).nbytes for name in checkpoint.shapes()), not refused, notes
    if recipe.target != "gguf":
        return checkpoint.tensor_bytes, not refused, notes
    try:
        size = _gguf_bytes(checkpoint)
    except CheckpointError as error:
        return _estimated_gguf_bytes(checkpoint), False, [*notes, str(error)] if not model.refused else notes
    dropped = [name for name in checkpoint.tensors if gguf_arch.place(gguf_arch.find(checkpoint.config), name) is None]
    return size, not refused, [*notes, f"{len(dropped)} tensors of the vision tower are not part of the file."] if dropped else notes


def _schemes(model: _Model, recipe: Recipe) -> tuple[dict[str, Scheme], list[str], bool]:
    """The scheme of every matrix that is quantized, what was substituted, and whether quantize would refuse the recipe as it is named."""
    try:
        plans = resolve(recipe, model.linears, model.outside, model.checkpoint.config)
    except CheckpointError:  # not of GGUF's architectures, which the caller says
        if recipe.mixture is None:
            raise
        schemes, notes, _ = _schemes(model, replace(recipe, mixture=None))
        return schemes, [*notes, f"{recipe.scheme.name} is counted throughout: what the mixture {recipe.mixture} chooses is not known."], True
    except ShapeError:
        if recipe.rules:
            raise
        return _with_fallbacks(model, recipe)
    counts = Counter(note for one in plans.values() for note in one.notes)
    return {name: one.scheme for name, one in plans.items()}, [f"{count} matrices: {note}." for note, count in counts.items()], False


def _with_fallbacks(model: _Model, recipe: Recipe) -> tuple[dict[str, Scheme], list[str], bool]:
    """Matrices that cannot hold the scheme take the largest group that divides them, as a rule in a recipe file would say."""
    schemes: dict[str, Scheme] = {}
    counts: Counter[tuple[int, str]] = Counter()
    for name, shape in model.linears.items():
        try:
            plans = resolve(recipe, {name: shape}, {})
        except ShapeError:
            other = replace(recipe.scheme, block=_fitting_group(recipe.scheme, shape[1])) if recipe.scheme.format == INT else numerics.scheme_of("float16")
            counts[shape[1], other.name] += 1
            plans = resolve(replace(recipe, scheme=other), {name: shape}, {})
        schemes |= {key: one.scheme for key, one in plans.items()}
    schemes |= {key: one.scheme for key, one in resolve(recipe, {}, model.outside).items()}
    said = "{} cannot hold rows of {}: {} is counted for {} matrices (say so with a rule in a recipe file)."
    notes = [said.format(recipe.scheme.name, columns, other, count) for (columns, other), count in counts.items()]
    return schemes, notes, True


def _fitting_group(scheme: Scheme, columns: int) -> tuple[int, int]:
    return 1, next((size for size in GROUP_SIZES if size < scheme.group_size and columns % size == 0), -1)


def _as_written(model: _Model, target_name: str, schemes: dict[str, Scheme]) -> Checkpoint:
    """What quantize hands to the writer, without weights."""
    source = model.checkpoint
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in schemes and name not in model.unused}
    rest = {name: entry for name, entry in source.quantized.items() if name not in schemes}
    if not source.kind == target_name == "gguf":
        tensors, rest = tensors | {name: source.lazy(name) for name in rest if name not in model.unused}, {}
    shapes = {**model.linears, **model.outside}
    dtypes = {name: source.lazy(name).dtype for name in schemes}
    made = {name: LazyQuantized(scheme, shapes[name], dtypes[name], _nothing, stored_bytes(scheme, shapes[name])) for name, scheme in schemes.items()}
    return replace(source, tensors=tensors, quantized={**rest, **made})


@lru_cache(maxsize=4096)
def stored_bytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bytes of a matrix [out_features, in_features] in a compressed-tensors file, or of its blocks or its cast."""
    return numerics.nbytes(scheme, shape) if layout_of(scheme) is None else ct_layouts.nbytes(scheme, shape)


def _gguf_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the tensors that the GGUF writer would write; CheckpointError where it would refuse. What a rope does is no weight and not counted."""
    arch = gguf_arch.find(checkpoint.config)
    config = gguf_arch.full_config(checkpoint.config)
    gguf_arch.metadata(arch, config)
    return sum(tensor.nbytes for tensor in gguf._plan(checkpoint, arch, config, None) if tensor.name not in gguf_arch.ROPE_TENSORS)


def _estimated_gguf_bytes(checkpoint: Checkpoint) -> int:
    """For a model that the GGUF writer does not know: vectors in float32, the rest as it is."""
    dense = sum(tensor.numel * (4 if len(tensor.shape) < 2 else tensor.dtype.itemsize) for tensor in checkpoint.tensors.values())
    return dense + sum(entry.nbytes for entry in checkpoint.quantized.values())
