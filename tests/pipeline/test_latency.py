"""latency: a tiny model in a fresh process, and what is refused before loading."""

import os
import subprocess
import sys

import pytest
import torch

from lowbit.errors import CheckpointError, LowbitError, ModelError, ResourceError
from lowbit.pipeline import latency, resources
from lowbit.pipeline.latency import Latency, measure, measure_here

OPTIONS = {"prefill": 8, "decode": 4, "dtype": "float32", "threads": None, "repeats": 2}


@pytest.fixture(scope="module")
def folder(model_folder):
    return model_folder("llama")


def test_a_fresh_process(folder):
    """What is reported belongs together; this process's memory is not in it."""
    ballast = torch.ones(1 << 28)
    found = measure(folder, prefill=8, decode=4, repeats=3, threads=1, dtype="bfloat16")
    assert (found.prefill, found.decode, found.repeats, found.threads, found.dtype) == (8, 4, 3, 1, "bfloat16")
    assert found.prefill_ms_per_token_p95 >= found.prefill_ms_per_token_p50 > 0
    assert found.decode_ms_per_token_p95 >= found.decode_ms_per_token_p50 > 0
    assert found.decode_tokens_per_s == pytest.approx(1000 / found.decode_ms_per_token_p50)
    assert found.prefill_tokens_per_s == pytest.approx(1000 / found.prefill_ms_per_token_p50)
    assert found.load_s > 0
    assert found.weights_bytes == 2 * (2 * 320 * 64 + 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64) + 64)
    if os.path.exists("/proc/self/status"):
        assert found.weights_bytes < found.peak_memory_bytes < found.peak_rss_bytes < ballast.nbytes


def test_an_error_travels_from_the_process(folder, capsys):
    code = latency.main([str(folder), "--prefill", "125", "--decode", "4", "--repeats", "1"])
    done = subprocess.CompletedProcess([sys.executable], code, stdout=capsys.readouterr().out, stderr="")
    assert code == 1
    with pytest.raises(ModelError, match="prefill and decode are 129 tokens together, and this model takes at most 128"):
        latency._answer(done)


def test_what_is_refused_before_a_process_starts(folder, monkeypatch):
    monkeypatch.setattr(latency.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    for name in ("prefill", "decode", "repeats", "threads"):
        with pytest.raises(ModelError, match=f"{name} is 0; expected at least 1"):
            measure(folder, **{name: 0})
    with pytest.raises(CheckpointError, match="does not exist"):
        measure("./nothing/here")


def test_too_little_memory_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 300_000)
    monkeypatch.setattr(latency, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ResourceError, match=r"Measuring latency \(the whole model is held, in float32\) needs about .* available"):
        measure_here(folder, **OPTIONS)


def test_here(folder):
    assert isinstance(measure_here(folder, **OPTIONS), Latency)
    with pytest.raises(ResourceError, match="dtype 'int4' is not known"):
        measure_here(folder, **{**OPTIONS, "dtype": "int4"})


def test_timing_does_not_change_what_is_computed(folder):
    """The tokens generated with the cache are those of one pass without it."""
    from lowbit.checkpoints import open_checkpoint
    from lowbit.models import skeleton as sk

    model = latency.load_model(sk.build(open_checkpoint(folder)), torch.float32)
    seen, forward = [], model.forward
    model.forward = lambda **values: seen.append(values["input_ids"]) or forward(**values)
    ids = torch.randint(0, 320, (1, 8), generator=torch.Generator().manual_seed(0))
    latency._run(model, ids, 4)
    assert [x.shape[1] for x in seen] == [8, 1, 1, 1, 1]
    text = torch.cat(seen, 1)
    with torch.no_grad():
        expected = forward(input_ids=text).logits.argmax(-1)
    assert torch.equal(expected[:, 7:11], text[:, 8:12])


@pytest.mark.parametrize(
    ("code", "output", "error", "message"),
    [
        (-9, "", ResourceError, "killed, most likely for lack of memory"),
        (1, "", LowbitError, "ended with code 1: it broke"),
        (0, "not json", LowbitError, "ended with code 0"),
        (1, '{"error": "CheckpointError", "message": "bad file"}', CheckpointError, "bad file"),
    ],
)
def test_answers_that_are_no_result(code, output, error, message):
    with pytest.raises(error, match=message):
        latency._answer(subprocess.CompletedProcess([sys.executable], code, stdout=output, stderr="first\nit broke\n"))
