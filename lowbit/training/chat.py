"""Training data with labels: text whose every token counts, conversations of which only the answers do; packed into windows.

A document is a text, or a conversation as the model's chat template renders it. Where a window holds several, each sees itself alone: positions begin anew, by which transformers keeps
attention within a document, and no token is predicted from the document before.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, foreign_errors
from ..pipeline.calibration import bos_id, is_records, json_records, read_texts, require_template, template_errors

IGNORED = -100  # the label of a token that is not learned, as transformers has it


@dataclass(frozen=True)
class Document:
    """ids of a text or conversation, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Rows(torch.utils.data.Dataset):
    """Windows as the Trainer takes them: ids, labels (IGNORED where nothing is learned) and positions, int64 [windows, length]."""

    ids: Tensor
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index], "position_ids": self.positions[index]}

    @property
    def learned(self) -> int:
        """How many tokens have a label."""
        return int((self.labels != IGNORED).sum())


def read_documents(source: str, tokenizer, *, length: int) -> tuple[list[Document], list[str]]:
    """The documents of a source (see calibration.read_texts; JSONL with messages: conversations), none longer than length, and what to tell the user.

    Text is cut into pieces, the rest of a conversation that is too long is left out. Raises DataError for what cannot be read or holds nothing to learn.
    """
    if is_records(source):
        documents = [document for where, record in json_records(source) for document in _of_record(record, tokenizer, where, length)]
    else:
        documents = [piece for text in read_texts(source, tokenizer) for piece in _of_text(text, tokenizer, length)]
    cut = sum(len(document.ids) > length for document in documents)
    found = [document for document in (Document(each.ids[:length], each.learned[:length]) for each in documents) if any(document.learned[1:])]
    if not found:
        raise DataError(f"{source} holds nothing to learn: no text of two tokens, no answer of an assistant within the first {length} tokens of a conversation.")
    notes = [f"{cut} of {len(documents)} conversations are longer than {length} tokens; what follows was left out. More of them: --seq-len."] if cut else []
    if empty := len(documents) - len(found):
        notes.append(f"{empty} of {len(documents)} documents hold nothing to learn and were left out.")
    return found, notes


def _of_record(record: dict, tokenizer, where: str, length: int) -> list[Document]:
    if isinstance(record.get("text"), str):
        return _of_text(record["text"], tokenizer, length)
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise DataError(f"{where} has the fields {sorted(record)}; expected text (a string) or messages (a list).")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise DataError(f"{where}: messages is a list of objects with role and content; found {messages!r:.100}.")
    require_template(tokenizer, where)
    return [conversation(messages, tokenizer, where, tools=record.get("tools"))]


def _of_text(text: str, tokenizer, length: int) -> list[Document]:
    """A text in pieces of at most length tokens, all learned; BOS before each piece and the end token after the last, where the tokenizer has them."""
    with foreign_errors("the model's tokenizer fails on this text"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids, bos = ids + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), bos_id(tokenizer)
    before = [] if bos is None else [bos]
    step = length - len(before)
    return [Document(before + ids[start : start + step], [True] * len(before + ids[start : start + step])) for start in range(0, len(ids), step)]


def conversation(messages: list[dict], tokenizer, where: str, *, tools: Any = None) -> Document:
    """A conversation as the chat template renders it, of which the assistant's answers are learned.

    Where the template marks them ({% generation %}), as it does; else an answer is what rendering it adds to the conversation so far and its prompt for an answer.
    """
    render = lambda upto, **more: tokenizer.apply_chat_template(messages[:upto], tools=tools, tokenize=False, **more)
    with template_errors(where):
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            made = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return Document(list(made["input_ids"]), [bool(kept) for kept in made["assistant_masks"]])
        text = render(len(messages))
        spans = [_span(render, text, place, where) for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not tokenizer.is_fast:
        raise DataError(f"{where}: this model's tokenizer does not say where its tokens lie in the text, by which answers are found. Its template would need {{% generation %}}, or give plain text.")
    with foreign_errors("the model's tokenizer fails on this text"):
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = lambda start, stop: start < stop and any(first <= start and stop <= last for first, last in spans)
    return Document(list(made["input_ids"]), [inside(start, stop) for start, stop in made["offset_mapping"]])


def _span(render, text: str, place: int, where: str) -> tuple[int, int]:
    """From where to where the answer with this number among the messages lies in the rendered text."""
    until = render(place + 1)
    prompts = [render(place, add_generation_prompt=prompt) for prompt in (True, False)] if place else [""]
    before = next((prompt for prompt in prompts if until.startswith(prompt)), None)
    if before is None or not text.startswith(until):
        raise DataError(
            f"{where}: the chat template renders the beginning of this conversation differently when it stands alone, so answers cannot be found. "
            "Mark them in the template with {% generation %}, or cut the conversation to one answer."
        )
    return len(before), len(until)


def pack(documents: list[Document], length: int, *, filler: int) -> Rows:
    """Windows of length tokens, each document whole in one of them: the longest first, each into the fullest window that has room for it; filler where nothing fits."""
    bins: list[list[Document]] = []
    room: list[tuple[int, int]] = []  # of each window, ascending: what is free, and its number
    for document in sorted(documents, key=lambda document: -len(document.ids)):
        place = bisect_left(room, (len(document.ids), -1))
        free, number = room.pop(place) if place < len(room) else (length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(document)
        insort(room, (free - len(document.ids), number))
    ids, labels, positions = torch.full((len(bins), length), filler), torch.full((len(bins), length), IGNORED), torch.zeros(len(bins), length, dtype=torch.int64)
    for number, inside in enumerate(bins):
        start = 0
        for document in inside:
            stop = start + len(document.ids)
            ids[number, start:stop] = torch.tensor(document.ids)
            learned = torch.tensor(document.learned)
            learned[0] = False
            labels[number, start:stop] = torch.where(learned, ids[number, start:stop], IGNORED)
            positions[number, start:stop] = torch.arange(stop - start)
            start = stop
        positions[number, start:] = torch.arange(length - start)
    return Rows(ids, labels, positions)
