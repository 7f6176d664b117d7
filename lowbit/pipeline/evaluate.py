"""Evaluation of checkpoints against an original, streamed: every model runs block by block, logits are made one window at a time.

Original and quantized models never are in memory whole; what is held is the hidden states of all windows, one block, and the logits of one window.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import Checkpoint, LazyQuantized, LazyTensor, open_checkpoint, weight_files
from ..errors import DataError, ModelError
from ..evaluation.metrics import CONVENTIONS, WindowScores, score_window
from ..evaluation.summary import Summary, summarize
from ..models import skeleton as sk
from ..models.kv_cache import KVScheme
from ..models.linears import outside_matrices
from ..progress import SILENT, Advance, Progress
from . import resources
from .calibration import Windows, default_text, packed, read_texts
from .hidden import HiddenStates
from .locate import load_tokenizer, locate, model_name
from .streaming import Streamer


@dataclass(frozen=True)
class Size:
    """file_bytes: of all files with weights. bits_per_weight: 8 x tensor bytes / all parameters (tied ones once); linear_bits: of the blocks' matrices alone."""

    file_bytes: int
    tensor_bytes: int
    parameters: int
    bits_per_weight: float
    linear_bits: float


@dataclass(frozen=True)
class Row:
    """One model's place in the table."""

    name: str
    path: Path
    size: Size
    summaries: dict[str, Summary]
    provenance: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What evaluate and compare return: the original first, then the others; noise_floor: the original in its own dtype against itself in float32."""

    rows: list[Row]
    noise_floor: dict[str, Summary] | None
    text: str
    windows: int
    length: int
    digest: str


def evaluate(model: str | Path, **options) -> Comparison:
    """Perplexity of one model; options as in compare."""
    return compare([], against=model, **{"noise_floor": False, **options})


def compare(
    models: Sequence[str | Path],
    *,
    against: str | Path,
    names: list[str] | None = None,
    text: str | Path | None = None,
    ctx: int | None = None,
    n_windows: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    noise_floor: bool = True,
    kv_bits: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Comparison:
    """Measure models against an original on the same windows of text, tokenized once with the original's tokenizer.

    text: a text or JSONL file; None: the evaluation part of the bundled text. ctx: window length (2048, or the model's limit, or what the text
    holds); n_windows: how many from the start of the text (None: all). dtype: of the computation, float32 by default.
    kv_bits: the models (not the original) run with a cache of keys and values quantized to so many bits.
    noise_floor: also measure the original in its own dtype against itself in float32.
    """
    chosen = resources.choose_device(device)
    compute = resources.choose_dtype(dtype or "float32", chosen)
    paths = [locate(path, progress=progress) for path in (against, *models)]
    labels = names or [model_name(path) if path.is_dir() else path.name for path in paths]
    if kv_bits and not names:
        labels[1:] = [f"{label} kv{kv_bits}" for label in labels[1:]]
    checkpoints = [open_checkpoint(path) for path in paths]
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        tokenizer = load_tokenizer(checkpoints[0], Path(scratch))
        windows = evaluation_windows(checkpoints[0], tokenizer, text, ctx, n_windows)
        own = _own_dtype(checkpoints[0])
        extra = [checkpoints[0]] if noise_floor and own != compute else []
        caches = [None, *[KVScheme(bits=kv_bits) if kv_bits else None] * len(models), *[None] * len(extra)]
        scores = score_all(checkpoints + extra, [compute] * len(checkpoints) + [own] * len(extra), windows, chosen, progress, kv=caches)
    rows = []
    for label, path, checkpoint, found in zip(labels, paths, checkpoints, scores, strict=False):
        rows.append(Row(label, path, size_of(checkpoint), {c: summarize(found, c, seed=seed) for c in CONVENTIONS}, checkpoint.provenance))
    floor = {c: summarize(scores[-1], c, seed=seed) for c in CONVENTIONS} if extra else None
    return Comparison(rows, floor, "bundled evaluation text" if text is None else Path(text).name, len(windows.ids), windows.ids.shape[1], windows.digest)


def evaluation_windows(checkpoint: Checkpoint, tokenizer, text: str | Path | None, ctx: int | None, n_windows: int | None) -> Windows:
    """The windows that every model is measured on."""
    limit = sk.build(checkpoint).text_config.max_position_embeddings or 2048
    if ctx is not None and ctx > limit:
        raise ModelError(f"ctx is {ctx}, and this model takes at most {limit} tokens.")
    texts = [default_text("evaluation")] if text is None else read_texts(str(text), tokenizer)
    windows = packed(texts, tokenizer, length=ctx or min(2048, limit), count=n_windows, spread=False)
    if ctx is not None and windows.ids.shape[1] < ctx:
        raise DataError(f"the evaluation text holds {windows.found} tokens, less than one window of {ctx}. Use --ctx {windows.found} or more text.")
    return windows


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    if checkpoint.kind == "gguf":
        return torch.float16
    sizes: dict[torch.dtype, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel
    return max(sizes, key=lambda dtype: sizes[dtype])


def score_all(
    checkpoints: list[Checkpoint], dtypes: list[torch.dtype], windows: Windows, device: torch.device, progress: Progress, *, kv: list[KVScheme | None]
) -> list[list[WindowScores]]:
    """Scores of every model on every window; the first is the reference. All models advance together, block by block."""
    # Room for what is held at once: the hidden states of every model, a block, and the logits of a window for two models.
    models = []
    batches = windows.batches()
    depth = 0
    for checkpoint, dtype, cache in zip(checkpoints, dtypes, kv, strict=True):
        skeleton = sk.build(checkpoint)
        streamer = Streamer(skeleton, batches, dtype=dtype, device=device, kv=cache)
        states = HiddenStates(streamer.shapes, streamer.hidden_size, dtype)
        streamer.record(states)
        models.append((streamer, states))
        depth = max(depth, streamer.depth)
    with progress.step("Evaluating", len(models) * depth * len(batches) + len(windows.ids) * len(models)) as advance:
        for index in range(depth):
            for streamer, states in models:
                if index < streamer.depth:
                    streamer.run(streamer.load_block(index), index, states, states, tick=advance)
                    resources.release_memory()
        return _score(models, windows, device, advance)


def _score(models, windows: Windows, device: torch.device, advance: Advance) -> list[list[WindowScores]]:
    scores: list[list[WindowScores]] = [[] for _ in models]
    for number, batch in enumerate(models[0][0].batches):
        for row in range(len(batch.ids)):
            ids = batch.ids[row]
            reference: Tensor | None = None
            for place, (streamer, states) in enumerate(models):
                hidden = states.read(number, device)[row : row + 1]
                logits = streamer.logits(ids.unsqueeze(0), hidden)[0]
                common = logits.shape[-1] if reference is None else min(logits.shape[-1], reference.shape[-1])  # vocabularies padded differently
                found = score_window(ids, logits[:, :common], None if reference is None else reference[:, :common])
                if bool(found.nll.isnan().any()):
                    raise ModelError(f"{streamer.skeleton.checkpoint.path}: its logits are NaN. The config or the weights are damaged.")
                scores[place].append(found)
                reference = logits if place == 0 else reference
                advance()
    return scores


def size_of(checkpoint: Checkpoint) -> Size:
    """Bytes of a checkpoint, in files and in tensors, and what they come to per weight."""
    skeleton = sk.build(checkpoint)
    parameters = skeleton.parameter_count()
    outside = set(outside_matrices(skeleton))
    entries: dict[str, LazyTensor | LazyQuantized] = {**checkpoint.tensors, **checkpoint.quantized}
    matrices = {n: q for n, q in entries.items() if len(q.shape) == 2 and n not in outside}
    weights = sum(q.shape[0] * q.shape[1] for q in matrices.values())
    return Size(
        file_bytes=sum(file.stat().st_size for file in weight_files(checkpoint.path)),
        tensor_bytes=checkpoint.tensor_bytes,
        parameters=parameters,
        bits_per_weight=8 * checkpoint.tensor_bytes / parameters,
        linear_bits=8 * sum(q.nbytes for q in matrices.values()) / max(1, weights),
    )
