"""bitsandbytes folders: round trips, what bitsandbytes and transformers make of them where they are installed, and files that are damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import numerics
from lowbit.checkpoints import bitsandbytes, open_checkpoint
from lowbit.checkpoints.checkpoint import Checkpoint, LazyQuantized
from lowbit.errors import CheckpointError, RecipeError
from lowbit.scheme import Activation, Scheme

NAME = "model.layers.0.self_attn.q_proj.weight"
INT8 = Scheme(bits=8, block=(1, -1), range="textbook", act=Activation(range="textbook", threshold=6.0))
SCHEMES = [Scheme(kind, 4, (1, size), nested=nested) for kind in ("nf4", "fp4") for size in (64, 32) for nested in (None, 256)] + [INT8]


def written(qt, folder):
    folder.mkdir(exist_ok=True)
    bitsandbytes.write(Checkpoint("safetensors", None, {"dtype": qt.dtype}, {}, {NAME: LazyQuantized(qt.scheme, qt.shape, getattr(torch, qt.dtype), lambda: qt)}), folder)
    return folder


def weights(rows=48, columns=160):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(48, 160), (7, 33)])  # blocks that cross rows, and an odd number of codes
def test_round_trip(tmp_path, scheme, shape):
    qt = numerics.quantize(weights(*shape), scheme)
    opened = open_checkpoint(written(qt, tmp_path))
    found = opened.quantized[NAME].load()
    assert opened.kind == "bitsandbytes" and found.scheme == scheme and found.shape == shape and found.dtype == "float32" and not opened.tensors
    assert torch.equal(found.parts["codes"], qt.parts["codes"])
    torch.testing.assert_close(numerics.dequantize(found), numerics.dequantize(qt), rtol=1e-6 if scheme is INT8 else 0, atol=0)
    assert bool(opened.activations) == (scheme is INT8)


@pytest.mark.consumer
@pytest.mark.parametrize("recipe", ["nf4-g64-dq-rtn", "nf4-g64-rtn", "fp4-g64-rtn", "llm-int8"])
def test_transformers_loads_them(save_model, tmp_path, recipe):
    """Codes as bitsandbytes holds them after from_pretrained, and its own decoding of them."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the consumer of this layout, is not installed")
    from transformers import AutoModelForCausalLM

    lowbit.quantize(save_model("llama", tmp_path / "model", dtype=torch.bfloat16), recipe, tmp_path / "out", target_name="bitsandbytes")
    checkpoint = open_checkpoint(tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for name, entry in checkpoint.quantized.items():
        module, ours = model.get_submodule(name.removesuffix(".weight")), numerics.dequantize(entry.load())
        if recipe == "llm-int8":
            found = module.weight.data.float() * module.weight.SCB.unsqueeze(1) / 127
            torch.testing.assert_close(found, ours, rtol=1e-6, atol=1e-8)
        else:
            found = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            torch.testing.assert_close(found.float(), ours, rtol=2**-8, atol=1e-8)  # decoded in bfloat16, the model's dtype
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20).view(1, 20)).logits).all()


@pytest.mark.parametrize(
    "scheme",
    [Scheme("nf4", 4, (1, 48)), Scheme(bits=4), Scheme(bits=8, block=(1, 64)), Scheme("nf4", 4, (1, 64), nested=128), Scheme("float16", 16), Scheme("nf4", 4, (1, 64), act=Activation())],
    ids=lambda s: s.name,
)
def test_what_cannot_be_is_refused(scheme):
    with pytest.raises(RecipeError, match="bitsandbytes"):
        bitsandbytes.check(scheme, (64, 64), "x")


@pytest.fixture
def sound(tmp_path):
    return written(numerics.quantize(weights(), Scheme("nf4", 4, (1, 64), nested=256)), tmp_path / "sound")


def damaged(folder, part, change, *, load=False):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name == f"{NAME}{part}" or (part == "state" and "quant_state" in name))
    made = change(tensors.pop(key))
    save_file({**tensors, **({} if made is None else {key: made})}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as found:
        opened = open_checkpoint(folder)
        if load:
            opened.quantized[NAME].load()
    return str(found.value)


@pytest.mark.parametrize(
    ("part", "change", "message", "load"),
    [
        ("", lambda t: t[:-1].clone(), "needs torch.uint8", False), ("", lambda t: None, "is missing", False), (".absmax", lambda t: t.float(), "needs torch.uint8", False),
        (".quant_map", lambda t: t * 2, "is not the table of nf4", True), (".nested_quant_map", lambda t: t + 1, "is not the table", True),
        (".nested_absmax", lambda t: torch.full_like(t, float("nan")), "NaN or infinity", True), ("state", lambda t: t[:-1].clone(), "is not the JSON", False),
        ("state", lambda t: torch.zeros(5000, dtype=torch.uint8), "is not the JSON", False), ("state", lambda t: None, "belongs to no packed weight", False),
    ],
)  # fmt: skip
def test_hostile_tensors(sound, part, change, message, load):
    assert message in damaged(sound, part, change, load=load)


@pytest.mark.parametrize(
    "state",
    [
        [1], {}, {"shape": [48, -160]}, {"shape": [48]}, {"shape": [2**60, 2**60]}, {"blocksize": 0}, {"blocksize": "64"}, {"quant_type": "nf5"}, {"dtype": "float8"}, {"nested_offset": None},
        {"nested_blocksize": -1}, {"shape": [True, 160]},
    ],
)  # fmt: skip
def test_hostile_states(sound, state):
    def change(tensor):
        made = {**json.loads(bytes(tensor.tolist())), **state} if isinstance(state, dict) and state else state
        return torch.tensor(list(json.dumps(made).encode()), dtype=torch.uint8)

    assert ("holds a JSON list" if state == [1] else "expected quant_type") in damaged(sound, "state", change)
