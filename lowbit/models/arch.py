"""Facts about architectures, as a table: what cannot be streamed, and why."""

from __future__ import annotations

import transformers

from ..errors import ModelError

UNSUPPORTED = {
    "gemma3n": "its later blocks reuse the keys and values of earlier ones and every block takes an embedding of its own",
    "gemma3n_text": "its later blocks reuse the keys and values of earlier ones and every block takes an embedding of its own",
    "mamba": "it is a state-space model without attention blocks and has not been tested",
    "mamba2": "it is a state-space model without attention blocks and has not been tested",
}


# Linear layers of a few outputs that route tokens: they cost nothing and decide everything.
ROUTERS = ("gate", "router", "shared_expert_gate")

# Matrices of one input that vLLM and others make one layer.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def refuse_unsupported(config) -> None:
    """Raise ModelError, by name and with the reason, for what cannot be streamed."""
    text = config.get_text_config()
    for model_type in (config.model_type, text.model_type):
        if model_type in UNSUPPORTED:
            raise ModelError(f"{model_type} cannot be quantized yet: {UNSUPPORTED[model_type]}.")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelError(f"{text.model_type} with num_kv_shared_layers = {text.num_kv_shared_layers} cannot be streamed: its last blocks reuse the keys and values of earlier ones.")
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder; lowbit quantizes decoders.")
    if type(config) in transformers.AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        raise ModelError(f"{config.model_type} is an encoder; lowbit quantizes decoders.")
