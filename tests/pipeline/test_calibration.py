"""Calibration text: what is read, how it is cut into windows, and what is said when it is too little."""

import json
import sys

import pytest
import torch
import transformers

from lowbit.checkpoints import open_checkpoint
from lowbit.errors import DataError, LowbitError, ResourceError
from lowbit.pipeline import resources
from lowbit.pipeline.calibration import MICRO_BATCH_TOKENS, Windows, calibration_windows, default_text, packed, read_texts
from lowbit.pipeline.selfgen import self_texts
from lowbit.progress import Progress
from lowbit.recipe import Calibration


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


def jsonl(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def windows_of(path, tokenizer, *, n_samples, seq_len, pad=False):
    notes = Notes()
    return calibration_windows(Calibration(str(path), n_samples, seq_len, pad), tokenizer, progress=notes), notes.notes


# ---- sources


def test_bundled_text_is_large_and_no_passage_is_in_both_parts():
    calibration, evaluation = default_text("calibration"), default_text("evaluation")
    assert len((calibration + evaluation).encode()) >= 120_000
    lines = [line for line in evaluation.splitlines() if len(line) > 60]
    assert lines and not [line for line in lines if line in calibration]


def test_text_file_is_packed_into_windows_spread_over_it(tmp_path, tokenizer):
    text = "".join(f"{i:04d} " for i in range(1000))
    (tmp_path / "t.txt").write_text(text)
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows, notes = windows_of(tmp_path / "t.txt", tokenizer, n_samples=4, seq_len=50)
    assert not notes and windows.mask is None and windows.ids.shape == (4, 50) and windows.found == len(stream)
    starts = [i * (len(stream) // 50) // 4 * 50 for i in range(4)]
    assert [row.tolist() for row in windows.ids] == [stream[a : a + 50] for a in starts]


def test_shortage_is_said_and_nothing_is_repeated(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("".join(f"{i:04d} " for i in range(40)))
    windows, notes = windows_of(tmp_path / "t.txt", tokenizer, n_samples=16, seq_len=64)
    assert windows.ids.shape == (200 // 64, 64)
    assert notes == ["The calibration text holds 200 tokens: 3 windows of 64 instead of 16. All of it is used, once. More text: --calibration FILE."]
    assert len({tuple(row.tolist()) for row in windows.ids}) == 3


def test_text_shorter_than_a_window(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("0123456789")
    windows, notes = windows_of(tmp_path / "t.txt", tokenizer, n_samples=2, seq_len=64)
    assert windows.ids.shape == (1, 10) and len(notes) == 1


def test_every_window_begins_with_bos_where_the_tokenizer_has_it_so(tokenizer_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<|end|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    windows = packed(["abc " * 50], tokenizer, length=16, count=None)
    assert (windows.ids[:, 0] == 0).all() and not (windows.ids[:, 1:] == 0).any()


def test_jsonl_of_texts_is_packed_with_the_end_token_between(tmp_path, tokenizer):
    path = jsonl(tmp_path, {"text": "one"}, {"text": "two\u2028lines", "other": 1})
    assert read_texts(str(path), tokenizer) == ["one", "two\u2028lines"]
    windows, _ = windows_of(path, tokenizer, n_samples=1, seq_len=8)
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("one", "two\u2028lines")]
    assert windows.ids[0].tolist() == [*ids[0], tokenizer.eos_token_id, *ids[1]][:8]


def test_empty_lines_and_windows_line_ends_are_no_records(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n\n')
    assert read_texts(str(path), tokenizer) == ["a", "b"]


def test_jsonl_of_messages_takes_the_chat_template(tmp_path, tokenizer):
    path = jsonl(tmp_path, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})
    assert read_texts(str(path), tokenizer) == ["<user>hi</user><assistant>yes</assistant>"]


def test_padded_texts_are_rows_of_their_own(tmp_path, tokenizer):
    path = jsonl(tmp_path, {"text": "abcdef"}, {"text": "x"}, {"text": "qzqzqzqzqzqzqz"}, {"text": "zq"})
    windows, notes = windows_of(path, tokenizer, n_samples=8, seq_len=10, pad=True)
    lengths = [min(10, len(tokenizer(t)["input_ids"])) for t in ("abcdef", "qzqzqzqzqzqzqz", "zq")]
    assert windows.mask.sum(1).tolist() == lengths  # a text of one token predicts nothing
    assert windows.tokens == sum(lengths) and windows.found == sum(lengths)
    assert windows.ids.shape == (3, 10) and (windows.ids[~windows.mask] == 0).all()
    assert len(notes) == 1 and "3 windows" in notes[0]
    few, _ = windows_of(path, tokenizer, n_samples=2, seq_len=10, pad=True)
    assert torch.equal(few.ids[1], windows.ids[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"data\.jsonl, line 2 is not JSON"),
        ('["a"]', "line 1 is a list; expected an object with text or messages"),
        ('{"prompt": "a"}', r"line 1 has the fields \['prompt'\]; expected text \(a string\) or messages"),
        ('{"text": 3}', r"line 1 has the fields \['text'\]"),
        ('{"messages": [{"role": "user"}, 3]}', "line 1: the chat template refuses these messages"),
        ("\n\n", "fewer than two tokens"),
        ('{"text": ""}', "fewer than two tokens"),
    ],
)
def test_bad_records(content, message, tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        windows_of(tmp_path / "data.jsonl", tokenizer, n_samples=1, seq_len=8)


def test_nothing_to_pad(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no calibration text holds two tokens"):
        windows_of(jsonl(tmp_path, {"text": "a"}), tokenizer, n_samples=1, seq_len=8, pad=True)


def test_messages_without_a_template(tmp_path, tokenizer_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="line 1 holds messages, and this model's tokenizer has no chat template"):
        read_texts(str(jsonl(tmp_path, {"messages": []})), tokenizer)


@pytest.mark.parametrize(("content", "message"), [(None, "is no file; expected a .txt or .jsonl file"), (b"\xff\xfe\x00a", "cannot be read as UTF-8 text")])
def test_bad_files(content, message, tmp_path, tokenizer):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(str(tmp_path / "t.txt"), tokenizer)


def test_text_of_the_model_itself_is_no_file(tokenizer):
    with pytest.raises(DataError, match='"self" .* is there for calibration and for train qat'):
        read_texts("self", tokenizer)


def test_folder_as_text(tmp_path, tokenizer):
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_texts(str(tmp_path), tokenizer)


def test_dataset_without_the_package(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LowbitError, match=r'calibration from the dataset wikitext needs the package datasets.*pip install "lowbit\[data\]"'):
        read_texts("dataset:wikitext", tokenizer)


def test_dataset_with_a_package(monkeypatch, tokenizer):
    import types

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("wiki", "small", "train", True)
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_texts("dataset:wiki:small", tokenizer) == ["one", "two"]


def test_dataset_that_cannot_be_loaded(monkeypatch, tokenizer):
    import types

    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"the dataset wiki cannot be loaded \(ConnectionError: no network\)"):
        read_texts("dataset:wiki", tokenizer)


# ---- windows


def test_digest_depends_on_tokens_and_mask():
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    digests = {Windows(ids, None, 20).digest, Windows(ids, mask, 20).digest, Windows(ids, ~mask, 20).digest, Windows(ids + 1, None, 20).digest}
    assert len(digests) == 4


@pytest.mark.parametrize(("windows", "length", "rows"), [(10, 512, [4, 4, 2]), (3, 5000, [1, 1, 1]), (5, 100, [5])])
def test_micro_batches(windows, length, rows):
    ids = torch.arange(windows * length).view(windows, length)
    batches = Windows(ids, None, 0).batches()
    assert [len(b.ids) for b in batches] == rows
    assert torch.equal(torch.cat([b.ids for b in batches]), ids)
    assert all(b.ids.numel() <= max(MICRO_BATCH_TOKENS, length) for b in batches)


# ---- the model's own text


def test_self_samples_from_the_model(model_folder, tokenizer):
    checkpoint = open_checkpoint(model_folder("llama-tied"))
    calibration = Calibration("self", 5, 24)
    texts = self_texts(checkpoint, tokenizer, calibration, seed=1)
    assert 1 <= len(texts) <= 5 and len(set(texts)) == len(texts)
    assert texts == self_texts(checkpoint, tokenizer, calibration, seed=1)
    assert texts != self_texts(checkpoint, tokenizer, calibration, seed=2)


def test_self_is_refused_with_the_size_where_it_does_not_fit(model_folder, tokenizer, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"Sampling calibration text from the model itself .* needs about .*B of memory, and 1\.0 kB are available"):
        self_texts(open_checkpoint(model_folder("llama")), tokenizer, Calibration("self", 1, 8), seed=0)
