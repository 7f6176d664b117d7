"""From what a user names (a folder, a GGUF file, a hub id) to a path on disk; and the model's tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from ..checkpoints import Checkpoint
from ..checkpoints.gguf import write_tokenizer
from ..errors import CheckpointError, foreign_errors
from ..models import skeleton as sk
from ..progress import SILENT, Progress

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def locate(model: str | Path, *, progress: Progress = SILENT) -> Path:
    """The path of a model; a hub id is downloaded through huggingface_hub (safetensors only), or found in its cache."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", name) or name.endswith((".gguf", ".safetensors")):
        raise CheckpointError(f"{name} does not exist. Expected a folder in the Hugging Face layout, a .gguf file, or a hub id such as org/name.")
    return _download(name, progress)


def _download(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    progress.note(f"{name} is no path here; asking the Hugging Face hub.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name} is neither a path here nor a model on the hub (or it is private: run `hf auth login`).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name} is no path here, and the Hugging Face hub cannot be reached ({type(error).__name__}). Give the path of a folder or a .gguf file, or try again with a network."
        ) from error


def model_name(path: Path) -> str:
    """What a model is called: its file or folder, and of a download (.../models--org--name/snapshots/hash) the name on the hub."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name.removesuffix(".gguf")


def base_name(model: object, path: Path) -> str:
    """What a card calls the model that a result was made from: its id on the hub where it has one, else the name of its folder or file."""
    parent = path.parent.parent.name
    if path.parent.name == "snapshots" and parent.startswith("models--"):
        return parent.removeprefix("models--").replace("--", "/", 1)
    return str(model) if isinstance(model, str) and not Path(model).expanduser().exists() else model_name(path)


def load_tokenizer(checkpoint: Checkpoint, scratch: Path):
    """The model's own tokenizer; a GGUF file's is written to scratch first. No remote code is run."""
    folder = checkpoint.path
    sk.read_config(checkpoint)  # which transformers does, too, in other words
    if checkpoint.kind == "gguf":
        folder = scratch / "tokenizer"
        folder.mkdir(exist_ok=True)
        write_tokenizer(checkpoint.path, folder)
    with foreign_errors(f"{checkpoint.path} has no tokenizer that transformers can load"):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
