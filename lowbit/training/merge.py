"""A LoRA adapter merged into the weights that it was trained against, and quantized again with error feedback; with what that cost."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import __version__, numerics
from ..algorithms.rtn import RtnOptions
from ..checkpoints import TARGETS, Checkpoint, LazyTensor, open_checkpoint
from ..checkpoints.adapter import Adapter, LowRank, open_adapter
from ..checkpoints.safetensors import read_json
from ..errors import CheckpointError, JobError, ModelError, RecipeError
from ..evaluation.summary import Estimate, Summary, summarize
from ..models import skeleton as sk
from ..models.linears import find_linears
from ..models.skeleton import Skeleton
from ..pipeline import recipes, resources
from ..pipeline.card import write_measured
from ..pipeline.evaluate import evaluation_windows, score_all
from ..pipeline.job import refuse_existing, work_folder
from ..pipeline.locate import base_name, load_tokenizer, locate
from ..pipeline.output import checked, readable_errors, refuse_own_input, shard_bytes_of, with_rounded
from ..pipeline.output import write as write_output
from ..pipeline.quantize import fingerprint, quantize
from ..pipeline.recipes import LayerPlan
from ..progress import SILENT, Progress
from ..recipe import Recipe
from .job import NOTES
from .lossless import compared, shifted

RECIPE = "int4-asym-g64-gptq"
WINDOW = 512  # tokens of a window that is measured, where the model takes so many


@dataclass(frozen=True)
class Merged:
    """What merge made. kl: mean KL divergence to base + adapter in float32, nats; naive: the same of plain rounding in the same number formats (None: not measured, or not to be had).

    statement: of a merge without loss, what was found by decoding the file.
    """

    path: Path
    provenance: dict
    seconds: float
    kl: Estimate | None = None
    naive: Estimate | None = None
    windows: int = 0
    length: int = 0
    statement: str = ""
    notes: tuple[str, ...] = field(default=())


def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    target_name: str | None = None,
    base_recipe: str | None = None,
    lossless: bool = False,
    calibration: str | Path | None = None,
    n_samples: int | None = None,
    seq_len: int | None = None,
    measure: bool = True,
    text: str | Path | None = None,
    n_windows: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Merged:
    """Merge a LoRA adapter into the weights that it was trained against, dequantize(base) + s B A, and quantize the result; tensor by tensor, nothing whole in memory.

    base: what the adapter was trained on, in any layout that lowbit opens. adapter: a folder of peft. recipe (int4-asym-g64-gptq), target_name, calibration, n_samples, seq_len, device, dtype, seed,
    max_shard_size, resume, overwrite: as in quantize.
    base_recipe: of a dense base that training rounded on the way in ("nf4-dq" in QLoRA): it is rounded so first.
    lossless: put a QA-LoRA adapter into the base's float zero-points (HQQ, Q4_1, Q5_1); no code changes, no data is needed, the layout stays.
    measure: also the KL divergence to base + adapter on held-out text (text: a file; None: the bundled evaluation text), n_windows of 512 tokens.
    Raises LowbitError before any work for a bad adapter, or one of another model.
    """
    started, path, located = time.monotonic(), Path(output), locate(base, progress=progress)
    given = {"recipe": recipe, "target": target_name, "base_recipe": base_recipe, "calibration": calibration}
    if lossless and (extra := [name for name, value in given.items() if value is not None]):
        raise RecipeError(f"a merge without loss keeps the base's codes and layout, so {' and '.join(extra)} would say nothing. Leave it out, or leave --lossless out.")
    part = open_adapter(locate(adapter, progress=progress))
    opened = open_checkpoint(located)
    refuse_own_input(path, part.path)
    if target_name is None and path.suffix == ".gguf":
        target_name = "gguf"
    base_recipe, notes = _trained_against(opened, part.path, base_recipe, lossless)
    for note in notes:
        progress.note(note)
    ground = opened if base_recipe is None else _rounded(opened, base_recipe)
    said = {
        "adapter": part.path.name, "sha256": part.sha256, "ranks": part.ranks, "matrices": len(part.layers), "base": base_name(base, located), "base_format": opened.kind,
        "base_fingerprint": fingerprint(opened), "base_recipe": base_recipe, "lossless": lossless, "lowbit": __version__,
        "asked": {"recipe": recipe.name if isinstance(recipe, Recipe) else str(recipe or RECIPE), "target": target_name, "calibration": calibration and Path(calibration).name,
                  "n_samples": n_samples, "seq_len": seq_len, "seed": seed},
    }  # fmt: skip
    statement = ""
    if _is_made(path, said, resume):
        progress.note(f"{path} is made already.")
    elif lossless:
        statement = _write_shifted(ground, part, path, said, base_name(base, located), max_shard_size, overwrite, progress)
    else:
        joined = replace(merged(ground, part), provenance={"merged": said})
        quantize(
            joined, RECIPE if recipe is None else recipe, path, target_name=target_name, calibration=calibration, n_samples=n_samples, seq_len=seq_len, device=device, dtype=dtype, seed=seed,
            max_shard_size=max_shard_size, resume=resume, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    made = open_checkpoint(path)
    result = Merged(path, made.provenance, 0.0, statement=statement, notes=tuple(notes))
    if measure:
        result = _measured(result, merged(ground, part, whole=True), made, text, n_windows, device, seed or 0, progress)
    return replace(result, seconds=time.monotonic() - started)


def _trained_against(base: Checkpoint, adapter: Path, base_recipe: str | None, lossless: bool) -> tuple[str | None, list[str]]:
    """The recipe by which training rounded a dense base, where it is given or stands beside an adapter of lowbit's; and what the user should know.

    Raises RecipeError where the adapter was trained on a base that no recipe makes again.
    """
    said = read_json(adapter / NOTES) if (adapter / NOTES).is_file() else {}
    if said and fingerprint(base) not in (said.get("model"), said.get("base")):
        return base_recipe, ["The adapter says that it was trained on another base than this one, or on another layout of it: its errors are right for that base's values alone."]
    if base.quantized or base_recipe is not None or lossless:
        return base_recipe, []
    if not said.get("recipe"):
        return None, [
            "The base is dense, and the adapter is merged into it as it is: right for an adapter that was trained on it so. "
            "One that was trained on a quantized base (QLoRA) has learned that base's errors: give that base, or --base-recipe nf4-dq."
        ]
    if said.get("base_kept"):
        raise RecipeError(f"the adapter was trained on a base that was made with it, {said['base_kept']}, not on {base.path}. Give that folder as BASE.")
    return said["recipe"]["name"], [f"The adapter was trained on this model rounded by {said['recipe']['name']}, and is merged into that."]


def _is_made(path: Path, said: dict, resume: bool) -> bool:
    """Whether an earlier run has made the output, so that only measuring is left."""
    if not resume or not path.exists() or work_folder(path).exists():
        return False
    if open_checkpoint(path).provenance.get("merged") != said:
        raise JobError(f"{path} exists already and is of another merge. Choose another -o, or --overwrite to replace it when the new one is whole.")
    return True


def _rounded(base: Checkpoint, words: str) -> Checkpoint:
    """A dense base with its linear layers rounded by a recipe without data, as training read it."""
    skeleton = sk.build(base)
    linears = [linear for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index)]
    if done := next((linear.name for linear in linears if linear.name in base.quantized), None):
        raise RecipeError(f"{done} is quantized in {base.path} already: its values are what training read. Leave --base-recipe out.")
    if any(linear.transposed for linear in linears):
        raise ModelError(f"{type(skeleton.model).__name__} keeps its weights in Conv1D layers, which no program rounds on the way in. Leave --base-recipe out, or give the quantized base.")
    try:
        draft = recipes.parse(f"{words}-rtn")
    except RecipeError:  # it names an algorithm, or is wrong
        draft = recipes.parse(words)
    shapes = {linear.name: linear.shape for linear in linears}
    recipe, _ = recipes.settle(draft, shapes, "float32")
    if recipe.algorithm not in ("rtn", "hqq") or recipe.transforms or recipe.scheme.act is not None:
        raise RecipeError(f"--base-recipe {words}: training rounds its base without data; name a number format and rtn or hqq, e.g. nf4-dq.")
    return with_rounded(skeleton.checkpoint, recipes.resolve(recipe, shapes, {}))


# ------------------------------------------------------------------------------------------------------------------ adding


def merged(base: Checkpoint, adapter: Adapter, *, whole: bool = False) -> Checkpoint:
    """The base with the adapter added to its weights when they are read: float32 sums, given in the base's dtype, or with whole in float32.

    Weights that the model ties, of which one is adapted, become two. CheckpointError where a tensor of the adapter finds no layer, or one of another shape.
    """
    skeleton = sk.build(base)
    places = _places(skeleton, adapter)
    ground, names = _untied(skeleton, set(places))
    tensors = dict(ground.tensors)
    for parameter, low in places.items():
        name = names.get(parameter) or skeleton.sources[parameter].flat()[0]
        turned = isinstance(skeleton.model.get_submodule(parameter.rpartition(".")[0]), Conv1D)
        tensors[name] = _sum(ground, name, low, turned, whole)
    return replace(ground, tensors=tensors, quantized={name: entry for name, entry in ground.quantized.items() if name not in tensors})


def _places(skeleton: Skeleton, adapter: Adapter) -> dict[str, LowRank]:
    """The adapter's parts by the model's parameters."""
    modules, found = dict(skeleton.model.named_modules()), {}
    kind, tied = type(skeleton.model).__name__, skeleton.model.all_tied_weights_keys
    for path, low in adapter.layers.items():
        module, parameter = modules.get(path), f"{path}.weight"
        if module is None:
            raise CheckpointError(f"{adapter.path}: {path!r} is no layer of this {kind}. The adapter belongs to another model.")
        if not isinstance(module, nn.Embedding if low.embedding else nn.Linear | Conv1D):
            raise CheckpointError(f"{adapter.path}: {path} is a {type(module).__name__} in this {kind}; expected {'an embedding' if low.embedding else 'a linear layer'}.")
        source = skeleton.sources.get(parameter) or skeleton.sources.get(tied.get(parameter, ""))
        if source is None or source.converter is not None or source.stacked:
            raise ModelError(f"{path}: its weight is joined from several tensors of the checkpoint, and an adapter cannot be merged there yet.")
        wanted = tuple(module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape)
        if low.pool > 1 and low.A.shape[1] == wanted[1]:  # peft pools in GPTQ layers only, and trains an ordinary adapter elsewhere
            low = replace(low, pool=1)
        if low.shape != wanted:
            raise CheckpointError(f"{adapter.path}: the adapter of {path} is for a weight of {list(low.shape)}, and this model's is {list(wanted)}. The adapter belongs to another model.")
        found[parameter] = low
    for path, copy in adapter.copies.items():
        _refuse_other_copy(skeleton, path, copy, adapter.path)
    return found


def _refuse_other_copy(skeleton: Skeleton, path: str, copy: LazyTensor, where: Path) -> None:
    """peft stores adapted embeddings beside the adapter; another one than the base's (tokens were added) is not merged."""
    parameter = f"{path}.weight"
    source = skeleton.sources.get(parameter) or skeleton.sources[skeleton.model.all_tied_weights_keys[parameter]]
    own = skeleton.checkpoint.lazy(source.flat()[0])
    if own.shape != copy.shape or not all(bool((own.read(at, at + 4096).to(copy.dtype) == copy.read(at, at + 4096)).all()) for at in range(0, own.shape[0], 4096)):
        raise CheckpointError(f"{where} holds a copy of {path} that differs from this base's: it was trained or resized beside the adapter, or the adapter belongs to another base.")


def _untied(skeleton: Skeleton, adapted: set[str]) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint in which tied weights are two where one of them is adapted, and the names of both there by parameter."""
    base, sources = skeleton.checkpoint, skeleton.sources
    names: dict[str, str] = {}
    config, tensors, quantized = base.config, dict(base.tensors), dict(base.quantized)
    for pair in skeleton.model.all_tied_weights_keys.items():
        if not adapted & set(pair):
            continue
        stored = {parameter: sources[parameter].flat()[0] for parameter in pair if parameter in sources}
        if len(set(stored.values())) < 2:
            only = next(iter(stored.values()))
            copy = pair[1] if pair[0] == only else pair[0]
            stored = {pair[0]: only, pair[1]: only} | {copy: copy}
            (tensors if only in tensors else quantized)[copy] = tensors[only] if only in tensors else quantized[only]  # type: ignore[assignment]
        names |= stored
        texts = {"text_config": {**config["text_config"], "tie_word_embeddings": False}} if isinstance(config.get("text_config"), dict) else {}
        config = {**config, **texts, "tie_word_embeddings": False}
    return replace(base, config=config, tensors=tensors, quantized=quantized), names


def _sum(base: Checkpoint, name: str, low: LowRank, turned: bool, whole: bool) -> LazyTensor:
    """One weight with its adapter. turned: a Conv1D's, which lies [in, out] where it is dense and [out, in] where it is quantized."""
    own = base.lazy(name)
    dtype = torch.float32 if whole else own.dtype

    def read(start: int, stop: int) -> Tensor:
        if not turned:
            return own.read(start, stop).float().add_(low.delta(start, stop)).to(dtype)
        values = own.load().float().T if name in base.quantized else own.load().float()
        return values.add(low.delta().T)[start:stop].to(dtype)

    return LazyTensor(low.shape[::-1] if turned else low.shape, dtype, read)


# ------------------------------------------------------------------------------------------------------------------ without loss


def _write_shifted(base: Checkpoint, adapter: Adapter, path: Path, said: dict, name: str, max_shard_size: int | str | None, overwrite: bool, progress: Progress) -> str:
    """Write the base with the adapter in its zero-points, in the base's layout; what decoding the file found, in words."""
    refuse_existing(path, resume=False, overwrite=overwrite)
    refuse_own_input(path, base.path)
    if base.kind not in TARGETS or not base.quantized:
        raise RecipeError(f"{base.path} is {base.kind}, which has no float zero-points. --lossless is for HQQ's integers and GGUF's Q4_1 and Q5_1.")
    kind = TARGETS[base.kind]
    if bool(kind.suffix) and max_shard_size is None and path.suffix != kind.suffix:
        raise RecipeError(f"{base.path} is {base.kind}, and a merge without loss keeps the layout: expected -o to end in {kind.suffix}.")
    skeleton = sk.build(base)
    places = _places(skeleton, adapter)
    if any(isinstance(skeleton.model.get_submodule(parameter.rpartition(".")[0]), nn.Embedding) for parameter in places) or set(places) & set(skeleton.model.all_tied_weights_keys):
        raise RecipeError("the adapter changes the embedding or a tied head, which no zero-points can take alone. Leave --lossless out.")
    layers = {skeleton.sources[parameter].flat()[0]: low for parameter, low in places.items()}
    base = checked(skeleton.checkpoint, [name for source in skeleton.sources.values() for name in source.flat()])
    made = replace(shifted(base, layers), provenance={**base.provenance, "merged": said})
    for weight, entry in made.quantized.items():
        kind.check(entry.scheme, entry.shape, weight.removesuffix(".weight"))
    resources.require_disk(path.absolute().parent, made.tensor_bytes, purpose="This merge")
    with readable_errors(path):
        write_output(made, base.kind, path, progress, overwrite=overwrite, base=name, shard_bytes=shard_bytes_of(max_shard_size, base.kind, path))
    return compared(base, sk.build(open_checkpoint(path)).checkpoint, layers, path, progress).statement


# ------------------------------------------------------------------------------------------------------------------ measuring


def _measured(result: Merged, reference: Checkpoint, made: Checkpoint, text: str | Path | None, n_windows: int, device: str | None, seed: int, progress: Progress) -> Merged:
    """The result with its KL divergence to the reference, and that of plain rounding of the reference in the same number formats; both go into the card."""
    place = resources.choose_device(device)
    naive = _naive(reference, made)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        tokenizer = load_tokenizer(reference, Path(scratch))
        limit = sk.build(reference).text_config.max_position_embeddings or WINDOW
        windows = evaluation_windows(reference, tokenizer, text, min(WINDOW, limit), n_windows)
        models = [reference, made, *([naive] if naive is not None else [])]
        scores = score_all(models, [torch.float32] * len(models), windows, place, progress, kv=[None] * len(models))
    found: list[Summary] = [summarize(score, "full", seed=seed) for score in scores]
    result = replace(result, kl=found[1].kl_mean, naive=found[2].kl_mean if naive is not None else None, windows=len(windows.ids), length=windows.ids.shape[1])
    write_measured(result.path, _table(result, found))
    return result


def _naive(reference: Checkpoint, made: Checkpoint) -> Checkpoint | None:
    """The reference rounded plainly to the number formats of what was made; None where a format is only read, or made holds dense weights."""
    skeleton = sk.build(reference)
    reference, written = skeleton.checkpoint, sk.build(made).checkpoint
    lossless = made.provenance["merged"]["lossless"]
    names = [name for name in (reference.tensors if lossless else made.provenance["layers"]) if name in written.quantized and name in reference.shapes()]
    if not names or any(numerics.entry(written.quantized[name].scheme).quantize is None for name in names):
        return None
    linears = [linear for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index)]
    lying = {linear.name: _turned(reference.tensors[linear.name]) for linear in linears if linear.transposed and linear.expert is None and linear.name in reference.tensors}
    plans = {name: LayerPlan(written.quantized[name].scheme, "rtn", RtnOptions()) for name in names}
    return with_rounded(replace(reference, tensors={**reference.tensors, **lying}, activations=made.activations), plans)


def _turned(lazy: LazyTensor) -> LazyTensor:
    return LazyTensor(lazy.shape[::-1], lazy.dtype, lambda start, stop: lazy.load().T[start:stop])


def _table(result: Merged, found: list[Summary]) -> str:
    """What was measured, as Markdown for the card."""
    names = ("base + adapter, float32", "this", *(("plain rounding of the merged weights, same number formats",) if len(found) > 2 else ()))
    lines = ["| | perplexity | mean KL to base + adapter, nats (95% interval) |", "| --- | --- | --- |"]
    for name, one in zip(names, found, strict=True):
        kl = "" if one.kl_mean is None or one is found[0] else f"{one.kl_mean.value:.4f} ({one.kl_mean.low:.4f} to {one.kl_mean.high:.4f})"
        lines.append(f"| {name} | {one.perplexity.value:.3f} | {kl} |")
    return "\n".join(lines) + f"\n\n{result.windows} windows of {result.length} tokens, every token scored, float32 (`lowbit merge`)."
