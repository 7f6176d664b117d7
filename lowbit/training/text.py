"""Text for training from scratch: a byte-level BPE made from it (the tokenizers library), and its tokens in a file that is memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

from ..checkpoints.safetensors import sync
from ..errors import DataError, foreign_errors
from ..pipeline.calibration import is_records, read_texts

END = "<|end|>"  # stands after each text
PIECE = 1 << 20  # characters of a text file that are read at once


def train_tokenizer(data: str, vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of at most so many tokens, the end token with them, trained on data (see pieces)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary <= 257:
        raise DataError(f"the vocabulary is to have {vocabulary} tokens; a byte-level BPE needs more than 257: the bytes and an end token.")
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
    bpe.train_from_iterator((piece for piece, _ in pieces(data, None)), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def pieces(data: str, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """What data holds, piece by piece, and whether a text ends there. A text file is read in pieces that end with a line; all else as calibration reads it."""
    path = Path(data)
    if data == "default" or data.startswith("dataset:") or is_records(data) or not path.is_file():
        yield from ((text, True) for text in read_texts(data, tokenizer or _Plain()))
        return
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(), False
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    yield "", True


class _Plain:
    """Stands for a tokenizer that is still to be made: records of chat have no template yet."""

    chat_template = None


def write_tokens(data: str, tokenizer: Any, path: Path) -> None:
    """The tokens of data, an end token after each text, as unsigned integers of 16 or 32 bits (see number_type); nothing has the name before it is whole."""
    kind, draft = number_type(len(tokenizer)), path.with_name(path.name + ".tmp")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with draft.open("wb") as file:
        for piece, ends in pieces(data, tokenizer):
            with foreign_errors("the tokenizer fails on this text"):
                ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            np.asarray([*ids, *(end if ends else [])], dtype=kind).tofile(file)
    sync(draft)
    os.replace(draft, path)


def number_type(vocabulary: int) -> Any:
    """The smallest type that holds the numbers of so many tokens."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


class Tokens(Dataset):
    """Windows of length tokens of a file of write_tokens, by their numbers, as the Trainer takes them."""

    def __init__(self, ids: np.ndarray, length: int, windows: np.ndarray) -> None:
        self.ids, self.length, self.windows = ids, length, windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.row(index)}

    def row(self, index: int) -> Tensor:
        """int64 [length]."""
        start = int(self.windows[index]) * self.length
        return torch.from_numpy(self.ids[start : start + self.length].astype(np.int64))


def split(path: Path, vocabulary: int, length: int, held_out: int) -> tuple[Tokens, Tokens]:
    """The windows of a token file for training, and those held out: at most held_out and a twentieth, spread evenly. DataError for fewer than 20 windows."""
    ids = np.memmap(path, dtype=number_type(vocabulary), mode="r")
    count = len(ids) // length
    if count < 20:
        raise DataError(f"the data holds {len(ids):,} tokens, {count} windows of {length}; training needs at least 20 windows. Give more text, or a smaller --seq-len.")
    aside = min(held_out, count // 20)
    held = np.arange(aside) * count // aside + count // aside // 2
    return Tokens(ids, length, np.setdiff1d(np.arange(count), held)), Tokens(ids, length, held)
