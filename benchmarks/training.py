"""What training adds to post-training quantization, at the same bytes: plain rounding, the best post-training result, and training that starts from it.

    python benchmarks/training.py MODEL TRAINING_TEXT EVALUATION [--only int2] [--minutes 15 60] [--list] [--markdown]

Every row is made in a process of its own and measured on the first 20 windows of 512 tokens of EVALUATION (second half scored, float32). Rows are appended to
benchmarks/results/training.jsonl with the commit that made them; a row that is there is not made again, and a training that was stopped goes on (--work keeps what it has so far).
The minutes are of training, block phase and end to end together; the post-training start is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from gptq import commit, machine

RESULTS = Path(__file__).parent / "results" / "training.jsonl"
WINDOWS, LENGTH, SAMPLES = 20, 512, 64
# name: number format as a recipe's words, algorithm of the start, target.
FORMATS = {
    "int4": ("int4-asym-g64", "gptq-guided", "lowbit"),
    "int3": ("int3-asym-g64", "gptq-guided", "lowbit"),
    "int2": ("int2-asym-g64", "gptq-guided", "lowbit"),
    "ternary": ("ternary", "gptq-guided", "lowbit"),
    "q4_0": ("q4_0", "gptq-guided", "gguf"),
    "q3_k": ("q3_k", "gptq-guided", "gguf"),
}
# Share of the minutes that goes to the block phase, and the rates: lr of weights and scales, block by block and end to end.
SETTINGS = {
    "int4": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 2e-3, "lr": 1e-5, "lr_scales": 5e-4},
    "int3": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 3e-3, "lr": 2e-5, "lr_scales": 1e-3},
    "int2": {"blocks": 0.4, "block_lr": 5e-5, "block_lr_scales": 5e-3, "lr": 4e-5, "lr_scales": 2e-3},
    "ternary": {"blocks": 0.4, "block_lr": 5e-5, "block_lr_scales": 5e-3, "lr": 4e-5, "lr_scales": 2e-3},
    "q4_0": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 2e-3, "lr": 1e-5, "lr_scales": 5e-4},
    "q3_k": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 3e-3, "lr": 2e-5, "lr_scales": 1e-3},
}
SECONDS_PER_EPOCH = 130  # of the block phase, 64 windows of 512 tokens of SmolLM2, measured
MAKE = """
import json, resource, sys, lowbit
arguments = json.loads(sys.argv[1])
made = lowbit.quantize(arguments["model"], arguments["recipe"], arguments["out"], target_name=arguments["target"], calibration=arguments["data"], n_samples=64, seq_len=512, overwrite=True)
print(json.dumps({"seconds": made.seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""
TRAIN = """
import json, resource, sys
from pathlib import Path
from lowbit.training.blockwise import BlockOptions
from lowbit.training.qat import QatOptions, qat
a = json.loads(sys.argv[1])
s = a["settings"]
options = QatOptions(
    blocks=BlockOptions(a["epochs"], s["block_lr"], s["block_lr_scales"]), phases=("blocks", "end") if a["epochs"] else ("end",), minutes=a["end_minutes"], lr=s["lr"], lr_scales=s["lr_scales"]
)
work = Path(a["out"] + ".train")
made = qat(a["model"], a["recipe"], a["out"], data=a["data"], target_name=a["target"], options=options, resume=work.exists())
print(json.dumps({"seconds": made.seconds, "phase_seconds": made.phase_seconds, "curve": made.curve, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("evaluation")
    parser.add_argument("--only", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--minutes", type=float, nargs="*", default=[15, 60])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowbit-training")
    parser.add_argument("--list", action="store_true", help="name what is still to be made, and stop")
    parser.add_argument("--markdown", action="store_true", help="print what is there as a table, and stop")
    a = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    if a.markdown:
        print(markdown(rows))
        return
    done = {(row["name"], row["what"]) for row in rows if row["model"] == Path(a.model).name}
    whats = ["rounding", "post-training", *(f"{minutes:g} minutes" for minutes in a.minutes)]
    todo = [(name, what) for name in FORMATS if a.only in (None, name) for what in whats if (name, what) not in done]
    if a.list:
        print("\n".join(f"{name:8} {what}" for name, what in todo))
        return
    RESULTS.parent.mkdir(exist_ok=True)
    a.work.mkdir(parents=True, exist_ok=True)
    for name, what in todo:
        row = {"name": name, "what": what, "model": Path(a.model).name, **made_row(a, name, what), "machine": machine(), "commit": commit()}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:8} {what:14} KL {row['kl']['value']:.4f}  ppl {row['perplexity']:.2f}  {row['file_bytes'] / 1e6:.1f} MB  {row['seconds']:.0f} s", flush=True)


def made_row(a: argparse.Namespace, name: str, what: str) -> dict:
    words, algorithm, target = FORMATS[name]
    out = a.work / f"{name}-{what.replace(' ', '-')}{'.gguf' if target == 'gguf' else ''}"
    arguments = {"model": a.model, "data": a.data, "out": str(out), "target": target, "recipe": f"{words}-{'rtn' if what == 'rounding' else algorithm}"}
    if what.endswith("minutes"):
        minutes, settings = float(what.split()[0]), SETTINGS[name]
        epochs = round(settings["blocks"] * minutes * 60 / SECONDS_PER_EPOCH)
        end = minutes - epochs * SECONDS_PER_EPOCH / 60
        arguments |= {"settings": settings, "epochs": epochs, "end_minutes": end}
        found = run(TRAIN, arguments) | {"settings": settings, "epochs": epochs, "end_minutes": round(end, 1)}
    else:
        found = run(MAKE, arguments)
    return {"recipe": arguments["recipe"], **found, **measured(a, out)}


def run(code: str, arguments: dict) -> dict:
    made = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise SystemExit(made.returncode)
    return json.loads(made.stdout.splitlines()[-1])


def measured(a: argparse.Namespace, out: Path) -> dict:
    import lowbit

    table = lowbit.compare([out], against=a.model, text=a.evaluation, ctx=LENGTH, n_windows=WINDOWS, noise_floor=False)
    row = table.rows[1]
    summary = row.summaries["llama.cpp"]
    return {"file_bytes": row.size.file_bytes, "bits_per_weight": row.size.linear_bits, "perplexity": summary.perplexity.value, "kl": vars(summary.kl_mean), "top1": summary.agreement.value}


def markdown(rows: list[dict]) -> str:
    """A line for each number format and way, with the share of the post-training KL that is left."""
    start = {row["name"]: row["kl"]["value"] for row in rows if row["what"] == "post-training"}
    lines = ["| number format | | MB | perplexity | mean KL (95%) | of the start's | seconds |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (list(FORMATS).index(row["name"]), row["seconds"])):
        kl = row["kl"]
        share = f"{kl['value'] / start[row['name']]:.2f}" if row["name"] in start else ""
        interval = f"{kl['value']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})"
        lines.append(f"| {row['name']} | {row['what']} | {row['file_bytes'] / 1e6:.1f} | {row['perplexity']:.2f} | {interval} | {share} | {row['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
