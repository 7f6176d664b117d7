"""BitNet from scratch on a text: the full-precision twin, b1.58, binary, and full precision first, then b1.58; the same tokens in the same order, each at three learning rates.

    python benchmarks/bitnet.py TEXT.txt [--only b1.58] [--epochs 5] [--steps N] [--threads 2] [--work FOLDER] [--markdown]

A model of 5.9 M weights (6 layers, hidden 256, byte-level BPE of 4,096 tokens trained on the text), 4,096 tokens a step. Each row is a `lowbit train bitnet` of its own, appended to
benchmarks/results/bitnet.jsonl with the commit that made it; a row that is there is not made again, and a training that was stopped goes on (--work keeps what it has so far).
loss is the best held-out cross-entropy, in nats per token, with what the file holds. --markdown prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from gptq import commit, machine

RESULTS = Path(__file__).parent / "results" / "bitnet.jsonl"
KINDS = {
    "full precision": ["--weights", "full"],
    "b1.58": [],
    "binary": ["--weights", "binary"],
    "full precision, then b1.58": ["--switch-at", "0.4"],
}
RATES = (1e-3, 2e-3, 4e-3)
MODEL = ["--layers", "6", "--hidden", "256", "--intermediate", "704", "--heads", "4", "--vocab", "4096"]
BATCH, LENGTH = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", action="append", choices=KINDS)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="in place of epochs, to see that it works")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("bitnet-work"))
    parser.add_argument("--markdown", action="store_true")
    a = parser.parse_args()
    if a.markdown:
        print(table(rows()))
        return
    a.work.mkdir(exist_ok=True)
    length = {"steps": a.steps} if a.steps else {"epochs": a.epochs}
    for kind in a.only or KINDS:
        for rate in RATES:
            key = {"kind": kind, "lr": rate, "text": a.text.name, **length}
            if not any(row.items() >= key.items() for row in rows()):
                report({**key, **train(a, kind, rate, length)})


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def train(a: argparse.Namespace, kind: str, rate: float, length: dict) -> dict:
    out = a.work / f"{list(KINDS).index(kind)}-{rate:g}-{'-'.join(f'{key}{value:g}' for key, value in length.items())}"
    settings = [*MODEL, *KINDS[kind], "--batch", BATCH, "--seq-len", LENGTH, "--lr", rate, "--eval-every", 200, "--threads", a.threads, *(f"--{key}={value}" for key, value in length.items())]
    resume = ["--resume"] if out.with_name(out.name + ".train").exists() else []
    command = [sys.executable, "-m", "lowbit", "train", "bitnet", "--data", a.text, "-o", out, *settings, *resume, "--overwrite", "--json"]
    made = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{made.stderr[-3000:]}")
    found = json.loads(made.stdout)
    steps = found["curve"][-1][0]
    where = {"commit": commit(), "machine": machine()}
    measured = {"seconds": round(found["seconds"], 1), "tokens_per_s": round(steps * BATCH * LENGTH / found["seconds"])} if not resume else {}
    return {"loss": min(loss for _, loss in found["curve"]), "last": found["curve"][-1][1], "tokens": steps * BATCH * LENGTH, "curve": found["curve"], **measured, **where}


def report(row: dict) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['kind']:28} lr {row['lr']:g}  loss {row['loss']:.4f}  {row['tokens']:,} tokens  {row.get('tokens_per_s', '?')} tokens/s", flush=True)


def table(found: list[dict]) -> str:
    lines = ["| | " + " | ".join(f"lr {rate:g}" for rate in RATES) + " | best |", "|---|" + "---|" * (len(RATES) + 1)]
    for kind in KINDS:
        losses = {row["lr"]: row["loss"] for row in found if row["kind"] == kind and "epochs" in row}
        if losses:
            lines.append(f"| {kind} | " + " | ".join(f"{losses[rate]:.3f}" if rate in losses else "" for rate in RATES) + f" | {min(losses.values()):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
