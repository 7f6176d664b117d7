"""A few greedy tokens from a checkpoint, through the transformers model with decoded weights: what the weights say, without the kernels' rounded inputs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ..checkpoints import open_checkpoint
from ..models import skeleton as sk
from . import resources
from .locate import load_tokenizer, locate
from .selfgen import load_model, sample


def generate(path: str | Path, prompt: str, *, max_new_tokens: int = 32, dtype: torch.dtype = torch.float32) -> str:
    """Continue a prompt greedily (as a chat turn where the model has a template). Loads the whole model; ResourceError when it does not fit."""
    checkpoint = open_checkpoint(locate(path))
    skeleton = sk.build(checkpoint)
    resources.require_memory(int(skeleton.parameter_count() * dtype.itemsize * 1.2), purpose="Generating text (the whole model is held)")
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        tokenizer = load_tokenizer(checkpoint, Path(scratch))
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]])
        made = sample(load_model(skeleton, dtype), ids, ids.shape[1] + max_new_tokens, torch.Generator(), greedy=True)[0, ids.shape[1] :].tolist()
        if tokenizer.eos_token_id in made:
            made = made[: made.index(tokenizer.eos_token_id)]
        return tokenizer.decode(made, skip_special_tokens=True).strip()
