"""Quantize a model two ways and say which lost less.

    python examples/quantize_and_compare.py MODEL
"""

import sys

import lowbit

model = sys.argv[1]
outputs = {}
for recipe in ("int4-sym-rtn", "int4-sym-gptq"):
    outputs[recipe] = lowbit.quantize(model, recipe, f"example-{recipe}", n_samples=16, seq_len=512, overwrite=True).path

table = lowbit.compare(list(outputs.values()), against=model, names=["original", *outputs], ctx=512, n_windows=4)
for row in table.rows[1:]:
    kl = row.summaries["full"].kl_mean
    print(f"{row.name}: {row.size.file_bytes / 1e6:.1f} MB, mean KL {kl.value:.4f} (95%: {kl.low:.4f} to {kl.high:.4f})")
