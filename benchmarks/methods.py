"""One table of all methods on one model with the same data: bits per weight with all overhead, perplexity, KL divergence, seconds, peak memory.

    python benchmarks/methods.py MODEL CALIBRATION EVALUATION [--only 4-bit] [--together 8] [--list] [--markdown]

Each method runs in a process of its own; what it made is measured on the first 20 windows of 512 tokens of EVALUATION (second half scored, float32), eight
results together (the original then runs once for all of them), and deleted. Rows are appended to benchmarks/results/methods.jsonl with the commit that made them; a row that is
there is not made again (delete its line to have it anew), so a run that was stopped goes on. --markdown prints the table of docs/methods. MODEL should be off every grid (see docs/status.md).
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

RESULTS = Path(__file__).parent / "results" / "methods.jsonl"
WINDOWS, LENGTH, SAMPLES = 20, 512, 64
# AutoRound's published settings (200 steps of 8 sequences of 2048 tokens a block) take hours here; these are lighter, and blocks.py runs the 200 steps on three blocks.
AUTOROUND = 'scheme = "int{bits}-{sym}-g64-autoround"\n[options]\niterations = 50\nbatch = 4\nlr = 0.01'
# family, name, recipe (words, or a recipe file's text). Groups of 64, which divide SmolLM2's layers.
ROWS = (
    ("8-bit", "RTN int8, channel", "int8-sym-channel-rtn"),
    ("8-bit", "FP8 E4M3, channel", "fp8-channel-rtn"),
    ("8-bit", "MXFP8 E4M3", "mxfp8-rtn"),
    ("W8A8", "W8A8", "w8a8"),
    ("W8A8", "SmoothQuant", "w8a8-smooth"),
    ("W8A8", "SmoothQuant, static", "w8a8-static"),
    ("W8A8", "LLM.int8()", "llm-int8"),
    ("W8A8", "FP8", "fp8"),
    ("6-bit", "MXFP6 E2M3", "mxfp6-rtn"),
    ("4-bit", "RTN sym", "int4-sym-g64-rtn"),
    ("4-bit", "RTN asym", "int4-asym-g64-rtn"),
    ("4-bit", "NF4 dq", "nf4-g64-dq-rtn"),
    ("4-bit", "FP4", "fp4-g64-rtn"),
    ("4-bit", "MXFP4", "mxfp4-rtn"),
    ("4-bit", "NVFP4", "nvfp4-rtn"),
    ("4-bit", "HQQ", "int4-asym-g64-hqq"),
    ("4-bit", "AWQ", "int4-asym-g64-awq-rtn"),
    ("4-bit", "GPTQ sym", "int4-sym-g64-gptq"),
    ("4-bit", "GPTQ asym", "int4-asym-g64-gptq"),
    ("4-bit", "AWQ + GPTQ", "int4-asym-g64-awq-gptq"),
    ("4-bit", "NF4 GPTQ", "nf4-g64-gptq"),
    ("4-bit", "MXFP4 GPTQ", "mxfp4-gptq"),
    ("4-bit", "NVFP4 GPTQ", "nvfp4-gptq"),
    ("4-bit", "guided GPTQ sym", "int4-sym-g64-gptq-guided"),
    ("4-bit", "guided GPTQ asym", "int4-asym-g64-gptq-guided"),
    ("4-bit", "guided GPTQ sym, 4 groups", "int4-sym-g64-gptq-guided4"),
    ("4-bit", "GPTAQ sym", "int4-sym-g64-gptaq"),
    ("4-bit", "rotated GPTQ sym", "int4-sym-g64-rotate-gptq"),
    ("4-bit", "QuIP#", "quip-4"),
    ("W4A8", "GPTQ sym", "int4-sym-g64-gptq-a8"),
    ("3-bit", "RTN asym", "int3-asym-g64-rtn"),
    ("3-bit", "HQQ", "int3-asym-g64-hqq"),
    ("3-bit", "AWQ", "int3-asym-g64-awq-rtn"),
    ("3-bit", "GPTQ asym", "int3-asym-g64-gptq"),
    ("3-bit", "AWQ + GPTQ", "int3-asym-g64-awq-gptq"),
    ("3-bit", "GPTAQ asym", "int3-asym-g64-gptaq"),
    ("3-bit", "rotated GPTQ asym", "int3-asym-g64-rotate-gptq"),
    ("3-bit", "guided GPTQ asym", "int3-asym-g64-gptq-guided"),
    ("3-bit", "QuIP#", "quip-3"),
    ("2-bit", "RTN asym", "int2-asym-g64-rtn"),
    ("2-bit", "HQQ", "int2-asym-g64-hqq"),
    ("2-bit", "GPTQ asym", "int2-asym-g64-gptq"),
    ("2-bit", "guided GPTQ asym", "int2-asym-g64-gptq-guided"),
    ("2-bit", "QuIP#", "quip-2"),
    ("2-bit", "guided QuIP#", "e8p2-ldlq-guided"),
    ("2-bit", "AQLM 2x8", "aqlm-2x8"),
    ("2-bit", "guided AQLM 2x8", "2x8-aqlm-guided"),
    ("1.58-bit", "ternary, absmean", "ternary-rtn"),
    ("1-bit", "binary, mean", "binary-rtn"),
    ("4-bit", "AutoRound, 50 steps", AUTOROUND.format(bits=4, sym="sym-full")),
    ("3-bit", "AutoRound, 50 steps", AUTOROUND.format(bits=3, sym="asym")),
)
MAKE = """
import json, resource, sys, lowbit
model, recipe, out, calibration, samples, length = sys.argv[1:]
made = lowbit.quantize(model, recipe, out, target_name="safetensors", calibration=calibration, n_samples=int(samples), seq_len=int(length), overwrite=True)
layers = made.layers.values()
weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
bits = sum(layer["bits_per_weight"] * layer["shape"][0] * layer["shape"][1] for layer in layers) / weights
spent = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"processor_seconds": spent.ru_utime + spent.ru_stime, "seconds": made.seconds, "peak_memory_bytes": made.peak_memory_bytes, "bits_per_weight": bits}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--only", help="a family, e.g. 4-bit")
    parser.add_argument("--without", default="", help="leave out rows whose recipe holds this word")
    parser.add_argument("--together", type=int, default=8, help="results that are measured at once (about 110 MB of disk each)")
    parser.add_argument("--list", action="store_true", help="name what is still to be made, and stop")
    parser.add_argument("--markdown", action="store_true", help="print what is there as a table, and stop")
    a = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    if a.markdown:
        print(markdown(rows))
        return
    done = {(row["family"], row["name"]) for row in rows}
    todo = [row for row in ROWS if row[:2] not in done and a.only in (None, row[0]) and not (a.without and a.without in row[2])]
    if a.list:
        print("\n".join(f"{family:9} {name:20} {recipe}" for family, name, recipe in todo))
        return
    RESULTS.parent.mkdir(exist_ok=True)
    for start in range(0, len(todo), a.together):
        with tempfile.TemporaryDirectory() as scratch:
            some = todo[start : start + a.together]
            made = [quantized(a, recipe, Path(scratch) / str(number)) for number, (_, _, recipe) in enumerate(some)]
            started = time.perf_counter()
            losses = measured(a, [str(Path(scratch) / str(number) / "out") for number in range(len(some))])
            seconds = round((time.perf_counter() - started) / len(some), 1)
        for (family, name, recipe), row, loss in zip(some, made, losses, strict=True):
            row = {"family": family, "name": name, "recipe": recipe, "model": Path(a.model).name, **row, "measuring_seconds": seconds, **loss, "machine": machine(), "commit": commit()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            words = f"ppl {row['perplexity']:9.2f}  KL {row['kl']['value']:.4f}"
            print(f"{family:9} {name:20} {row['bits_per_weight']:6.3f} bits  {words}  {row['seconds']:6.1f} s  {row['peak_memory_bytes'] / 1e6:.0f} MB", flush=True)


def quantized(a: argparse.Namespace, recipe: str, folder: Path) -> dict:
    """Quantize into folder/out, in a process of its own."""
    folder.mkdir()
    started = time.perf_counter()
    if "\n" in recipe:
        (folder / "recipe.toml").write_text(recipe)
        recipe = str(folder / "recipe.toml")
    made = subprocess.run([sys.executable, "-c", MAKE, a.model, recipe, str(folder / "out"), a.calibration, str(SAMPLES), str(LENGTH)], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stderr[-2000:])
    return {**json.loads(made.stdout.splitlines()[-1]), "process_seconds": round(time.perf_counter() - started, 1)}


def measured(a: argparse.Namespace, paths: list[str]) -> list[dict]:
    """What each result lost."""
    import lowbit

    table = lowbit.compare(paths, against=a.model, text=a.evaluation, ctx=LENGTH, n_windows=WINDOWS, noise_floor=False)
    original = table.rows[0].summaries["llama.cpp"].perplexity.value
    found = [row.summaries["llama.cpp"] for row in table.rows[1:]]
    return [{"perplexity": each.perplexity.value, "original_perplexity": original, "kl": vars(each.kl_mean), "top1": each.agreement.value} for each in found]


def markdown(rows: list[dict]) -> str:
    """The rows by family and KL."""
    order = list(dict.fromkeys(family for family, *_ in ROWS))
    lines = ["| | method | recipe | bits per weight | perplexity | mean KL (95%) | top-1 | seconds | of processor | peak memory |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (order.index(row["family"]), row["kl"]["value"])):
        kl = row["kl"]
        lines.append(
            f"| {row['family']} | {row['name']} | {_words(row['recipe'])} | {row['bits_per_weight']:.3f} | {row['perplexity']:.2f} | {kl['value']:.4f} ({kl['low']:.4f} to {kl['high']:.4f}) "
            f"| {100 * row['top1']:.1f}% | {row['seconds']:.0f} | {_rounded(row.get('processor_seconds'))} | {row['peak_memory_bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def _rounded(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"


def _words(recipe: str) -> str:
    return f"`{recipe}`" if "\n" not in recipe else ", ".join(f"`{part}`" for part in recipe.replace('"', "").replace("scheme = ", "").splitlines() if not part.startswith("["))


if __name__ == "__main__":
    main()
