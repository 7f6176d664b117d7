"""What the native decoder's rounded inputs, and a rounded cache, cost: perplexity and mean KL divergence to the decoded weights in float32.

    python benchmarks/runtime_loss.py MODEL TEXT [--windows 20] [--length 512]

The first windows of TEXT are scored twice: all their tokens, and the second half of each, as `lowbit eval` and llama-perplexity do.
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
    parts = {"every token": 0, "second half": a.length // 2}
    loss = {(name, part): 0.0 for name in ("decoded, float32", *engines) for part in parts}
    kl = dict.fromkeys(loss, 0.0)
    for window in (ids[at : at + a.length] for at in range(0, a.windows * a.length, a.length)):
        target = torch.tensor(window[1:]).unsqueeze(1)
        with torch.no_grad():
            goal = reference(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
        found = {"decoded, float32": goal, **{name: engine.model.forward(window, 0, every=True).log_softmax(-1) for name, engine in engines.items()}}
        for (name, part), first in ((key, parts[key[1]]) for key in loss):
            scores = found[name]
            loss[name, part] -= float(scores[first:-1].gather(1, target[first:]).mean()) / a.windows
            kl[name, part] += float((goal.exp() * (goal - scores)).sum(-1)[first:].mean()) / a.windows
    for part in parts:
        plain = loss["decoded, float32", part]
        for name in ("decoded, float32", *engines):
            value = loss[name, part]
            print(f"{part:12s} {name:18s} perplexity {math.exp(value):8.3f} ({100 * math.expm1(value - plain):+.2f}%)  KL {kl[name, part]:.5f}")


if __name__ == "__main__":
    main()
