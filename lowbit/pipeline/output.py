"""Results on their way to disk: lazily rounded matrices, writing through a sibling, what goes wrong there in one paragraph."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from .. import numerics
from ..algorithms import algorithm
from ..checkpoints import Checkpoint, LazyQuantized, LazyTensor, target
from ..checkpoints.checkpoint import CHUNK_BYTES
from ..checkpoints.safetensors import write_text
from ..errors import JobError, RecipeError, ResourceError
from ..models import skeleton as sk
from ..models.linears import find_linears
from ..models.skeleton import Skeleton
from ..numerics.ggml import BLOCK_TYPES
from ..progress import Progress
from ..stats import LayerStats
from ..tensor import QuantizedTensor
from .card import card_of, card_path
from .job import temporary, work_folder
from .recipes import LayerPlan
from .resources import parse_size


def shard_bytes_of(size: int | str | None, target_name: str, output: Path) -> int | None:
    """The largest size of a file in bytes, from what a user writes (5GB, a number of bytes; None: the target's own)."""
    if size is None:
        return None
    found = size if isinstance(size, int) else parse_size(size)
    if found < 1:
        raise RecipeError(f"max_shard_size is {size!r}; expected a size such as 5GB or 500MB.")
    if target(target_name).suffix and output.suffix == target(target_name).suffix:
        raise RecipeError(f"with a shard size the model becomes several files, which go into a folder, and {output} is named like a file. Give -o a folder's name, and --to {target_name}.")
    return found


def write(
    checkpoint: Checkpoint,
    target_name: str,
    output: Path,
    progress: Progress,
    *,
    overwrite: bool,
    base: str,
    shard_bytes: int | None = None,
    whole: Callable[[], None] = lambda: None,
) -> None:
    """Write through a sibling, so that nothing has the output's name before it is whole; whole is called just before it gets it. base: the original's name, for the card beside the weights."""
    kind, draft, old = target(target_name), temporary(output), output.with_name(output.name + ".old")
    if overwrite and old.exists() and not output.exists():  # an earlier run was killed between its last two steps
        os.replace(old, output)
    _delete(draft)
    draft.parent.mkdir(parents=True, exist_ok=True)
    folder = not kind.suffix or shard_bytes is not None
    if folder:
        draft.mkdir()
    with progress.step(f"Writing {target_name}", checkpoint.tensor_bytes) as advance:
        try:
            kind.write(checkpoint, draft, shard_bytes=shard_bytes, progress=advance)
            card = card_of(draft, base=base)
            if folder:
                write_text(card_path(draft, False), card)
            whole()
        except BaseException:
            _delete(draft)
            raise
    publish(draft, output, overwrite=overwrite)
    if not folder:
        write_text(card_path(output, True), card)


def publish(draft: Path, output: Path, *, overwrite: bool) -> None:
    """Give a file or folder that is whole its name; with overwrite, what had that name is there until then, and again if that fails."""
    old = output.with_name(output.name + ".old")
    aside = overwrite and output.exists() and (output.is_dir() or draft.is_dir())  # a file replaces a file in one step
    if aside:
        _delete(old)
        os.replace(output, old)
    try:
        os.replace(draft, output)
    except OSError:
        if aside:
            os.replace(old, output)
        raise
    if aside:
        _delete(old)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def refuse_own_input(output: Path, model: Path) -> None:
    """Raise JobError when writing the output would replace the model that is read."""
    if model.resolve().is_relative_to(output.resolve()):
        raise JobError(f"the output {output} is where the model itself is. Choose another -o.")


@contextmanager
def readable_errors(output: Path) -> Iterator[None]:
    """Say in one paragraph what the system refuses; what is done so far stays where it is."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or output.absolute().parent}: {error.strerror or error}"
        keep = f" What is done so far is kept in {work_folder(output)}: go on with --resume." if work_folder(output).exists() else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"There is no room for the output ({what}). Free some disk, or write elsewhere with -o.{keep}") from error
        raise JobError(f"The output cannot be written or the model cannot be read ({what}).{keep}") from error


def as_stored_dense(checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
    """The checkpoint with dense tensors as its model stores them: the quantized matrices of Conv1D layers turned to [in, out], those of single experts in one tensor where the model has one."""
    linears = [linear for index in range(len(skeleton.blocks)) for linear in find_linears(skeleton, index)]
    names = [linear.name for linear in linears if linear.transposed and linear.expert is None and linear.name in checkpoint.quantized]
    made = {name: _turned(checkpoint, name) for name in names}
    members = {name: parameter for parameter, names in sk.stacks(skeleton).items() for name in names}
    for parameter, names in sk.stacks(skeleton).items():
        made[parameter] = _stack(checkpoint, names, bool(skeleton.model.get_submodule(parameter.rpartition(".")[0]).is_transposed))
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in members}
    quantized = {name: entry for name, entry in checkpoint.quantized.items() if name not in made and name not in members}
    return replace(checkpoint, tensors={**tensors, **made}, quantized=quantized)


def _stack(checkpoint: Checkpoint, names: list[str], transposed: bool) -> LazyTensor:
    """The matrices of all experts as one tensor, an expert at a time."""
    first = checkpoint.lazy(names[0])
    one = lambda name: checkpoint.dense(name).T if transposed else checkpoint.dense(name)
    shape = first.shape[::-1] if transposed else first.shape
    return LazyTensor((len(names), *shape), first.dtype, lambda start, stop: torch.stack([one(name) for name in names[start:stop]]))


def checked(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The checkpoint whose dense tensors of these names raise FormatError when NaN or infinity is read from them, and its ggml blocks when they stand for it."""

    def read(name: str, lazy: LazyTensor, start: int, stop: int) -> Tensor:
        rows = lazy.read(start, stop)
        numerics.refuse_bad_values(rows, name)
        return rows

    def load(name: str, entry: LazyQuantized) -> QuantizedTensor:
        if entry.scheme.format in BLOCK_TYPES:  # other readers look at their scales
            for part in entry.values():
                numerics.refuse_bad_values(part, name)
        return entry.load()

    def some(name: str, entry: LazyQuantized, start: int, stop: int) -> QuantizedTensor:
        assert entry.rows is not None
        qt = entry.rows(start, stop)
        if qt.scheme.format in BLOCK_TYPES:
            numerics.refuse_bad_values(numerics.dequantize(qt), name)
        return qt

    def guarded(name: str, entry: LazyQuantized) -> LazyQuantized:
        return replace(entry, load=partial(load, name, entry), rows=None if entry.rows is None else partial(some, name, entry))

    wanted = set(names)
    tensors = {name: replace(lazy, read=partial(read, name, lazy)) if name in wanted and lazy.dtype.is_floating_point else lazy for name, lazy in checkpoint.tensors.items()}
    quantized = {name: guarded(name, entry) if name in wanted else entry for name, entry in checkpoint.quantized.items()}
    return replace(checkpoint, tensors=tensors, quantized=quantized)


def _turned(checkpoint: Checkpoint, name: str) -> LazyTensor:
    entry = checkpoint.quantized[name]
    return LazyTensor(entry.shape[::-1], entry.dtype, lambda start, stop: checkpoint.dense(name).T[start:stop])


def with_rounded(checkpoint: Checkpoint, plans: dict[str, LayerPlan], importance: Mapping[str, LayerStats] = MappingProxyType({})) -> Checkpoint:
    """The checkpoint with some of its matrices (embedding, head) rounded as planned when they are read, a chunk of rows at a time; importance: statistics of theirs, where known."""
    quantized = dict(checkpoint.quantized)
    for name, plan in plans.items():
        quantized[name] = _rounded(checkpoint.lazy(name), plan, importance.get(name))
    return replace(checkpoint, tensors={n: t for n, t in checkpoint.tensors.items() if n not in plans}, quantized=quantized)


def _rounded(lazy: LazyTensor, plan: LayerPlan, stats: LayerStats | None) -> LazyQuantized:
    rows, columns = lazy.shape
    whole = plan.scheme.block == (-1, -1) or not numerics.entry(plan.scheme).rowwise(plan.scheme, columns)  # something is shared by all rows: they are needed together
    chunk = rows if whole else max(1, CHUNK_BYTES // (columns * 4))
    dtype = str(lazy.dtype).removeprefix("torch.")

    def some(start: int, stop: int) -> QuantizedTensor:
        made = algorithm(plan.algorithm).run(lazy.read(start, min(stop, rows)), plan.scheme, stats, plan.options, [])
        return QuantizedTensor(plan.scheme, made.shape, dtype, made.parts)

    def load() -> QuantizedTensor:
        if whole:
            return some(0, rows)
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, rows, chunk):
            for key, value in some(start, start + chunk).parts.items():
                parts.setdefault(key, []).append(value)
        return QuantizedTensor(plan.scheme, (rows, columns), dtype, {key: torch.cat(values) for key, values in parts.items()})

    return LazyQuantized(plan.scheme, (rows, columns), lazy.dtype, load, numerics.nbytes(plan.scheme, (rows, columns)), None if whole else some)


def held(value: Tensor) -> LazyTensor:
    """A tensor in memory as a lazy one."""
    return LazyTensor(tuple(value.shape), value.dtype, lambda start, stop: value[start:stop].clone() if value.ndim else value.clone())


def rounded_record(plan: LayerPlan, shape: tuple[int, int]) -> dict:
    """The provenance of a matrix that with_rounded rounds."""
    record = {"scheme": plan.scheme.name, "algorithm": plan.algorithm, "shape": list(shape), "bits_per_weight": round(numerics.bits_per_weight(plan.scheme, shape), 4)}
    return {**record, "notes": list(plan.notes)} if plan.notes else record


def dtype_name(checkpoint: Checkpoint, name: str) -> str:
    entry = checkpoint.tensors.get(name) or checkpoint.quantized[name]
    dtype = str(entry.dtype).removeprefix("torch.")
    return dtype if dtype in ("float32", "float16", "bfloat16") else "float32"
