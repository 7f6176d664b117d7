"""Every layout with everything wrong in turn: each tensor dropped, of other dtypes and shapes, with bad values; each key of quantization_config gone or absurd."""

import json
import re

import pytest
import torch
from hostile.layouts import ABSURD, FOLDERS, PACKED, Damaged, damaged_tensors, damaged_values, module_of

from lowbit.checkpoints import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.models import skeleton as sk

# What may be gone or changed without a file meaning something else.
OPTIONAL = re.compile(
    r"(g_idx|weight_format|view_as_float|quant_scale|quant_zero) dropped"
    r"|(weight_format|input_scale|input_zero_point|nbits|group_size|axis|packing|view_as_float|quant_scale|quant_zero|scale_inv|weight_scale) with one axis more"
    r"|\.(offload_meta|encoded_state_dict|stores_quant_config|channel_wise|optimize|round_zero|compute_dtype|unpack_view_dtype|activation_scale) |down_proj_bias with"
)
QUANTIZED = [name for name in FOLDERS if name != "dense"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """sound(layout): its sound folder, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = FOLDERS[name](tmp_path_factory.mktemp("sound") / name)
        return made[name]

    return get


def outcome(folder, *, build: bool) -> str:
    """ "" when all of it can be decoded (and built, if asked for), the error's words when it is one of ours; anything else goes through."""
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.quantized:
            assert bool(checkpoint.dense(name).isfinite().all()), f"{name} decodes to NaN or infinity"
        for tensor in checkpoint.tensors.values():
            tensor.read(0, 1)
        if build:
            built = sk.build(checkpoint)
            for name in built.sources:
                sk.load_parameter(built, name, torch.float32)
    except LowbitError as error:
        return str(error)
    return ""


def wrong(what: str) -> bool:
    """Whether a file that is damaged so must be refused."""
    return not OPTIONAL.search(what) and any(word in what.partition(" ")[2] for word in ("dropped", "axis", "with a nan", "with a inf", "with a NaN"))


@pytest.mark.parametrize("name", QUANTIZED)
def test_sound(name, sound):
    checkpoint = open_checkpoint(sound(name))
    assert set(PACKED) <= set(checkpoint.shapes()) or any("experts.1.down_proj" in key or "experts.down_proj.1" in key for key in checkpoint.quantized)
    assert outcome(sound(name), build=True) == ""


@pytest.mark.parametrize("name", QUANTIZED)
def test_damaged_tensors(name, sound, tmp_path, bounded):
    folder, missed, seen = Damaged(sound(name), tmp_path / "bad"), [], 0
    own = {key: folder.tensors[key] for key in module_of(folder.tensors)}
    rest = {key: tensor for key, tensor in folder.tensors.items() if key not in own}
    for what, tensors in damaged_tensors(own):
        folder.write(tensors=tensors)
        with bounded():
            said = outcome(folder.folder, build=False)
            if wrong(what) and not said:  # then it must show beside the others
                said = outcome(folder.write(tensors={**rest, **tensors}), build=True)
        seen += bool(said)
        if wrong(what) and not said:
            missed.append(what)
    assert not missed and seen > 10


@pytest.mark.parametrize("name", QUANTIZED)
def test_damaged_section(name, sound, tmp_path, bounded, request):
    """Every change of a key of the section itself, and about 25 of those below; all with --slow."""
    folder, refused = Damaged(sound(name), tmp_path / "bad"), set()
    if "quantization_config" not in folder.config:
        pytest.skip("the layout says nothing in config.json")
    changes = list(damaged_values(folder.config["quantization_config"]))
    deep = [change for change in changes if "." in change[0].partition(" ")[0]]
    step = 1 if request.config.getoption("--slow") else max(1, len(deep) // 25)
    for what, section in [change for change in changes if "." not in change[0].partition(" ")[0]] + deep[::step]:
        folder.write_config({**folder.config, "quantization_config": section})
        with bounded():
            if outcome(folder.folder, build=False):
                refused.add(what)
    assert {"quant_method removed", "quant_method = 'x'", "quant_method = []"} <= refused


@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_damaged_state(name, sound, tmp_path, bounded):
    """bitsandbytes says in a tensor of text what its tensors are."""
    folder, refused = Damaged(sound(name), tmp_path / "bad"), set()
    key = next(key for key in module_of(folder.tensors) if "quant_state" in key)
    for what, state in damaged_values(json.loads(bytes(folder.tensors[key].tolist())), (*ABSURD, 2**40, 2**62, 1e300, 3, [2**40, 2**40])):
        folder.write(tensors={**folder.tensors, key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)})
        with bounded():
            if outcome(folder.folder, build=False):
                refused.add(what)
    assert {"quant_type removed", "shape = []", "dtype = {}", "blocksize = -1", "shape.0 = 1099511627776"} <= refused


@pytest.mark.parametrize("name", [name for name in QUANTIZED if name.startswith("torchao")])
def test_damaged_header(name, sound, tmp_path, bounded):
    """torchao says in the header of the file what its tensors are."""
    folder, refused = Damaged(sound(name), tmp_path / "bad"), set()
    texts = {key: json.loads(text) for key, text in folder.metadata.items() if key in (PACKED[0], "tensor_names")}
    for what, changed in damaged_values(texts):
        folder.write(metadata={**{key: text for key, text in folder.metadata.items() if key not in texts}, **{key: json.dumps(value) for key, value in changed.items()}})
        with bounded():
            if outcome(folder.folder, build=False):
                refused.add(what)
    assert {"tensor_names removed", "tensor_names = {}", f"{PACKED[0]} removed", f"{PACKED[0]}._data.block_size = -1"} <= refused


@pytest.mark.parametrize("name", QUANTIZED)
def test_truncated(name, sound, tmp_path):
    """Shards cut at many places."""
    folder = Damaged(sound(name), tmp_path / "bad").folder
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    for size in range(0, len(data), len(data) // 10 + 1):
        path.write_bytes(data[:size])
        assert "is not a whole safetensors file" in outcome(folder, build=False)


@pytest.mark.parametrize("key", ["quant_method", "packing_format", "config_groups", "format", "bits", "group_size", "sym", "zero_point", "version", "num_bits", "strategy", "type"])
@pytest.mark.parametrize("value", [[], {}, [[]], float("nan"), "x" * 10_000, 2**70, -(2**70)], ids=lambda value: str(value)[:6])
def test_values_that_cannot_be_looked_up(sound, tmp_path, key, value):
    """Of any layout: lists and objects as names, numbers beyond 64 bits."""
    for name in ("pack-quantized", "gptq-v1", "awq", "auto-round", "int-quantized"):
        folder = Damaged(sound(name), tmp_path / name)
        section = folder.config["quantization_config"]
        group = section.get("config_groups", {}).get("group_0", {})
        for place in (section, group, group.get("weights", {}), group.get("input_activations") or {}):
            if key in place:
                before, place[key] = place[key], value
                folder.write_config(folder.config)
                outcome(folder.folder, build=False)
                place[key] = before


HANGING = ("re:(a|aa)+$", "re:(.*a){20}$", "re:(x+x+)+y", "re:(?:[a-z_.0-9]+)*!")
USELESS = ("re:(", "re:a{1000000000}", "re:(?R)", "re:" + "(" * 5000, "re:" + "a" * 100_000, "re:(?P<a>x)", "re:(a{1,500}){1,500}")


@pytest.mark.parametrize("target", HANGING + USELESS, ids=lambda target: target[:20])
def test_targets_that_are_programs(sound, tmp_path, bounded, target):
    """A regular expression of a stranger may take for ever or all memory: compressed-tensors has them in its targets."""
    folder = Damaged(sound("pack-quantized"), tmp_path / "bad")
    name = "model." + "a" * 40 + "!.weight"
    for key in [key for key in folder.tensors if key.startswith(PACKED[0].removesuffix("weight"))]:
        folder.tensors[key.replace(PACKED[0].removesuffix("weight"), name.removesuffix("weight"))] = folder.tensors.pop(key)
    section = folder.config["quantization_config"]
    group = section["config_groups"]["group_0"]
    section["config_groups"] = {"group_0": {**group, "targets": [target]}, "group_1": {**group, "targets": ["x.y"]}}
    folder.write()
    with bounded():
        said = outcome(folder.folder, build=False)
    assert any(words in said for words in ("takes too long", "no expression for names", "is not a regular expression", "no config group targets it")), said


def test_many_targets(sound, tmp_path, bounded):
    """A group that names every module, as lowbit itself writes mixtures: looked up, not searched."""
    folder = Damaged(sound("int-quantized"), tmp_path / "bad")
    group = folder.config["quantization_config"]["config_groups"]["group_0"]
    names = [f"model.layers.{i}.mlp.x" for i in range(9_000)]
    folder.config["quantization_config"]["config_groups"] = {f"group_{i}": {**group, "targets": names[i::4]} for i in range(4)}
    folder.write(tensors={f"{name}.{part}": torch.ones(1, 1).to(dtype) for name in names for part, dtype in (("weight", torch.int8), ("weight_scale", torch.float16))})
    with bounded():
        assert len(open_checkpoint(folder.folder).quantized) == len(names)
