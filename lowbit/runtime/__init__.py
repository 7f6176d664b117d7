"""Running models: a lean decoder for the Llama kind (decoder.py), transformers for all others, and text that comes out as it is made (generate.py)."""

from .decoder import NativeModel, why_not_native
from .engine import Engine, open_model
from .generate import Sampling, Text, generate

__all__ = ["Engine", "NativeModel", "Sampling", "Text", "generate", "open_model", "why_not_native"]
