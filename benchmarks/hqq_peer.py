"""Claim: HQQ takes no longer than the hqq package on the same matrices in the same run, and gives the same zero-points.

    python benchmarks/hqq_peer.py [--runs 5]          in an environment that holds hqq, too

Both on the CPU in float32, in turn; shapes of SmolLM2-135M's layers and one of 4096 x 4096, groups of 64 along rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from gptq import commit, machine
from hqq.core.quantize import Quantizer

from lowbit.algorithms.hqq import HqqOptions, hqq
from lowbit.scheme import Scheme

RESULTS = Path(__file__).parent / "results" / "hqq.jsonl"
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    a = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    for rows, columns in SHAPES:
        for bits in (4, 2):
            W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
            scheme = Scheme(bits=bits, block=(1, 64), symmetric=False, zero_dtype="float")
            ours, theirs = [], []
            for _ in range(a.runs + 1):  # the first warms up
                start = time.perf_counter()
                made = hqq(W, scheme, None, HqqOptions(), [])
                ours.append(time.perf_counter() - start)
                start = time.perf_counter()
                _, meta = Quantizer.quantize(W, nbits=bits, group_size=64, optimize=True, round_zero=bits == 4, axis=1, bitpack=False, compute_dtype=torch.float32, device="cpu")
                theirs.append(time.perf_counter() - start)
            gap = float((made.parts["zero_point"].view(-1) - meta["zero"].view(-1)).abs().max())
            times = [round(1e3 * statistics.median(found[1:]), 2) for found in (ours, theirs)]
            row = {"shape": [rows, columns], "bits": bits, "lowbit_ms": times[0], "hqq_ms": times[1], "largest_gap_of_zero_points": gap}
            with RESULTS.open("a") as file:
                file.write(json.dumps({**row, "machine": machine(), "commit": commit()}) + "\n")
            print(f"{rows} x {columns}, {bits} bits: lowbit {row['lowbit_ms']} ms, hqq {row['hqq_ms']} ms; zero-points differ by at most {gap:.1e}")


if __name__ == "__main__":
    main()
