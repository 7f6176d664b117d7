"""What a training step costs with quantized views: forward, backward and AdamW on 4 windows of 512 tokens, against the same model plain, in turn.

    python benchmarks/qat_step.py MODEL [--runs 5] [--formats int4-asym-g64:learned int4-asym-g64:minmax nf4-g64:learned ...]

bfloat16 autocast, float32 masters, cross-entropy (no teacher). Medians and ratios are appended to benchmarks/results/qat_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from gptq import commit, machine

RESULTS = Path(__file__).parent / "results" / "qat_step.jsonl"
FORMATS = (
    "int4-asym-g64:learned", "int4-sym-g64:learned", "int4-asym-g64:minmax", "int2-asym-g64:learned", "nf4-g64:learned", "nvfp4:fixed", "ternary:minmax", "q4_0:learned", "q4_k:learned",
    "q3_k:learned", "q4_k:minmax",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    a = parser.parse_args()
    ids = torch.randint(0, 40000, (4, 512), generator=torch.Generator().manual_seed(0))
    step_of = {"plain": stepper(a.model, None)}
    for name in a.formats:
        step_of[name] = stepper(a.model, name)
        times: dict[str, list[float]] = {"plain": [], name: []}
        for run in range(a.runs + 1):
            for which in times:
                started = time.perf_counter()
                step_of[which](ids)
                if run:  # the first warms up
                    times[which].append(time.perf_counter() - started)
        del step_of[name]
        row = {
            "format": name, "plain": round(statistics.median(times["plain"]), 3), "seconds": round(statistics.median(times[name]), 3),
            "ratio": round(statistics.median(t / p for t, p in zip(times[name], times["plain"], strict=True)), 3), "runs": a.runs, "threads": torch.get_num_threads(),
            "machine": machine(), "commit": commit(),
        }  # fmt: skip
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:24} {row['seconds']:7.2f} s  plain {row['plain']:7.2f} s  ratio {row['ratio']:.3f}", flush=True)


def stepper(path: str, name: str | None):
    """A function that does one step."""
    from transformers import AutoModelForCausalLM

    from lowbit import training

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    if name is not None:
        recipe, _, scales = name.partition(":")
        training.prepare(model, f"{recipe}-rtn", scales=scales, target_name="gguf" if recipe.startswith("q") else "lowbit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
