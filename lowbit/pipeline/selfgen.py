"""Calibration data sampled from the model itself, for when there is no text. LLM-QAT (arXiv:2305.17888) does it so: the first tokens greedily spread, then sampling."""

from __future__ import annotations

import torch

from ..checkpoints import Checkpoint
from ..models import skeleton as sk
from ..progress import SILENT, Progress
from ..recipe import Calibration
from . import resources

BATCH = 8


def self_texts(checkpoint: Checkpoint, tokenizer, calibration: Calibration, *, seed: int, progress: Progress = SILENT) -> list[str]:
    """n_samples texts of seq_len tokens sampled from the model at temperature 1, each begun with a random token.

    The model is loaded whole for this; ResourceError with the size when it does not fit.
    """
    skeleton = sk.build(checkpoint)
    needed = skeleton.parameter_count() * 4
    resources.require_memory(int(needed * 1.3), purpose="Sampling calibration text from the model itself (the whole model is held, in float32)")
    model = load_model(skeleton, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    with progress.step("Sampling text", calibration.n_samples) as advance, torch.no_grad():
        for start in range(0, calibration.n_samples, BATCH):
            rows = min(BATCH, calibration.n_samples - start)
            ids = torch.randint(0, min(len(tokenizer), model.config.get_text_config().vocab_size), (rows, 1), generator=generator)
            texts += tokenizer.batch_decode(sample(model, ids, calibration.seq_len, generator), skip_special_tokens=True)
            advance(rows)
    return [text for text in texts if text.strip()]


def load_model(skeleton: sk.Skeleton, dtype: torch.dtype, device: torch.device = torch.device("cpu")):
    """The whole model, filled from the checkpoint (quantized weights decoded)."""
    model = skeleton.model
    sk.fill_buffers(model, model, device)
    tied = model.all_tied_weights_keys
    for name, _ in list(model.named_parameters()):
        if name in tied and name not in skeleton.sources:
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(sk.load_parameter(skeleton, name, dtype).to(device), requires_grad=False))
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def sample(model, ids: torch.Tensor, length: int, generator: torch.Generator, *, greedy: bool = False) -> torch.Tensor:
    """Extend ids [rows, n] to length tokens, at temperature 1 (or greedily), with a key-value cache."""
    cache, step = None, ids
    while ids.shape[1] < length:
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        step = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, step], dim=1)
    return ids
