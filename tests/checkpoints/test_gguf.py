"""GGUF against three readers: our own, transformers' and llama.cpp's (xllamacpp), on tiny random models of every architecture."""

import ctypes
import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit import numerics
from lowbit.checkpoints import gguf, gguf_arch, gguf_container, open_checkpoint, safetensors, weight_files
from lowbit.checkpoints.checkpoint import Checkpoint, LazyQuantized, LazyTensor
from lowbit.errors import CheckpointError, RecipeError, ShapeError
from lowbit.models import skeleton
from lowbit.numerics import ggml
from lowbit.pipeline.quantize import quantize
from lowbit.scheme import CASTS, Scheme
from lowbit.tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")

CORPUS = ["the quick brown fox jumps over the lazy dog", "what is 12 + 345?  it's 357.\n\n\tdone", "Größe, 北京 and 🦙"] * 3
PROMPT = "the quick brown fox"
COMMON = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None,
    bos_token_id=None, eos_token_id=None, initializer_range=0.1,
)  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", dict(rope_theta=5e4)),
    "llama3-rope": ("LlamaConfig", dict(
        attention_bias=True, tie_word_embeddings=True, head_dim=32, rope_theta=5e5, max_position_embeddings=16384,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    )),
    "mistral": ("MistralConfig", dict(sliding_window=None)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("Qwen2Config", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32))),
    "qwen3": ("Qwen3Config", dict(head_dim=128)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=768, norm_topk_prob=True)),
    "qwen2_moe": ("Qwen2MoeConfig", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=1408, shared_expert_intermediate_size=5632)),
    "gemma2": ("Gemma2Config", dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=64, num_hidden_layers=3)),
    "starcoder2": ("Starcoder2Config", dict(sliding_window=None, use_bias=True)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=64, num_hidden_layers=7)),
    "olmo2": ("Olmo2Config", dict(rope_theta=5e5)),
    "smollm3": ("SmolLM3Config", dict(num_hidden_layers=5, rope_theta=5e6, tie_word_embeddings=True)),
    "bitnet": ("BitNetConfig", dict(hidden_act="silu", tie_word_embeddings=True, rope_theta=5e5)),
    "phi3": ("Phi3Config", dict(original_max_position_embeddings=128, pad_token_id=0)),
    "gpt2": ("GPT2Config", dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=None, eos_token_id=None, initializer_range=0.1)),
}  # fmt: skip


def byte_level_tokenizer(folder: Path) -> int:
    """A byte-level BPE of GPT-2's kind with two special tokens; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>", "<|user|>", "<｜fin▁x｜>"], initial_alphabet=alphabet, show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", chat_template="{{ messages[0]['content'] }}").save_pretrained(folder)
    return tokenizer.get_vocab_size()


def gemma_tokenizer(folder: Path) -> int:
    """A BPE with byte fallback of Gemma's kind: no space before the text."""
    return sentence_piece_tokenizer(folder, prefix=False)


def sentence_piece_tokenizer(folder: Path, *, prefix: bool = True) -> int:
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
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
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
    """Every matrix of the layers replaced by random codes of a scheme."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in checkpoint.tensors.items():
        if ".layers." in name and len(tensor.shape) == 2:
            qt = QuantizedTensor(scheme, tensor.shape, "bfloat16", random_parts(scheme, *tensor.shape, generator))
            made[name] = LazyQuantized(scheme, qt.shape, tensor.dtype, lambda qt=qt: qt)
    return replace(checkpoint, tensors={n: t for n, t in checkpoint.tensors.items() if n not in made}, quantized=made)


def random_parts(scheme: Scheme, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    integers = lambda limit, *shape: torch.randint(0, limit, shape, dtype=torch.uint8, generator=generator)
    if scheme.format in CASTS:
        return {"weight": torch.randn(rows, columns, generator=generator).to(getattr(torch, scheme.format))}
    if scheme.format != "int":
        kind = ggml.BLOCK_TYPES[scheme.format]
        return {"blocks": integers(256, rows, columns // kind.block_size * kind.block_bytes)}
    shape = (1 if scheme.block == (-1, -1) else rows, scheme.groups(columns))
    parts = {"codes": integers(2**scheme.bits, rows, columns), "scale": torch.randn(shape, generator=generator).half()}
    return parts if scheme.symmetric else {**parts, "zero_point": integers(2**scheme.bits, *shape)}


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
        start = 3 if tensor.shape[0] > 3 else 0
        assert torch.equal(back.tensors[name].read(start, 11), tensor.load()[start:11]), name


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
    if kind in ("olmo2", "smollm3", "bitnet"):
        pytest.skip(f"transformers 5.23 reads no GGUF of {kind}")
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
    params.flash_attn_type, params.verbosity = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED, -1
    return xllamacpp.Server(params)


def complete(llama_cpp, prompt: str, count: int) -> list[int]:
    reply = llama_cpp.handle_completions({"prompt": prompt, "max_tokens": count, "temperature": 0, "return_tokens": True, "verbose": True})
    assert "choices" in reply, reply
    return reply["__verbose"]["tokens"]


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
    # One pass over prompt and continuation says for each position whether theirs is our greedy choice too.
    ours = logits(original(checkpoint), ids + theirs)[len(ids) - 1 : -1]
    behind = ours.max(-1).values - ours.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    assert len(theirs) == 12 or theirs[-1] == 0  # <|end|>
    assert behind.max() < 1e-3, (theirs, ours.argmax(-1).tolist())  # llama.cpp looks GELU up in a table of float16


TEXTS = [*CORPUS[:3], "  two  spaces", "a1b22c333", "<|user|>hi<|end|>", "hi<｜fin▁x｜> 北", "\n\n\n x", "ﬁ e\u0301 \u200d"]


@pytest.mark.consumer
@pytest.mark.parametrize(("kind", "tokenizer"), [("llama", byte_level_tokenizer), ("llama", sentence_piece_tokenizer), ("phi3", sentence_piece_tokenizer), ("gemma3", gemma_tokenizer)])
def test_llama_cpp_tokenizes_alike(tmp_path, kind, tokenizer):
    checkpoint = make(tmp_path / "hf", kind, tokenizer=tokenizer, num_hidden_layers=1)
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


# ----------------------------------------------------------------------------------------------------------------- number formats


@pytest.mark.parametrize("type_name", ggml.BLOCK_TYPES)
def test_blocks_are_written_and_read_unchanged(llama, tmp_path, type_name):
    checkpoint = quantized(llama[0], ggml.scheme(type_name))
    gguf.write(checkpoint, tmp_path / "q.gguf")
    back = gguf.open_file(tmp_path / "q.gguf")
    assert back.quantized.keys() == checkpoint.quantized.keys()
    for name, entry in back.quantized.items():
        assert entry.scheme.format == type_name and entry.dtype == torch.float16
        assert torch.equal(entry.load().parts["blocks"], checkpoint.quantized[name].load().parts["blocks"]), name
        assert entry.nbytes == entry.load().parts["blocks"].numel()


INTS = [
    *((Scheme(bits=b, block=(1, g), scale_dtype="float16"), t) for b, t in ((2, "q4_0"), (3, "q4_0"), (4, "q4_0"), (5, "q5_0"), (6, "q8_0"), (8, "q8_0")) for g in (32, 96, -1)),
    *((Scheme(bits=b, block=(1, 64), symmetric=False, scale_dtype="float16"), t) for b, t in ((2, "q4_1"), (3, "q4_1"), (4, "q4_1"), (5, "q5_1"))),
    (Scheme(bits=4, block=(-1, -1), scale_dtype="float16"), "q4_0"),
    (Scheme(bits=4, block=(1, 32), range="full", scale_dtype="float16"), "q4_0"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "type_name"), INTS, ids=lambda value: getattr(value, "name", value))
def test_integers_become_blocks_of_the_same_values(llama, tmp_path, scheme, type_name):
    checkpoint = quantized(llama[0], scheme)
    gguf.write(checkpoint, tmp_path / "q.gguf")
    back = gguf.open_file(tmp_path / "q.gguf")
    for name, entry in back.quantized.items():
        assert entry.scheme.format == type_name
        theirs, ours = numerics.dequantize(entry.load()), numerics.dequantize(checkpoint.quantized[name].load())
        if scheme.symmetric:
            assert torch.equal(theirs, ours), name
        else:  # the minimum, -scale * zero_point, is rounded to float16
            parts = checkpoint.quantized[name].load().parts
            minimum = (parts["scale"].float() * parts["zero_point"].float()).abs().max()
            assert (theirs - ours).abs().max() <= minimum * 2.0**-11


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_quantized_experts_are_stacked_and_taken_apart(tmp_path, kind):
    checkpoint = quantized(make(tmp_path / "hf", kind, num_hidden_layers=1), ggml.scheme("q8_0"))
    gguf.write(checkpoint, tmp_path / "q.gguf")
    assert gguf.read_header(tmp_path / "q.gguf").tensors["blk.0.ffn_down_exps.weight"].shape[0] == 4
    back = gguf.open_file(tmp_path / "q.gguf")
    assert back.quantized.keys() == checkpoint.quantized.keys() and len(back.quantized) > 12
    assert all(torch.equal(entry.load().parts["blocks"], checkpoint.quantized[name].load().parts["blocks"]) for name, entry in back.quantized.items())
    missing = {name: entry for name, entry in checkpoint.quantized.items() if ".experts.2." not in name}
    with pytest.raises(CheckpointError, match=r"has experts \[0, 1, 3\]; the config says 4"):
        gguf.write(replace(checkpoint, quantized=missing), tmp_path / "q.gguf")


def test_gpt2s_quantized_matrices_are_out_by_in_and_read_as_transposed_values(tmp_path):
    checkpoint = make(tmp_path / "hf", "gpt2")
    name, scheme = "transformer.h.0.attn.c_attn.weight", ggml.scheme("q8_0")
    qt = numerics.quantize(checkpoint.tensors[name].load().T.contiguous(), scheme)
    entry = LazyQuantized(scheme, qt.shape, torch.float32, lambda: qt)
    tensors = {n: t for n, t in checkpoint.tensors.items() if n != name}
    gguf.write(replace(checkpoint, tensors=tensors, quantized={name: entry}), tmp_path / "q.gguf")
    back = gguf.open_file(tmp_path / "q.gguf")
    assert back.tensors[name].shape == (64, 192) and torch.equal(back.dense(name), numerics.dequantize(qt).half().T)


@pytest.mark.parametrize("cast", ["float16", "bfloat16", "float32"])
def test_casts_are_dense(llama, tmp_path, cast):
    checkpoint = quantized(llama[0], Scheme(format=cast))
    gguf.write(checkpoint, tmp_path / "q.gguf")
    back = gguf.open_file(tmp_path / "q.gguf")
    assert not back.quantized
    for name, entry in checkpoint.quantized.items():
        assert back.tensors[name].dtype == getattr(torch, cast)
        assert torch.equal(back.dense(name), entry.load().parts["weight"])


def test_file_type_and_dtypes(llama, tmp_path):
    header = gguf.read_header(llama[1])
    assert header.get("general.file_type") == 32
    assert {info.type_id for name, info in header.tensors.items() if "norm" in name or name.endswith("bias")} == {0}
    gguf.write(quantized(llama[0], ggml.scheme("q4_k")), tmp_path / "q.gguf")
    assert gguf.read_header(tmp_path / "q.gguf").get("general.file_type") == 14


def test_types_that_are_no_weights_are_refused(tmp_path):
    import gguf as library

    write_small(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (np.zeros((4, 256), np.int32), library.GGMLQuantizationType.I32)})
    with pytest.raises(CheckpointError, match="ffn_up.weight' is of type i32; weights are floats or blocks of them"):
        gguf.open_file(tmp_path / "m.gguf")


def write_small(path: Path, tensors: dict[str, tuple], *, experts: int = 0) -> None:
    """A GGUF of some tensors (values, ggml type) beside an embedding of zeros, by gguf-py."""
    import gguf as library

    writer = library.GGUFWriter(path, "llama")
    for key, _, _ in gguf_arch.ARCHS["llama"].keys[:6]:
        writer.add_uint32(f"llama.{key}", 2)
    if experts:
        writer.add_uint32("llama.expert_count", experts)
        writer.add_uint32("llama.expert_used_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 256), np.float32))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_a_scale_beside_a_matrix_multiplies_it(tmp_path):
    """As llama.cpp's converter writes NVFP4: X.scale multiplies what X.weight decodes to, and X.input_scale is not used on a CPU."""
    import gguf as library

    rng, nvfp4, f32 = np.random.default_rng(0), library.GGMLQuantizationType.NVFP4, library.GGMLQuantizationType.F32
    blocks, stack = (rng.integers(0, 120, shape, dtype=np.uint8) for shape in ((8, 144), (2, 8, 144)))
    write_small(tmp_path / "m.gguf", {
        "blk.0.ffn_up.weight": (blocks, nvfp4), "blk.0.ffn_up.scale": (np.float32([0.37]), f32), "blk.0.ffn_up.input_scale": (np.float32([9]), f32),
        "blk.0.ffn_down.weight": (blocks, nvfp4),
    })  # fmt: skip
    back = gguf.open_file(tmp_path / "m.gguf")
    plain = torch.from_numpy(library.quants.dequantize(blocks, nvfp4))
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    assert back.tensors[up].dtype == torch.float32 and torch.equal(back.tensors[up].read(2, 7), plain[2:7] * np.float32(0.37))
    assert back.quantized[down].scheme.format == "ggml_nvfp4" and torch.equal(numerics.dequantize(back.quantized[down].load()), plain)
    assert not any(name.endswith("scale") for name in back.shapes())
    experts = {"blk.1.ffn_up_exps.weight": (stack, nvfp4), "blk.1.ffn_up_exps.scale": (np.float32([0.5, 3]), f32)}
    write_small(tmp_path / "experts.gguf", experts, experts=2)
    back = gguf.open_file(tmp_path / "experts.gguf")
    for expert, factor in enumerate((0.5, 3)):
        name = next(name for name in back.tensors if f"experts.{expert}." in name)
        assert torch.equal(back.dense(name), torch.from_numpy(library.quants.dequantize(stack[expert], nvfp4)) * factor)
    write_small(tmp_path / "bad.gguf", {"blk.0.ffn_up.weight": (blocks, nvfp4), "blk.0.ffn_up.scale": (np.ones(3, np.float32), f32)})
    with pytest.raises(CheckpointError, match=r"ffn_up.scale' is \[3\] of type f32; 1 f32 belong there"):
        gguf.open_file(tmp_path / "bad.gguf")


def test_mxfp4_is_stored_with_its_codes(llama, tmp_path):
    scheme = numerics.scheme_of("mxfp4")
    made = {name: numerics.quantize(tensor.load(), scheme) for name, tensor in llama[0].tensors.items() if ".layers." in name and len(tensor.shape) == 2}
    entries = {name: LazyQuantized(scheme, qt.shape, torch.bfloat16, lambda qt=qt: qt) for name, qt in made.items()}
    gguf.write(replace(llama[0], tensors={n: t for n, t in llama[0].tensors.items() if n not in made}, quantized=entries), tmp_path / "q.gguf")
    back = gguf.open_file(tmp_path / "q.gguf")
    assert gguf.read_header(tmp_path / "q.gguf").get("general.file_type") == 38
    for name, qt in made.items():
        assert back.quantized[name].scheme.format == "ggml_mxfp4"
        assert torch.equal(numerics.dequantize(back.quantized[name].load()), numerics.dequantize(qt)), name


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose rows hold super-blocks, its F32 GGUF, and an importance matrix as llama-imatrix writes it."""
    import gguf as library

    folder = tmp_path_factory.mktemp("wide")
    checkpoint = make(folder / "hf", "llama", hidden_size=256, intermediate_size=512)
    gguf.write(checkpoint, folder / "f32.gguf")
    writer, rng = library.GGUFWriter(folder / "imatrix.gguf", "imatrix"), np.random.default_rng(0)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, info in gguf.read_header(folder / "f32.gguf").tensors.items():
        if len(info.shape) == 2:
            writer.add_tensor(f"{name}.in_sum2", rng.random((1, info.shape[1]), dtype=np.float32) + 0.1)
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return checkpoint, folder


def continues_alike(checkpoint: Checkpoint, path: Path) -> None:
    """llama.cpp's greedy tokens are near our best ones, of the decoded weights. It rounds inputs to 8 bits, which moves logits (their deviation is 1.6)."""
    ids, theirs = ids_of(checkpoint, PROMPT), complete(server(path), PROMPT, 12)
    built = skeleton.build(gguf.open_file(path))
    for name, part in built.model.named_modules():
        skeleton.fill(built, name, part, torch.float32, torch.device("cpu"))
    ours = logits(built.model.eval(), ids + theirs)[len(ids) - 1 : -1]
    behind = ours.max(-1).values - ours.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    assert len(theirs) == 12 or theirs[-1] == 0  # <|end|>
    assert behind.max() < 0.3, (theirs, ours.argmax(-1).tolist())


@pytest.mark.consumer
@pytest.mark.parametrize("recipe", ["iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "ggml_mxfp4", "mxfp4-rtn"])
def test_llama_cpp_reads_our_types(wide, tmp_path, recipe):
    quantize(wide[0].path, recipe, tmp_path / "q.gguf", target_name="gguf")
    name = "ggml_mxfp4" if recipe == "mxfp4-rtn" else recipe
    header = gguf.read_header(tmp_path / "q.gguf")
    assert header.tensors["blk.1.ffn_down.weight"].type_id == ggml.BLOCK_TYPES[name].type_id
    continues_alike(wide[0], tmp_path / "q.gguf")


@pytest.mark.consumer
def test_llama_cpp_multiplies_by_the_scale_beside_a_matrix_too(wide, tmp_path, libggml):
    import gguf as library

    def nvfp4(values: np.ndarray) -> np.ndarray:
        blocks = np.empty((len(values), values.shape[1] // 64 * 36), np.uint8)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, blocks)]
        libggml.ggml_quantize_chunk(40, *pointers, *(ctypes.c_int64(n) for n in (0, *values.shape)), None)
        return blocks

    reader, writer = library.GGUFReader(wide[1] / "f32.gguf"), library.GGUFWriter(tmp_path / "q.gguf", "llama")
    copy_metadata(reader, writer)
    for i, tensor in enumerate(reader.tensors):
        if tensor.name.startswith("blk.") and len(tensor.data.shape) == 2:
            factor = np.float32(2.0 ** (i % 5) / 3)
            writer.add_tensor(tensor.name, nvfp4(tensor.data / factor), raw_dtype=library.GGMLQuantizationType.NVFP4)
            writer.add_tensor(tensor.name.replace(".weight", ".scale"), np.array([factor]))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    opened = gguf.open_file(tmp_path / "q.gguf")
    for name, tensor in wide[0].tensors.items():  # the matrices are as large as they were
        assert float((opened.dense(name) - tensor.load()).square().mean() / tensor.load().square().mean()) < 0.02, name
    continues_alike(wide[0], tmp_path / "q.gguf")


def copy_metadata(reader, writer) -> None:
    for field in list(reader.fields.values())[3:]:
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)


# llama-quantize's words that, with --pure, mean one type.
LLAMA_QUANTIZE = {
    "IQ1_S": "iq1_s", "IQ1_M": "iq1_m", "IQ2_XXS": "iq2_xxs", "IQ2_XS": "iq2_xs", "IQ2_M": "iq2_s", "IQ3_XXS": "iq3_xxs", "IQ3_S": "iq3_s", "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs", "TQ1_0": "tq1_0", "TQ2_0": "tq2_0", "Q1_0": "q1_0", "Q2_0": "q2_0", "MXFP4_MOE": "ggml_mxfp4",
}  # fmt: skip


@pytest.mark.consumer
@pytest.mark.parametrize("type_name", LLAMA_QUANTIZE)
def test_files_of_llama_quantize_are_read(wide, tmp_path, type_name, llama_quantize, dequantize_row):
    name, path = LLAMA_QUANTIZE[type_name], tmp_path / "q.gguf"
    llama_quantize(wide[1] / "f32.gguf", path, type_name, wide[1] / "imatrix.gguf")
    header, back = gguf.read_header(path), gguf.open_file(path)
    assert header.get("general.file_type") == gguf._FILE_TYPES[name][0]
    for layer in range(2):
        info, entry = header.tensors[f"blk.{layer}.ffn_down.weight"], back.quantized[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert entry.scheme == ggml.scheme(name)
        assert torch.equal(numerics.dequantize(entry.load()), dequantize_row(torch.from_numpy(np.array(info.rows)), name))
    if name in ("iq1_m", "iq2_xxs", "iq3_s", "q2_0"):
        continues_alike(wide[0], path)


# ---------------------------------------------------------------------------------------------------------------------- metadata


def test_a_gguf_written_again_is_the_same_model(llama, tmp_path):
    first = gguf.read_header(llama[1])
    checkpoint = replace(gguf.open_file(llama[1]), provenance={"recipe": {"name": "none"}, "lowbit": "test"})
    gguf.write(checkpoint, tmp_path / "again.gguf")
    again = gguf.read_header(tmp_path / "again.gguf")
    assert {k: v for k, v in again.raw.items() if k != gguf.PROVENANCE} == first.raw
    assert {n: i.rows.tobytes() for n, i in again.tensors.items()} == {n: i.rows.tobytes() for n, i in first.tensors.items()}
    assert gguf.open_file(tmp_path / "again.gguf").provenance == {"recipe": {"name": "none"}, "lowbit": "test"}


def test_rope_factors_survive_a_second_writing(tmp_path):
    checkpoint = make(tmp_path / "hf", "llama3-rope", num_hidden_layers=1)
    gguf.write(checkpoint, tmp_path / "a.gguf")
    opened = gguf.open_file(tmp_path / "a.gguf")
    assert opened.config["rope_scaling"] == {k: v for k, v in checkpoint.config["rope_parameters"].items() if k != "rope_theta"}
    gguf.write(opened, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_olmo_3_is_not_taken_for_olmo_2():
    arch = gguf_arch.ARCHS["olmo2"]
    values = {f"olmo2.{key}": 8 for key, _, _ in arch.keys}
    assert gguf_arch.config_from(arch, values, ["output.weight"], 10, {})["model_type"] == "olmo2"
    with pytest.raises(CheckpointError, match="olmo2.attention.sliding_window: it is an OLMo 3, which this version does not read"):
        gguf_arch.config_from(arch, {**values, "olmo2.attention.sliding_window": 4096}, ["output.weight"], 10, {})


def test_unknown_rope_factors_become_longrope_of_the_same_numbers():
    factors = torch.tensor([1.0, 1.5, 3.0, 3.0])
    values = {"llama.rope.freq_base": 10000.0, **{f"llama.{key}": 8 for key, _, _ in gguf_arch.ARCHS["llama"].keys}}
    config = gguf_arch.config_from(gguf_arch.ARCHS["llama"], values, ["output.weight"], 10, {"rope_freqs.weight": factors})
    assert config["rope_scaling"]["rope_type"] == "longrope" and config["rope_scaling"]["short_factor"] == factors.tolist()


def test_same_bytes_each_time_and_progress_of_all_bytes(llama, tmp_path):
    seen = []
    gguf.write(llama[0], tmp_path / "again.gguf", progress=seen.append)
    assert (tmp_path / "again.gguf").read_bytes() == llama[1].read_bytes()
    assert sum(seen) == sum(info.nbytes for info in gguf.read_header(llama[1]).tensors.values())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_write_leaves_nothing(llama, tmp_path):
    def fail(start, stop):
        raise RuntimeError("the disk is gone")

    name = "model.layers.0.mlp.up_proj.weight"
    broken = replace(llama[0], tensors={**llama[0].tensors, name: replace(llama[0].tensors[name], read=fail)})
    with pytest.raises(RuntimeError, match="the disk is gone"):
        gguf.write(broken, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_the_language_part_of_gemma3(tmp_path):
    checkpoint = make(tmp_path / "hf", "gemma3", num_hidden_layers=1)
    nested = {"language_model." + name: tensor for name, tensor in checkpoint.tensors.items()}
    vision = {"vision_tower.vision_model.embeddings.weight": LazyTensor((3, 3), torch.float32, lambda start, stop: torch.zeros(3, 3))}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": checkpoint.config}
    gguf.write(checkpoint, tmp_path / "hf.gguf")
    gguf.write(replace(checkpoint, config=config, tensors={**nested, **vision}), tmp_path / "nested.gguf")
    assert (tmp_path / "nested.gguf").read_bytes() == (tmp_path / "hf.gguf").read_bytes()


def test_the_vocabulary_is_padded_to_the_embedding(tmp_path):
    checkpoint = make(tmp_path / "hf", "llama", num_hidden_layers=1)
    name, vocab = "model.embed_tokens.weight", checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    grown = {n: LazyTensor((vocab + 8, 64), torch.float32, lambda start, stop: torch.zeros(vocab + 8, 64)[start:stop]) for n in (name, "lm_head.weight")}
    gguf.write(replace(checkpoint, tensors={**checkpoint.tensors, **grown}), tmp_path / "m.gguf")
    header = gguf.read_header(tmp_path / "m.gguf")
    assert header.get("llama.vocab_size") == len(header.get("tokenizer.ggml.tokens")) == vocab + 8
    assert header.get("tokenizer.ggml.tokens")[-1] == f"[PAD{vocab + 7}]" and header.get("tokenizer.ggml.token_type")[-1] == 5
    shrunk = {n: LazyTensor((64, 64), torch.float32, lambda start, stop: torch.zeros(64, 64)) for n in grown}
    with pytest.raises(CheckpointError, match="has id 319 and the embedding 64 rows"):
        gguf.write(replace(checkpoint, tensors={**checkpoint.tensors, **shrunk}), tmp_path / "m.gguf")


def test_special_tokens_and_template(llama):
    header = gguf.read_header(llama[1])
    assert header.get("tokenizer.ggml.eos_token_id") == 0 and header.get("tokenizer.ggml.pre") == "gpt-2"
    assert header.get("tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]
    assert header.get("tokenizer.chat_template") == "{{ messages[0]['content'] }}"
    assert header.get("tokenizer.ggml.add_bos_token") is False


SPLITS = json.loads((Path(gguf.__file__).parent / "data" / "pretokenizers.json").read_text())["splits"]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split["names"][0])
def test_pre_tokenizers_are_known_by_their_rule(split):
    from lowbit.checkpoints import gguf_tokenizer

    built = gguf_tokenizer._build(split["steps"])
    data = {"pre_tokenizer": json.loads(built.__getstate__()), "model": {"ignore_merges": split.get("ignore_merges", False)}}
    assert gguf_tokenizer._by_rule(data) == split["names"][0]


def test_an_unknown_pre_tokenizer_says_what_to_do(llama, tmp_path):
    data = json.loads((llama[0].path / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {**data["pre_tokenizer"]}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="tokenizer.ggml.pre from a GGUF of it and add the hash"):
        gguf.write(replace(llama[0], files=(tmp_path / "tokenizer.json",)), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="has no tokenizer.json"):
        gguf.write(replace(llama[0], files=()), tmp_path / "m.gguf")


# --------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("scheme", "shape", "error", "message"),
    [
        (ggml.scheme("q4_k"), (8, 576), ShapeError, "layer: q4_k needs in_features to be a multiple of 256, and 576 is not. Use q5_0"),
        (ggml.scheme("q6_k"), (8, 545), ShapeError, "545 is not. Use float16"),
        (ggml.scheme("q8_0"), (8, 830), ShapeError, "multiple of 32, and 830 is not. Use float16"),
        (Scheme(block=(1, 32), scale_dtype="float16"), (8, 830), ShapeError, "in_features = 830"),
        (Scheme(block=(1, 48), scale_dtype="float16"), (8, 96), ShapeError, "groups of 48"),
        (Scheme(block=(1, 32)), (8, 64), RecipeError, "scale_dtype is float32"),
        (Scheme(bits=6, symmetric=False, scale_dtype="float16"), (8, 64), RecipeError, "int6-sym and int5-asym"),
        (Scheme(format="nf4"), (8, 64), RecipeError, "no type for the format 'nf4'"),
    ],
)
def test_check_refuses_what_does_not_fit(scheme, shape, error, message):
    with pytest.raises(error, match=message):
        gguf.check(scheme, shape, "layer")


def test_check_accepts_what_fits():
    for scheme in (*(scheme for scheme, _ in INTS), Scheme(format="bfloat16"), *map(ggml.scheme, ggml.BLOCK_TYPES)):
        gguf.check(scheme, (8, 768), "layer")
    gguf.check(Scheme(format="float16"), (3, 5), "layer")


def test_fallback_is_llama_quantizes():
    assert [gguf.fallback(t, 576) for t in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")] == ["q4_0", "q4_0", "q5_0", "q5_1", "q8_0", "q8_0"]
    assert gguf.fallback("q4_k", 512) == "q4_k" and gguf.fallback("q4_k", 545) == "float16" and gguf.fallback("q4_0", 40) == "float16"


def test_unsupported_models_name_the_known_ones(llama, tmp_path):
    with pytest.raises(CheckpointError, match="'mamba' cannot be written as GGUF: llama.cpp's names for its tensors and settings are not in .*knows bitnet, gemma2, .*olmo2, .*smollm3"):
        gguf.supported({"model_type": "mamba"})
    for config, message in (
        ({"model_type": "olmo2", "tie_word_embeddings": True}, "tie_word_embeddings = True; llama.cpp computes olmo2 with False"),
        ({"model_type": "olmo2", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "smollm3", "num_hidden_layers": 8, "no_rope_layers": [1, 1, 0, 1, 1, 0, 1, 1]}, "smollm3 without rope in layers 4, 8, ...; the config's no_rope_layers are others"),
        ({"model_type": "smollm3", "num_hidden_layers": 6, "no_rope_layer_interval": 3}, "no_rope_layers are others"),
        ({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 64}, "use_sliding_window = True"),
    ):
        with pytest.raises(CheckpointError, match=message):
            gguf.supported(config)
    for change, message in (
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"num_hidden_layers": 2}, r"lacks model\.layers\.1\.input_layernorm\.weight"),
        ({"num_attention_heads": 3}, "transformers does not accept this config.*number of attention heads"),
    ):
        with pytest.raises(CheckpointError, match=message):
            gguf.write(replace(llama[0], config={**llama[0].config, **change}), tmp_path / "m.gguf")
    extra = {**llama[0].tensors, "model.layers.0.self_attn.sinks.weight": llama[0].tensors["model.norm.weight"]}
    with pytest.raises(CheckpointError, match=r"sinks\.weight has no place in a GGUF of architecture llama"):
        gguf.write(replace(llama[0], tensors=extra), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- architectures without an entry in the table

OTHERS = {
    "stablelm": ("StableLmConfig", dict(use_qkv_bias=True, rope_theta=2e4, partial_rotary_factor=0.5)),
    "nemotron": ("NemotronConfig", dict(head_dim=16, partial_rotary_factor=0.5)),
    "falcon": ("FalconConfig", {}),
    "bloom": ("BloomConfig", dict(n_layer=2, n_head=4)),
    "lfm2": ("Lfm2Config", dict(num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
}  # fmt: skip


def llama_cpp_layout(kind: str, name: str, value: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's converter does to a tensor of Hugging Face's, as far as those of OTHERS need it."""
    if kind == "nemotron" and name.endswith("norm.weight"):
        return value + 1
    if kind == "bloom" and "attn_qkv" in name:
        return value.view(4, 3, 16, -1).transpose(0, 1).reshape(value.shape)
    return value.squeeze(1) if name.endswith("conv.weight") else value


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_that_transformers_knows_are_read(tmp_path, kind):
    import gguf as library

    class_name, special = OTHERS[kind]
    rows = byte_level_tokenizer(tmp_path)
    config = getattr(transformers, class_name)(**{**COMMON, "hidden_size": 64, "vocab_size": rows, **special})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    names = library.get_tensor_name_map(getattr(library.MODEL_ARCH, kind.upper()), 2)
    writer = library.GGUFWriter(tmp_path / "m.gguf", kind)
    writer.add_vocab_size(rows)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2] if kind == "lfm2" else 1 if kind == "falcon" else 2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    if kind != "bloom":
        writer.add_feed_forward_length(96)
    if kind in ("stablelm", "nemotron"):
        writer.add_rope_dimension_count(8)
        writer.add_rope_freq_base(2e4 if kind == "stablelm" else 1e4)
    for name, value in model.state_dict().items():
        stem, dot, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        if name.startswith("lm_head") and config.tie_word_embeddings:
            continue
        theirs = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        value = value + torch.randint(-20, 21, value.shape) / 64 if value.ndim == 1 else value
        model.state_dict()[name].copy_(value)
        writer.add_tensor(theirs + dot + suffix, llama_cpp_layout(kind, theirs + dot + suffix, value).contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()

    built = skeleton.build(gguf.open_file(tmp_path / "m.gguf"))
    for name, part in built.model.named_modules():
        if name != "lm_head" or not config.tie_word_embeddings:
            skeleton.fill(built, name, part, torch.float32, torch.device("cpu"))
    built.model.tie_weights()
    ids = list(range(20, 60))
    assert (logits(built.model, ids) - logits(model, ids)).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------- split files (bad ones: tests/hostile)


def test_split_files_are_one_model(llama, tmp_path):
    import gguf as library

    reader = library.GGUFReader(llama[1])
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=3)
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 4
    whole = gguf.open_file(llama[1])
    for part in parts[:2]:
        split = gguf.open_file(part)
        assert split.config == whole.config and split.shapes() == whole.shapes()
        assert all(torch.equal(split.dense(name), whole.dense(name)) for name in whole.shapes())
    parts[2].unlink()
    with pytest.raises(CheckpointError, match="m-00003-of-00004.gguf does not exist"):
        gguf.open_file(parts[0])
    alone = tmp_path / "alone.gguf"
    parts[1].rename(alone)
    with pytest.raises(CheckpointError, match="one part of 4"):
        gguf.open_file(alone)


@pytest.fixture
def parts(llama, tmp_path):
    """The model of llama, written in parts of at most 400 kB, and their files."""
    (tmp_path / "out").mkdir()
    seen = []
    gguf.write(llama[0], tmp_path / "out", shard_bytes=400_000, progress=seen.append)
    whole = gguf.read_header(llama[1])
    assert sum(seen) == sum(info.nbytes for info in whole.tensors.values())
    return sorted((tmp_path / "out").iterdir())


def test_a_model_is_written_in_parts(llama, parts):
    """At most so many bytes of tensors each, metadata in the first, what llama.cpp asks for in all; read back the same from any of them and from the folder."""
    whole, opened = gguf.read_header(llama[1]), gguf.open_file(llama[1])
    assert [path.name for path in parts] == [f"model-{i:05d}-of-{len(parts):05d}.gguf" for i in range(1, len(parts) + 1)] and len(parts) > 2
    keys = {"split.no", "split.count", "split.tensors.count"}
    names = []
    for number, path in enumerate(parts):
        header = gguf_container._read_part(path)
        assert [header.get(key) for key in sorted(keys)] == [len(parts), number, len(whole.tensors)]
        assert [header.raw[key][0] for key in sorted(keys)] == [2, 2, 5]  # u16, u16, i32
        assert header.raw.keys() - keys == (whole.raw.keys() if number == 0 else set())
        assert sum(info.nbytes for info in header.tensors.values()) <= 400_000 or len(header.tensors) == 1
        names += header.tensors
    assert names == list(whole.tensors)
    for path in (parts[0], parts[-1], parts[0].parent):
        again = open_checkpoint(path)
        assert again.config == opened.config and again.path == parts[0]
        assert again.shapes() == opened.shapes() and all(torch.equal(again.dense(name), opened.dense(name)) for name in opened.shapes())
    assert weight_files(parts[1]) == weight_files(parts[0].parent) == parts


def test_parts_become_one_again(llama, parts, tmp_path):
    gguf.write(gguf.open_file(parts[1]), tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == llama[1].read_bytes()


def test_a_model_that_fits_is_one_part(llama, tmp_path):
    gguf.write(llama[0], tmp_path, shard_bytes=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00001.gguf"]
    assert gguf.open_file(tmp_path / "model-00001-of-00001.gguf").shapes() == llama[0].shapes()


def test_too_many_parts_are_refused(tmp_path):
    tensors = [gguf_container.Planned(f"t{i}", 0, (1,), (lambda: torch.zeros(1),)) for i in range(65_536)]
    with pytest.raises(RecipeError, match="shards of 1 bytes would be 65,536 files, and a GGUF has at most 65,535"):
        gguf_container.write_split(tmp_path, {}, tensors, shard_bytes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.consumer
def test_llama_cpp_loads_the_parts(llama, parts):
    assert complete(server(parts[0]), PROMPT, 8) == complete(server(llama[1]), PROMPT, 8)


@pytest.mark.consumer
def test_llama_gguf_split_joins_them(llama, parts, tmp_path, llama_program):
    llama_program("llama-gguf-split", "--merge", parts[0], tmp_path / "joined.gguf")
    joined, whole = gguf.read_header(tmp_path / "joined.gguf"), gguf.read_header(llama[1])
    assert {name: info.rows.tobytes() for name, info in joined.tensors.items()} == {name: info.rows.tobytes() for name, info in whole.tensors.items()}
    assert {key: value for key, value in joined.raw.items() if not key.startswith("split.")} == whole.raw
    llama_program("llama-gguf-split", "--split", "--split-max-tensors", 3, llama[1], tmp_path / "theirs")
    theirs = gguf.open_file(tmp_path / "theirs-00002-of-00004.gguf")
    assert theirs.shapes() == llama[0].shapes() and theirs.config == gguf.open_file(llama[1]).config


def _with_value(path: Path, key: str, kind: str, old: int, new: int) -> None:
    data, value = path.read_bytes(), lambda number: len(key.encode()).to_bytes(8, "little") + key.encode() + gguf_container.pack_value(kind, number)
    assert data.count(value(old)) == 1
    path.write_bytes(data.replace(value(old), value(new)))


@pytest.mark.parametrize(
    ("part", "key", "kind", "old", "new", "message"),
    [
        (1, "split.no", "u16", 1, 2, "00002-of-.*split.no is 2, and by its name it would be 1. The parts do not belong together"),
        (0, "split.no", "u16", 0, 1, "00001-of-.*split.no is 1, and by its name it would be 0"),
        (2, "split.count", "u16", None, 9, "00003-of-.*split.count is 9, and by its name it would be"),
        (0, "split.tensors.count", "i32", 12, 13, "hold 12 tensors together; the first one says 13"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(parts, part, key, kind, old, new, message):
    _with_value(parts[part], key, kind, len(parts) if old is None else old, new)
    for path in (parts[0], parts[-1], parts[0].parent):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_parts_with_wrong_names_are_refused(parts):
    count = len(parts)
    for name in (f"model-00009-of-{count:05d}.gguf", "model-00000-of-00000.gguf", f"model-00000-of-{count:05d}.gguf"):
        other = parts[0].with_name(name)
        other.write_bytes(parts[0].read_bytes())
        with pytest.raises(CheckpointError, match="there is no such part of"):
            gguf.open_file(other)
        other.unlink()
    parts[1].rename(parts[1].with_name("alone.gguf"))
    for path in (parts[0], parts[2]):
        with pytest.raises(CheckpointError, match="model-00002-of-.* does not exist"):
            gguf.open_file(path)
    with pytest.raises(CheckpointError, match=f"holds {count} GGUF files; name one of them"):
        open_checkpoint(parts[0].parent)
