"""Each method against its own peer, with the same settings on the linears of three blocks (the first, the middle and the last): error and time.

    python benchmarks/blocks.py MODEL CALIBRATION.txt --peer gptqmodel=VENV/bin/python --peer llm-compressor=... [--runs 3] [--data FOLDER]

The original model runs over CALIBRATION once; of the three blocks the inputs and each linear's Hessian are kept (in FOLDER, where they are used again). Then lowbit's
method and the peer's run in turn, whole processes, on the same (W, H) and inputs; what is compared is tr(dW H dW^T) / tr(W H W^T), summed over the linears, the mean squared
error of each block's output (16 windows), and the seconds inside the calls (peer_methods.py), the median of the runs. GPTQ is run without its sweep of coordinate descent,
which the peers do not have. Results are appended to benchmarks/results/blocks.jsonl.

    python benchmarks/blocks.py --own METHOD FOLDER OUT.safetensors [as peer_methods.py]        lowbit's gptq, hqq, awq or autoround alone
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import peer_methods
import torch
from gptq import commit, machine
from peer_methods import PATHS, Clock, block_kwargs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lowbit.numerics as numerics
from lowbit.algorithms import algorithm, make_options
from lowbit.algorithms.hqq import HqqOptions, hqq
from lowbit.models.attention import NAME
from lowbit.models.linears import Linear
from lowbit.pipeline.calibration import MICRO_BATCH_TOKENS
from lowbit.pipeline.collect import Collector, Current, InputGroup, StopBlock
from lowbit.pipeline.hidden import HiddenStates
from lowbit.pipeline.learned import learn_block
from lowbit.pipeline.recipes import LayerPlan
from lowbit.pipeline.streaming import Batch
from lowbit.pipeline.transform import transform_block
from lowbit.scheme import Scheme
from lowbit.stats import LayerStats

RESULTS = Path(__file__).parent / "results" / "blocks.jsonl"
# peer: lowbit's method, options of both, and of the peer alone
PAIRS = {
    "gptqmodel": ("gptq", [], []),
    "gptqmodel-desc-act": ("gptq", [], []),
    "llm-compressor": ("gptq", [], []),
    "hqq": ("hqq", ["--no-sym"], []),
    "autoawq": ("awq", ["--no-sym", "--windows", "4"], []),
    "auto-round": ("autoround", ["--windows", "64", "--amp"], []),  # in bfloat16, the peer's default
}


def main() -> None:
    if "--own" in sys.argv:
        sys.argv.remove("--own")
        peer_methods.main({"gptq": own_gptq, "hqq": own_hqq, "awq": own_awq, "autoround": own_autoround})
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=PYTHON", help=f"one of {', '.join(PAIRS)} and the interpreter that has it")
    parser.add_argument("--data", type=Path, help="where the blocks are kept; a temporary folder when left out")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200, help="of AutoRound")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = a.data or Path(scratch)
        data.mkdir(exist_ok=True)
        if not list(data.glob("block*.safetensors")):
            dump(a.model, a.calibration, a.samples, data)
        for name, python in (each.split("=", 1) for each in a.peer):
            own, both, alone = PAIRS[name]
            both = [*both, "--iters", str(a.iters)]
            runs: dict[str, list[dict]] = {"lowbit": [], name: []}
            for _ in range(a.runs):
                runs["lowbit"].append(measured([sys.executable, __file__, "--own", own, data, f"{scratch}/made", *both]))
                runs[name].append(measured([python, str(Path(__file__).with_name("peer_methods.py")), name, data, f"{scratch}/made", *both, *alone]))
            report(name, own, runs, Path(a.model).name)


def measured(command: list) -> dict:
    made = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{made.stderr[-3000:]}")
    out = str(next(part for part in command if str(part).endswith("/made")))
    with safe_open(out, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def report(peer: str, own: str, runs: dict[str, list[dict]], model: str) -> None:
    row = {"peer": peer, "method": own, "model": model, "machine": machine(), "commit": commit(), "options": runs[peer][0]["options"], "versions": runs[peer][0]["versions"]}
    for name, found in runs.items():
        blocks = found[0]["error"]
        row[name] = {
            "seconds": [round(statistics.median(sum(run["seconds"][block].values()) for run in found), 3) for block in blocks],
            "error": [round(sum(found[0]["error"][block].values()), 6) for block in blocks],
            "output_mse": [float(f"{found[0]['output_mse'][block]:.5g}") for block in blocks],
        }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    for name in runs:
        print(f"{own} {name:20} error {row[name]['error']}  output mse {row[name]['output_mse']}  seconds {row[name]['seconds']}", flush=True)


def dump(model: str, calibration: str, samples: int, folder: Path) -> None:
    """The first, middle and last block of the original model: weights, inputs, Hessians."""
    from lowbit.checkpoints import open_checkpoint
    from lowbit.models import skeleton as sk
    from lowbit.models.linears import find_linears, get_weight
    from lowbit.pipeline.calibration import packed, read_texts
    from lowbit.pipeline.collect import symmetrize
    from lowbit.pipeline.locate import load_tokenizer
    from lowbit.pipeline.streaming import Streamer

    checkpoint = open_checkpoint(Path(model))
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(checkpoint, Path(scratch))
    windows = packed(read_texts(calibration, tokenizer), tokenizer, length=512, count=samples)
    streamer = Streamer(sk.build(checkpoint), [Batch(ids[None]) for ids in windows.ids], dtype=torch.float32)
    states = HiddenStates(streamer.shapes, streamer.hidden_size, torch.float32)
    streamer.record(states)
    for index in range(streamer.depth):
        block = streamer.load_block(index)
        if index in (0, streamer.depth // 2, streamer.depth - 1):
            linears = find_linears(streamer.skeleton, index)
            run = lambda number, block=block, index=index: streamer.run_block(block, index, number, states.read(number, streamer.device))
            groups = collected(block, linears, run, len(streamer.batches), ("hessian",))
            tensors = {"hidden": torch.cat([states.read(number, streamer.device) for number in range(len(streamer.batches))])}
            for group in groups:
                for linear in group.linears:
                    name = linear.module.rpartition(".")[2]
                    tensors[f"{name}.weight"], tensors[f"{name}.hessian"] = get_weight(block, linear).clone(), symmetrize(group.stats.hessian).clone()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{norm}.weight"] = getattr(block, norm).weight.detach().clone()
            config = streamer.skeleton.text_config
            told = {"n_tokens": windows.ids.numel(), "head_dim": block.self_attn.head_dim, "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_parameters["rope_theta"]}
            save_file(tensors, folder / f"block{index}.safetensors", metadata={key: str(value) for key, value in told.items()})
        streamer.run(block, index, states, states)


def collected(block: nn.Module, linears: list[Linear], run, count: int, needs: tuple[str, ...]) -> list[InputGroup]:
    collector = Collector(block, linears)
    groups = collector.discover(lambda: run(0))
    with torch.no_grad(), collector.collect(groups, needs, Current()):
        for number in range(count):
            with suppress(StopBlock):
                run(number)
    return groups


def scheme_of(a: argparse.Namespace, **more) -> Scheme:
    return Scheme(bits=a.bits, block=(1, a.group_size), symmetric=a.sym, **more)


def own_gptq(tensors: dict[str, Tensor], n_tokens: int, layer: nn.Module, hidden: Tensor, a: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    made, clock = {}, Clock()
    for name in PATHS:
        notes: list[str] = []
        qt = algorithm("gptq").run(tensors[f"{name}.weight"], scheme_of(a), LayerStats(n_tokens, hessian=tensors[f"{name}.hessian"]), make_options("gptq", {"damp": a.damp, "sweeps": 0}), notes)
        made[name] = numerics.dequantize(qt)
        clock(name)
        if notes:
            raise SystemExit(f"{name}: {notes}: not a fair comparison")
    return made, clock.seconds


def own_hqq(tensors: dict[str, Tensor], n_tokens: int, layer: nn.Module, hidden: Tensor, a: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    made, clock = {}, Clock()
    for name in PATHS:
        made[name] = numerics.dequantize(hqq(tensors[f"{name}.weight"], scheme_of(a, zero_dtype="float"), None, HqqOptions(), []))
        clock(name)
    return made, clock.seconds


def places(tensors: dict[str, Tensor]) -> list[Linear]:
    return [Linear(name, path, "weight", tuple(tensors[f"{name}.weight"].shape)) for name, path in PATHS.items()]


def own_awq(tensors: dict[str, Tensor], n_tokens: int, layer: nn.Module, hidden: Tensor, a: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Scales, clipping and rounding; back in the basis of the original inputs by what the scales did to each weight, which a second run without clipping shows."""
    clock, kwargs = Clock(), block_kwargs(layer, hidden)

    def transformed(clip: bool) -> nn.Module:
        block = copy.deepcopy(layer)
        run = lambda number: block(hidden[number : number + 1].float(), attention_mask=None, **kwargs)
        plans = {linear.name: LayerPlan(scheme_of(a), "rtn", make_options("rtn", {})) for linear in places(tensors)}
        with torch.no_grad():
            groups = collected(block, places(tensors), run, len(hidden), ("hessian", "sum_abs"))
            first = lambda: (out if isinstance(out := run(0), Tensor) else out[0])
            transform_block(block, groups, plans, {"awq": {"clip": clip}}, first)
        return block

    block = transformed(True)
    rounded = {name: numerics.dequantize(numerics.quantize(block.get_submodule(path).weight.detach(), scheme_of(a))) for name, path in PATHS.items()}
    clock("block")
    unclipped = transformed(False)
    ratio = lambda name, path: unclipped.get_submodule(path).weight.detach() / layer.get_submodule(path).weight.detach()
    return {name: torch.where(layer.get_submodule(path).weight == 0, 0, value / ratio(name, path)) for (name, path), value in zip(PATHS.items(), rounded.values(), strict=True)}, clock.seconds


def own_autoround(tensors: dict[str, Tensor], n_tokens: int, layer: nn.Module, hidden: Tensor, a: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    dtype = torch.bfloat16 if a.amp else torch.float32
    block, kwargs = copy.deepcopy(layer).to(dtype), block_kwargs(layer, hidden)
    block.self_attn.config._attn_implementation = NAME  # as quantize has it
    kwargs = {**kwargs, "position_embeddings": tuple(part.to(dtype) for part in kwargs["position_embeddings"])}
    rows = max(1, MICRO_BATCH_TOKENS // hidden.shape[1])  # windows at once, as quantize has them
    parts = hidden.split(rows)
    shapes = [tuple(part.shape[:2]) for part in parts]
    source, target = (HiddenStates(shapes, hidden.shape[2], dtype) for _ in range(2))
    run = lambda x: (out if isinstance(out := block(x, attention_mask=None, **kwargs), Tensor) else out[0])
    with torch.no_grad():
        for number, part in enumerate(parts):
            source.write(number, part)
            target.write(number, run(part.to(dtype)))
    streamer = SimpleNamespace(
        run_block_with_gradient=lambda block, index, number, x: run(x), batches=[Batch(torch.zeros(shape, dtype=torch.int64)) for shape in shapes], device=torch.device("cpu")
    )
    linears = places(tensors)
    plans = {linear.name: LayerPlan(scheme_of(a, range="full" if a.sym else "half"), "autoround", make_options("autoround", {"iterations": a.iters, "batch": a.batch})) for linear in linears}
    clock = Clock()
    made, _ = learn_block(block, 0, linears, plans, streamer, source, target, {linear.name: "float32" for linear in linears}, 0)
    clock("block")
    return {name: numerics.dequantize(qt) for name, qt in made.items()}, clock.seconds


if __name__ == "__main__":
    main()
