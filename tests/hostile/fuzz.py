"""Coverage-guided fuzzing of whatever lowbit reads: python tests/hostile/fuzz.py TARGET [seconds] [corpus]

Targets: gguf (the header's bytes), safetensors (the header's bytes), config (config.json, up to the skeleton), index (model.safetensors.index.json), provenance (lowbit.json),
recipe (TOML), tokenizer (tokenizer.json, as GGUF metadata), imatrix (an importance matrix), layouts (any layout of layouts.py, or one: layout:NAME; tensors and settings are damaged
as the bytes say), numbers (decoders of decoders.py). Only lowbit's own errors may come out. seconds: how long (default 60). corpus: a folder where inputs that reach new code are
kept (default: a temporary one).

Needs atheris (pip install atheris; wheels for Linux and CPython 3.11 and newer). An input that makes something else happen is written to crash-..., hang or memory to timeout-...
and oom-... in the current folder; python tests/hostile/fuzz.py TARGET FILE runs it again. What was found becomes a case in files.py or one of the tests here.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:1] = [str(ROOT), str(ROOT.parent)]

with atheris.instrument_imports(include=["lowbit"]):
    import torch
    from hostile import decoders, files, layouts

    from lowbit.checkpoints import gguf_tokenizer, open_checkpoint
    from lowbit.checkpoints.imatrix import read_imatrix
    from lowbit.errors import LowbitError
    from lowbit.models import skeleton as sk
    from lowbit.pipeline import recipes
    from lowbit.pipeline.evaluate import Row, Size
    from lowbit.pipeline.inspect import inspect
    from lowbit.report.model import _model_section

SECONDS, MEMORY_MB, HANG_SECONDS = 60, 4000, 20
Run = Callable[[bytes], None]


def use(path: Path, *, build: bool = False) -> None:
    """Open, look into it, decode some rows of everything."""
    checkpoint = open_checkpoint(path)
    inspect(path)
    for name in checkpoint.shapes():
        checkpoint.lazy(name).read(0, 2)
    if build:
        sk.build(checkpoint)


def fuzz_gguf(folder: Path) -> tuple[Run, Iterable[bytes]]:
    """The header as it comes, and zeros behind it."""
    path = folder / "x.gguf"

    def run(data: bytes) -> None:
        path.write_bytes(data + bytes(200_000))
        use(path)

    (folder / "seed").mkdir()
    seeds = []
    for name in ("q4_0", "q6_k", "q5_1"):
        raw, tensors, _ = files.parts(layouts.gguf_file(folder / "seed" / f"{name}.gguf", name if name != "q6_k" else "q8_0"))
        short = {key: value for key, value in raw.items() if not key.startswith("tokenizer")}
        seeds.append(files.header_bytes(short, tensors, 32))
    return run, [*seeds, b"GGUF" + struct.pack("<IQQ", 3, 0, 0), files.header_bytes({"general.architecture": files.pack_value("string", "gpt2")}, [], 32)]


def fuzz_safetensors(folder: Path) -> tuple[Run, Iterable[bytes]]:
    """A header with up to eight things wrong, or as it comes; behind it as many bytes as the sound one has."""
    files.sound(folder)
    sound = files.sound_files()["model.safetensors"]
    size = struct.unpack_from("<Q", sound)[0]
    text = text_of(json.loads(sound[8 : 8 + size]), most=8)

    def run(data: bytes) -> None:
        header = text(data)
        (folder / "model.safetensors").write_bytes((header if data[:1] == b"\xff" else struct.pack("<Q", len(header)) + header) + sound[8 + size :])
        use(folder, build=True)

    return run, [b"\0" + sound[8 : 8 + size], b"\xff" + sound[:200], *noise()]


def noise() -> list[bytes]:
    """Seeds for targets that take their decisions from the bytes: long enough for all of them."""
    return [b"\x60" + random.Random(i).randbytes(200) for i in range(50)]


def text_of(sound: dict, most: int = 4) -> Callable[[bytes], bytes]:
    """Input to a JSON text: as it comes where the first byte is small, else the sound data with some things wrong."""

    def make(data: bytes) -> bytes:
        if data[:1] < b"\x40" or data[:1] == b"\xff":
            return data[1:]
        provider, made = atheris.FuzzedDataProvider(data[1:]), json.loads(json.dumps(sound))
        for _ in range(provider.ConsumeIntInRange(1, most)):
            damage_setting(made, provider)
        return json.dumps(made).encode("utf-8", "surrogatepass")

    return make


def fuzz_text(folder: Path, name: str, sound: dict, *, build: bool = False) -> tuple[Run, Iterable[bytes]]:
    """A JSON file of a sound folder."""
    files.sound(folder)
    text = text_of(sound)

    def run(data: bytes) -> None:
        (folder / name).write_bytes(text(data))
        use(folder, build=build)

    return run, [b"\0" + json.dumps(sound).encode(), *noise()]


def fuzz_provenance(folder: Path) -> tuple[Run, Iterable[bytes]]:
    """lowbit.json, and the report of it (which may refuse it in any of its own words: model_section makes one error of them)."""
    files.sound(folder)
    text = text_of(files.PROVENANCE)

    def run(data: bytes) -> None:
        (folder / "lowbit.json").write_bytes(text(data))
        row = Row("x", folder, Size(1, 1, 1, 1.0, 1.0), {}, open_checkpoint(folder).provenance)
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            _model_section(row, is_open=True)

    return run, [b"\0" + json.dumps(files.PROVENANCE).encode(), *noise()]


def fuzz_recipe(folder: Path) -> tuple[Run, Iterable[bytes]]:
    path = folder / "x.toml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        recipe, _ = recipes.settle(recipes.parse(path), files.SHAPES, "float16")
        recipes.resolve(recipe, files.SHAPES, {})

    return run, ["\n".join(f"{key} = {files.toml(value)}" for key, value in files.RECIPE.items()).encode(), *(f'scheme = "{text}"'.encode() for text, _ in recipes.PRESETS.values())]


def fuzz_tokenizer(folder: Path) -> tuple[Run, Iterable[bytes]]:
    """tokenizer.json without its vocabulary, which is put back."""
    files.sound(folder)
    sound = layouts.tokenizer()
    vocabulary = sound["model"].pop("vocab")
    text = text_of(sound)

    def run(data: bytes) -> None:
        content = text(data).decode(errors="replace")
        with contextlib.suppress(ValueError, RecursionError):
            made = json.loads(content)
            if isinstance(made, dict) and isinstance(made.get("model"), dict):
                content = json.dumps({**made, "model": {"vocab": vocabulary, **made["model"]}})
        (folder / "tokenizer.json").write_text(content, encoding="utf-8", errors="replace")
        checkpoint = open_checkpoint(folder)
        gguf_tokenizer.metadata(checkpoint.files, checkpoint.config, layouts.ROWS, where=folder)

    return run, [b"\0" + json.dumps(sound).encode(), *noise()]


VALUES = (
    *layouts.ABSURD, True, False, 0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 1.5, float("nan"), "int", "float", "group", "tensor", "channel", "token", "tensor_group", "nf4", "fp4", "gptq", "awq",
    [1], {"a": 1},
)  # fmt: skip
PARTS = ("weight", "weight_scale", "qzeros", "g_idx", "SCB", "weight_packed", "weight_shape", "scales", "W_q", "codes", "scale", "bias", "")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn)


def fuzz_layouts(folder: Path, only: str | None = None) -> tuple[Run, Iterable[bytes]]:
    """A sound folder with up to four things wrong: a tensor gone, renamed, of another dtype, shape or content, a setting gone or replaced."""
    names = [only] if only else [name for name in layouts.FOLDERS if name != "dense"]
    sound = {name: layouts.Damaged(layouts.FOLDERS[name](folder / name), folder / f"{name}-bad") for name in names}

    def run(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        damaged = sound[provider.PickValueInList(names)]
        tensors, config, texts = dict(damaged.tensors), json.loads(json.dumps(damaged.config)), dict(damaged.metadata)
        for _ in range(provider.ConsumeIntInRange(1, 4)):
            action = provider.ConsumeIntInRange(0, 4)
            if action < 2:
                damage_tensor(tensors, provider)
            elif action < 4 or not damage_text(tensors, texts, provider):
                damage_setting(config, provider)
        use(damaged.write(tensors, config, texts))

    return run, noise()


def damage_tensor(tensors: dict, provider) -> None:
    name = provider.PickValueInList(sorted(layouts.module_of(tensors)) or sorted(tensors))
    tensor, action = tensors.pop(name), provider.ConsumeIntInRange(0, 5)
    if action == 0:
        return
    if action == 1:
        name = name.rpartition(".")[0] + "." + provider.PickValueInList(list(PARTS))
    elif action == 2:
        tensor = tensor.float().to(provider.PickValueInList(list(DTYPES)))
    elif action == 3:
        shape = [provider.ConsumeIntInRange(0, 130) for _ in range(provider.ConsumeIntInRange(0, 3))]
        tensor = decoders.fill(torch.empty(shape, dtype=tensor.dtype), provider.ConsumeBytes(16))
    elif action == 4:
        tensor = decoders.fill(tensor, provider.ConsumeBytes(64))
    else:
        flat, place = tensor.clone().reshape(-1), provider.ConsumeIntInRange(0, max(0, tensor.numel() - 1))
        flat[place : place + 1] = decoders.fill(flat[place : place + 1], provider.ConsumeBytes(8))
        tensor = flat.view(tensor.shape)
    tensors[name] = tensor


def damage_text(tensors: dict, texts: dict, provider) -> bool:
    """Damage JSON that stands in the header or in a tensor (torchao, bitsandbytes); False where there is none."""
    states = {name: bytes(tensor.tolist()).decode(errors="replace") for name, tensor in tensors.items() if "quant_state" in name and tensor.dtype == torch.uint8 and tensor.ndim == 1}
    found = {name: text for name, text in {**texts, **states}.items() if text[:1] in ("{", "[")}
    if not found:
        return False
    name = provider.PickValueInList(sorted(found))
    with contextlib.suppress(ValueError):
        made = {"x": json.loads(found[name])}
        damage_setting(made, provider)
        text = json.dumps(made.get("x"))
        if name in texts:
            texts[name] = text
        else:
            tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return True


def damage_setting(data: dict, provider) -> None:
    """Remove or replace one value somewhere in JSON data; of a config mostly in its quantization_config."""
    place = data["quantization_config"] if isinstance(data.get("quantization_config"), dict) and provider.ConsumeBool() else data
    while place:
        key = provider.PickValueInList(sorted(place) if isinstance(place, dict) else list(range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and provider.ConsumeProbability() < 0.8:
            place = place[key]
            continue
        action = provider.ConsumeIntInRange(0, 7)
        if action == 0:
            del place[key]
        else:
            place[key] = provider.PickValueInList(list(VALUES)) if action < 6 else provider.ConsumeUnicode(12) if action == 6 else provider.ConsumeInt(8)
        return


def fuzz_imatrix(folder: Path) -> tuple[Run, Iterable[bytes]]:
    """An importance matrix of either form, as it comes."""
    path = folder / "x.dat"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_imatrix(path)

    sound = {"a__in_sum2": torch.ones(2, 4), "a__counts": torch.ones(2, 1)}
    return run, [files.imatrix(**sound)(folder).read_bytes(), files.old_imatrix(1, 1, b"a", 1, 2, 1.0, 1.0, 3, 1, b"b")(folder).read_bytes()]


def fuzz_numbers(folder: Path) -> tuple[Run, Iterable[bytes]]:
    names = list(decoders.DECODERS)
    return lambda data: decoders.DECODERS[names[data[0] % len(names)]](data[1:]) if data else None, [bytes([i]) + bytes(range(64)) for i in range(len(names))]


TARGETS: dict[str, Callable[[Path], tuple[Run, Iterable[bytes]]]] = {
    "gguf": fuzz_gguf,
    "safetensors": fuzz_safetensors,
    "config": lambda folder: fuzz_text(folder, "config.json", layouts.CONFIG, build=True),
    "index": lambda folder: fuzz_text(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": dict.fromkeys(layouts.weights(), "model.safetensors")}),
    "provenance": fuzz_provenance,
    "recipe": fuzz_recipe,
    "tokenizer": fuzz_tokenizer,
    "imatrix": fuzz_imatrix,
    "layouts": fuzz_layouts,
    "numbers": fuzz_numbers,
}


def main(words: list[str]) -> None:
    if not words or words[0].partition(":")[0] not in (*TARGETS, "layout"):
        sys.exit(f"{__doc__}\nExpected a target: {', '.join(TARGETS)} or layout:NAME with one of {', '.join(layouts.FOLDERS)}.")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "model").mkdir()
    target, _, only = words[0].partition(":")
    run, seeds = fuzz_layouts(folder / "model", only) if target == "layout" else TARGETS[target](folder / "model")

    def once(data: bytes) -> None:
        with contextlib.suppress(LowbitError):
            run(data)

    if len(words) > 1 and Path(words[1]).is_file():
        once(Path(words[1]).read_bytes())
        return
    corpus = Path(words[2]) if len(words) > 2 else folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        once(seed)
        (corpus / f"seed-{number}").write_bytes(seed)
    seconds = int(words[1]) if len(words) > 1 else SECONDS
    options = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={HANG_SECONDS}", "-max_len=20000", "-len_control=0", "-reduce_inputs=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
