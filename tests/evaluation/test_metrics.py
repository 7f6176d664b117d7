"""The protocol's numbers against direct formulas."""

import math

import pytest
import torch

from lowbit.evaluation.metrics import score_window, scored
from lowbit.evaluation.summary import summarize

V, N = 50, 12


@pytest.fixture
def window():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, V, (N,), generator=g), torch.randn(N, V, generator=g), torch.randn(N, V, generator=g)


def test_scores_equal_the_formulas(window):
    ids, logits, reference = window
    found = score_window(ids, logits, reference)
    nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    p, q = reference[:-1].softmax(-1), logits[:-1].softmax(-1)
    assert torch.allclose(found.nll, nll.double(), atol=1e-6)
    assert torch.allclose(found.kl, (p * (p / q).log()).sum(-1).double(), atol=1e-6)
    assert torch.equal(found.agree, (p.argmax(-1) == q.argmax(-1)).double())


def test_a_model_against_itself_loses_nothing(window):
    ids, logits, _ = window
    found = score_window(ids, logits, logits.clone())
    assert float(found.kl.abs().max()) == 0 and float(found.agree.min()) == 1


def test_conventions():
    values = torch.arange(511.0)  # position t predicts token t + 1
    assert len(scored(values, "full")) == 511
    half = scored(values, "llama.cpp")
    assert len(half) == 255 and float(half[0]) == 256  # llama-perplexity: n_ctx - n_ctx/2 - 1 tokens from position n_ctx/2
    with pytest.raises(ValueError, match="expected one of full, llama.cpp"):
        scored(values, "gptq")


def test_summary_and_intervals():
    g = torch.Generator().manual_seed(1)
    windows = []
    for _ in range(20):
        ids = torch.randint(0, V, (N,), generator=g)
        logits = torch.randn(N, V, generator=g)
        windows.append(score_window(ids, logits, logits + 0.1 * torch.randn(N, V, generator=g)))
    s = summarize(windows, "full", seed=0)
    kl = torch.cat([w.kl for w in windows])
    assert s.tokens == 20 * (N - 1)
    assert s.kl_mean.value == pytest.approx(float(kl.mean()))
    assert s.perplexity.value == pytest.approx(math.exp(float(torch.cat([w.nll for w in windows]).mean())))
    assert s.kl_mean.low < s.kl_mean.value < s.kl_mean.high
    assert s.kl_mean.high - s.kl_mean.low < 4 * 2 * float(kl.std()) / len(kl) ** 0.5
    assert summarize(windows, "full", seed=0) == s


def test_one_window_has_no_interval(window):
    ids, logits, _ = window
    s = summarize([score_window(ids, logits)], "full")
    assert math.isnan(s.perplexity.low) and s.kl_mean is None
