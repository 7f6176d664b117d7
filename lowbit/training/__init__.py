"""Training that knows it will be quantized: what is trained is the file.

    import lowbit.training as training
    model = AutoModelForCausalLM.from_pretrained(folder)
    training.prepare(model, "int4-asym-g64")          # linear layers now multiply with what the file will hold
    ...                                               # any loop, transformers' Trainer, TRL
    training.write(model, "out", source=folder)       # the file, in the recipe's target
"""

from .merge import Merged, merge
from .prepare import convert, prepare
from .qat import QatOptions, qat
from .save import write

__all__ = ["Merged", "QatOptions", "convert", "merge", "prepare", "qat", "write"]
