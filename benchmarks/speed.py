"""How fast the native kernels and the decoder are, beside other programs, all in one run.

    python benchmarks/speed.py layers [--only int4] [--shapes 4096x4096,11008x4096] [--rounds 9] [--ggml FOLDER]
    python benchmarks/speed.py model MODEL.gguf --llama-bench PATH/llama-bench [--against OTHER.gguf] [--rounds 5]
    python benchmarks/speed.py attention [--rounds 9]
    python benchmarks/speed.py decode [--rounds 9]
    python benchmarks/speed.py encode --ggml FOLDER [--rounds 5]
    python benchmarks/speed.py texts MODEL.gguf
    python benchmarks/speed.py random FOLDER --tokenizer FOLDER       a Llama of 1.1B (TinyLlama's shape) with random weights, to quantize

layers: one linear layer, 1 row and 128 rows of inputs. Each contender has as many copies of its weights as fill 160 MB, so that they come from memory, not from a cache; contenders take turns
in every round. bandwidth: sums of float32 over 256 MB, in the same rounds. Beside ours: torch (float32, bfloat16, _weight_int4pack_mm, fbgemm's dynamic int8); where it is installed,
onnxruntime's MatMulNBits (accuracy_level 4, groups of 128); with --ggml, the folder of libggml-cpu.so, ggml_mul_mat (one graph of all copies, so that its threads start once).
model: prompts of 128 and 512 tokens and 64 generated ones, `lowbit` and llama-bench in turns (with --against, llama-bench on another file of the same model).
attention: over whole sequences in bfloat16, causal, forward alone and with gradients, ours and torch's in turns.
decode: a packed matrix of 5632 x 2048 to bfloat16, in C++ and by numerics in torch. encode: a matrix of 4096 x 4096 into ggml's blocks, with and without an importance of its columns, beside
ggml_quantize_chunk (rows shared out between as many threads), and the squared error, weighted by the importance, relative to its.
texts: 1, 2, 4 and 8 texts at once through the endpoint's scheduler, 128 tokens each.
Quantiles 20, 50 and 80 of the rounds are appended to benchmarks/results/speed.jsonl with the commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from gptq import commit, machine

from lowbit import kernels, numerics
from lowbit.native import native, threads
from lowbit.pipeline import recipes

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
MEMORY = 160e6
GGML = {"Q4_0": (2, 18, 32), "Q8_0": (8, 34, 32), "Q2_K": (10, 84, 256), "Q3_K": (11, 110, 256), "Q4_K": (12, 144, 256), "TQ2_0": (35, 66, 256)}  # ggml's number, bytes and weights of a block
FORMATS = ("int8-sym-g128", "int4-asym-g128", "int4-sym-g64", "int3-asym-g64", "int2-asym-g64", "ternary", "nf4", "q4_0", "q4_k", "q2_k")


def main() -> None:
    if sys.argv[1:2] in (["--ort"], ["--ggml-child"]):
        (ort_child if sys.argv[1] == "--ort" else ggml_child)(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "model", "attention", "decode", "encode", "texts", "random"])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("--against")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--shapes", default="4096x4096")
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    if a.what == "random":
        random_llama(Path(a.model), a.tokenizer)
        return
    rows = {"layers": layers, "model": model, "attention": attention, "decode": decode, "encode": encode, "texts": texts}[a.what](a)
    with RESULTS.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, "commit": commit(), "machine": machine()}) + "\n")


def quantiles(values: list[float]) -> list[float]:
    found = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8]))
    return [float(f"{value:.4g}") for value in found]


# ------------------------------------------------------------------------------------------------------------------ layers


def layers(a: argparse.Namespace) -> list[dict]:
    found = []
    for shape in a.shapes.split(","):
        out, cols = (int(part) for part in shape.split("x"))
        for m in (1, 128):
            runs = contenders(out, cols, m, a.only)
            others = {f"onnxruntime MatMulNBits {bits}": (Child("--ort", out, cols, m, bits), out * cols * bits // 8) for bits in (4, 8)} if find_spec("onnxruntime") and find_spec("onnx") else {}
            for name, (_, size, block) in GGML.items() if a.ggml else ():
                if not a.only or a.only in name.lower():
                    others[f"ggml_mul_mat {name}"] = Child("--ggml-child", out, cols, m, name, a.ggml), out * cols // block * size
            times: dict[str, list[float]] = {name: [] for name in (*runs, *others)}
            for _ in range(a.rounds + 1):
                for name, (copies, work, _) in runs.items():
                    started = time.perf_counter()
                    for copy in range(copies):
                        work(copy)
                    times[name].append((time.perf_counter() - started) / copies)
                for name, (child, _) in others.items():
                    times[name].append(child.pass_())
            for child, _ in others.values():
                child.close()
            read = max(runs["memory"][2] / value for value in times["memory"][1:])
            print(f"{shape}, {m} row(s); memory read at {read / 1e9:.1f} GB/s")
            sizes = {**{name: size for name, (_, _, size) in runs.items() if name != "memory"}, **{name: size for name, (_, size) in others.items()}}
            for name, size in sizes.items():
                low, middle, high = quantiles([1e6 * value for value in times[name][1:]])
                rates = {"gbs": round(size / middle / 1e3, 1), "gops": round(2 * m * out * cols / middle / 1e3), "read_gbs": round(read / 1e9, 1)}
                found.append({"kind": "layer", "name": name, "shape": shape, "rows": m, "us": [low, middle, high], "bytes": size, **rates})
                print(f"  {name:28s} {middle:9.0f} us ({low:.0f} to {high:.0f})  {rates['gbs']:6.1f} GB/s  {rates['gops']:7.0f} Gop/s", flush=True)
    return found


def contenders(out: int, cols: int, m: int, only: str | None) -> dict[str, tuple[int, Callable[[int], object], int]]:
    """name: (copies, work on one of them, bytes of weights that it reads)."""
    torch.manual_seed(0)
    W, x = torch.randn(out, cols) * 0.05, torch.randn(m, cols)
    y = torch.empty(m, out)
    xn, yn = x.numpy(), y.numpy()
    big = torch.ones(1 << 26)
    runs: dict[str, tuple[int, Callable[[int], object], int]] = {"memory": (1, lambda _: big.sum(), big.numel() * 4)}
    for name in FORMATS:
        if only and only not in name:
            continue
        qt = numerics.quantize(W, recipes.parse(name if name == "ternary" else f"{name}-rtn").recipe.scheme)
        first = kernels.pack(qt)
        copies = [first, *(kernels.pack(qt) for _ in range(int(MEMORY / first.nbytes)))]
        runs[f"lowbit {name}"] = len(copies), lambda i, c=copies: native().matmul(c[i].held, xn, yn, threads()), first.nbytes
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        dense = [W.to(dtype).clone() for _ in range(max(1, int(MEMORY / (W.numel() * dtype.itemsize))) + 1)]
        inputs = x.to(dtype)
        runs[name] = len(dense), lambda i, c=dense, v=inputs: torch.nn.functional.linear(v, c[i]), W.numel() * dtype.itemsize
    codes = torch.randint(0, 16, (out, cols), dtype=torch.int32)
    scales = torch.rand(cols // 128, out, 2, dtype=torch.bfloat16)
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 8) for _ in range(int(MEMORY / (W.numel() / 2)) + 1)]
    half = x.bfloat16()
    runs["torch int4pack g128"] = len(packed), lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed[i], 128, scales), W.numel() // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eights = [torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(cols, out)), {torch.nn.Linear}, dtype=torch.qint8) for _ in range(int(MEMORY / W.numel()) + 1)]
    runs["torch dynamic int8 (fbgemm)"] = len(eights), lambda i: eights[i](x), W.numel()
    return runs


class Child:
    """Another program in a process of its own, whose threads then do not spin while others are timed. pass_(): seconds for one of the copies, the mean of all."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, *map(str, arguments), str(threads())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def pass_(self) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        seconds = float(self.process.stdout.readline())
        time.sleep(0.2)  # until its threads sleep
        return seconds

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def ggml_child(out_: str, cols_: str, m_: str, name: str, folder: str, count: str) -> None:
    import ctypes

    out, cols, m = int(out_), int(cols_), int(m_)
    base, cpu = (ctypes.CDLL(str(Path(folder) / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
    void, size, whole = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64

    class Params(ctypes.Structure):
        _fields_ = [("mem_size", size), ("mem_buffer", void), ("no_alloc", ctypes.c_bool)]

    def function(library: ctypes.CDLL, name: str, result, *arguments):
        found = getattr(library, name)
        found.restype, found.argtypes = result, arguments
        return found

    kind, bytes_, block = GGML[name]
    copies = int(MEMORY / (out * cols // block * bytes_)) + 1
    context = function(base, "ggml_init", void, Params)(Params(int(MEMORY * 1.5) + (copies + 2) * (m * (out + cols) * 4 + (1 << 16)) + (1 << 26), None, False))
    new, data = function(base, "ggml_new_tensor_2d", void, void, ctypes.c_int, whole, whole), function(base, "ggml_get_data", void, void)
    multiply, graph_of = function(base, "ggml_mul_mat", void, void, void, void), function(base, "ggml_new_graph_custom", void, void, size, ctypes.c_bool)
    add = function(base, "ggml_build_forward_expand", None, void, void)
    encode = function(base, "ggml_quantize_chunk", size, ctypes.c_int, void, void, whole, whole, whole, void)
    run = function(cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, void, void, ctypes.c_int)
    torch.manual_seed(0)
    x, W = torch.randn(m, cols), torch.randn(out, cols) * 0.05
    inputs, graph, first = new(context, 0, cols, m), graph_of(context, 2 * copies + 8, False), None
    ctypes.memmove(data(inputs), x.data_ptr(), x.numel() * 4)
    for _ in range(copies):
        weights = new(context, kind, cols, out)
        if first is None:
            encode(kind, W.data_ptr(), data(weights), 0, out, cols, None)
            first = weights
        else:
            ctypes.memmove(data(weights), data(first), out * cols // block * bytes_)
        add(graph, multiply(context, weights, inputs))
    for _ in sys.stdin:
        started = time.perf_counter()
        run(context, graph, int(count))
        print((time.perf_counter() - started) / copies, flush=True)


def ort_child(*arguments: str) -> None:
    import numpy as np
    import onnxruntime

    out, cols, m, bits, count = map(int, arguments)
    onnxruntime.set_global_thread_pool_sizes(count, 1)
    model = ort_model(out, cols, bits)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    sessions = [onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(int(MEMORY / (out * cols * bits / 8)) + 1)]
    x = np.random.default_rng(0).standard_normal((m, cols), dtype=np.float32)
    for _ in sys.stdin:
        started = time.perf_counter()
        for session in sessions:
            session.run(None, {"x": x})
        print((time.perf_counter() - started) / len(sessions), flush=True)


def ort_model(out: int, cols: int, bits: int) -> bytes:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    blocks = cols // 128
    rng = np.random.default_rng(0)
    B = numpy_helper.from_array(rng.integers(0, 256, (out, blocks, 128 * bits // 8), dtype=np.uint8), "B")
    scales = numpy_helper.from_array(rng.random(out * blocks, dtype=np.float32), "scales")
    node = helper.make_node("MatMulNBits", ["x", "B", "scales"], ["y"], domain="com.microsoft", K=cols, N=out, bits=bits, block_size=128, accuracy_level=4)
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [None, cols])], [value("y", TensorProto.FLOAT, [None, out])], [B, scales])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9)
    return onnx.ModelProto.SerializeToString(made)


# ---------------------------------------------------------------------------------------------------------------- attention


def attention(a: argparse.Namespace) -> list[dict]:
    from lowbit.kernels.attention import attend

    rows = []
    for batch, heads, length, dim in ((4, 9, 512, 64), (1, 32, 2048, 64), (1, 32, 2048, 128)):
        torch.manual_seed(0)
        q, k, v, g = (torch.randn(batch, length, heads, dim, dtype=torch.bfloat16).transpose(1, 2).requires_grad_(index < 3) for index in range(4))
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "lowbit": lambda q=q, k=k, v=v, dim=dim: attend(q, k, v, dim**-0.5, True),
            "torch": lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(a.rounds + 1):
            for name, run in runs.items():
                for what in ("forward", "with gradients"):
                    started = time.perf_counter()
                    out = run()
                    if what != "forward":
                        out.backward(g)
                    times.setdefault((name, what), []).append(time.perf_counter() - started)
        for (name, what), found in times.items():
            rows.append({"kind": "attention", "name": name, "what": what, "shape": [batch, heads, length, dim], "ms": quantiles([1e3 * value for value in found[1:]])})
            print(f"{batch} x {heads} heads of {dim}, {length} tokens, {what:14s} {name:7s} {rows[-1]['ms'][1]:8.2f} ms", flush=True)
    return rows


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: found[1:] for name, found in times.items()}


def decode(a: argparse.Namespace) -> list[dict]:
    from lowbit.kernels import decode as packed
    from lowbit.numerics import parts

    rows = []
    for name in ("nf4-dq", "int4-asym-g128", "int4-sym-g64", "int3-asym-g64", "int2-asym-g64", "int8-sym-channel"):
        torch.manual_seed(0)
        qt = numerics.quantize(torch.randn(5632, 2048) * 0.05, recipes.parse(f"{name}-rtn").recipe.scheme)
        stored = parts.store(qt)
        runs: dict[str, Callable[[], object]] = {
            "C++": lambda stored=stored, qt=qt: packed.decode(stored, qt.scheme, qt.shape, torch.bfloat16),
            "torch": lambda stored=stored, qt=qt: numerics.dequantize(parts.restore(stored, qt.scheme, qt.shape, "float32")).bfloat16(),
        }
        for which, found in in_turns(runs, a.rounds).items():
            rows.append({"kind": "decode", "name": which, "format": name, "ms": quantiles([1e3 * value for value in found])})
            print(f"{name:20s} {which:6s} {rows[-1]['ms'][1]:8.2f} ms", flush=True)
    return rows


def encode(a: argparse.Namespace) -> list[dict]:
    import ctypes
    from concurrent.futures import ThreadPoolExecutor

    from lowbit.numerics import ggml

    theirs = ctypes.CDLL(str(a.ggml / "libggml-base.so"))
    chunk = theirs.ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    torch.manual_seed(0)
    size, count, rows = 4096, threads(), []
    W, importance = torch.randn(size, size) * 0.02, torch.rand(size).square() + 0.01
    pool = ThreadPoolExecutor(count)
    for name in ("q4_0", "q5_0", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq2_0", "ggml_mxfp4"):
        kind = ggml.BLOCK_TYPES[name]
        theirs.ggml_quantize_init(kind.type_id)
        for weighted in (False, True):
            given = importance if weighted else None
            made = torch.empty(size, size // kind.block_size * kind.block_bytes, dtype=torch.uint8)
            part = lambda k, kind=kind, made=made, given=given: chunk(
                kind.type_id, W.data_ptr(), made.data_ptr(), size * k // count * size, size * (k + 1) // count - size * k // count, size, None if given is None else given.data_ptr()
            )
            runs: dict[str, Callable[[], object]] = {"lowbit": lambda name=name, given=given: ggml.encode(W, name, importance=given), "libggml": lambda part=part: list(pool.map(part, range(count)))}
            times = in_turns(runs, a.rounds)
            error = lambda blocks, name=name, given=given: float(((ggml.decode(blocks, name) - W).square() * (1 if given is None else given)).sum())
            ratio = error(ggml.encode(W, name, importance=given)) / error(made)
            for which, found in times.items():
                rates = quantiles([size * size / value / 1e6 for value in found])
                rows.append({"kind": "encode", "name": which, "format": name, "weighted": weighted, "weights_per_us": rates, "error_of_libggml": round(ratio, 4)})
            ours, other = rows[-2]["weights_per_us"][1], rows[-1]["weights_per_us"][1]
            print(f"{name:12s} {'with' if weighted else 'no':4s} importance: {ours:7.1f} million weights/s, libggml {other:7.1f} ({ours / other:.2f} times), error {ratio:.4f} of its", flush=True)
    pool.shutdown()
    return rows


# ------------------------------------------------------------------------------------------------------------------ whole models


def texts(a: argparse.Namespace) -> list[dict]:
    import threading

    from lowbit.runtime import Sampling, open_model
    from lowbit.runtime.scheduler import Job, Scheduler

    engine, rows = open_model(a.model, context=1024), []
    engine.stops = frozenset()
    prompt = engine.tokenizer("The history of the city of London begins with")["input_ids"]
    for count in (1, 2, 4, 8):
        scheduler, done = Scheduler(engine, count), threading.Semaphore(0)
        tell = lambda piece, text, error, done=done: done.release() if error or text.finish else None
        started = time.perf_counter()
        for number in range(count):
            scheduler.submit(Job([*prompt, 100 + number], Sampling(0), 128, (), tell))
        for _ in range(count):
            done.acquire()
        rate = count * 128 / (time.perf_counter() - started)
        scheduler.close()
        rows.append({"kind": "texts", "model": Path(a.model).name, "texts": count, "tokens_per_s": round(rate, 1)})
        print(f"{count} texts at once: {rate:.0f} tokens/s together", flush=True)
    return rows


def model(a: argparse.Namespace) -> list[dict]:
    from lowbit.runtime import open_model
    from lowbit.runtime.bench import bench

    engine = open_model(a.model, context=1024)
    times: dict[str, dict[str, list[float]]] = {"lowbit": {}, "llama.cpp": {}}
    for _ in range(a.rounds):
        made = bench(engine, prefill=(128, 512), decode=64, repeats=1)
        ours = {**{f"prompt of {part.tokens}": part.tokens_per_s for part in made.prefill}, "decode": made.decode_tokens_per_s}
        theirs = llama_bench(a) if a.llama_bench else {}
        for name, found in (("lowbit", ours), ("llama.cpp", theirs)):
            for key, value in found.items():
                times[name].setdefault(key, []).append(value)
    rows = []
    for name, found in times.items():
        for key, values in found.items():
            rows.append({"kind": "model", "model": Path(a.model).name, "name": name, "what": key, "tokens_per_s": quantiles(values), "bytes": engine.model.nbytes})
            if name != "lowbit":
                rows[-1] |= {"model": Path(a.against or a.model).name, "bytes": Path(a.against or a.model).stat().st_size}
            print(f"{name:10s} {key:14s} {rows[-1]['tokens_per_s'][1]:9.1f} tokens/s ({rows[-1]['tokens_per_s'][0]:.1f} to {rows[-1]['tokens_per_s'][2]:.1f})")
    return rows


def random_llama(folder: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
        dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def llama_bench(a: argparse.Namespace) -> dict[str, float]:
    folder = str(a.llama_bench.parent)
    command = [str(a.llama_bench), "-m", a.against or a.model, "-t", str(threads()), "-p", "128,512", "-n", "64", "-r", "1", "-o", "json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={"LD_LIBRARY_PATH": folder})
    return {(f"prompt of {row['n_prompt']}" if row["n_prompt"] else "decode"): row["avg_ts"] for row in json.loads(said.stdout)}


if __name__ == "__main__":
    main()
