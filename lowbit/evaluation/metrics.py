"""Per-token scores of a model's logits against the text and against another model's logits.

Conventions: "full" scores every token of a window that has a predecessor (the GPTQ, AWQ and QuIP# papers); "llama.cpp" scores the
second half (llama-perplexity: positions ctx/2 .. ctx-2 predict the next token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CONVENTIONS = ("full", "llama.cpp")
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class WindowScores:
    """Scores of one window, one value per predicted token, float64 [length - 1]; without a reference kl and agree are None."""

    nll: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None


def score_window(ids: Tensor, logits: Tensor, reference: Tensor | None = None) -> WindowScores:
    """Score logits [length, vocabulary] of a window of ids [length].

    nll: -log p(next token). kl: KL(reference || model), in nats. agree: whether both rank the same token first.
    """
    nll, kl, agree = [], [], []
    for start in range(0, len(ids) - 1, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, len(ids) - 1)
        logp = torch.log_softmax(logits[start:stop].float(), dim=-1)
        nll.append(-logp.gather(-1, ids[start + 1 : stop + 1].to(logp.device).unsqueeze(-1)).squeeze(-1))
        if reference is not None:
            logq = torch.log_softmax(reference[start:stop].float(), dim=-1)
            agree.append(logp.argmax(-1) == logq.argmax(-1))
            kl.append((logq.exp() * (logq - logp)).sum(-1))
    if reference is None:
        return WindowScores(torch.cat(nll).double().cpu())
    return WindowScores(torch.cat(nll).double().cpu(), torch.cat(kl).double().cpu(), torch.cat(agree).double().cpu())


def scored(values: Tensor, convention: str) -> Tensor:
    """The part of a window's per-token values [length - 1] that a convention counts."""
    if convention == "full":
        return values
    if convention == "llama.cpp":
        return values[(len(values) + 1) // 2 :]
    raise ValueError(f"convention is {convention!r}; expected one of {', '.join(CONVENTIONS)}")
