"""What training adds to post-training quantization, at the same bytes: plain rounding, the best post-training result, and training that starts from it.

    python benchmarks/training.py MODEL TRAINING_TEXT EVALUATION [--only int2] [--minutes 15 60] [--list] [--markdown]

Every row is made in a process of its own and measured on the first 20 windows of 512 tokens of EVALUATION (second half scored, float32). Rows are appended to
benchmarks/results/training.jsonl with the commit that made them; a row that is there is not made again, and a training that was stopped goes on (--work keeps what it has so far).
The minutes are of training, block phase and end to end together; the post-training start is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
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
    "int4": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 1e-4, "lr": 1e-5, "lr_scales": 5e-5},
    "int3": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 2e-4, "lr": 2e-5, "lr_scales": 1e-4},
    "int2": {"blocks": 0.4, "block_lr": 5e-5, "block_lr_scales": 5e-4, "lr": 4e-5, "lr_scales": 2e-4},
    "ternary": {"blocks": 0.4, "block_lr": 5e-5, "block_lr_scales": 5e-4, "lr": 4e-5, "lr_scales": 2e-4},
    "q4_0": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 1e-4, "lr": 1e-5, "lr_scales": 5e-5},
    "q3_k": {"blocks": 0.3, "block_lr": 2e-5, "block_lr_scales": 2e-4, "lr": 2e-5, "lr_scales": 1e-4},
}
SECONDS_PER_EPOCH = 130  # of the block phase, 64 windows of 512 tokens of SmolLM2, measured
