"""From per-token scores of windows to the numbers that are reported, each with a 95% confidence interval (bootstrap over windows)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .metrics import WindowScores, scored

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One model under one convention. KL in nats; agreement as a share from 0 to 1; tokens: scored."""

    convention: str
    tokens: int
    perplexity: Estimate
    kl_mean: Estimate | None = None
    kl_median: Estimate | None = None
    kl_p99: Estimate | None = None
    agreement: Estimate | None = None

    def to_dict(self) -> dict:
        return asdict(self)


def summarize(windows: list[WindowScores], convention: str, *, seed: int = 0) -> Summary:
    """All metrics of a model over windows under one convention."""
    nll = [scored(w.nll, convention) for w in windows]
    draws = _draws(len(windows), seed)
    perplexity = _estimate(nll, lambda values: math.exp(float(values.mean())), draws)
    tokens = sum(len(values) for values in nll)
    kl = [scored(w.kl, convention) for w in windows if w.kl is not None]
    agree = [scored(w.agree, convention) for w in windows if w.agree is not None]
    if not kl:
        return Summary(convention, tokens, perplexity)
    return Summary(
        convention,
        tokens,
        perplexity,
        kl_mean=_estimate(kl, lambda v: float(v.mean()), draws),
        kl_median=_estimate(kl, lambda v: float(v.median()), draws),
        kl_p99=_estimate(kl, lambda v: float(v.kthvalue(max(1, math.ceil(0.99 * len(v)))).values), draws),
        agreement=_estimate(agree, lambda v: float(v.mean()), draws),
    )


def _draws(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (RESAMPLES if count > 1 else 0, count), generator=generator)


def _estimate(values: list[Tensor], statistic: Callable[[Tensor], float], draws: Tensor) -> Estimate:
    value = statistic(torch.cat(values))
    if not len(draws):
        return Estimate(value, math.nan, math.nan)
    resampled = torch.tensor([statistic(torch.cat([values[i] for i in draw])) for draw in draws.tolist()], dtype=torch.float64)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)
