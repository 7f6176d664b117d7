"""GGUF against three readers: our own, transformers' and llama.cpp's (xllamacpp), on tiny random models of every architecture."""

import json
import struct
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit import numerics
from lowbit.checkpoints import gguf, gguf_arch, safetensors
from lowbit.checkpoints.checkpoint import Checkpoint, LazyQuantized, LazyTensor
from lowbit.errors import CheckpointError, RecipeError, ShapeError
from lowbit.numerics import ggml
from lowbit.scheme import Scheme

transformers = pytest.importorskip("transformers")

CORPUS = ["the quick brown fox jumps over the lazy dog", "what is 12 + 345?  it's 357.\n\n\tdone", "Größe, 北京 and 🦙"] * 3
PROMPT = "the quick brown fox"
COMMON = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None, initializer_range=0.1)  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", dict(rope_theta=5e4)),
    "llama3-rope": ("LlamaConfig", dict(attention_bias=True, tie_word_embeddings=True, head_dim=32, rope_theta=5e5, max_position_embeddings=16384, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192))),
    "mistral": ("MistralConfig", dict(sliding_window=None)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("Qwen2Config", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32))),
    "qwen3": ("Qwen3Config", dict(head_dim=32)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=64, num_hidden_layers=7)),
    "phi3": ("Phi3Config", dict(original_max_position_embeddings=128)),
    "gpt2": ("GPT2Config", dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=None, eos_token_id=None, initializer_range=0.1)),
}  # fmt: skip


def byte_level_tokenizer(folder: Path) -> int:
    """A byte-level BPE of GPT-2's kind with two special tokens; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>", "<|user|>"], initial_alphabet=alphabet, show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", chat_template="{{ messages[0]['content'] }}").save_pretrained(folder)
    return tokenizer.get_vocab_size()


def sentence_piece_tokenizer(folder: Path) -> int:
    """A BPE with byte fallback of Llama 2's kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    words = [text.replace(" ", "▁") for text in CORPUS[:2]]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(["▁" + word for word in words], trainers.BpeTrainer(vocab_size=90, show_progress=False))
    data = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = sorted(data["vocab"], key=data["vocab"].get)
    vocab = {token: i for i, token in enumerate([*special, *(p for p in pieces if p not in special)])}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(m) for m in data["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return len(vocab)


def make(folder: Path, kind: str, *, dtype=torch.float32, tokenizer=byte_level_tokenizer, **changes) -> Checkpoint:
    """A tiny random model of a kind in MODELS, saved as a Hugging Face folder and opened."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = tokenizer(folder)
    name, special = MODELS[kind]
    common = {} if kind == "gpt2" else COMMON
    config = getattr(transformers, name)(**{**common, **special, "vocab_size": vocab, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():  # norms and biases that are not all 1 or 0, and exact when 1 is added to them
        if parameter.ndim == 1:
            parameter.data += torch.randint(-20, 21, parameter.shape) / 64
    model.save_pretrained(folder)
    return safetensors.open_folder(folder)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """kind, the checkpoint and its F32 GGUF."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make(folder / "hf", request.param)
    gguf.write(checkpoint, folder / "f32.gguf")
    return request.param, checkpoint, folder / "f32.gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of bfloat16 whose rows divide into all blocks, and its GGUF."""
    folder = tmp_path_factory.mktemp("bf16")
    checkpoint = make(folder / "hf", "llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    gguf.write(checkpoint, folder / "bf16.gguf")
    return checkpoint, folder / "bf16.gguf"


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def original(checkpoint: Checkpoint):
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


def ids_of(checkpoint: Checkpoint, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(checkpoint.path)(text)["input_ids"]


def quantized(checkpoint: Checkpoint, scheme: Scheme) -> Checkpoint:
    """Every matrix of the layers rounded to a scheme."""
    made = {}
    for name, tensor in checkpoint.tensors.items():
        if ".layers." in name and len(tensor.shape) == 2:
            qt = numerics.quantize(tensor.load(), scheme)
            made[name] = LazyQuantized(scheme, qt.shape, tensor.dtype, lambda qt=qt: qt)
    return replace(checkpoint, tensors={n: t for n, t in checkpoint.tensors.items() if n not in made}, quantized=made)


# ------------------------------------------------------------------------------------------------------------------- reading back


def test_tensors_read_back_bit_for_bit(model):
    _, checkpoint, path = model
    back = gguf.open_file(path)
    assert back.shapes() == checkpoint.shapes()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(back.dense(name), tensor.load()), name


def test_rows_read_back_in_slices(model):
    _, checkpoint, path = model
    back = gguf.open_file(path)
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(back.tensors[name].read(3, 11), tensor.load()[3:11]), name


def test_config_builds_the_same_model(model):
    kind, checkpoint, path = model
    config = gguf.open_file(path).config
    assert config["dtype"] == "float32"
    assert config["architectures"] == (["LlamaForCausalLM"] if kind == "mistral" else checkpoint.config["architectures"])
    folder = path.parent / "rebuilt"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    writer = safetensors.ShardWriter(folder, entries=1000)
    for name, tensor in gguf.open_file(path).tensors.items():
        writer.add(name, tensor.load())
    writer.close()
    rebuilt = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = ids_of(checkpoint, CORPUS[1] * 3)
    assert (logits(rebuilt, ids) - logits(original(checkpoint), ids)).abs().max() < 1e-5


def test_transformers_reads_the_same_logits(model):
    pytest.importorskip("accelerate", reason="transformers loads GGUF with accelerate")
    kind, checkpoint, path = model
    if kind in ("mixtral", "llama3-rope", "qwen2"):
        pytest.skip("transformers 5.23 drops experts of llama files, attention biases, rope factors and yarn when it reads GGUF")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = ids_of(checkpoint, CORPUS[1])
    assert (logits(theirs, ids) - logits(original(checkpoint), ids)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------- llama.cpp


def server(path: Path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 128, 1, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.verbosity = -1
    return xllamacpp.Server(params)


def complete(llama_cpp, prompt: str, count: int) -> list[int]:
    reply = llama_cpp.handle_completions({"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1})
    assert "choices" in reply, reply
    return [entry["id"] for entry in reply["choices"][0]["logprobs"]["content"]]


def tokenize(llama_cpp, text: str, *, special: bool = False) -> list[int]:
    body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
    request = urllib.request.Request(f"{llama_cpp.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["tokens"]


@pytest.mark.consumer
def test_llama_cpp_continues_alike(model):
    _, checkpoint, path = model
    ids = ids_of(checkpoint, PROMPT)
    theirs = complete(server(path), PROMPT, 12)
    net, ours = original(checkpoint), []
    for _ in range(12):
        ours.append(int(logits(net, ids + ours)[-1].argmax()))
    assert theirs == ours[: len(theirs)] and len(theirs) >= 8


TEXTS = [*CORPUS[:3], "  two  spaces", "a1b22c333", "<|user|>hi<|end|>", "\n\n\n x", "ﬁ e\u0301 \u200d"]


@pytest.mark.consumer
@pytest.mark.parametrize("kind", ["byte-level", "sentence-piece"])
def test_llama_cpp_tokenizes_alike(tmp_path, kind):
    make_tokenizer = {"byte-level": byte_level_tokenizer, "sentence-piece": sentence_piece_tokenizer}[kind]
    checkpoint = make(tmp_path / "hf", "llama", tokenizer=make_tokenizer, num_hidden_layers=1)
    gguf.write(checkpoint, tmp_path / "m.gguf")
    ours = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
    written = gguf.write_tokenizer(tmp_path / "m.gguf", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert "tokenizer.json" in {file.name for file in written}
    llama_cpp = server(tmp_path / "m.gguf")
    for text in TEXTS:
        for special in (False, True):
            ids = ours(text, add_special_tokens=special)["input_ids"]
            assert tokenize(llama_cpp, text, special=special) == ids, (text, special)
            assert back(text, add_special_tokens=special)["input_ids"] == ids, (text, special)
    assert back.chat_template == ours.chat_template
