"""Training that knows it will be quantized: what is trained is the file.

    import lowbit.training as training
    model = AutoModelForCausalLM.from_pretrained(folder)
    training.prepare(model, "int4-asym-g64")          # linear layers now multiply with what the file will hold
    ...                                               # any loop, transformers' Trainer, TRL
    training.write(model, "out", source=folder)       # the file, in the recipe's target
"""

from .bitnet import BitNetOptions, bitnet
from .prepare import convert, prepare
from .qat import QatOptions, qat
from .save import write

__all__ = ["BitNetOptions", "QatOptions", "bitnet", "convert", "prepare", "qat", "write"]
