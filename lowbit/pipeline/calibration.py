"""Calibration and evaluation text as windows of tokens.

Texts are packed into full windows (or, with pad, kept apart); a text that holds fewer tokens than asked for is used as it is, never twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError, foreign_errors, missing_extra
from ..progress import SILENT, Progress
from ..recipe import Calibration
from .streaming import Batch

MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Windows:
    """ids int64 [windows, length]; mask bool of the same shape (None: every token is real); found: tokens that the text held."""

    ids: Tensor
    mask: Tensor | None
    found: int

    @property
    def digest(self) -> str:
        """A hash of the tokens, for provenance and for --resume."""
        mask = b"" if self.mask is None else self.mask.numpy().tobytes()
        return hashlib.sha256(self.ids.numpy().tobytes() + mask).hexdigest()

    @property
    def tokens(self) -> int:
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def batches(self, tokens: int = MICRO_BATCH_TOKENS) -> list[Batch]:
        """Micro-batches of about so many tokens."""
        rows = max(1, tokens // self.ids.shape[1])
        return [Batch(self.ids[i : i + rows], None if self.mask is None else self.mask[i : i + rows]) for i in range(0, len(self.ids), rows)]


def default_text(part: str) -> str:
    """The text that ships with lowbit: part "calibration" or "evaluation" (no passage is in both)."""
    return (files("lowbit") / "data" / f"{part}.txt").read_text(encoding="utf-8").replace("\n<<<>>>\n", "\n\n")


def calibration_windows(calibration: Calibration, tokenizer, *, texts: list[str] | None = None, as_llama_cpp: bool = False, progress: Progress = SILENT) -> Windows:
    """The calibration set of a recipe: n_samples windows of seq_len tokens, spread evenly over the text (texts, or those of its source).

    as_llama_cpp: the first windows instead, cut where llama.cpp's programs cut them.
    """
    if texts is None:
        texts = read_texts(calibration.source, tokenizer)
    if calibration.pad:
        windows = _padded(texts, tokenizer, calibration)
    else:
        windows = packed(texts, tokenizer, length=calibration.seq_len, count=calibration.n_samples, spread=not as_llama_cpp, bos_first=as_llama_cpp)
    if len(windows.ids) < calibration.n_samples:
        progress.note(
            f"The calibration text holds {windows.found:,} tokens: {len(windows.ids)} windows of {windows.ids.shape[1]} instead of "
            f"{calibration.n_samples}. All of it is used, once. More text: --calibration FILE."
        )
    return windows


def read_texts(source: str, tokenizer) -> list[str]:
    """The texts of a source: "default", a text file (one text), JSONL with text or messages (one per line) or "dataset:NAME"."""
    if source == "default":
        return [default_text("calibration")]
    if source.startswith("dataset:"):
        return _dataset_texts(source.removeprefix("dataset:"), tokenizer)
    if is_records(source):
        return [_record_text(record, tokenizer, where) for where, record in json_records(source)]
    return [_content(source)]


def is_records(source: str) -> bool:
    """Whether a source is a JSONL file."""
    return not source.startswith("dataset:") and Path(source).suffix in (".jsonl", ".ndjson")


def json_records(source: str) -> list[tuple[str, dict]]:
    """The objects of a JSONL file, each with where it stands (for errors)."""
    path = Path(source)
    return [(f"{path}, line {number}", _parse(line, path, number)) for number, line in enumerate(_content(source).split("\n"), 1) if line.strip()]


def _content(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except FileNotFoundError:
        if source == "self":
            raise DataError('"self" (text that the model generates) is there for calibration and for train qat. Give a .txt or .jsonl file, "default" or "dataset:NAME".') from None
        raise DataError(f'text source {source!r} is no file; expected a .txt or .jsonl file, "default" or "dataset:NAME" (to calibrate with, "self", too).') from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read as UTF-8 text: {error}") from error


@contextmanager
def template_errors(where: str) -> Iterator[None]:
    """Whatever a chat template raises, as a DataError of the record that it refuses."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a template is the model's own program: whatever it raises, the record is what to look at
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error


def require_template(tokenizer, where: str) -> None:
    """Raise DataError where messages cannot be rendered."""
    if not tokenizer.chat_template:
        raise DataError(f"{where} holds messages, and this model's tokenizer has no chat template. Give plain text in a text field.")


def _parse(line: str, path: Path, number: int) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number} is a {type(record).__name__}; expected an object with text or messages.")
    return record


def _record_text(record: dict, tokenizer, where: str) -> str:
    if isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record.get("messages"), list):
        require_template(tokenizer, where)
        with template_errors(where):
            return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    raise DataError(f"{where} has the fields {sorted(record)}; expected text (a string) or messages (a list).")


def _dataset_texts(name: str, tokenizer) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "data", purpose=f"calibration from the dataset {name}") from None
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        return [_record_text(row, tokenizer, f"dataset {name}") for row, _ in zip(rows, range(4096), strict=False)]
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds for a missing network, name or config
        raise DataError(f"the dataset {name} cannot be loaded ({type(error).__name__}: {error}). Check the name and the network, or give a file.") from error


def token_ids(texts: list[str], tokenizer) -> Tensor:
    """All texts as one stream of token ids, without special tokens; texts are parted by the end-of-text token where there is one."""
    end = [] if tokenizer.eos_token_id is None or len(texts) == 1 else [tokenizer.eos_token_id]
    ids: list[int] = []
    with foreign_errors("the model's tokenizer fails on this text"):
        for text in texts:
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    return torch.tensor(ids, dtype=torch.int64)


def bos_id(tokenizer) -> int | None:
    """The id that the tokenizer puts before every text, or None when it puts none."""
    first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else None


def packed(texts: list[str], tokenizer, *, length: int, count: int | None, spread: bool = True, bos_first: bool = False) -> Windows:
    """Consecutive windows of length tokens; count of them, spread evenly over the text (or the first), all when count is None.

    Where the tokenizer begins a text with BOS, every window does: its first token is replaced, as llama-perplexity does it.
    A text shorter than one window gives one short window. bos_first: BOS stands before the text too, so that windows begin a token earlier.
    """
    ids, bos = token_ids(texts, tokenizer), bos_id(tokenizer)
    if len(ids) < 2:
        raise DataError("the text holds fewer than two tokens.")
    if bos_first and bos is not None:
        ids = torch.cat([torch.tensor([bos]), ids])
    length = min(length, len(ids))
    windows = ids[: len(ids) // length * length].view(-1, length)
    if count is not None and count < len(windows):
        chosen = torch.arange(count) * len(windows) // count if spread else torch.arange(count)
        windows = windows[chosen]
    windows = windows.clone()
    if bos is not None:
        windows[:, 0] = bos
    return Windows(windows, None, len(ids))


def _padded(texts: list[str], tokenizer, calibration: Calibration) -> Windows:
    """One text per row, cut at seq_len and padded at the right; the mask is False on padding."""
    with foreign_errors("the model's tokenizer fails on this text"):
        rows = [tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"][: calibration.seq_len] for text in texts]
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        raise DataError("no calibration text holds two tokens or more.")
    found = sum(map(len, rows))
    if len(rows) > calibration.n_samples:
        rows = [rows[i * len(rows) // calibration.n_samples] for i in range(calibration.n_samples)]
    longest = max(map(len, rows))
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids, mask = torch.full((len(rows), longest), filler, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return Windows(ids, mask, found)
