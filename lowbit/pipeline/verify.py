"""Does the program that a file is for compute what lowbit computes? Structure, every weight by the consumer's own decoding, and the logits of a text."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, numerics
from ..checkpoints import Checkpoint, open_checkpoint
from ..checkpoints.safetensors import natural_key, write_text
from ..errors import LowbitError, VerificationError
from ..models import quantized
from ..models import skeleton as sk
from ..numerics import ggml
from ..progress import SILENT, Progress
from . import consumer_process, llama_cpp, resources, vllm_rules
from .calibration import default_text
from .consumers import Consumer, consumer_of
from .locate import load_tokenizer, locate

FILE = "verification.json"
PROMPT_IDS = 48
COLUMNS = 256  # of a matrix that a consumer only multiplies with
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-3}  # largest difference of logits, of the largest logit
LLAMA_KL = 0.01  # mean KL divergence of llama.cpp to ours
ROUNDED_KL = 0.01  # the same where inputs are rounded: one that lies between two codes can fall to either side
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass(frozen=True)
class Verification:
    """What was found. verdict: "passed", "failed" or "not run" (the consumer is not installed, or the structure is broken).

    weights: matrices whose decoded values were compared; equal: how many of them bit for bit; largest_difference: of the others, of the matrix's largest magnitude. logits_difference: largest,
    of the largest logit; kl: mean, in nats, where that is what counts. problems: everything that does not hold, in words.
    rules: of programs that cannot run here, whether what their source asks for is kept.
    """

    path: str
    kind: str
    consumer: str
    versions: dict[str, str]
    verdict: str
    tensors: int
    weights: int = 0
    equal: int = 0
    largest_difference: float = 0.0
    logits_difference: float | None = None
    kl: float | None = None
    dtype: str | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lines: str = ""
    rules: dict[str, str] = field(default_factory=dict)
    lowbit: str = __version__


@dataclass
class _Findings:
    """What adds up while a consumer answers."""

    versions: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None
    weights: int = 0
    equal: int = 0
    largest: float = 0.0
    difference: float | None = None
    kl: float | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed_to_run: bool = False


def verify(path: str | Path, *, python: str | None = None, write: bool = True, progress: Progress = SILENT) -> Verification:
    """Check a checkpoint's structure, and compare weights and logits with the program that its layout is of.

    python: the interpreter that has the consumer's packages (default: this one). write: verification.json beside the model (FILE.verification.json beside a GGUF file).
    A broken structure raises CheckpointError as opening it does; everything else is in the result.
    """
    located = locate(path, progress=progress)
    checkpoint = open_checkpoint(located)
    said: list[str] = []
    if checkpoint.kind == "safetensors" and checkpoint.activations:
        checkpoint = replace(checkpoint, activations={})
        said.append("This folder's dense weights are meant for rounded inputs, which lowbit.load rounds and transformers does not: compared is the model without that rounding.")
    skeleton = sk.build(checkpoint)
    consumer = consumer_of(checkpoint)
    tensors = _check_structure(skeleton.checkpoint, progress)
    if skeleton.unused:
        said.append(f"{len(skeleton.unused)} tensors are of no use to {type(skeleton.model).__name__}, e.g. {skeleton.unused[0]}.")
    found = _Findings(notes=said)
    missing = _missing(consumer, python)
    if missing:
        found.failed_to_run = True
        found.notes.append(f"{consumer.name} is not installed here ({', '.join(missing)}): {consumer.install}")
    elif consumer.name == "llama.cpp":
        _with_llama_cpp(skeleton, checkpoint.path, found, progress)
    else:
        _with_process(skeleton, located, consumer, python, found, progress)
    verdict = FAILED if found.problems else NOT_RUN if found.failed_to_run else PASSED
    shown = str(checkpoint.path.relative_to(located.parent))  # of a folder of GGUF parts the first one
    made = Verification(
        located.name, checkpoint.kind, consumer.name, found.versions, verdict, tensors, found.weights, found.equal, found.largest, found.difference, found.kl, found.dtype,
        tuple(found.problems), tuple(dict.fromkeys([*found.notes, *([consumer.note] if consumer.note else [])])), consumer.lines(shown), vllm_rules.verdicts(checkpoint),
    )  # fmt: skip
    if write:
        target = located / FILE if located.is_dir() else located.with_name(f"{located.name}.{FILE}")
        write_text(target, json.dumps(asdict(made), indent=2) + "\n")
    return made


@dataclass(frozen=True)
class Availability:
    """A layout, the program that checks it, and which of its packages are missing here."""

    kind: str
    consumer: str
    missing: tuple[str, ...]


def available(python: str | None = None) -> list[Availability]:
    """Every consumer, and what pip install would add."""
    kinds = ("safetensors", "compressed-tensors", "gptq", "awq", "auto-round", "bitsandbytes", "hqq", "aqlm", "bitnet", "torchao", "lowbit", "gguf")
    consumers = {kind: consumer_of(Checkpoint(kind, Path(), {}, {})) for kind in kinds}
    return [Availability(kind, consumer.name, tuple(_missing(consumer, python))) for kind, consumer in consumers.items()]


def _missing(consumer: Consumer, python: str | None) -> list[str]:
    if python is None:
        return [package for name, package in consumer.packages.items() if importlib.util.find_spec(name) is None]
    code = f"import importlib.util as u, json; print(json.dumps([p for n, p in {dict(consumer.packages)!r}.items() if u.find_spec(n) is None]))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise VerificationError(f"{python} cannot be run: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}.")
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------------------ structure


def _check_structure(checkpoint: Checkpoint, progress: Progress) -> int:
    """Decode every quantized weight and read every dense one; raise CheckpointError or FormatError for what is damaged. Returns how many there are."""
    names = sorted(checkpoint.shapes(), key=natural_key)
    with progress.step("Reading every tensor", len(names)) as advance:
        for name in names:
            if name in checkpoint.quantized:
                for rows in checkpoint.quantized[name].values():
                    numerics.refuse_bad_values(rows, name)
            else:
                for part in checkpoint.tensors[name].chunks():
                    if part.is_floating_point():
                        numerics.refuse_bad_values(part.float() if part.dtype.itemsize == 1 else part, name)
            advance(1)
    return len(names)


# ------------------------------------------------------------------------------------------------------------------ consumers in Python


def _with_process(skeleton: sk.Skeleton, path: Path, consumer: Consumer, python: str | None, found: _Findings, progress: Progress) -> None:
    checkpoint = skeleton.checkpoint
    places = {parameter.removesuffix(".weight"): name for parameter, name in quantized.matrices(skeleton).items()}
    if others := sorted(set(checkpoint.quantized) - set(places.values()), key=natural_key):
        found.notes.append(f"{len(others)} quantized matrices are not compared one by one (experts, embeddings, tied heads), but by the logits: e.g. {others[0]}.")
    text_ids = _ids(skeleton, found)
    request = {
        "code": consumer.lines(str(path.absolute()), "torch.float32"), "packages": list(consumer.packages), "ids": text_ids, "columns": COLUMNS,
        "weights": {place: checkpoint.quantized[name].shape[1] for place, name in places.items()}, "threads": torch.get_num_threads(),
    }  # fmt: skip
    decoded_to: set[str] = set()
    logits: Tensor | None = None
    with progress.step(f"Asking {consumer.name}", len(places) + 1) as advance:
        for message, value in _answers(request, consumer, python):
            if "error" in message:
                found.problems.append(f"{consumer.name} stopped: {message['error']}")
                return
            found.versions |= message.get("versions", {})
            if "weight" in message:
                if value is not None:
                    message["dtype"] = consumer.decodes_to or message["dtype"]
                    _compare(checkpoint, places[message["weight"]], value, message, found)
                    decoded_to.add(message["dtype"])
                else:
                    found.problems.append(f"{message['weight']} is not a module of the model that {consumer.name} made.")
                advance(1)
            elif "dtype" in message:
                found.dtype = message["dtype"]
            elif "logits" in message:
                logits = value
                advance(1)
    if logits is None:
        found.problems.append(f"{consumer.name} gave no logits.")
        return
    # Ours are computed on weights in the dtype that the consumer decodes to, so that what is compared is the model and not that rounding, which was compared above.
    kept = getattr(torch, decoded_to.pop()) if len(decoded_to) == 1 and checkpoint.quantized else None
    _compare_logits(skeleton, text_ids, logits, kept, consumer.rounds or bool(checkpoint.activations), found)


def _answers(request: dict, consumer: Consumer, python: str | None) -> Iterator[tuple[dict, Tensor | None]]:
    """What the process says, one message at a time, each with its array."""
    home = str(Path(__file__).parents[2])
    paths = [path for path in (os.environ.get("PYTHONPATH"), home if "lowbit" in consumer.packages else None) if path]
    environment = {**os.environ, **consumer.environment, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [python or sys.executable, "-P", str(Path(consumer_process.__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE if python is None else subprocess.DEVNULL, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stderr is not None:
            _drain(process.stderr)
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.close()
        while line := process.stdout.readline():
            message = json.loads(line)
            shape = message.get("shape")
            data = bytearray(process.stdout.read(4 * math.prod(shape))) if shape is not None else None
            yield message, None if data is None else torch.frombuffer(data, dtype=torch.float32).view(shape) if data else torch.empty(shape)
        if code := process.wait():
            yield {"error": f"its process ended with code {code}"}, None


def _drain(stream) -> None:
    """Throw away what libraries print, so that a full pipe stops nobody."""
    threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()


def _compare(checkpoint: Checkpoint, name: str, theirs: Tensor, message: dict, found: _Findings) -> None:
    """One weight: bit for bit; within one unit of the last place where the consumer decodes to fp16 or bf16; of the largest magnitude where it only multiplies."""
    ours = numerics.dequantize(checkpoint.quantized[name].load())[:, : theirs.shape[1]]
    found.weights += 1
    if theirs.shape != ours.shape:
        found.problems.append(f"{name} is {list(ours.shape)}, and {list(theirs.shape)} in the consumer.")
        return
    dtype = getattr(torch, message["dtype"])
    if torch.equal(ours, theirs) or torch.equal(ours.to(dtype).float(), theirs):
        found.equal += 1
        return
    difference = (ours - theirs).abs()
    largest = float(ours.abs().max().clamp(min=1e-30))
    found.largest = max(found.largest, float(difference.max()) / largest)
    info = torch.finfo(dtype)
    if message["how"] == "unit vectors":  # sums of products, of which all but one are 0 or cancel
        allowed = torch.full((), info.eps * largest)
    elif dtype != torch.float32 or message["how"] == "bitsandbytes int8":  # which multiplies with the magnitude and with 1 / 127, where we divide once: two units
        allowed = (info.eps * (1 if dtype != torch.float32 else 2) * ours.abs().maximum(theirs.abs())).clamp(min=info.smallest_normal * info.eps)
    else:
        allowed = torch.zeros(())
    if bool((difference > allowed).any()):
        found.problems.append(f"{name}: {int((difference > allowed).sum())} of {ours.numel()} values differ by more than a unit of {message['dtype']}, at most by {float(difference.max()):.3g}.")


def _ids(skeleton: sk.Skeleton, found: _Findings) -> list[list[int]]:
    """One sequence of tokens, the same for everybody: the beginning of the bundled evaluation text where the model has a tokenizer."""
    vocabulary = skeleton.text_config.vocab_size
    length = min(PROMPT_IDS, getattr(skeleton.text_config, "max_position_embeddings", None) or PROMPT_IDS)
    with suppress(LowbitError), tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        ids = load_tokenizer(skeleton.checkpoint, Path(scratch))(default_text("evaluation")[: 20 * length])["input_ids"][:length]
        if len(ids) == length and max(ids) < vocabulary:
            return [ids]
    found.notes.append("The model has no tokenizer of its own vocabulary here: the prompt is of random tokens.")
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).tolist()


def _ours(skeleton: sk.Skeleton, ids: list[list[int]], dtype: torch.dtype, decode_to: torch.dtype | None) -> Tensor:
    resources.require_memory(int(skeleton.parameter_count() * dtype.itemsize * 1.2), purpose="Computing logits to compare (the whole model is held)")
    model = quantized.load(sk.build(skeleton.checkpoint), dtype, decode_to=decode_to)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float()


def _compare_logits(skeleton: sk.Skeleton, ids: list[list[int]], theirs: Tensor, decode_to: torch.dtype | None, rounds: bool, found: _Findings) -> None:
    dtype = found.dtype or "float32"
    ours = _ours(skeleton, ids, getattr(torch, dtype), decode_to)
    if ours.shape != theirs.shape:
        found.problems.append(f"logits are {list(ours.shape)}, and {list(theirs.shape)} in the consumer.")
        return
    found.difference = float((ours - theirs).abs().max() / ours.abs().max())
    found.kl = kl(ours, theirs)
    if not math.isfinite(found.difference):
        found.problems.append("the consumer's logits are not finite.")
    elif rounds:
        allowed = ROUNDED_KL
        if found.kl > allowed and dtype != "float32":  # in half precision many inputs fall to another code: as much as that moves our own logits is no difference
            allowed = max(allowed, 2 * kl(_ours(skeleton, ids, torch.float32, decode_to), ours))
            found.notes.append(f"The model runs in {dtype} only, which alone moves our own logits by half of a mean KL divergence of {allowed:.3g}.")
        if found.kl > allowed:
            found.problems.append(f"mean KL divergence of the consumer's logits to ours is {found.kl:.3g}; with rounded inputs at most {allowed:.3g} is expected.")
    elif found.difference > TOLERANCES[dtype]:
        found.problems.append(f"logits differ by {found.difference:.3g} of the largest; at most {TOLERANCES[dtype]:g} is expected in {dtype}.")


def kl(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL divergence over positions, in nats, of the distribution theirs to ours; both logits or log-probabilities [..., vocabulary]."""
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# ------------------------------------------------------------------------------------------------------------------ llama.cpp


def _with_llama_cpp(skeleton: sk.Skeleton, path: Path, found: _Findings, progress: Progress) -> None:
    _compare_ggml_blocks(skeleton.checkpoint, path, found, progress)
    try:
        found.versions["xllamacpp"] = llama_cpp.version()
        ids = _ids(skeleton, found)[0]
        theirs = llama_cpp.next_token_logprobs(path, ids, progress=progress)
    except LowbitError as error:
        found.problems.append(f"llama.cpp does not run it: {error}")
        return
    ours = _ours(skeleton, [ids], torch.float32, torch.float32)[0]
    ours = torch.stack([ours[place].log_softmax(-1) for place in theirs])
    found.dtype, found.kl = "float32", kl(ours, torch.stack(list(theirs.values())))
    if not found.kl <= LLAMA_KL:
        found.problems.append(f"mean KL divergence of llama.cpp's predictions to ours is {found.kl:.3g}; at most {LLAMA_KL} is expected.")


def _compare_ggml_blocks(checkpoint: Checkpoint, path: Path, found: _Findings, progress: Progress) -> None:
    """Every quantized tensor by gguf-py, ggml's own decoder in Python."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = {name: entry for name, entry in checkpoint.quantized.items() if entry.scheme.format in ggml.BLOCK_TYPES}
    with progress.step("Decoding with gguf-py", len(blocks)) as advance:
        for name, entry in blocks.items():
            try:
                theirs = torch.from_numpy(dequantize(entry.load().parts["blocks"].numpy(), GGMLQuantizationType(ggml.BLOCK_TYPES[entry.scheme.format].type_id)))
            except (NotImplementedError, ValueError):
                found.notes.append(f"gguf-py {consumer_process.version('gguf')} cannot decode {entry.scheme.format}.")
            else:
                _compare(checkpoint, name, theirs, {"dtype": "float32", "how": "ggml"}, found)
            advance(1)
    found.versions["gguf"] = consumer_process.version("gguf")
