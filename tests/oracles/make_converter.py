"""Make converter.json with llama.cpp's own converter: metadata, tensors and tokenizers of tiny models of every architecture that lowbit writes.

    pip install sentencepiece && python tests/oracles/make_converter.py PATH/TO/llama.cpp        # a checkout of build 11434

Weights are a formula (weights below; tests/checkpoints/test_gguf_converter.py has it too), so that the fixture needs only a checksum of each
tensor. The converter knows how a tokenizer cuts text by hashes of published ones only; the tiny ones here get the name "unknown".
"""

import io
import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch
import transformers

CORPUS = ["the quick brown fox jumps over the lazy dog", "what is 12 + 345?  it's 357.\n\n\tdone", "Größe, 北京 and 🦙"] * 3
COMMON = {
    "vocab_size": 303, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": "float32",
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 64}
MODELS = {
    "llama": {"model_type": "llama", "rope_theta": 5e4},
    "llama 3, tied": {"model_type": "llama", "rope_theta": 5e5, "max_position_embeddings": 16384, "head_dim": 32, "attention_bias": True, "tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},
    "qwen3 moe": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True, **MOE},
    "qwen2 moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48, **MOE},
    "gemma 2": {"model_type": "gemma2", **GEMMA},
    "gemma 3": {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7},
    "phi-3": {"model_type": "phi3", "original_max_position_embeddings": 128, "pad_token_id": 0},
    "gpt-2": {"model_type": "gpt2", "vocab_size": 303, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "dtype": "float32"},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": None, "use_bias": True},
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "rope_theta": 5e6, "tie_word_embeddings": True},
}  # fmt: skip


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers that float32 holds exactly, also with 1 added, and that differ from place to place."""
    first = sum(map(ord, name))
    return ((torch.arange(shape.numel()) * 7 + first) % 255 - 127).float().div_(128).reshape(shape)


def save_model(folder: Path, config: dict) -> None:
    made = transformers.AutoConfig.for_model(**(config if "n_embd" in config else {**COMMON, **config}))
    model = transformers.AutoModelForCausalLM.from_config(made)
    for name, parameter in model.named_parameters():
        parameter.data = weights(name, parameter.shape)
    model.save_pretrained(folder)
    if "n_embd" in config:  # which transformers 5 does not write any more
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_ctx": config["n_positions"]}))


def byte_level(folder: Path, *, llama3: bool) -> None:
    """A byte-level BPE: of GPT-2's kind, or of Llama 3's with BOS before each text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=llama3))
    split = pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain]) if llama3 else plain
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|begin|>", "<|end|>"], show_progress=False))
    tokenizer.add_tokens([AddedToken("<sep>", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False)])
    if llama3:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", chat_template="{{ messages[0]['content'] }}")
    fast.save_pretrained(folder)


def sentence_piece(folder: Path, *, prefix: bool) -> None:
    """A SentencePiece BPE as tokenizer.model, which the converter reads, and as the tokenizer.json that Llama 2 and Gemma have, which lowbit reads."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    stored = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=stored, model_type="bpe", vocab_size=340, byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", add_dummy_prefix=prefix, remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(stored.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue())
    vocab = {pieces.IdToPiece(i): i for i in range(pieces.vocab_size())}
    merges = [(token[:cut], token[cut:]) for token in vocab if not pieces.IsControl(vocab[token]) and not pieces.IsByte(vocab[token]) for cut in range(1, len(token))]
    merges = sorted((pair for pair in merges if pair[0] in vocab and pair[1] in vocab), key=lambda pair: vocab["".join(pair)])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "<|user|>")])
    tokenizer.add_tokens([AddedToken("<sep>▁x", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ bos_token }}").save_pretrained(folder)
    path, later = folder / "tokenizer_config.json", {"<|user|>": True, "<sep>▁x": False}
    decoder = {str(pieces.vocab_size() + i): {"content": token, "special": special} for i, (token, special) in enumerate(later.items())}
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": decoder}))


TOKENIZERS = {  # how it is made, the model's architecture, whether lowbit's own words must be equal
    "GPT-2's kind": (lambda folder: byte_level(folder, llama3=False), "LlamaForCausalLM"),
    "Llama 3's kind": (lambda folder: byte_level(folder, llama3=True), "LlamaForCausalLM"),
    "Llama 2's kind": (lambda folder: sentence_piece(folder, prefix=True), "LlamaForCausalLM"),
    "Gemma's kind": (lambda folder: sentence_piece(folder, prefix=False), "GemmaForCausalLM"),
}


def convert(folder: Path, *, vocabulary: bool) -> Path:
    """The converter's file for a folder; vocabulary: only the tokenizer's metadata, else everything but these."""
    import gguf
    from conversion import get_model_class
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "unknown"
    kind = get_model_class(json.loads((folder / "config.json").read_text())["architectures"][0])
    if not vocabulary:
        kind = type(kind.__name__, (kind,), {"set_vocab": lambda self: None, "model_arch": kind.model_arch})
    made = kind(folder, gguf.LlamaFileType.ALL_F32, folder / "made.gguf")
    made.write_vocab() if vocabulary else made.write()
    return folder / "made.gguf"


def main(checkout: str) -> None:
    sys.path[:0] = [str(Path(checkout) / "gguf-py"), checkout]
    import gguf

    found = {"models": {}, "tokenizers": {}}
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), config)
            byte_level(Path(folder), llama3=False)  # which some architectures look at for their embedding
            reader = gguf.GGUFReader(convert(Path(folder), vocabulary=False))
            values = {key: field.contents() for key, field in reader.fields.items() if "." in key and not key.startswith("general.")}
            tensors = {t.name: [t.tensor_type.name, t.shape.tolist()[::-1], zlib.crc32(t.data.tobytes())] for t in reader.tensors}
            found["models"][name] = {"config": json.loads((Path(folder) / "config.json").read_text()), "metadata": values, "tensors": tensors}
    for name, (make, architecture) in TOKENIZERS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            make(path)
            size = max(json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"], key=lambda token: token["id"])["id"] + 1
            save_model(path, {"model_type": "llama" if architecture.startswith("Llama") else "gemma", "vocab_size": size + 3, "num_hidden_layers": 1})
            reader = gguf.GGUFReader(convert(path, vocabulary=True))
            values = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
            files = {file.name: file.read_text(encoding="utf-8") for file in sorted(path.glob("*")) if file.name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")}
            files["tokenizer.json"] = json.dumps(json.loads(files["tokenizer.json"]), ensure_ascii=False, separators=(",", ":"))
            found["tokenizers"][name] = {"files": files, "rows": size + 3, "metadata": values}
    line = lambda key, value: f"{json.dumps(key)}:{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
    lines = [f'"{kind}":{{\n' + ",\n".join(line(key, value) for key, value in entries.items()) + "}" for kind, entries in found.items()]
    Path(__file__).with_name("converter.json").write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
