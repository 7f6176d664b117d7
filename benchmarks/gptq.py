"""Claim: GPTQ int4 (symmetric, groups of 64) takes at most half of llm-compressor's time, no more memory, and loses less.

Both run as whole processes, from start until the files are written, in turn, on the same tokens; the loss of both files is measured by lowbit's
protocol (and the perplexity can be checked with llama-perplexity, see docs/status.md).

    python benchmarks/gptq.py MODEL CALIBRATION.txt EVALUATION.txt --peer-python PEER_VENV/bin/python [--dtype float32] [--runs 2] [--recipe int4-sym-g64-gptq-guided]

The peer's environment holds llmcompressor and torch (CPU); --dtype is the peer's. Results are appended to benchmarks/results/gptq.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "gptq.jsonl"
SAMPLES, LENGTH, GROUP = 64, 512, 64
OURS = """
import sys, lowbit
lowbit.quantize(sys.argv[1], sys.argv[4], sys.argv[2], calibration=sys.argv[3], n_samples=64, seq_len=512, overwrite=True)
"""
PEER = """
import sys, json, torch, llmcompressor
from transformers import AutoModelForCausalLM, AutoTokenizer
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
source, out, ids, dtype = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3])), getattr(torch, sys.argv[4])
model, tokenizer = AutoModelForCausalLM.from_pretrained(source, dtype=dtype), AutoTokenizer.from_pretrained(source)
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
oneshot(model=model, dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(r) for r in ids]}), recipe=recipe,
        num_calibration_samples=len(ids), max_seq_length=len(ids[0]))
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recipe", default="int4-sym-g64-gptq", help="lowbit's, e.g. int4-sym-g64-gptq-guided")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--windows", type=int, default=40)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ids, text = same_tokens(a.model, a.calibration, Path(scratch))
        runs: dict[str, list[dict]] = {"lowbit": [], "llm-compressor": []}
        for _ in range(a.runs):
            runs["lowbit"].append(timed([sys.executable, "-c", OURS, a.model, f"{scratch}/ours", text, a.recipe]))
            runs["llm-compressor"].append(timed([a.peer_python, "-c", PEER, a.model, f"{scratch}/peer", ids, a.dtype]))
        loss = losses(a, scratch)
    record = {"model": Path(a.model).name, "recipe": a.recipe, "peer_dtype": a.dtype, "machine": machine(), "peer_version": version(a.peer_python), "runs": runs, "loss": loss, "commit": commit()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    report(runs, loss)


def same_tokens(model: str, calibration: str, scratch: Path) -> tuple[str, str]:
    """The first SAMPLES x LENGTH tokens, as ids for the peer and as a text that tokenizes to them for us."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(Path(calibration).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][: SAMPLES * LENGTH + 8]
    text = tokenizer.decode(ids)
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    if again[: SAMPLES * LENGTH] != ids[: SAMPLES * LENGTH]:
        raise SystemExit("the decoded text does not tokenize to the same ids: use another calibration text")
    (scratch / "ids.json").write_text(json.dumps([ids[i * LENGTH : (i + 1) * LENGTH] for i in range(SAMPLES)]))
    (scratch / "text.txt").write_text(text, encoding="utf-8")
    return str(scratch / "ids.json"), str(scratch / "text.txt")


def timed(command: list[str]) -> dict:
    """Wall seconds and peak RSS of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(error.decode()[-2000:])
    return {"seconds": round(time.perf_counter() - start, 2), "peak_rss_bytes": usage.ru_maxrss * 1024}


def losses(a: argparse.Namespace, scratch: str) -> dict:
    import lowbit

    table = lowbit.compare([f"{scratch}/ours", f"{scratch}/peer"], against=a.model, names=["original", "lowbit", "llm-compressor"], text=a.evaluation, ctx=LENGTH, n_windows=a.windows)
    found = {}
    for row in table.rows:
        summary = row.summaries["llama.cpp"]
        found[row.name] = {"perplexity": summary.perplexity.value, "kl": vars(summary.kl_mean) if summary.kl_mean else None, "file_bytes": row.size.file_bytes}
    return found


def machine() -> str:
    import torch
    import transformers

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}"


def version(python: str) -> str:
    return subprocess.run([python, "-c", "from importlib.metadata import version; print(version('llmcompressor'))"], capture_output=True, text=True).stdout.strip()


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def report(runs: dict, loss: dict) -> None:
    for name, found in runs.items():
        seconds = sorted(run["seconds"] for run in found)
        memory = max(run["peak_rss_bytes"] for run in found) / 1e9
        print(f"{name:16} {seconds[0]:7.1f} to {seconds[-1]:.1f} s   peak RSS {memory:.2f} GB   KL {loss[name]['kl']['value']:.4f}   perplexity {loss[name]['perplexity']:.2f}")
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs["lowbit"], runs["llm-compressor"], strict=True)]
    print(f"time ratio, run by run: {', '.join(f'{r:.2f}' for r in ratios)}; original perplexity {loss['original']['perplexity']:.2f}")


if __name__ == "__main__":
    main()
