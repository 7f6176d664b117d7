"""Runs in a process of its own, with whatever Python has the consumer's packages: loads a checkpoint by the lines it is given and answers with the weights and logits that it computes.

Needs nothing of lowbit. Reads one JSON line {"code", "packages", "weights": in_features by name of module, "ids", "columns"}; answers on stdout with JSON lines, each followed by the bytes of a
float32 array where it says a shape. What libraries print goes to stderr.
"""

import json
import os
import sys
from importlib import metadata


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())

    def say(message, array=None):
        if array is not None:
            array = array.detach().float().contiguous().cpu()
            message = {**message, "shape": list(array.shape)}
        answers.write(json.dumps(message).encode() + b"\n")
        if array is not None:
            answers.write(array.numpy().tobytes())
        answers.flush()

    try:
        import torch

        if request.get("threads"):
            torch.set_num_threads(request["threads"])
        versions = {name: version(name) for name in ("torch", "transformers", *request["packages"])}
        say({"versions": versions})
        scope = {"torch": torch}
        exec(request["code"], scope)  # the lines of the model card, of lowbit's own table
        model = scope["model"].eval()
        modules = dict(model.named_modules())
        say({"dtype": str(model.dtype).removeprefix("torch.")})
        with torch.no_grad():
            steps = [lambda: tell_weights(modules, request, say), lambda: say({"logits": True}, model(torch.tensor(request["ids"])).logits)]
            for step in steps[::-1] if "compressed_tensors" in request["packages"] else steps:  # it unpacks in the first forward; others (aqlm, bitsandbytes) rearrange their codes there
                step()
    except BaseException as error:  # whatever happens is the answer
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"})


def tell_weights(modules, request, say):
    for name, columns in request["weights"].items():
        if name not in modules:
            say({"weight": name, "absent": True})
            continue
        value, how = weight_of(modules[name], columns, request["columns"])
        say({"weight": name, "how": how, "dtype": str(value.dtype).removeprefix("torch.")}, value)


def version(name):
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        found = metadata.packages_distributions().get(name)
        return metadata.version(found[0]) if found else "?"


def weight_of(module, in_features, columns):
    """The weight [out, in] that the module multiplies with, by the consumer's own decoding; else what it makes of unit vectors (the first columns)."""
    import torch

    weight = getattr(module, "weight", None)
    if hasattr(module, "W_q") and hasattr(module, "dequantize"):
        return module.dequantize(), "hqq"
    if hasattr(module, "codebooks") and hasattr(module, "codes"):
        from aqlm.utils import _dequantize_weight, unpack_int_data

        return _dequantize_weight(unpack_int_data(module.codes.data, module.nbits_per_codebook), module.codebooks.data, module.scales.data), "aqlm"
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state), "bitsandbytes"
    if getattr(weight, "SCB", None) is not None:
        import bitsandbytes

        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB), "bitsandbytes int8"
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T, "dequantize_weight"
    if isinstance(weight, torch.Tensor) and type(weight.data) is not torch.Tensor and hasattr(weight, "dequantize"):
        return weight.dequantize(), "torchao"
    if type(module).__name__ == "AutoBitLinear":
        return module.weight * module.weight_scale, "bitnet"
    if type(module).__name__ == "QuantLinear" and hasattr(module, "quantized"):
        return weight, "lowbit"
    if isinstance(module, torch.nn.Linear) and isinstance(weight, torch.Tensor) and weight.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return weight, "dense"
    if hasattr(module, "nf") and isinstance(weight, torch.Tensor):  # Conv1D
        return weight.T, "dense"
    return by_unit_vectors(module, in_features, columns), "unit vectors"


def by_unit_vectors(module, in_features, columns):
    import torch

    dtype = next((tensor.dtype for tensor in [*module.parameters(), *module.buffers()] if tensor.is_floating_point()), torch.float32)
    vectors = torch.eye(in_features, dtype=dtype)[:columns]
    return (module(vectors) - module(torch.zeros_like(vectors[:1]))).T


if __name__ == "__main__":
    main()
