"""Every layout that lowbit writes, proven against the program that reads it: written, verified by the consumer in its own environment, converted to every other layout.

    python benchmarks/formats.py MODEL [--environments FOLDER] [--only KIND] [--markdown]

MODEL is quantized without data into each row's layout; `lowbit verify` asks the row's consumer; `lowbit convert` tries all other layouts and compares. --environments FOLDER: where the consumers'
virtual environments are, made there when they are absent (several GB; each takes minutes). Rows are appended to benchmarks/results/formats.jsonl and not made twice; --markdown prints the table of
docs/formats.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptq import commit, machine

RESULTS = Path(__file__).parent / "results" / "formats.jsonl"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# environment: what pip installs there beside torch and transformers of constraints.txt
ENVIRONMENTS = {
    "gptqmodel": ("gptqmodel==7.7.0", "optimum==2.3.0", "accelerate"),
    "autoround": ("auto-round==0.16.1", "auto-round-lib==0.16.0", "accelerate"),
    "hqq": ("hqq==0.2.8.post1", "accelerate"),
    "aqlm": ("aqlm[cpu]==1.1.7", "accelerate"),
    "torchao": ("torchao==0.18.0", "accelerate"),
    "bitsandbytes": ("bitsandbytes==0.50.2", "accelerate"),
}
# layout, recipe, environment (None: this one)
ROWS = (
    ("safetensors", "int4-sym-g64-rtn", None),
    ("compressed-tensors", "int4-sym-g64-rtn", None),
    ("compressed-tensors", "int4-asym-g64-rtn", None),
    ("compressed-tensors", "int8-sym-channel-rtn", None),
    ("compressed-tensors", "w8a8", None),
    ("compressed-tensors", "fp8", None),
    ("compressed-tensors", "nvfp4-rtn", None),
    ("compressed-tensors", "mxfp4-rtn", None),
    ("gptq", "int2-sym-g64-rtn", "gptqmodel"),
    ("gptq", "int3-sym-g64-rtn", "gptqmodel"),
    ("gptq", "int4-sym-g64-rtn", "gptqmodel"),
    ("gptq", "int4-asym-g64-rtn", "gptqmodel"),
    ("gptq", "int8-sym-g64-rtn", "gptqmodel"),
    ("awq", "int4-asym-g64-rtn", "gptqmodel"),
    ("awq", "int4-sym-g64-rtn", "gptqmodel"),
    ("auto-round", "int4-sym-g64-rtn", "autoround"),
    ("auto-round", "int4-asym-g64-rtn", "autoround"),
    ("bitsandbytes", "nf4-g64-rtn", "bitsandbytes"),
    ("bitsandbytes", "nf4-g64-dq-rtn", "bitsandbytes"),
    ("bitsandbytes", "fp4-g64-rtn", "bitsandbytes"),
    ("bitsandbytes", "llm-int8", "bitsandbytes"),
    ("hqq", "int4-asym-g64-hqq", "hqq"),
    ("hqq", "int2-asym-g64-hqq", "hqq"),
    ("aqlm", "2x8-rtn", "aqlm"),
    ("bitnet", "bitnet", None),
    ("torchao", "int4-sym-g64-rtn", "torchao"),
    ("torchao", "fp8-channel-rtn", "torchao"),
    ("lowbit", "e8p2-rtn", None),
    ("lowbit", "mxfp6-rtn", None),
    ("gguf", "q4_0-pure-rtn", None),
    ("gguf", "q8_0-rtn", None),
    ("gguf", "q4_k_m-rtn", None),
    ("gguf", "q6_k-rtn", None),
    ("gguf", "iq4_nl-rtn", None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--environments", type=Path, help="folder of the consumers' virtual environments")
    parser.add_argument("--only", help="a layout, e.g. gptq")
    parser.add_argument("--markdown", action="store_true", help="print what is there as a table, and stop")
    a = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    if a.markdown or a.model is None:
        print(markdown(rows))
        return
    done = {(row["layout"], row["recipe"]) for row in rows}
    for layout, recipe, environment in ROWS:
        if (layout, recipe) in done or a.only not in (None, layout):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            row = {"layout": layout, "recipe": recipe, "model": Path(a.model).name, **measured(a, layout, recipe, environment, Path(scratch)), "machine": machine(), "commit": commit()}
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{layout:20} {recipe:24} {row['verdict']:8} {row['equal']}/{row['weights']}  logits {row['logits_difference']}  KL {row['kl']}  lossless to {', '.join(row['lossless_to'])}", flush=True)


def measured(a: argparse.Namespace, layout: str, recipe: str, environment: str | None, scratch: Path) -> dict:
    import lowbit
    from lowbit.checkpoints import TARGETS, open_checkpoint
    from lowbit.errors import LowbitError
    from lowbit.pipeline.convert import convert
    from lowbit.pipeline.verify import verify

    out = scratch / ("out.gguf" if layout == "gguf" else "out")
    started = time.perf_counter()
    lowbit.quantize(a.model, recipe, out, target_name=layout)
    written = time.perf_counter() - started
    read = open_checkpoint(out).kind == layout
    found = verify(out, python=None if environment is None else str(interpreter(a.environments, environment)))
    lossless, within, refused = [], [], {}
    for target in TARGETS:
        if target in (layout, "safetensors"):
            continue
        made = scratch / ("converted.gguf" if target == "gguf" else "converted")
        try:
            done = convert(out, target, made, overwrite=True)
        except LowbitError as error:
            refused[target] = str(error)
        else:
            (lossless if done.exact == done.matrices else within).append(target)
    return {
        "read": read, "consumer": found.consumer, "versions": found.versions, "verdict": found.verdict, "weights": found.weights, "equal": found.equal, "largest_difference": found.largest_difference,
        "logits_difference": found.logits_difference, "kl": found.kl, "dtype": found.dtype, "problems": list(found.problems), "vllm": next(iter(found.rules.values()), ""),
        "lossless_to": lossless, "within_rounding_to": within, "refused": refused, "seconds_to_write": round(written, 1),
    }  # fmt: skip


def interpreter(folder: Path | None, name: str) -> Path:
    """The Python of a consumer's environment, which is made when it is not there."""
    if folder is None:
        return Path(sys.executable)
    place = folder / name
    if not (place / "bin" / "python").is_file():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        command = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, "torch", "transformers"]
        subprocess.run(command, check=True)
        subprocess.run([place / "bin" / "python", "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]], check=True)
    return place / "bin" / "python"


def markdown(rows: list[dict]) -> str:
    """The rows in the order of ROWS."""
    order = {row[:2]: place for place, row in enumerate(ROWS)}
    lines = ["| layout | recipe | weights equal | logits differ by | KL | consumer | verdict | lossless to | within rounding to | vLLM |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: order.get((row["layout"], row["recipe"]), len(order))):
        packages = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "torch")
        logits = "" if row["logits_difference"] is None else f"{row['logits_difference']:.1e}"
        kl = "" if row["kl"] is None else f"{row['kl']:.1e}"
        vllm = row["vllm"].partition(":")[0].partition(" (")[0].rstrip(".")
        lines.append(
            f"| {row['layout']} | `{row['recipe']}` | {row['equal']} of {row['weights']} | {logits} | {kl} | {packages} | {row['verdict']} | {', '.join(row['lossless_to'])} "
            f"| {', '.join(row['within_rounding_to'])} | {vllm} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
