"""AQLM with one codebook of 65,536 (1x16) on one 4096 x 4096 matrix: what the largest codebook takes, once.

    python benchmarks/aqlm_large.py [--kmeans 3] [--rounds 1] [--kind 1x16]

Gaussian weights, correlated inputs. Prints the relative error tr(dW H dW^T) / tr(W H W^T), the seconds and the peak memory; appended to
benchmarks/results/aqlm_large.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from gptq import commit, machine

from lowbit import numerics
from lowbit.algorithms.aqlm import AqlmOptions, aqlm
from lowbit.stats import LayerStats

RESULTS = Path(__file__).parent / "results" / "aqlm_large.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--kind", default="1x16")
    parser.add_argument("--kmeans", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    a = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(a.side, a.side, generator=generator) * 0.02
    X = torch.randn(2 * a.side, a.side, generator=generator)
    X = X + 0.5 * (X @ torch.randn(a.side, a.side, generator=generator)) / a.side**0.5
    H = X.T @ X
    del X
    start = time.perf_counter()
    made = aqlm(W, numerics.scheme_of(f"aqlm_{a.kind}"), LayerStats(2 * a.side, hessian=H), AqlmOptions(kmeans=a.kmeans, rounds=a.rounds, tolerance=0.0), [])
    seconds = time.perf_counter() - start
    D = numerics.dequantize(made) - W
    error = float(((D @ H) * D).sum(dtype=torch.float64) / ((W @ H) * W).sum(dtype=torch.float64))
    row = {
        "kind": a.kind, "side": a.side, "kmeans": a.kmeans, "rounds": a.rounds, "bits_per_weight": numerics.bits_per_weight(made.scheme, made.shape), "error": error,
        "weight_error": float(D.square().sum() / W.square().sum()), "seconds": round(seconds, 1), "threads": torch.get_num_threads(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "machine": machine(), "commit": commit(),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row)


if __name__ == "__main__":
    main()
