"""llama.cpp as a consumer: what it predicts from a GGUF file, through the package xllamacpp (llama.cpp's server in the process)."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from ..errors import VerificationError
from ..progress import SILENT, Progress

PLACES = (4, 8, 12, 16, 24, 32, 40, 47)  # of a sequence of tokens, after which the next one is predicted
CONTEXT = 128
TOKENS = 4  # that are asked for: one alone is held back where it ends within a character


def version() -> str:
    return metadata.version("xllamacpp")


def next_token_logprobs(path: Path, ids: list[int], *, progress: Progress = SILENT) -> dict[int, Tensor]:
    """Log-probabilities float32 [vocabulary] of the next token after each of PLACES (those that ids reach), by place. VerificationError where llama.cpp refuses the file or gives no numbers."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = CONTEXT, 1, False, torch.get_num_threads()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type, params.verbosity = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED, -1
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError, OSError) as error:
        raise VerificationError(f"llama.cpp does not load {path.name}: {' '.join(str(error).split())}") from error
    found, places = {}, [place for place in PLACES if place <= len(ids)]
    with progress.step("Asking llama.cpp", len(places)) as advance:
        for place in places:
            top = _first_token(server.handle_completions({"prompt": ids[:place], "max_tokens": TOKENS, "temperature": 0, "logprobs": 1 << 20, "cache_prompt": False}))
            advance(1)
            if top is None:
                continue
            values = torch.full((max(entry["id"] for entry in top) + 1,), -torch.inf)
            values[torch.tensor([entry["id"] for entry in top])] = torch.tensor([entry["logprob"] for entry in top])
            found[place - 1] = values
    if not found:
        raise VerificationError(f"llama.cpp answered without log-probabilities after each of {len(places)} beginnings.")
    return found


def _first_token(reply: dict) -> list[dict] | None:
    """Log-probabilities of the first token of an answer; None where the text ends within a character, which the server then holds back."""
    if "choices" not in reply:
        raise VerificationError(f"llama.cpp answered {str(reply)[:200]}")
    logprobs = reply["choices"][0]["logprobs"]
    whole = logprobs is not None and len(logprobs["content"]) == reply["usage"]["completion_tokens"]
    return logprobs["content"][0]["top_logprobs"] if whole and logprobs["content"] else None
