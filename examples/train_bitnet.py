"""Train a small BitNet from scratch on a text file, let it go on with a sentence, and say how many bits its weights take.

    python examples/train_bitnet.py TEXT.txt
"""

import sys

import torch
import transformers

import lowbit
from lowbit.training import BitNetOptions, bitnet

config = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1024}
options = BitNetOptions(steps=300, batch=8, seq_len=128, lr=4e-3, switch_at=0.3, eval_every=100)  # full precision first, then -1, 0 and 1
made = bitnet("example-bitnet", data=sys.argv[1], config=config, options=options, overwrite=True)
for step, loss in made.curve:
    print(f"step {step}: held-out loss {loss:.3f}")

model = lowbit.load(made.path, dtype="float32")  # or transformers.AutoModelForCausalLM.from_pretrained
tokenizer = transformers.AutoTokenizer.from_pretrained(made.path)
torch.manual_seed(0)
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=40, do_sample=True)[0]))

values = torch.cat([torch.unique(model.get_submodule(f"model.layers.{i}.mlp.up_proj").weight) for i in range(3)])
print(f"values of three matrices: {values.tolist()}")
