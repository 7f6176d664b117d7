"""Claim: on the same data, seed and adapter start each of the first losses is within 1% of bitsandbytes + peft's, in at most its time per step.

    python benchmarks/qlora_peer.py MODEL DATA --peer VENV/bin/python [--steps 50] [--seq-len 512] [--batch 1] [--rank 16]

MODEL: a dense folder. Each side is a process of its own, one after the other, with the same loop: AdamW (2e-4), gradient norm 0.3, bfloat16 autocast, gradient checkpointing,
no dropout. lowbit's has the base that `lowbit train qlora` makes (NF4 with double quantization); the peer's is MODEL as transformers loads it with BitsAndBytesConfig, and peft.
A row goes to benchmarks/results/qlora.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESULTS = Path(__file__).parent / "results" / "qlora.jsonl"


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        side(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--peer", required=True, help="a Python with torch, transformers, peft and bitsandbytes")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(a, folder)
        found = {}
        for name, python in (("lowbit", sys.executable), ("bitsandbytes + peft", a.peer)):
            subprocess.run([python, __file__, "--side", name, str(folder)], check=True)
            found[name] = json.loads((folder / f"{name}.json").read_text())
    ours, theirs = found.values()
    gaps = [abs(x / y - 1) for x, y in zip(ours["losses"], theirs["losses"], strict=True)]
    row = {"model": a.model.name, "steps": a.steps, "tokens": a.batch * a.seq_len, "rank": a.rank, "largest_difference": max(gaps), "sides": found}
    from gptq import commit, machine

    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({**row, "machine": machine(), "commit": commit()}) + "\n")
    for name, run in found.items():
        memory = f"peak RssAnon {run['peak_bytes'] / 1e6:.0f} MB, {run['loaded_bytes'] / 1e6:.0f} MB loaded"
        print(f"{name:20} loss {run['losses'][0]:.4f} to {run['losses'][-1]:.4f}   {run['step_ms']:.0f} ms a step   {memory}")
    print(f"largest relative difference of a loss: {max(gaps):.2%}; time {ours['step_ms'] / theirs['step_ms']:.2f} of the peer's")
    if max(gaps) > 0.01:
        sys.exit("a loss differs by more than 1%")


def prepare(a: argparse.Namespace, folder: Path) -> None:
    """What both sides read: windows, lowbit's base, the adapter's start, settings."""
    import lowbit
    from lowbit.checkpoints import open_checkpoint
    from lowbit.pipeline.locate import load_tokenizer
    from lowbit.training import adapters
    from lowbit.training.chat import pack, read_documents

    tokenizer = load_tokenizer(open_checkpoint(a.model), folder)
    documents, _ = read_documents(a.data, tokenizer, length=a.seq_len)
    rows = pack(documents, a.seq_len, filler=0)
    count = a.steps * a.batch
    if len(rows) < count:
        sys.exit(f"{a.data} holds {len(rows)} windows of {a.seq_len} tokens, and {count} are needed")
    save_file({"input_ids": rows.ids[:count], "labels": rows.labels[:count], "position_ids": rows.positions[:count]}, folder / "rows.safetensors")
    lowbit.quantize(a.model, "nf4-dq", folder / "base", target_name="lowbit")
    model = adapters.attach(lowbit.load(folder / "base", dtype="bfloat16"), rank=a.rank, alpha=a.rank, dropout=0.0, seed=0)
    model.save_pretrained(folder / "start", save_embedding_layers=False)
    (folder / "settings.json").write_text(json.dumps({"model": str(a.model.resolve()), "steps": a.steps, "batch": a.batch}))


def side(name: str, folder: Path) -> None:
    """One side's losses, milliseconds a step (the median without the first two) and memory."""
    settings = json.loads((folder / "settings.json").read_text())
    model = {"lowbit": ours, "bitsandbytes + peft": theirs}[name](folder, settings["model"])
    loaded = rss_anon()
    model.train()
    model.base_model.model.config.use_cache = False
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    rows, losses, times, peak = load_file(folder / "rows.safetensors"), [], [], Peak()
    for step in range(settings["steps"]):
        start = time.perf_counter()
        batch = {key: value[step * settings["batch"] : (step + 1) * settings["batch"]] for key, value in rows.items()}
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        times.append(1e3 * (time.perf_counter() - start))
    found = {"losses": losses, "step_ms": statistics.median(times[2:]), "peak_bytes": peak.stop(), "loaded_bytes": loaded}
    (folder / f"{name}.json").write_text(json.dumps(found))


def ours(folder: Path, model: str):
    import lowbit
    from lowbit.training import load_adapter

    return load_adapter(lowbit.load(folder / "base", dtype="bfloat16"), folder / "start", trainable=True)


def theirs(folder: Path, model: str):
    import transformers
    from peft import PeftModel

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    return PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True)


class Peak(threading.Thread):
    """The largest RssAnon seen, 50 times a second, also within the backward pass."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.most = max(self.most, rss_anon())

    def stop(self) -> int:
        self.done.set()
        self.join()
        return self.most


def rss_anon() -> int:
    """Bytes that this process holds."""
    return next(int(line.split()[1]) * 1024 for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
