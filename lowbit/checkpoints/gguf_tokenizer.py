"""Tokenizers in GGUF's words: from Hugging Face's tokenizer.json to tokenizer.ggml.*, and back to a folder.

llama.cpp has two kinds that matter here. "gpt2": byte-level BPE, ranked merges, and a named rule that cuts text into words
(tokenizer.ggml.pre). "llama": SentencePiece's BPE, where the piece with the best score is joined first. llama.cpp finds the rule by
hashing the ids of one text; data/pretokenizers.json is its table. Where a vocabulary is not in it, the rule is read from tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from ..errors import CheckpointError, foreign_errors
from .gguf_arch import Value
from .safetensors import read_json, read_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask"}
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
_SPACE = "▁"
_SCORE_ADDED, _SCORE_UNUSED = -1000.0, -10000.0


def metadata(files: Iterable[Path], config: dict, rows: int, *, where: Path) -> dict[str, Value]:
    """The tokenizer's keys. rows: of the embedding, to which the vocabulary is padded. where: the model, for messages."""
    by_name = {file.name: file for file in files}
    if "tokenizer.json" not in by_name:
        raise CheckpointError(f"{where} has no tokenizer.json, which a GGUF needs. Make one: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL).")
    data = read_json(by_name["tokenizer.json"])
    settings = read_json(by_name["tokenizer_config.json"]) if "tokenizer_config.json" in by_name else {}
    with foreign_errors(f"{where}: its tokenizer is damaged, or of a kind that the tokenizers library does not read"):
        return _metadata(data, settings, by_name, config, rows, where)


def _metadata(data: dict, settings: dict, by_name: dict[str, Path], config: dict, rows: int, where: Path) -> dict[str, Value]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(by_name["tokenizer.json"]))
    if data["model"].get("type") != "BPE":
        raise CheckpointError(f"{where}: the tokenizer is of type {data['model'].get('type')}; byte-level BPE and SentencePiece BPE can be written as GGUF.")
    tokens, types = _vocabulary(data, rows, where)
    byte_level = any(part.get("type") == "ByteLevel" for key in ("pre_tokenizer", "decoder") for part in _parts(data.get(key)))
    values = _byte_level(data, tokenizer, tokens, types, where) if byte_level else _sentence_piece(data, tokens, types, where)
    values.update(_special(tokenizer, settings, config))
    template = _chat_template(by_name, settings)
    if template:
        values["tokenizer.chat_template"] = ("string", template)
    return values


def _parts(part: dict | None) -> list[dict]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps."""
    if part is None:
        return []
    nested = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    return [step for inner in nested for step in _parts(inner)] if nested else [part]


def _vocabulary(data: dict, rows: int, where: Path) -> tuple[list[str], list[int]]:
    """Tokens and types by id; ids that the tokenizer leaves out are unused."""
    by_id = {index: (token, BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL) for token, index in data["model"]["vocab"].items()}
    unknown = data["model"].get("unk_token")
    for added in data.get("added_tokens", []):
        content = added["content"]
        control = added.get("special") or _LOOKS_SPECIAL.fullmatch(content)
        # llama.cpp compares user-defined tokens with the text before spaces are escaped.
        by_id[added["id"]] = (content, UNKNOWN if content == unknown else CONTROL) if control else (content.replace(_SPACE, " "), USER_DEFINED)
    if by_id and max(by_id) >= rows:
        raise CheckpointError(f"{where}: the tokenizer has id {max(by_id)} and the embedding {rows} rows. They do not belong together, or the embedding was not resized.")
    unused = [(f"[PAD{i}]", UNUSED) for i in range(rows)]
    tokens, types = zip(*(by_id.get(i, unused[i]) for i in range(rows)), strict=True)
    return list(tokens), list(types)


def _byte_level(data: dict, tokenizer, tokens: list[str], types: list[int], where: Path) -> dict[str, Value]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    # Only a SentencePiece vocabulary has tokens that stand for raw bytes.
    return {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", pre_tokenizer(data, tokenizer, where=where)),
        "tokenizer.ggml.tokens": ("string[]", tokens),
        "tokenizer.ggml.token_type": ("i32[]", [NORMAL if kind in (BYTE, UNKNOWN) else kind for kind in types]),
        "tokenizer.ggml.merges": ("string[]", merges),
    }


def pre_tokenizer(data: dict, tokenizer, *, where: Path) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer cuts text. data: tokenizer.json. Raises CheckpointError for an unknown one."""
    digest = hashlib.sha256(str(tokenizer.encode(_table()["check_text"]).ids).encode()).hexdigest()
    name = _table()["hashes"].get(digest) or _by_rule(data)
    if name is None:
        raise CheckpointError(
            f"{where}: llama.cpp's name for this tokenizer's way of cutting text is not known (check text {digest[:16]}...), and a wrong one would "
            "load and then split words differently. If llama.cpp supports the model, take tokenizer.ggml.pre from a GGUF of it and add the hash to "
            "lowbit/checkpoints/data/pretokenizers.json; or write another target (compressed-tensors, safetensors)."
        )
    return name


def _by_rule(data: dict) -> str | None:
    normalizers = [step["type"] for step in _parts(data.get("normalizer"))]
    steps = _steps(data.get("pre_tokenizer"))
    for split in _table()["splits"]:
        # llama.cpp composes no characters; Qwen's own GGUFs accept that.
        allowed = ([], ["NFC"]) if split["names"][0].startswith("qwen") else ([],)
        same_merging = bool(data["model"].get("ignore_merges")) == split.get("ignore_merges", False)
        if steps == split["steps"] and same_merging and normalizers in allowed:
            return split["names"][0]
    return None


def _steps(pre_tokenizer: dict | None) -> list[str]:
    """A pre-tokenizer in the words of data/pretokenizers.json."""
    steps = []
    for part in _parts(pre_tokenizer):
        if part["type"] == "Digits" and part.get("individual_digits"):
            steps.append("digits")
        elif part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            steps += ["byte_level"] if part.get("use_regex", True) else []
        elif part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            steps.append(part["pattern"].get("Regex", ""))
        else:
            steps.append(part["type"])
    return steps


@cache
def _table() -> dict:
    return json.loads((Path(__file__).parent / "data" / "pretokenizers.json").read_text(encoding="utf-8"))


def _sentence_piece(data: dict, tokens: list[str], types: list[int], where: Path) -> dict[str, Value]:
    if not data["model"].get("byte_fallback"):
        raise CheckpointError(f"{where}: the tokenizer is neither byte-level BPE nor SentencePiece BPE with byte fallback; llama.cpp has no kind for it.")
    prefix = any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for key in ("normalizer", "pre_tokenizer")
        for part in _parts(data.get(key))
    )
    return {
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("string[]", tokens),
        "tokenizer.ggml.scores": ("f32[]", _scores(data, tokens, types)),
        "tokenizer.ggml.token_type": ("i32[]", types),
        "tokenizer.ggml.add_space_prefix": ("bool", prefix),
    }


def _scores(data: dict, tokens: list[str], types: list[int]) -> list[float]:
    """A score for each token such that joining the best first is joining in the order of tokenizer.json's merges: those that SentencePiece gave them.

    It counts joined pieces downwards from 0 in the order in which they were found, then single characters.
    """
    rank: dict[str, int] = {}
    for merge in data["model"]["merges"]:
        rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), len(rank))
    for token, kind in zip(tokens, types, strict=True):
        if kind == NORMAL:
            rank.setdefault(token, len(rank))
    fixed = {BYTE: 0.0, UNKNOWN: 0.0, UNUSED: _SCORE_UNUSED, CONTROL: _SCORE_ADDED, USER_DEFINED: _SCORE_ADDED}
    return [fixed[kind] if kind in fixed else -float(rank[token]) for token, kind in zip(tokens, types, strict=True)]


def _special(tokenizer, settings: dict, config: dict) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for ours, theirs in _SPECIAL.items():
        token = settings.get(f"{ours}_token")
        index = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        if index is None:
            index = config.get(f"{ours}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and index >= 0:
            values[f"tokenizer.ggml.{theirs}_token_id"] = ("u32", index)
    plain, full = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    adds = {"bos": full[:1] != plain[:1], "eos": full[-1:] != plain[-1:]}
    for kind, does in adds.items():
        values[f"tokenizer.ggml.add_{kind}_token"] = ("bool", bool(settings.get(f"add_{kind}_token", does)))
    return values


def _chat_template(files: dict[str, Path], settings: dict) -> str | None:
    if "chat_template.jinja" in files:
        return read_text(files["chat_template.jinja"])
    template = settings.get("chat_template")
    if template is None and "chat_template.json" in files:
        template = read_json(files["chat_template.json"]).get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template


def rebuild(path: Path, values: Mapping):
    """The Hugging Face tokenizer of a GGUF file, cutting text as llama.cpp does. values: its metadata."""
    with foreign_errors(f"{path}: transformers cannot build a tokenizer of this file"):
        return _rebuild(path, values)


def _rebuild(path: Path, values: Mapping):
    kind, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    from tokenizers import normalizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = next((split for split in _table()["splits"] if pre in split["names"]), None)
    if kind == "gpt2" and split is None and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise CheckpointError(f"{path}: how the pre-tokenizer {pre!r} cuts text is not known to this version, so its tokenizer cannot be rebuilt. Take tokenizer.json from the original model.")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if kind == "gpt2" and split is not None:
        # transformers leaves rules it does not know at GPT-2's and never sets ignore_merges.
        tokenizer.backend_tokenizer.pre_tokenizer = _build(split["steps"])
        tokenizer.backend_tokenizer.model.ignore_merges = split.get("ignore_merges", False)
    if kind == "gpt2":
        _restore_added(tokenizer, values)
        _drop_invented(tokenizer, len(values["tokenizer.ggml.tokens"]))
    if kind == "llama":
        # llama.cpp puts a space before every text that wants one; transformers' Metaspace leaves out those that begin with a space.
        prepend = [normalizers.Prepend(_SPACE)] if values.get("tokenizer.ggml.add_space_prefix", True) else []
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _restore_added(tokenizer, values: Mapping) -> None:
    """Undo what transformers does to a special token outside of the byte alphabet (DeepSeek's): it spells it as bytes and drops its mark."""
    from tokenizers import Tokenizer

    kinds = {CONTROL: True, USER_DEFINED: False}
    tokens, types = values["tokenizer.ggml.tokens"], values.get("tokenizer.ggml.token_type") or ()
    lost = {i: token for i, (token, kind) in enumerate(zip(tokens, types)) if kind in kinds and tokenizer.backend_tokenizer.token_to_id(token) != i}
    if not lost:
        return
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {token: i for token, i in data["model"]["vocab"].items() if i not in lost}
    data["model"]["vocab"] = kept | {token: i for i, token in lost.items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = data["added_tokens"] + [{"id": i, "content": token, **plain, "special": kinds[types[i]]} for i, token in lost.items()]
    data["added_tokens"] = sorted(added, key=lambda entry: entry["id"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))


def _drop_invented(tokenizer, count: int) -> None:
    """Take out special tokens that transformers gives to every tokenizer of a class (<|endoftext|>) and that the file, of count tokens, has not."""
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    invented = {entry["content"] for entry in data["added_tokens"] if entry["id"] >= count}
    if not invented:
        return
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if str(getattr(tokenizer, name)) in invented:
            tokenizer._special_tokens_map[name] = None


def _build(steps: list[str]):
    from tokenizers import Regex, pre_tokenizers

    parts: list[pre_tokenizers.PreTokenizer] = []
    for step in steps:
        if step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "byte_level":
            parts.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="byte_level" in steps)])
