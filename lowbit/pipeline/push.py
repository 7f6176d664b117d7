"""A result to the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import open_checkpoint, weight_files
from ..checkpoints.safetensors import refuse_outside
from ..errors import LowbitError
from . import card

SKIPPED = (".log", ".tmp", ".old", ".work")


@dataclass(frozen=True)
class Upload:
    """What goes where. files: name in the repository, place here, bytes. url: of the commit; None in a dry run."""

    repository: str
    private: bool
    files: tuple[tuple[str, Path, int], ...]
    url: str | None = None

    @property
    def total_bytes(self) -> int:
        return sum(size for _, _, size in self.files)


def push(path: str | Path, repository: str, *, private: bool = False, message: str | None = None, dry_run: bool = False) -> Upload:
    """Upload an output folder (its files, no folders) or a GGUF file (all its parts) with its card as README.md; the repository is made where there is none.

    dry_run: only say what would be uploaded; needs no network. Raises LowbitError for a name that is none, without a network and without a login.
    """
    source = Path(path).expanduser()
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository):
        raise LowbitError(f"{repository!r} is no repository of the hub; expected NAME/MODEL, e.g. my-name/SmolLM2-135M-int4.")
    open_checkpoint(source)  # what no program could load is not uploaded
    planned = Upload(repository, private, tuple((name, file, file.stat().st_size) for name, file in _files(source)))
    if dry_run:
        return planned
    return Upload(repository, private, planned.files, _upload(planned, message or f"Upload {source.name} with lowbit"))


def _files(source: Path) -> list[tuple[str, Path]]:
    if source.is_dir():
        return [(file.name, refuse_outside(file, source)) for file in sorted(source.iterdir()) if file.is_file() and not file.name.startswith(".") and file.suffix not in SKIPPED]
    parts = weight_files(source)
    beside = card.card_path(source, True) if len(parts) == 1 else card.card_path(source.parent, False)
    return [*([(card.FILE, refuse_outside(beside, source.parent))] if beside.is_file() else []), *((file.name, file) for file in parts)]


def _upload(planned: Upload, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError  # HTTPError: of httpx or its successor, whichever the hub's library is built on

    api = HfApi()
    try:
        api.whoami()
    except LocalTokenNotFoundError as error:
        raise LowbitError("nobody is logged in to the Hugging Face hub here. Run `hf auth login` with a token that may write, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise LowbitError(f"the hub does not accept the login ({_status(error)}). Run `hf auth login` with a token that may write.") from error
    except (OSError, HTTPError) as error:
        raise LowbitError(f"the Hugging Face hub cannot be reached ({type(error).__name__}). Nothing was uploaded; try again with a network, or see what would go with --dry-run.") from error
    try:
        api.create_repo(planned.repository, private=planned.private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=_content(name, file, planned)) for name, file, _ in planned.files]
        return str(api.create_commit(planned.repository, operations, commit_message=message).commit_url)
    except HfHubHTTPError as error:
        raise LowbitError(f"the hub refused the upload to {planned.repository} ({_status(error)}). The token needs the right to write there.") from error
    except (OSError, HTTPError) as error:
        raise LowbitError(f"the upload to {planned.repository} was cut off ({type(error).__name__}: {error}). Repeat the command: what has arrived is not sent again.") from error


def _content(name: str, file: Path, planned: Upload) -> str | bytes:
    """A file by its path; the card with the model's name on the hub in its lines."""
    if name != card.FILE:
        return str(file)
    weights = next((other for other, _, _ in planned.files if other.endswith(".gguf")), f"{card.NAME}.gguf")
    return file.read_text(encoding="utf-8").replace(f"{card.NAME}.gguf", weights).replace(f"{card.NAME}/{weights}", weights).replace(card.NAME, planned.repository).encode()


def _status(error: Exception) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__
