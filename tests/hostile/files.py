"""Bad model folders and GGUF files, each made by a few lines: what is done to a sound one, why, and a part of the error that must come of it."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save, save_file

from lowbit.checkpoints.gguf_container import Header, header_bytes, pack_value, read_header

from . import layouts
from .layouts import CONFIG, EMBEDDING, HEAD, LINEARS, NORMS


@dataclass(frozen=True)
class Case:
    """A bad file. make: (an empty folder) -> the path that is opened. reason: what it tries. message: a regular expression that the error matches.

    late: inspect, which reads headers only, cannot see it.
    """

    name: str
    make: Callable[[Path], Path]
    reason: str
    message: str
    late: bool = False


@cache
def sound_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        return {file.name: file.read_bytes() for file in layouts.dense(Path(folder)).iterdir()}


def sound(folder: Path, **instead: object) -> Path:
    """A sound dense folder. instead: config, index, provenance, tokenizer_config (JSON data or text), weights (bytes or tensors), None: without it."""
    places = {"config": "config.json", "index": "model.safetensors.index.json", "provenance": "lowbit.json", "weights": "model.safetensors", "tokenizer_config": "tokenizer_config.json"}
    files: dict[str, object] = {**sound_files(), **{places[key]: value for key, value in instead.items()}}
    for name, content in files.items():
        if content is None:
            continue
        if name == "model.safetensors" and isinstance(content, dict):
            content = save(content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode("utf-8", "surrogatepass"))
    return folder


def config(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: sound(folder, config={**CONFIG, **changes})


def weights(**changes: object) -> Callable[[Path], Path]:
    """Tensors by short names (embedding, head, norm, q) or full ones; None: without."""
    short = {"embedding": EMBEDDING, "head": HEAD, "norm": NORMS[2], "q": LINEARS[0]}
    made = {**layouts.weights(), **{short.get(name, name): tensor for name, tensor in changes.items()}}
    return lambda folder: sound(folder, weights={name: tensor for name, tensor in made.items() if tensor is not None})


def header(data: object, tail: int | bytes = 8, *, length: int | None = None) -> Callable[[Path], Path]:
    """model.safetensors with this header (JSON data or bytes), a length that may lie, and so many zeros behind it."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return lambda folder: sound(folder, weights=struct.pack("<Q", len(text) if length is None else length) + text + (bytes(tail) if isinstance(tail, int) else tail))


def tensor(shape: list, begin: int = 0, end: int = 8, dtype: object = "F32", name: str = "a") -> dict:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def index(weight_map: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file({"a": torch.zeros(2)}, folder.parent / "outside.safetensors")
        return sound(folder, index={"metadata": {}, "weight_map": weight_map})

    return make


def link(name: str, to: str | None = None) -> Callable[[Path], Path]:
    """A sound folder where one file is a link to a copy of it outside, or to a place."""

    def make(folder: Path) -> Path:
        sound(folder)
        (folder.parent / f"outside-{name}").write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(f"../outside-{name}" if to is None else to)
        return folder

    return make


def special(name: str, make_it: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A sound folder where one file is replaced by something else of that name."""

    def make(folder: Path) -> Path:
        sound(folder)
        (folder / name).unlink(missing_ok=True)
        make_it(folder / name)
        return folder

    return make


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(size)

    return make


def terabyte(folder: Path) -> Path:
    """A tensor of a terabyte in a sparse file, sound but for its shape."""
    sound(folder)
    text = json.dumps(tensor([1 << 38], 0, 1 << 40, name=NORMS[2])).encode()
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (1 << 40))
    return folder


class Evil:
    """A pickle that leaves a trace when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch lowbit-was-here",)


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


def provenance(layers: object, **more: object) -> Callable[[Path], Path]:
    return lambda folder: sound(folder, provenance={"layers": layers, **more})


def activation(**changes: object) -> Callable[[Path], Path]:
    act = {"format": "int", "bits": 8, "symmetric": True, "range": "half", "per": "token", "static": False, "observer": "minmax", "percentile": 99.99, "threshold": None}
    return provenance({LINEARS[0]: {"activation": {"act": {**act, **changes}, "scale": None, "zero_point": 0.0}}})


DAMAGED = "is not a whole safetensors file"
NO_MODEL = "cannot build a model of this config"
FOLDERS = (
    Case("nothing", lambda folder: folder, "an empty folder", "config.json does not exist"),
    Case("no weights", lambda folder: sound(folder, weights=None), "config and tokenizer alone", "holds no weights"),
    Case("other names", special("model.safetensors", lambda path: save_file({"a": torch.zeros(2)}, path.with_name("x.safetensors"))), "weights that nothing names", "holds x.safetensors but"),
    Case("pytorch_model.bin", special("model.safetensors", lambda path: path.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Evil()))), "only a pickle", "a pickle can run any code"),
    Case("model.pt", special("model.safetensors", lambda path: path.with_name("model.pt").write_bytes(pickle.dumps(Evil()))), "only a pickle", "a pickle can run any code"),
    Case("consolidated.pth", special("model.safetensors", lambda path: path.with_name("consolidated.00.pth").write_bytes(b"")), "only a pickle", "a pickle can run any code"),
    Case("pickle in disguise", lambda folder: sound(folder, weights=pickle.dumps(Evil())), "a pickle that runs a program, called model.safetensors", DAMAGED),
    Case("torch.save in disguise", special("model.safetensors", lambda path: torch.save({"a": torch.zeros(2)}, path)), "a zip of pickles, called model.safetensors", DAMAGED),
    Case("weights are a folder", special("model.safetensors", Path.mkdir), "a folder where a file is expected", "holds no weights|holds model.safetensors but"),
    Case("config is a folder", special("config.json", Path.mkdir), "a folder where a file is expected", "config.json is no file"),
    Case("config is a pipe", special("config.json", os.mkfifo), "reading it would wait for ever", "config.json is no file"),
    Case("config of a terabyte", special("config.json", sparse(1 << 40)), "a sparse file that fills the memory", "1,099,511,627,776 bytes; expected at most"),
    Case("config is /dev/zero", link("config.json", "/dev/zero"), "a file without an end", "config.json is no file"),
    Case("config links out", link("config.json"), "a link to a file of the user's", "leads out of the folder"),
    Case("weights link out", link("model.safetensors"), "a link to weights of the user's", "leads out of the folder"),
    Case("tokenizer links out", link("tokenizer.json"), "a link to a secret, which would be copied beside the output", "leads out of the folder"),
    Case("config links to itself", link("config.json", "config.json"), "a loop of links", "config.json does not exist"),
    Case("weights link to themselves", link("model.safetensors", "model.safetensors"), "a loop of links", "holds no weights|holds model.safetensors but"),
    # headers
    Case("empty weights", lambda folder: sound(folder, weights=b""), "an interrupted download", DAMAGED),
    Case("seven bytes", lambda folder: sound(folder, weights=b"1234567"), "shorter than the length of its header", DAMAGED),
    Case("half a header", lambda folder: sound(folder, weights=sound_files()["model.safetensors"][:100]), "truncated in the header", DAMAGED),
    Case("no data", lambda folder: sound(folder, weights=sound_files()["model.safetensors"][:-70_000]), "truncated in the data", DAMAGED),
    Case("a byte less", lambda folder: sound(folder, weights=sound_files()["model.safetensors"][:-1]), "truncated by one byte", DAMAGED),
    Case("a byte more", lambda folder: sound(folder, weights=sound_files()["model.safetensors"] + b"x"), "bytes behind the last tensor", DAMAGED),
    Case("header of 2^63 bytes", header({}, length=1 << 63), "a length that is negative as a signed number", DAMAGED),
    Case("header of 2^64 - 1 bytes", header({}, length=(1 << 64) - 1), "a length that overflows when 8 is added", DAMAGED),
    Case("header of a terabyte", header({}, length=1 << 40), "a length that fills the memory", DAMAGED),
    Case("header longer than the file", header({}, length=1000), "a length beyond the file", DAMAGED),
    Case("header is no JSON", header(b"{'a': 1}"), "another language", DAMAGED),
    Case("header is a list", header([]), "JSON of another kind", DAMAGED),
    Case("header is no text", header(b'{"\xff": 1}'), "bytes that are no UTF-8", DAMAGED),
    Case("deep header", header(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), "a parser that recurses", DAMAGED),
    Case("entry is a list", header({"a": ["F32", [2], [0, 8]]}), "what the library reads as an entry", "the entry of 'a' is no object"),
    Case("entry is a list of pairs", header({"a": ["U8", [2, 3], [0, 6]]}, 6), "the same, of pairs", "the entry of 'a' is no object"),
    Case("huge number in an entry", header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":' + b"9" * 5000 + b"}}"), "a number that Python refuses to read", DAMAGED),
    Case("tensor twice", header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "which of them counts?", "'a' is there twice"),
    Case("offsets past the end", header(tensor([2], 0, 10**9)), "data that is not there", DAMAGED),
    Case("offsets reversed", header(tensor([2], 8, 0)), "a negative size", DAMAGED),
    Case("offsets negative", header(tensor([2], -8, 0)), "bytes of the header as data", DAMAGED),
    Case("offsets of 2^64", header(tensor([2], 0, 1 << 64)), "a number that does not fit", DAMAGED),
    Case("offsets overlap", header({**tensor([2]), **tensor([2], name="b")}), "two tensors in the same bytes", DAMAGED),
    Case("a hole", header({**tensor([1], 0, 4), **tensor([1], 8, 12, name="b")}, 12), "bytes that belong to no tensor", DAMAGED),
    Case("dimensions negative", header(tensor([-1, -2])), "a product that is right", DAMAGED),
    Case("dimensions overflow", header(tensor([1 << 40, 1 << 40])), "a product beyond 2^64", DAMAGED),
    Case("dimensions wrap", header(tensor([1 << 62, 8], 0, 0), 0), "a product that is 0 in 64 bits", DAMAGED),
    Case("dimension beside a zero", header(tensor([0, (1 << 64) - 1], 0, 0), 0), "any number times 0 is 0", "has the shape .0, 18446744073709551615"),
    Case("dimensions and bytes differ", header(tensor([3])), "12 bytes announced as 8", DAMAGED),
    Case("dimension is a fraction", header(tensor([2.0])), "a number of another kind", DAMAGED),
    Case("dtype unknown", header(tensor([2], dtype="F999")), "a dtype that is none", DAMAGED),
    Case("dtype not read", header(tensor([4], dtype="U16")), "a dtype that no model has", "dtype U16, which lowbit does not read"),
    Case("dtype is a number", header(tensor([2], dtype=7)), "JSON of another kind", DAMAGED),
    Case("tensor of a terabyte", terabyte, "a sparse file with one tensor that fills memory and disk", "not in the checkpoint|has shape", late=True),
    # index
    Case("index is no JSON", lambda folder: sound(folder, index="{"), "truncated JSON", "index.json cannot be read as JSON"),
    Case("index without weight_map", lambda folder: sound(folder, index={"metadata": {}}), "no names", "expected an object weight_map"),
    Case("index that begins with a mark", lambda folder: sound(folder, index="\ufeff{}"), "a byte order mark", "index.json cannot be read as JSON"),
    Case("index of a list", index([]), "JSON of another kind", "expected an object weight_map"),
    Case("index of numbers", index({"a": 3}), "names that are none", "expected an object weight_map"),
    Case("index points up", index({"a": "../outside.safetensors"}), "a file outside of the folder", "points outside the folder"),
    Case("index points down and up", index({"a": "sub/../../outside.safetensors"}), "a file outside of the folder", "points outside the folder"),
    Case("index is absolute", index({"a": "/etc/passwd"}), "a file outside of the folder", "points outside the folder"),
    Case("index with backslashes", index({"a": "..\\outside.safetensors"}), "a file outside of the folder, on Windows", "points outside the folder"),
    Case("index with NUL", index({"a": "model.safetensors\0.txt"}), "a name that C ends early", "points outside the folder"),
    Case("index with an empty name", index({"a": ""}), "the folder itself", "points outside the folder"),
    Case("index of a missing shard", index({"a": "b.safetensors"}), "an interrupted download", "b.safetensors does not exist"),
    Case("index of a missing tensor", index({"a": "model.safetensors"}), "shards mixed up", "lists 'a' in this shard, which does not hold it"),
    Case("index through a link", lambda folder: _through_a_link(folder), "a folder in the folder that is a link out of it", "leads out of the folder"),
    # config
    Case("config missing", lambda folder: sound(folder, config=None), "weights alone", "config.json does not exist"),
    Case("config empty", lambda folder: sound(folder, config=""), "an interrupted download", "cannot be read as JSON"),
    Case("config is a list", lambda folder: sound(folder, config=[1]), "JSON of another kind", "holds a JSON list"),
    Case("config is no text", lambda folder: sound(folder, config=b'{"a": "\xff"}'), "bytes that are no UTF-8", "cannot be read as UTF-8"),
    Case("config of brackets", lambda folder: sound(folder, config="[" * 100_000), "a parser that recurses", "cannot be read as JSON"),
    Case("config nested deep", lambda folder: sound(folder, config=nested(500)), "copying it recurses", "nested more than 100 deep"),
    Case("config of a million lists", lambda folder: sound(folder, config='{"a": [' + "[]," * 2_000_000 + "[]]}"), "twenty bytes of memory for each byte", "more than 2,000,000 objects"),
    Case("huge number", lambda folder: sound(folder, config='{"a": ' + "9" * 5000 + "}"), "a number that Python refuses to read", "cannot be read as JSON"),
    Case("half a character", lambda folder: sound(folder, config='{"model_type": "\\ud800"}'), "text that cannot be printed", "half of a surrogate pair"),
    Case("no model_type", lambda folder: sound(folder, config={"a": 1}), "nothing says what it is", "no model_type", late=True),
    Case("model_type is a list", config(model_type=["llama"]), "a value that cannot be looked up", r"the model_type \['llama'\]", late=True),
    Case("model_type unknown", config(model_type="../llama"), "a name that might become a path", "is not known to transformers", late=True),
    Case("remote code", config(model_type="x", auto_map={"AutoConfig": "evil.Config"}), "code that comes with the model", "is not known to transformers", late=True),
    Case("architectures is a number", config(architectures=3), "a value that cannot be looped over", "the architectures 3", late=True),
    Case("hidden_size is text", config(hidden_size="64"), "a value of another kind", NO_MODEL, late=True),
    Case("hidden_size is negative", config(hidden_size=-64), "a shape that is none", NO_MODEL, late=True),
    Case("hidden_size of 10^12", config(hidden_size=10**12), "a matrix that fills the memory", f"{NO_MODEL}|config asks for", late=True),
    Case("vocabulary of 2^62", config(vocab_size=1 << 62), "a product that overflows", f"{NO_MODEL}|config asks for", late=True),
    Case("layers negative", config(num_hidden_layers=-1), "a list of negative length", f"{NO_MODEL}|no ModuleList", late=True),
    Case("layers of 10^9", config(num_hidden_layers=10**9), "a model that fills the memory", "num_hidden_layers = 1000000000; expected at most", late=True),
    Case("layers of 10^6", config(num_hidden_layers=10**6), "the same below that limit", "more than 1,2.. modules", late=True),
    Case("layers of 10^30", config(num_hidden_layers=10**30), "a number beyond 64 bits", "expected at most 1,000,000", late=True),
    Case("experts of 10^9", config(model_type="mixtral", num_local_experts=10**9), "experts that fill the memory", "num_local_experts = 1000000000", late=True),
    Case("labels of 10^9", config(num_labels=10**9), "a table that transformers fills", "num_labels = 1000000000", late=True),
    Case("layers of a tower", config(model_type="gemma3", vision_config={"num_hidden_layers": 10**9}), "the same, a level deeper", "num_hidden_layers = 1000000000", late=True),
    Case("context is negative", config(max_position_embeddings=-5), "windows of negative length", "max_position_embeddings is -5", late=True),
    Case("text_config is a number", config(text_config=5), "an attribute that the library takes for a config", NO_MODEL, late=True),
    Case("rope_theta is text", config(rope_theta="x", rope_parameters="y"), "a value of another kind", NO_MODEL, late=True),
    Case("tied, and both differ", lambda folder: sound(folder, config={**CONFIG, "tie_word_embeddings": True}), "which of them counts?", "ties lm_head.weight to model.embed_tokens.weight", late=True),
    Case("not tied, and no head", weights(head=None), "a head that would be noise", "the first is lm_head.weight", late=True),
    Case("quantized, nobody says how", config(quantization_config={"bits": 4}), "codes that would be taken for weights", "the quant_method None"),
    Case("quantized by a list", config(quantization_config={"quant_method": ["gptq"]}), "a value that cannot be looked up", r"the quant_method \['gptq'\]"),
    Case("quantized by an unknown", config(quantization_config={"quant_method": "x"}), "a method of another program", "quantized with 'x', which this version does not read"),
    Case("section is a list", config(quantization_config=[1]), "JSON of another kind", r"quantization_config is \[1\]"),
    # tensors
    Case("tensor missing", weights(q=None), "a parameter that would be noise", f"the first is {LINEARS[0]}", late=True),
    Case("tensor of another shape", weights(q=torch.zeros(64, 63)), "config and weights that do not belong together", r"has shape \[64, 63\]", late=True),
    Case("tensor turned flat", weights(q=torch.zeros(64 * 64)), "another number of dimensions", r"has shape \[4096\]", late=True),
    Case("codes as weights", weights(q=torch.zeros(64, 64, dtype=torch.int8)), "codes without a scale", "is torch.int8, which is no weight", late=True),
    Case("fp8 without a scale", weights(q=torch.zeros(64, 64).to(torch.float8_e4m3fn)), "codes without a scale", "float8_e4m3fn, which is no weight", late=True),
    Case("NaN in a matrix", weights(q=torch.full((64, 64), float("nan"))), "a damaged weight", f"{LINEARS[0]}: 4096 of 4096 values are NaN", late=True),
    Case("infinity in a norm", weights(norm=torch.full((64,), float("inf"))), "a damaged weight", f"{NORMS[2]}: 64 of 64 values are NaN", late=True),
    Case("NaN in the embedding", weights(embedding=torch.full((layouts.ROWS, 64), float("nan"))), "a damaged weight", "model.embed_tokens.weight: .* values are NaN", late=True),
    Case("experts without end", lambda folder: _experts(folder, torch.empty(1 << 40, 0, 8)), "a stack of so many matrices, of no bytes", "gate_up_proj has shape .1099511627776, 0, 8.", late=True),
    Case("experts that are no stack", lambda folder: _experts(folder, torch.tensor(1.0)), "a number where a stack is expected", "gate_up_proj has shape ..,", late=True),
    # provenance
    Case("provenance is no JSON", lambda folder: sound(folder, provenance="{"), "truncated JSON", "lowbit.json cannot be read as JSON"),
    Case("provenance is a list", lambda folder: sound(folder, provenance=[]), "JSON of another kind", "lowbit.json holds a JSON list"),
    Case("provenance nested deep", lambda folder: sound(folder, provenance=nested(300)), "copying it recurses", "nested more than 100 deep"),
    Case("recipe is text", provenance({}, recipe="int4"), "a value of another kind", "recipe of the provenance is 'int4'"),
    Case("layers is a list", provenance([1]), "a value of another kind", r"layers of the provenance is \[1\]"),
    Case("a layer is text", provenance({LINEARS[0]: "x"}), "a value of another kind", "q_proj.weight of the provenance is 'x'"),
    Case("activation is text", provenance({LINEARS[0]: {"activation": "a8"}}), "a value of another kind", "'a8' is no rounding"),
    Case("activation unknown", activation(frobnicate=1), "a key that means something elsewhere", "unknown key 'frobnicate'"),
    Case("activation of 10^12 bits", activation(format="fp8_e4m3", bits=10**12), "two to that power", "bits is 1000000000000; expected 2 to 8"),
    Case("activation of NaN", activation(threshold=float("nan")), "a comparison that is always false", "threshold is nan"),
)  # fmt: skip


def _experts(folder: Path, stack: torch.Tensor) -> Path:
    """A small gpt-oss whose first stack of experts is another tensor."""
    layouts.add_tokenizer(layouts.from_oracle(folder, "mxfp4", "gpt-oss"))
    found = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "layers.0.mlp.experts.gate_up_proj_" not in name or name.endswith("bias")}
    save_file({**tensors, "model.layers.0.mlp.experts.gate_up_proj": stack}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(found))
    return folder


def _through_a_link(folder: Path) -> Path:
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    save_file({"a": torch.zeros(2)}, outside / "x.safetensors")
    (folder / "sub").symlink_to(outside)
    return sound(folder, index={"weight_map": {"a": "sub/x.safetensors"}})


# ------------------------------------------------------------------------------------------------------------------ GGUF


@cache
def sound_gguf() -> bytes:
    with TemporaryDirectory() as folder:
        return layouts.gguf_file(Path(folder) / "sound.gguf").read_bytes()


@dataclass(frozen=True)
class Stored:
    """A tensor to write: what a header says of it, and its bytes."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


def parts(path: Path) -> tuple[dict[str, bytes], list[Stored], Header]:
    """Metadata and tensors of a file, to be changed."""
    found = read_header(path)
    return dict(found.raw), [Stored(info.name, info.type_id, info.shape, info.rows.tobytes()) for info in found.tensors.values()], found


def joined(raw: dict[str, bytes], tensors: list[Stored], alignment: int = 32) -> bytes:
    return header_bytes(raw, tensors, alignment) + b"".join(stored.data + bytes(-stored.nbytes % alignment) for stored in tensors)


@cache
def _sound_parts() -> tuple[dict[str, bytes], list[Stored]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sound.gguf"
        path.write_bytes(sound_gguf())
        return parts(path)[:2]


def metadata(**changes: tuple[str, object] | bytes | None) -> Callable[[Path], Path]:
    """The sound file with keys changed (a GGUF type and a value, or raw bytes); None: without; "__" stands for a dot."""

    def make(folder: Path) -> Path:
        raw, tensors = _sound_parts()
        made = {**raw, **{key.replace("__", "."): value if isinstance(value, bytes | None) else pack_value(*value) for key, value in changes.items()}}
        return written(joined({key: value for key, value in made.items() if value is not None}, tensors))(folder)

    return make


def stored(change: Callable[[dict[str, Stored]], object]) -> Callable[[Path], Path]:
    """The sound file with other tensors."""

    def make(folder: Path) -> Path:
        raw, tensors = _sound_parts()
        by_name = {one.name: one for one in tensors}
        change(by_name)
        return written(joined(raw, list(by_name.values())))(folder)

    return make


def written(data: bytes, name: str = "bad.gguf") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def raw_file(*, n_tensors: int = 0, values: bytes = b"", n_values: int = 0, infos: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> Callable[[Path], Path]:
    """A file of a header that is written byte by byte."""
    return written(magic + struct.pack("<IQQ", version, n_tensors, n_values) + values + infos + bytes(64))


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def info(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def array(kind: int, count: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, count)


def big_array(kind: int, count: int, size: int) -> Callable[[Path], Path]:
    """A sparse file that really has room for the array that it announces."""

    def make(folder: Path) -> Path:
        path = raw_file(n_values=1, values=array(kind, count))(folder)
        os.truncate(path, size)
        return path

    return make


def replaced(name: str, type_id: int, shape: tuple[int, ...], data: bytes) -> Callable[[Path], Path]:
    return stored(lambda tensors: tensors.update({name: Stored(name, type_id, shape, data)}))


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
GONE = "truncated or damaged"
GGUFS = (
    Case("empty file", written(b""), "an interrupted download", "has 0 bytes; a GGUF file begins with 24"),
    Case("magic alone", written(b"GGUF"), "an interrupted download", "has 4 bytes"),
    Case("text", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "a pointer of git-lfs instead of the file", "does not begin with GGUF"),
    Case("a pickle", written(pickle.dumps(Evil()).ljust(64)), "a pickle that runs a program", "does not begin with GGUF"),
    Case("ggml", raw_file(magic=b"GGML"), "the format before", "does not begin with GGUF"),
    Case("a folder", lambda folder: (folder / "x.gguf").mkdir() or folder / "x.gguf", "a folder where a file is expected", "config.json does not exist"),
    Case("big endian", raw_file(version=3 << 24), "numbers the other way round", "big-endian"),
    Case("version 1", raw_file(version=1), "lengths of 32 bits", "GGUF version 1"),
    Case("version 4", raw_file(version=4), "what is not known yet", "GGUF version 4"),
    Case("2^63 tensors", raw_file(n_tensors=1 << 63), "a list that fills the memory", "more than .* bytes can hold"),
    Case("2^64 - 1 values", raw_file(n_values=(1 << 64) - 1), "a product that overflows", "more than .* bytes can hold"),
    Case("key of 2^62 bytes", raw_file(n_values=1, values=struct.pack("<Q", 1 << 62)), "a length beyond the file", GONE),
    Case("key of 2^64 - 1 bytes", raw_file(n_values=1, values=struct.pack("<Q", (1 << 64) - 1)), "an end that overflows", GONE),
    Case("string of 2^63 bytes", raw_file(n_values=1, values=text(b"a") + struct.pack("<IQ", 8, 1 << 63)), "a length beyond the file", GONE),
    Case("key that is no text", raw_file(n_values=1, values=text(b"\xff\xfe") + struct.pack("<II", 4, 1)), "bytes that are no UTF-8", "not UTF-8"),
    Case("value of unknown type", raw_file(n_values=1, values=text(b"a") + struct.pack("<I", 77)), "a size that nobody knows", "unknown type 77"),
    Case("key twice", raw_file(n_values=2, values=ARCHITECTURE * 2), "which of them counts?", "is there twice"),
    *(Case(f"array of 2^60 of type {kind}", raw_file(n_values=1, values=array(kind, 1 << 60)), "a product that overflows", f"{GONE}|more than the file can hold") for kind in (0, 4, 7, 8, 10, 12)),
    Case("array of arrays", raw_file(n_values=1, values=array(9, 1)), "a parser that recurses", "unknown type 9"),
    Case("array of a terabyte", big_array(0, 1 << 40, 1 << 41), "a sparse file that fills the memory", "a header has at most"),
    Case("10^9 empty strings", big_array(8, 10**9, 1 << 41), "a loop of hours in a sparse file", "more than the file can hold"),
    Case("no dimensions", raw_file(n_tensors=1, infos=text(b"a") + struct.pack("<IIQ", 0, 0, 0).ljust(25, b"\0")), "a tensor that is none", "has 0 dimensions"),
    Case("five dimensions", raw_file(n_tensors=1, infos=info(b"a", (1,) * 5, 0, 0)), "more than ggml has", "5 dimensions"),
    Case("2^32 - 1 dimensions", raw_file(n_tensors=1, infos=text(b"a") + struct.pack("<I", (1 << 32) - 1) + bytes(30)), "a loop without an end", "4294967295 dimensions"),
    Case("dimension of 0", raw_file(n_tensors=1, infos=info(b"a", (32, 0), 0, 0)), "a tensor without bytes", r"is \[0, 32\]"),
    Case("dimensions overflow", raw_file(n_tensors=1, infos=info(b"a", (1 << 62, 1 << 62), 0, 0)), "a product beyond 2^64", GONE),
    Case("dimensions wrap", raw_file(n_tensors=1, infos=info(b"a", (1 << 62, 4), 0, 0)), "a product that is 0 in 64 bits", GONE),
    Case("offset past the end", raw_file(n_tensors=1, infos=info(b"a", (32, 2), 0, 1 << 40)), "data that is not there", GONE),
    Case("offset of 2^64 - 32", raw_file(n_tensors=1, infos=info(b"a", (2,), 0, (1 << 64) - 32)), "an end that overflows", GONE),
    Case("offset not aligned", raw_file(n_tensors=1, infos=info(b"a", (2,), 0, 5)), "what no program writes", "offset 5"),
    Case("tensors on the same bytes", raw_file(n_tensors=2, infos=info(b"a", (4,), 0, 0) + info(b"b", (4,), 0, 0)), "a small file that becomes a large one", "lie on the same bytes"),
    Case("type of 2^32 - 1", raw_file(n_tensors=1, infos=info(b"a", (32,), (1 << 32) - 1, 0)), "a size that nobody knows", "ggml type 4294967295"),
    Case("type that was removed", raw_file(n_tensors=1, infos=info(b"a", (32,), 4, 0)), "q4_2 is in no library", "ggml type 4,"),
    Case("rows of half a block", raw_file(n_tensors=1, infos=info(b"a", (33, 1), 2, 0)), "a block that is cut", "multiple of 32"),
    Case("tensor twice", raw_file(n_tensors=2, infos=info(b"a", (2,), 0, 0) * 2), "which of them counts?", "is there twice"),
    Case("tensor name is no text", raw_file(n_tensors=1, infos=info(b"\xff", (2,), 0, 0)), "bytes that are no UTF-8", "not UTF-8"),
    Case("alignment of 0", metadata(general__alignment=("u32", 0)), "a division by zero", "general.alignment is 0"),
    Case("alignment of 3", metadata(general__alignment=("u32", 3)), "what is no power of two", "general.alignment is 3"),
    Case("alignment is true", metadata(general__alignment=("bool", True)), "a number of another kind", "general.alignment is True"),
    Case("alignment is text", metadata(general__alignment=("string", "32")), "a number of another kind", "general.alignment is '32'"),
    Case("alignment of 2^31", metadata(general__alignment=("u32", 1 << 31)), "data beyond the file", GONE),
    Case("no architecture", raw_file(), "nothing says what it is", "lacks general.architecture"),
    Case("architecture is a number", metadata(general__architecture=("u32", 3)), "a value of another kind", "lacks general.architecture"),
    Case("architecture unknown", metadata(general__architecture=("string", "../whale")), "a name that might become a path", "does not make a decoder of GGUF architecture '../whale'"),
    Case("no embedding", raw_file(n_values=1, values=ARCHITECTURE), "a part of a model", "no token_embd.weight"),
    Case("10^9 layers", metadata(llama__block_count=("u32", 10**9)), "a model that fills the memory", "llama.block_count is 1000000000"),
    Case("layers are text", metadata(llama__block_count=("string", "1")), "a value of another kind", "llama.block_count is '1'"),
    Case("layers are negative", metadata(llama__block_count=("i32", -1)), "a list of negative length", "llama.block_count is -1"),
    Case("2^31 experts", metadata(llama__expert_count=("u32", 1 << 31)), "experts that fill the memory", "llama.expert_count is 2147483648"),
    Case("heads are text", metadata(llama__attention__head_count=("string", "x")), "a value of another kind", "values of the wrong kind"),
    Case("heads are NaN", metadata(llama__attention__head_count=("f32", float("nan"))), "a number that is none", "values of the wrong kind"),
    Case("heads are infinite", metadata(llama__attention__head_count=("f32", float("inf"))), "a number that is none", "values of the wrong kind"),
    Case("no heads", metadata(llama__attention__head_count=("u32", 0)), "a division by zero", "wrong kind|do not divide"),
    Case("3 heads of 64 rows", metadata(llama__attention__head_count=("u32", 3)), "rows that would be mixed up", "3 heads do not divide"),
    Case("epsilon is NaN", metadata(llama__attention__layer_norm_rms_epsilon=("f32", float("nan"))), "logits that are all NaN", "is not a finite number"),
    Case("no context length", metadata(llama__context_length=None), "what llama.cpp asks for", "lacks llama.context_length"),
    Case("one part of three", metadata(split__count=("u32", 3)), "a part of a model", "one part of 3"),
    Case("parts 0 of 0", written(b"GGUF".ljust(64), "a-00000-of-00000.gguf"), "a name that counts nothing", "there is no such part of 0 files"),
    Case("part 3 of 2", written(b"GGUF".ljust(64), "a-00003-of-00002.gguf"), "a name that contradicts itself", "there is no such part of 2 files"),
    Case("part 1 of 99999", lambda folder: written(sound_gguf(), "a-00001-of-99999.gguf")(folder), "a loop over files", "a-00002-of-99999.gguf does not exist"),
    Case("provenance is no JSON", metadata(lowbit__provenance=("string", "{")), "truncated JSON", "lowbit.provenance cannot be read as JSON"),
    Case("provenance is a number", metadata(lowbit__provenance=("u32", 1)), "a value of another kind", "lowbit.provenance is a int; expected JSON"),
    Case("layers of the provenance are text", metadata(lowbit__provenance=("string", '{"layers": "x"}')), "a value of another kind", "layers of the provenance is 'x'"),
    Case("unknown tensor", replaced("blk.0.x.weight", 0, (2,), bytes(8)), "a part that nobody would compute", "'blk.0.x.weight' is not one of"),
    Case("tensor name with a path", replaced("../../x", 0, (2,), bytes(8)), "a name that might become a path", "'../../x' is not one of"),
    Case("embedding of three dimensions", replaced("token_embd.weight", 0, (2, 2, 2), bytes(32)), "a shape that is no matrix", "a matrix or a dense vector belongs there"),
    Case("norm of blocks", replaced("output_norm.weight", 2, (64,), bytes(36)), "a quantized vector", "a matrix or a dense vector belongs there"),
    Case("matrix of integers", replaced("blk.0.attn_k.weight", 26, (64, 64), bytes(64 * 64 * 4)), "what no decoder knows", "weights are floats or blocks of them"),
    Case("rope factors of two dimensions", replaced("rope_freqs.weight", 0, (4, 4), bytes(64)), "a shape that is no vector", "expected a vector of f32"),
    Case("rope factors of zeros", replaced("rope_freqs.weight", 0, (8,), bytes(32)), "a division by zero", "a divisor of the rope is 0.0"),
    Case("rope factors of NaN", replaced("rope_freqs.weight", 0, (8,), b"\xff" * 32), "numbers that are none", "a divisor of the rope is nan"),
    Case("matrix missing", stored(lambda tensors: tensors.pop("blk.0.ffn_up.weight")), "a parameter that would be noise", "mlp.up_proj", late=True),
    Case("matrix of another shape", replaced("blk.0.ffn_up.weight", 0, (64, 32), bytes(64 * 32 * 4)), "config and weights that do not belong together", r"has shape \[64, 32\]", late=True),
    Case("scale is NaN", replaced("blk.0.attn_q.weight", 2, (64, 64), b"\xff" * (64 * 36)), "blocks that decode to NaN", "values are NaN", late=True),
)  # fmt: skip


def old_imatrix(*numbers: int | float | bytes) -> Callable[[Path], Path]:
    """An importance matrix of the older form: int32, float32 and bytes in turn."""
    return written(b"".join(n if isinstance(n, bytes) else struct.pack("<f" if isinstance(n, float) else "<i", n) for n in numbers), "bad.dat")


def imatrix(**tensors: torch.Tensor) -> Callable[[Path], Path]:
    """An importance matrix as GGUF, of these tensors (float32)."""
    raw = {"general.type": pack_value("string", "imatrix")}
    return written(joined(raw, [Stored(name.replace("__", "."), 0, tuple(t.shape), t.float().contiguous().numpy().tobytes()) for name, t in tensors.items()]), "bad.gguf")


IMATRICES = (
    Case("nothing", written(b"", "bad.dat"), "an interrupted download", "is announced at byte 0"),
    Case("text", written(b"entries: 3", "bad.dat"), "another file", "no importance matrix"),
    Case("a pipe", lambda folder: os.mkfifo(folder / "x.dat") or folder / "x.dat", "reading it would wait for ever", "is no file"),
    Case("a terabyte", lambda folder: sparse(1 << 40)(folder / "x.dat") or folder / "x.dat", "a sparse file that fills the memory", "1,099,511,627,776 bytes"),
    Case("2^31 - 1 entries", old_imatrix(2**31 - 1), "a loop of hours", "is announced at byte 4"),
    Case("-1 entries", old_imatrix(-1), "a loop that never begins", "the number of entries is -1"),
    Case("a name of 2^31 - 1 bytes", old_imatrix(1, 2**31 - 1, b"abc"), "a length beyond the file", "a name of 2,147,483,647 bytes is announced"),
    Case("a name that is no text", old_imatrix(1, 2, b"\xff\xfe", 1, 1, 1.0), "bytes that are no UTF-8", "is not UTF-8 text"),
    Case("-1 values", old_imatrix(1, 1, b"a", 1, -1), "a negative size", "the number of values is -1"),
    Case("2^30 values", old_imatrix(1, 1, b"a", 1, 2**30, 1.0), "a product that overflows", "4,294,967,296 bytes is announced"),
    Case("a name twice", old_imatrix(2, 1, b"a", 1, 1, 1.0, 1, b"a", 1, 1, 1.0), "which of them counts?", "a is there twice"),
    Case("NaN", old_imatrix(1, 1, b"a", 1, 1, float("nan")), "a weight that is none", "holds NaN, infinite or negative values"),
    Case("negative", old_imatrix(1, 1, b"a", 1, 1, -1.0), "a square that is none", "holds NaN, infinite or negative values"),
    Case("another GGUF", written(joined({}, [])), "a model instead", "GGUF of type None; expected an importance matrix"),
    Case("no importance", imatrix(), "a file without tensors", "holds no importance"),
    Case("sums without counts", imatrix(a__in_sum2=torch.ones(2)), "half of a pair", "a.counts is not"),
    Case("counts that do not divide", imatrix(a__in_sum2=torch.ones(4), a__counts=torch.ones(3)), "shapes that contradict each other", "which its 3 counts do not divide"),
    Case("infinite counts", imatrix(a__in_sum2=torch.ones(4), a__counts=torch.full((1,), float("inf"))), "a number that is none", "holds NaN, infinite or negative values"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ texts

# A recipe and a provenance that say something of everything, to be damaged.
SHAPES = {"model.layers.0.mlp.down_proj.weight": (64, 64), "model.layers.0.self_attn.q_proj.weight": (64, 64)}
RECIPE = {
    "scheme": "int4-asym-g64", "algorithm": "gptq", "options": {"damp": 0.01}, "scale_dtype": "float16", "true_sequential": False, "target": "compressed-tensors", "transforms": {"awq": {}},
    "calibration": {"source": "default", "n_samples": 16, "seq_len": 64, "pad": False}, "activations": {"bits": 8},
    "rules": [{"match": "*.down_proj", "scheme": "int8-sym-channel", "options": {"damp": 0.02}}],
}  # fmt: skip
RECORD = {
    "scheme": "int4-sym-g32", "algorithm": "gptq", "shape": [64, 64], "bits_per_weight": 4.5, "output_error": 0.1, "rtn_output_error": 0.2, "weight_error": 0.1,
    "notes": ["damping 0.1 instead of 0.01"],
}  # fmt: skip
PROVENANCE = {"lowbit": "0.1", "recipe": {"name": "x", "scheme": {"format": "int", "bits": 4, "block": [1, 32]}, "algorithm": "gptq", "rules": []}, "notes": [], "layers": {LINEARS[0]: RECORD}}


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {toml(part)}' for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)
