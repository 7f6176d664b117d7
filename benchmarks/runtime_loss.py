"""What the native decoder's rounded inputs, and a rounded cache, cost: perplexity and mean KL divergence to the decoded weights in float32.

    python benchmarks/runtime_loss.py MODEL TEXT [--windows 20] [--length 512]

Every token of the first windows of TEXT is scored.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import lowbit
from lowbit.runtime import open_model
from lowbit.runtime.engine import CACHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    a = parser.parse_args()
    engines = {f"native, {name}": open_model(a.model, context=a.length, kv_cache=name, native=True) for name in CACHES}
    ids = next(iter(engines.values())).tokenizer(a.text.read_text(encoding="utf-8")[: a.windows * a.length * 10])["input_ids"]
    reference = lowbit.load(a.model, dtype="float32")
    loss, kl = dict.fromkeys(["decoded, float32", *engines], 0.0), dict.fromkeys(engines, 0.0)
    for window in (ids[at : at + a.length] for at in range(0, a.windows * a.length, a.length)):
        target = torch.tensor(window[1:]).unsqueeze(1)
        with torch.no_grad():
            goal = reference(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
        found = {"decoded, float32": goal, **{name: engine.model.forward(window, 0, every=True).log_softmax(-1) for name, engine in engines.items()}}
        for name, scores in found.items():
            loss[name] -= float(scores[:-1].gather(1, target).mean()) / a.windows
            if name in kl:
                kl[name] += float((goal.exp() * (goal - scores)).sum(-1).mean()) / a.windows
    for name, value in loss.items():
        print(f"{name:18s} perplexity {math.exp(value):8.3f}  KL {kl.get(name, 0.0):.5f}")


if __name__ == "__main__":
    main()
