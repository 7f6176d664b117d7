"""A transformers model on the meta device, whose parts are filled from a checkpoint one at a time.

transformers defines the model and knows how checkpoint names map to parameters (renamed, fused experts); here is only what it
takes to load one module instead of all. Traps met by experiment: buffers that are in no checkpoint (rotary frequencies) are made
by the model's own _init_weights, and loading is strict: a parameter without a tensor is an error, never noise.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from .. import numerics
from ..checkpoints import Checkpoint, LazyTensor
from ..checkpoints.checkpoint import plain_config
from ..errors import CheckpointError, ModelError
from .arch import refuse_unsupported
from .attention import use_native
from .experts import EXPERTS_IMPLEMENTATION, is_experts

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: checkpoint names by converter pattern, and the converter (None: one tensor as it is, or with stacked a matrix [out, in] for each expert)."""

    names: dict[str, list[str]]
    converter: WeightConverter | None
    stacked: bool = False

    def flat(self) -> list[str]:
        return [name for names in self.names.values() for name in names]


@dataclass
class Skeleton:
    """A model on meta with the way to fill it. text: the module that owns the blocks; blocks_name: e.g. "model.layers".

    parameters: how many there are, tied ones once. unused: names of the checkpoint that no parameter takes.
    """

    model: transformers.PreTrainedModel
    checkpoint: Checkpoint
    sources: dict[str, Source]
    text_name: str
    blocks_name: str
    parameters: int
    unused: list[str] = field(default_factory=list)

    @property
    def text(self) -> transformers.PreTrainedModel:
        found = self.model.get_submodule(self.text_name)
        assert isinstance(found, transformers.PreTrainedModel)
        return found

    @property
    def blocks(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.blocks_name)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def config(self):
        return self.model.config

    @property
    def text_config(self):
        return self.model.config.get_text_config()

    def block_name(self, index: int) -> str:
        return f"{self.blocks_name}.{index}"

    def block_bytes(self, index: int, dtype: torch.dtype) -> int:
        """Bytes of one block's parameters in dtype."""
        return sum(p.numel() for p in self.blocks[index].parameters()) * dtype.itemsize

    def parameter_count(self) -> int:
        """All parameters, tied ones once; as the model was built, whatever has been filled or replaced since."""
        return self.parameters


def build(checkpoint: Checkpoint) -> Skeleton:
    """Build the checkpoint's model on the meta device and map its parameters to checkpoint names; loads no weight (but compares two that say that they are tied)."""
    config = read_config(checkpoint)
    refuse_unsupported(config)
    model = on_meta(checkpoint, model_class(config), config, torch.float32, modules=1000 + 20 * len(checkpoint.shapes()))
    model.eval()
    model.tie_weights()
    if model._can_set_experts_implementation():
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    use_native(model)
    blocks_name = find_blocks(model)
    checkpoint = unstacked(model, checkpoint)
    sources, unused = _map_names(model, checkpoint)
    return Skeleton(model, checkpoint, sources, blocks_name.rpartition(".")[0], blocks_name, sum(p.numel() for p in model.parameters()), unused)


def on_meta(checkpoint: Checkpoint, kind: type[transformers.PreTrainedModel], config, dtype: torch.dtype, *, modules: int) -> transformers.PreTrainedModel:
    """A model of a config without weights; ModelError for values that make none, and for more modules than given (numbers of layers and experts may be anything)."""
    made = 0

    def count(module: nn.Module, name: str, part: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > modules:
            raise ModelError(f"{checkpoint.path}: a model of this config has more than {modules:,} modules (layers, experts). It is damaged, or of another model than the weights.")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return kind._from_config(config, dtype=dtype)
    except ModelError:
        raise
    except Exception as error:  # the library raises many kinds for values that make no model, and for a package that is not there
        raise bad_config(checkpoint, error) from error
    finally:
        hook.remove()


def read_config(checkpoint: Checkpoint):
    data = plain_config(checkpoint.config, checkpoint.path)
    model_type = data.pop("model_type", None)
    if not isinstance(model_type, str):
        found = "no model_type" if model_type is None else f"the model_type {model_type!r}"
        raise CheckpointError(f"{checkpoint.path}: config.json has {found}, so it is not known which model this is.")
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(f"model_type {model_type!r} is not known to transformers {transformers.__version__}. A newer transformers may know it.")
    try:
        config = transformers.AutoConfig.for_model(model_type, **data)
        for sub in (config, config.get_text_config()):
            sub.use_cache = False
            sub.output_hidden_states = sub.output_attentions = False
    except Exception as error:  # types, validators and models each raise their own
        raise bad_config(checkpoint, error) from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise bad_config(checkpoint, ValueError(f"max_position_embeddings is {limit!r}; expected a positive number"))
    return config


def bad_config(checkpoint: Checkpoint, error: Exception) -> ModelError:
    reason = " ".join(str(error).split()) or "no reason given"
    return ModelError(f"{checkpoint.path}: transformers {transformers.__version__} cannot build a model of this config ({type(error).__name__}: {reason}).")


def model_class(config) -> type[transformers.PreTrainedModel]:
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(f"config.json has the architectures {named!r}; expected a list of names.")
    for name in named:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.can_generate():
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]  # type: ignore[return-value]  # pairs are of other mappings
    raise ModelError(f"model_type {config.model_type!r} has no language model with a head in transformers; lowbit quantizes decoders.")


def find_blocks(model: transformers.PreTrainedModel) -> str:
    """The name of the ModuleList that holds the text model's blocks: the one with the most parameters outside vision and audio towers."""
    text_config = model.config.get_text_config()
    depth = getattr(text_config, "num_hidden_layers", None)
    best, most = "", 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != depth or is_tower(name):
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > most:
            best, most = name, size
    owner = best.rpartition(".")[0]
    if not best or not isinstance(model.get_submodule(owner), transformers.PreTrainedModel):
        raise ModelError(f"{type(model).__name__}: no ModuleList of {depth} blocks was found in a text model, so it cannot be streamed block by block.")
    return best


def is_tower(name: str) -> bool:
    return any(word in name.lower() for word in ("vision", "visual", "audio", "image", "speech"))


EXPERT = re.compile(r"(.+\.\w+_proj)\.(\d+)\.weight")  # a matrix of one expert, of a parameter that the field's files hold in one tensor


def unstacked(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a matrix [out, in] for each expert where one tensor holds those of all experts (PARAMETER.3.weight of PARAMETER)."""
    tensors = dict(checkpoint.tensors)
    for name, module in model.named_modules():
        for parameter in ("gate_up_proj", "up_proj", "down_proj") if is_experts(module) and hasattr(module, "is_transposed") else ():
            stack = tensors.get(f"{name}.{parameter}")
            if stack is not None and len(stack.shape) == 3 and stack.shape[0] == module.num_experts:
                del tensors[f"{name}.{parameter}"]
                tensors |= {f"{name}.{parameter}.{e}.weight": _one_expert(stack, e, module.is_transposed) for e in range(stack.shape[0])}
    return checkpoint if tensors.keys() == checkpoint.tensors.keys() else replace(checkpoint, tensors=tensors)


def _one_expert(stack: LazyTensor, expert: int, transposed: bool) -> LazyTensor:
    whole = lambda: stack.read(expert, expert + 1)[0]
    shape = stack.shape[1:]
    return LazyTensor(shape[::-1] if transposed else shape, stack.dtype, lambda start, stop: (whole().T if transposed else whole())[start:stop].clone())


def stacks(skeleton: Skeleton) -> dict[str, list[str]]:
    """The parameters whose experts lie in the checkpoint one by one without a converter that joins them, and their names there in order."""
    return {name: source.flat() for name, source in skeleton.sources.items() if source.stacked}


def _map_names(model: transformers.PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, Source], list[str]]:
    """Parameter name -> Source by transformers' own renamings and converters; and the checkpoint names that no parameter takes."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Source] = {}
    unused = []
    for name in sorted(checkpoint.shapes(), key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted and (expert := EXPERT.fullmatch(name)) and expert[1] in wanted:
            sources.setdefault(expert[1], Source({}, None, stacked=True)).names.setdefault(expert[1], []).append(name)
            continue
        if target not in wanted:
            unused.append(name)
            continue
        source = sources.setdefault(target, Source({}, None if pattern is None else by_pattern.get(pattern)))
        source.names.setdefault(pattern or name, []).append(name)
    _refuse_missing(model, sources, wanted, checkpoint)
    return sources, unused


def _refuse_missing(model, sources, wanted, checkpoint) -> None:
    for source in sources.values():  # one converter can fill several parameters (a fused tensor split)
        if source.converter is not None and len(source.converter.target_patterns) > 1:
            raise ModelError(f"{type(model).__name__}: the checkpoint stores several parameters in one tensor ({source.flat()[0]}), which cannot be streamed yet.")
    tied = model.all_tied_weights_keys
    _refuse_untied(checkpoint, sources, tied)
    _fill_ties(sources, tied)
    missing = [n for n in wanted if n not in sources and tied.get(n) not in sources]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} of {len(wanted)} weights of {type(model).__name__} are not in the checkpoint, the first is {missing[0]}. It is incomplete or of another model."
        )
    shapes, parameters = checkpoint.shapes(), dict(model.named_parameters())
    for parameter, source in sources.items():
        name = source.flat()[0]
        if source.stacked:
            _refuse_bad_stack(model, parameter, source, checkpoint)
            continue
        if name in checkpoint.tensors and parameter in parameters and checkpoint.tensors[name].dtype not in FLOATS:
            raise CheckpointError(f"{checkpoint.path}: {name} is {checkpoint.tensors[name].dtype}, which is no weight; it is quantized, and config.json does not say how.")
        shape = shapes[name][::-1] if turned(model, parameter, name, checkpoint) else shapes[name]
        if source.converter is None and tuple(shape) != tuple(wanted[parameter].shape):
            raise CheckpointError(f"{checkpoint.path}: {name} has shape {list(shape)}, and the config asks for {list(wanted[parameter].shape)}.")


def _refuse_bad_stack(model: nn.Module, parameter: str, source: Source, checkpoint: Checkpoint) -> None:
    wanted, names, shapes = tuple(model.get_parameter(parameter).shape), source.flat(), checkpoint.shapes()
    one = wanted[:0:-1] if model.get_submodule(parameter.rpartition(".")[0]).is_transposed else wanted[1:]
    found = [int(expert[2]) for name in names if (expert := EXPERT.fullmatch(name))]
    if found != list(range(wanted[0])) or any(tuple(shapes[name]) != one for name in names):
        raise CheckpointError(f"{checkpoint.path}: {parameter} has {len(names)} experts, the first of {list(shapes[names[0]])}; the config asks for {wanted[0]} of {list(one)}.")


def turned(model: nn.Module, parameter: str, name: str, checkpoint: Checkpoint) -> bool:
    """Whether a weight lies in the checkpoint the other way round: quantized matrices are [out, in], and Conv1D's parameters [in, out]."""
    return name in checkpoint.quantized and isinstance(model.get_submodule(parameter.rpartition(".")[0]), Conv1D)


def _refuse_untied(checkpoint: Checkpoint, sources: dict[str, Source], tied: dict[str, str]) -> None:
    """Raise CheckpointError where the config ties two weights that the checkpoint holds both, with different values: programs disagree which one counts."""
    for pair in tied.items():
        one, other = (sources[name].flat()[0] if name in sources else "" for name in pair)
        if one != other and one in checkpoint.tensors and other in checkpoint.tensors:
            a, b = checkpoint.tensors[one], checkpoint.tensors[other]
            if a.shape != b.shape or not all(torch.equal(x, y) for x, y in zip(a.chunks(), b.chunks(), strict=True)):
                raise CheckpointError(f"{checkpoint.path}: config.json ties {one} to {other}, and the checkpoint holds both with different values. Set tie_word_embeddings to false, or remove one.")


def _fill_ties(sources: dict[str, Source], tied: dict[str, str]) -> None:
    """A tied weight that is stored under the other's name (the head instead of the embedding) is taken from there."""
    for target, source in tied.items():
        if source not in sources and target in sources:
            sources[source] = sources[target]


def load_parameter(skeleton: Skeleton, name: str, dtype: torch.dtype) -> Tensor:
    """One parameter of the model, from the checkpoint, cast to dtype when floating; raises FormatError naming a tensor with NaN or infinity."""
    source = skeleton.sources[name]
    if source.stacked:
        transposed = skeleton.model.get_submodule(name.rpartition(".")[0]).is_transposed
        made = torch.empty(skeleton.model.get_parameter(name).shape, dtype=dtype)
        for expert, key in enumerate(source.flat()):
            made[expert] = _dense(skeleton, key, dtype).T if transposed else _dense(skeleton, key, dtype)
        return made
    if source.converter is None:
        loaded = _dense(skeleton, source.flat()[0], dtype)
        return loaded.T.contiguous() if turned(skeleton.model, name, source.flat()[0], skeleton.checkpoint) else loaded
    converter = copy.deepcopy(source.converter)
    for pattern, names in source.names.items():
        for key in names:
            converter.add_tensor(name, key, pattern, lambda key=key: _dense(skeleton, key, dtype))  # type: ignore[arg-type]  # callables are taken too
    made = converter.convert(name, model=skeleton.model, config=skeleton.config)[name]
    made = made[0] if isinstance(made, list) else made
    wanted = skeleton.model.get_parameter(name).shape
    if made.shape != wanted:
        raise CheckpointError(f"{name}: the checkpoint's tensors join to {list(made.shape)}, and the config asks for {list(wanted)}.")
    return made


def _dense(skeleton: Skeleton, name: str, dtype: torch.dtype) -> Tensor:
    """A checkpoint tensor, in dtype when floating."""
    tensor = skeleton.checkpoint.dense(name)
    if not tensor.is_floating_point():
        return tensor
    numerics.refuse_bad_values(tensor, name)
    return tensor.to(dtype)


def load_module(skeleton: Skeleton, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A filled copy of the module called name (a block); the skeleton stays on meta."""
    module = copy.deepcopy(skeleton.model.get_submodule(name))
    for local, part in module.named_modules():
        fill(skeleton, f"{name}.{local}" if local else name, part, dtype, device)
    return module.eval()


def fill(skeleton: Skeleton, name: str, part: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give the parameters and buffers that part itself owns (not its children) their values, in place."""
    _make_buffers(skeleton.model, part, device)
    for leaf, parameter in part._parameters.items():
        if parameter is not None:
            part._parameters[leaf] = nn.Parameter(load_parameter(skeleton, f"{name}.{leaf}" if name else leaf, dtype).to(device), requires_grad=False)
    fill_stored_buffers(skeleton, name, part, device)


def fill_stored_buffers(skeleton: Skeleton, name: str, part: nn.Module, device: torch.device) -> None:
    """Give the buffers that part itself owns and that the checkpoint holds (a router's correction) their values, in their own dtype."""
    for leaf, buffer in part._buffers.items():
        full = f"{name}.{leaf}" if name else leaf
        if buffer is not None and full in skeleton.sources:
            part._buffers[leaf] = skeleton.checkpoint.dense(skeleton.sources[full].flat()[0]).to(device)


def fill_buffers(model: transformers.PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Give real values to all buffers on meta below module; its parameters stay as they are."""
    for part in module.modules():
        _make_buffers(model, part, device)


def _make_buffers(model: transformers.PreTrainedModel, part: nn.Module, device: torch.device) -> None:
    """Buffers that are in no checkpoint, by the model's own _init_weights."""
    empty = {n: b for n, b in part._buffers.items() if b is not None and b.is_meta}
    for name, buffer in empty.items():
        part._buffers[name] = torch.full_like(buffer, math.nan if buffer.is_floating_point() else 0, device=device)
    if empty:
        model._init_weights(part)
    for name in empty:
        value = part.get_buffer(name)
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ModelError(f"{type(part).__name__}.{name} is in no checkpoint and {type(model).__name__} does not say how to make it.")


def modules_outside_blocks(skeleton: Skeleton) -> Iterator[tuple[str, nn.Module]]:
    """Every leaf-owning module outside the blocks and towers: embeddings, final norm, head, rotary embedding."""
    for name, module in skeleton.model.named_modules():
        own = list(module.parameters(recurse=False)) or list(module.buffers(recurse=False))
        if own and not name.startswith(skeleton.blocks_name + ".") and not is_tower(name):
            yield name, module
