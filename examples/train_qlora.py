"""An adapter on a base that stays in NF4, then merged into 4-bit integers: python examples/train_qlora.py MODEL (SmolLM2-135M takes about two minutes on two cores)."""

import json
import sys
from pathlib import Path

from lowbit import training
from lowbit.training import QloraOptions

path = sys.argv[1]
answers = {"What is lowbit?": "A tool that makes language models small.", "What does it measure?": "What was lost, with an interval.", "Does it need a GPU?": "No, a laptop will do."}
talks = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} for question, answer in answers.items()]
Path("talks.jsonl").write_text("\n".join(json.dumps(talk) for talk in talks * 60) + "\n")

# The loss is on the answers only. The adapter is peft's and loads in plain peft, too.
adapter = training.qlora(path, "adapter", data="talks.jsonl", options=QloraOptions(rank=8, seq_len=128, batch=4, micro=4, steps=8, lr=1e-3), overwrite=True)
print("held-out perplexity before and after:", *(round(value, 2) for value in adapter.perplexity))

# Into the weights that it was trained against, the decoded NF4 ones, and rounded again with error feedback.
merged = training.merge(path, "adapter", "merged", base_recipe="nf4-dq", calibration="talks.jsonl", n_samples=16, seq_len=64, n_windows=2, overwrite=True)
print("KL to base + adapter:", round(merged.kl.value, 4), "by plain rounding:", round(merged.naive.value, 4))
