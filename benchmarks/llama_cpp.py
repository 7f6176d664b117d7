"""Claim: llama.cpp computes from our GGUF files what we compute. Perplexity on the same windows and the mean KL of its logits to ours.

    python benchmarks/llama_cpp.py FILE.gguf TEXT --llama-perplexity PATH [--ctx 512] [--windows 40]

Our logits (decoded weights, float32, streamed) are written as a base file of llama-perplexity --kl-divergence, whose own evaluation of FILE is then
compared with them token by token. On quantized files llama.cpp rounds activations to 8 bits; that is what the KL shows.
Base file: "_logits_", i32 ctx, vocabulary, windows; i32 tokens; then per scored token f32 scale, f32 minimum, u16 [vocabulary] log-probabilities.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from lowbit.checkpoints import open_checkpoint
from lowbit.evaluation.metrics import score_window, scored
from lowbit.models import skeleton as sk
from lowbit.pipeline.calibration import packed
from lowbit.pipeline.hidden import HiddenStates
from lowbit.pipeline.locate import load_tokenizer
from lowbit.pipeline.streaming import Streamer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--llama-perplexity", required=True)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--base-from", type=Path, help="take the logits from this file instead (e.g. the original)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base.kld"
        ours = write_base(a.base_from or a.file, a.text, base, a.ctx, a.windows, Path(scratch))
        command = [a.llama_perplexity, "-m", str(a.file), "--kl-divergence", "--kl-divergence-base", str(base), "-c", str(a.ctx), "-t", "2"]
        done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    theirs = float(re.search(r"Mean PPL\(Q\)\s*:\s*([0-9.]+)", text)[1])
    kl = float(re.search(r"Mean\s+KLD:\s*(-?[0-9.]+)", text)[1])
    top = float(re.search(r"Same top p:\s*([0-9.]+)", text)[1])
    print(f"{a.file.name}: perplexity ours {ours:.4f}, llama.cpp {theirs:.4f} ({100 * (theirs / ours - 1):+.2f}%); mean KL of llama.cpp's logits to ours {kl:.5f}; same top token {top:.2f}%")


def write_base(file: Path, text: Path, base: Path, ctx: int, count: int, scratch: Path) -> float:
    """Write our log-probabilities as llama-perplexity keeps them; returns our perplexity (second half of each window)."""
    checkpoint = open_checkpoint(file)
    tokenizer = load_tokenizer(checkpoint, scratch)
    windows = packed([text.read_text(encoding="utf-8")], tokenizer, length=ctx, count=count, spread=False)
    streamer = Streamer(sk.build(checkpoint), windows.batches(), dtype=torch.float32)
    states = HiddenStates(streamer.shapes, streamer.hidden_size, torch.float32)
    streamer.record(states)
    for index in range(streamer.depth):
        streamer.run(streamer.load_block(index), index, states, states)
    nll = []
    with base.open("wb") as sink:
        for number, batch in enumerate(streamer.batches):
            for row, ids in enumerate(batch.ids):
                logits = streamer.logits(ids.unsqueeze(0), states.read(number, torch.device("cpu"))[row : row + 1])[0]
                if not sink.tell():
                    sink.write(b"_logits_" + np.array([ctx, logits.shape[1], len(windows.ids)], dtype=np.int32).tobytes() + windows.ids.int().numpy().tobytes())
                nll.append(scored(score_window(ids, logits).nll, "llama.cpp"))
                sink.write(rows(logits[ctx // 2 : ctx - 1]))
    return float(torch.cat(nll).mean().exp())


def rows(logits: torch.Tensor) -> bytes:
    """Log-probabilities as 16-bit steps of each row's range (at most 16 nats)."""
    logp = logits.log_softmax(-1)
    top = logp.amax(-1, keepdim=True)
    low = torch.maximum(logp.amin(-1, keepdim=True), top - 16)
    scale = (top - low) / 65535
    steps = ((logp - low) / scale).round_().clamp_(0, 65535).to(torch.int32).numpy().astype(np.uint16)
    head = torch.cat([scale, low], dim=1).numpy().astype(np.float32).view(np.uint16)
    odd = np.zeros((len(steps), steps.shape[1] % 2), dtype=np.uint16)
    return np.concatenate([head, steps, odd], axis=1).tobytes()


if __name__ == "__main__":
    main()
