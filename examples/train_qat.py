"""Quantization-aware training in a loop of your own: python examples/train_qat.py MODEL (a folder or hub id of a small model; SmolLM2-135M takes about two minutes on two cores)."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit import training
from lowbit.pipeline.calibration import default_text
from lowbit.training.losses import divergence

path, recipe, steps = sys.argv[1], "int3-asym-g64-gptq", 20

# What training begins with: the post-training result.
lowbit.quantize(path, recipe, "qat-start", n_samples=16, seq_len=256, target_name="lowbit", overwrite=True)

tokenizer = AutoTokenizer.from_pretrained(path)
ids = tokenizer(default_text("calibration"), return_tensors="pt")["input_ids"][0]
windows = ids[: len(ids) // 128 * 128].view(-1, 128)
teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
training.prepare(model, recipe, start=lowbit.open("qat-start"), target_name="lowbit").train()

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
for step in range(steps):
    batch = windows[torch.arange(4) + 4 * step]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            goal = teacher(batch).logits
        loss = divergence(model(batch).logits, goal)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"step {step + 1}: KL {loss:.4f}")

training.write(model, "qat-out", source=path, overwrite=True)
for row in lowbit.compare(["qat-start", "qat-out"], against=path, ctx=256, n_windows=8).rows[1:]:
    print(row.name, "mean KL", round(row.summaries["full"].kl_mean.value, 4))
