"""GGUF architectures that have no entry in gguf_arch: read through transformers' own tables of keys, names and tensor layouts.

What transformers does not carry over is added here (rope base, rotary share, epsilons). Only for reading.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .gguf_arch import shortest

_EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon", "rms_norm_eps")
_FLAT = ("token_embd.weight", "output.weight")  # matrices that no architecture rearranges


class Reader:
    """transformers' knowledge of one file. config: a config.json without dtype."""

    def __init__(self, path: Path, name: str, metadata: Mapping, tensors: Mapping) -> None:
        import transformers
        from transformers import modeling_gguf_pytorch_utils as theirs

        self.path, self.name = path, name
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = theirs.load_gguf_checkpoint(str(path))["config"]
            found["tie_word_embeddings"] = "output.weight" not in tensors or name in ("falcon", "bloom")
            rows = tensors["token_embd.weight"].shape[0]
            model_type = found.pop("model_type")
            self.config = _completed(transformers.AutoConfig.for_model(model_type, **found), name, metadata, rows)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**self.config))
            self.processor = theirs.TENSOR_PROCESSORS.get(name, theirs.TensorProcessor)(config=found)
            self.names = theirs.get_gguf_hf_weights_map(model, self.processor)
        except Exception as error:  # the library raises many kinds; what is missing is in the message
            raise CheckpointError(f"{path}: transformers {transformers.__version__} does not make a decoder of GGUF architecture {name!r}: {' '.join(str(error).split())}") from error
        self.config["architectures"] = [type(model).__name__]

    def tensor(self, gguf_name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], Callable[[Tensor], Tensor] | None]:
        """Hugging Face's name, its shape, and what to do with the decoded values [shape] to have it (None: nothing)."""
        name = "lm_head.weight" if gguf_name == "output.weight" else self.names.get(gguf_name)
        if name is None or "_exps" in gguf_name:
            raise CheckpointError(f"{self.path}: transformers says no place for the tensor {gguf_name!r} of GGUF architecture {self.name!r}; the model would be incomplete without it.")

        def arrange(values: Tensor) -> Tensor:
            return torch.from_numpy(self.processor.process(weights=values.float().numpy(), name=gguf_name).weights).to(values.dtype)

        return (name, shape, None) if gguf_name in _FLAT else (name, tuple(arrange(torch.tensor(-1.0).expand(shape)).shape), arrange)


def _completed(config, name: str, metadata: Mapping, rows: int) -> dict:
    """A config as plain data, with what the file says and transformers leaves at the default of its config class."""
    get = lambda key: metadata.get(f"{name}.{key}")
    if get("rope.scaling.type") not in (None, "none"):
        raise ValueError(f"its rope scaling {get('rope.scaling.type')!r} would be lost")
    if name == "falcon" and (get("attention.head_count_kv") or 1) != 1:
        raise ValueError("its queries, keys and values are interleaved by key head, which transformers does not undo")
    data = {**config.to_dict(), "vocab_size": rows}
    epsilon = get("attention.layer_norm_epsilon") or get("attention.layer_norm_rms_epsilon")
    data.update({key: shortest(epsilon) for key in _EPSILONS if key in data and epsilon is not None})
    rope = data.get("rope_parameters") or {}
    if "rope_theta" in rope and get("rope.freq_base") is not None:
        rope["rope_theta"] = shortest(get("rope.freq_base"))
    if "partial_rotary_factor" in rope and get("rope.dimension_count") is not None:
        rope["partial_rotary_factor"] = get("rope.dimension_count") * data["num_attention_heads"] / data["hidden_size"]
    return data
