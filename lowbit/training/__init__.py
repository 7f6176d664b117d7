"""Training that knows it will be quantized: what is trained is the file.

    import lowbit.training as training
    model = AutoModelForCausalLM.from_pretrained(folder)
    training.prepare(model, "int4-asym-g64")          # linear layers now multiply with what the file will hold
    ...                                               # any loop, transformers' Trainer, TRL
    training.write(model, "out", source=folder)       # the file, in the recipe's target

    training.qlora("model", "adapter", data="chat.jsonl")            # an adapter of peft's on a base that stays packed
    model = training.load_adapter(lowbit.load("model-nf4"), "adapter")
    training.merge("model-nf4", "adapter", "merged", recipe="int4-asym-g64-gptq")
"""

from .adapters import load as load_adapter
from .bitnet import BitNetOptions, bitnet
from .merge import Merged, merge
from .prepare import convert, prepare
from .qat import QatOptions, qat
from .qlora import QloraOptions, qlora
from .save import write

__all__ = ["BitNetOptions", "Merged", "QatOptions", "QloraOptions", "bitnet", "convert", "load_adapter", "merge", "prepare", "qat", "qlora", "write"]
