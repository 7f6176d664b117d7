"""The model is never whole in memory: what a process really holds (RssAnon) does not grow with the depth, nor with the size of the model."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoints import Checkpoint, LazyQuantized, open_checkpoint, own
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 4096, 320
BLOCK_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128, "tie_word_embeddings": True, "dtype": "float32",
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QUANTIZE = """
from lowbit.pipeline.quantize import quantize
from lowbit.recipe import Calibration, Recipe, Rule
from lowbit.scheme import Scheme
rules = tuple(Rule(match, None) for match in keep)
recipe = Recipe("memory", Scheme(bits=4, block=(1, 128), scale_dtype="float32"), options={"search": "minmax"}, rules=rules, calibration=Calibration(text, 2, 64))
quantize(model, recipe, out, dtype="float32")
"""
COMPARE = """
import re, resource
data = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024  # what this process may write to, before it has begun
resource.setrlimit(resource.RLIMIT_DATA, (data + limit, data + limit))
from lowbit.pipeline.evaluate import compare
made = compare([other], against=model, text=text, ctx=64, n_windows=2)
print(len(made.rows), made.rows[1].summaries["full"].kl_mean.value)
"""


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, tokenizer_folder):
    """deep_model(depth): a Llama of equal blocks of 67 MB, one shard each; the shards are shared between depths and deleted at the end."""
    root = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    shapes = {
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")},
        "mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    block = {name: torch.randn(shape) * 0.02 if len(shape) == 2 else torch.ones(shape) for name, shape in shapes.items()}

    def shard(folder, name, tensors, index):
        if not (root / name).exists():
            save_file(tensors, root / name, metadata={"format": "pt"})
        os.link(root / name, folder / name)
        index.update(dict.fromkeys(tensors, name))

    def make(depth):
        folder, index = root / f"blocks-{depth}", {}
        if folder.exists():
            return folder
        folder.mkdir()
        shard(folder, "outside.safetensors", {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}, index)
        for i in range(depth):
            shard(folder, f"block-{i}.safetensors", {f"model.layers.{i}.{name}.weight": value for name, value in block.items()}, index)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": depth}))
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    yield make
    for file in root.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("keep", [pytest.param(["*.mlp.*"], id="attention"), pytest.param([], id="all", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_depth(keep, deep_model, fork_server, text_file, tmp_path):
    """GPTQ of 6 and of 24 blocks. The quick run quantizes the attention only: the memory of a block is the same, and it takes a fifth of the time."""
    peaks = {}
    for depth in (6, 24):
        answer = fork_server.run(QUANTIZE, model=deep_model(depth), text=text_file, out=tmp_path / f"out-{depth}", keep=keep)
        assert answer["status"] == 0, answer["output"]
        peaks[depth] = answer["peak"]
        shutil.rmtree(tmp_path / f"out-{depth}")
        print(f"{depth} blocks of {BLOCK_BYTES / 1e6:.0f} MB: peak RssAnon {answer['peak'] / 1e6:.0f} MB")
    assert BLOCK_BYTES >= 64e6
    assert peaks[24] <= 1.15 * peaks[6]


def test_evaluation_of_a_model_larger_than_the_memory_it_is_given(deep_model, fork_server, text_file):
    """A limit of half the model on what the process may allocate: whoever held it, or mapped it writable, would be refused."""
    model, other = deep_model(24), deep_model(6)
    answer = fork_server.run(COMPARE, model=model, other=other, text=text_file, limit=24 * BLOCK_BYTES // 2)
    assert answer["status"] == 0, answer["output"]
    rows, kl = answer["output"].split()[-2:]
    print(f"models of {24 * BLOCK_BYTES / 1e6:.0f} and {6 * BLOCK_BYTES / 1e6:.0f} MB: peak RssAnon {answer['peak'] / 1e6:.0f} MB")
    assert rows == "2" and float(kl) > 0
    assert answer["peak"] < 24 * BLOCK_BYTES / 3


CONVERT = """
from lowbit.pipeline.convert import convert
made = convert(model, "compressed-tensors", out)
print(made.matrices, made.exact)
"""


@pytest.mark.slow
def test_a_large_quantized_embedding_is_decoded_some_rows_at_a_time(deep_model, fork_server, tmp_path):
    """Into a layout that keeps embeddings dense. Its 134 million weights would take 537 MB in float32, twice that beside what was made of them."""
    rows = 2**17
    small, model = open_checkpoint(deep_model(1)), tmp_path / "model"
    scheme = Scheme(bits=2, block=(1, 64))
    codes = torch.randint(0, 4, (1, HIDDEN), dtype=torch.uint8).expand(rows, HIDDEN)
    qt = QuantizedTensor(scheme, (rows, HIDDEN), "bfloat16", {"codes": codes, "scale": torch.rand(rows, HIDDEN // 64)})
    name = "model.embed_tokens.weight"
    tensors = {key: value for key, value in small.tensors.items() if key != name}
    model.mkdir()
    own.write(Checkpoint("safetensors", model, {**small.config, "vocab_size": rows}, tensors, {name: LazyQuantized(scheme, qt.shape, torch.bfloat16, lambda: qt)}), model)
    answer = fork_server.run(CONVERT, model=model, out=tmp_path / "out")
    assert answer["status"] == 0, answer["output"]
    print(f"peak RssAnon {answer['peak'] / 1e6:.0f} MB")
    assert answer["output"].split()[-2:] == ["1", "1"]
    assert answer["peak"] < 1.25 * 4 * rows * HIDDEN
