"""The work folder of a quantize job: what is done so far, so that a killed job goes on where it stopped.

    OUT.work/job.json                    what the job is: recipe, model, data, versions; a different job is refused
    OUT.work/block-00007.safetensors     the quantized matrices of block 7 (codes packed), then
    OUT.work/block-00007.json            their records; its presence means that the block is done
    OUT.work/loss-00007.safetensors      for a guided job: squared gradient norms at the outputs of block 7's modules
    OUT.work/sums-00007.safetensors      for an importance matrix: sums of squares of the inputs of block 7's matrices
    OUT.work/rewritten-00007.safetensors what transforms changed in block 7 beside its quantized matrices (norms)
    OUT.work/hidden-0.bin, hidden-1.bin  hidden states: block b reads hidden-(b % 2) and writes the other
    OUT.work/reference-0.bin, ...        the same of the original model, for algorithms that compare with it
    OUT.work/finished.json               OUT.tmp is whole: what remains is to give it its name and to remove this folder

A block's files are written to a sibling, synced and renamed, and its input hidden states stay until it is done: redoing it gives the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints import LazyQuantized, LazyTensor
from ..checkpoints.safetensors import open_file, read_json, sync, write_text
from ..errors import CheckpointError, JobError
from ..numerics import nbytes, parts
from ..scheme import Scheme
from ..tensor import QuantizedTensor

KEY, FINISHED = "job.json", "finished.json"


def work_folder(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def temporary(output: Path) -> Path:
    """Where the output is written before it gets its name."""
    return output.with_name(output.name + ".tmp")


def refuse_existing(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise JobError when an output or an unfinished job is in the way."""
    folder = work_folder(output)
    if output.exists() and not overwrite and not (resume and (folder / FINISHED).exists() and not temporary(output).exists()):
        raise JobError(f"{output} exists already. Choose another -o, or --overwrite to replace it when the new one is whole.")
    if folder.exists() and not resume and not overwrite:
        raise JobError(f"{folder} holds an unfinished job. Go on with --resume, or begin anew with --overwrite.")


class Job:
    """One quantize job's work folder beside its output."""

    def __init__(self, output: Path, key: dict, *, resume: bool, overwrite: bool) -> None:
        refuse_existing(output, resume=resume, overwrite=overwrite)
        self.output, self.folder = output, work_folder(output)
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        if (self.folder / KEY).exists():
            self._refuse_other(read_json(self.folder / KEY), key)
            if not self.written:
                (self.folder / FINISHED).unlink(missing_ok=True)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / KEY, json.dumps(key, indent=2, sort_keys=True, default=str) + "\n")
        except OSError as error:
            raise JobError(f"{self.folder} cannot be written: {error.strerror}. Choose another place with -o.") from error

    def _refuse_other(self, stored: dict, key: dict) -> None:
        key = json.loads(json.dumps(key, default=str))
        different = [name for name in key if stored.get(name) != key[name]]
        if different:
            raise JobError(f"{self.folder} holds another job: its {', '.join(different)} differ from this command's. Repeat the first command with --resume, or begin anew with --overwrite.")

    def hidden_file(self, block: int, kind: str = "hidden") -> Path:
        """The file of the hidden states that block reads; kind "reference": of the original model."""
        return self.folder / f"{kind}-{block % 2}.bin"

    def done(self, part: str) -> bool:
        return (self.folder / f"{part}.json").exists()

    def save(self, part: str, tensors: dict[str, QuantizedTensor], records: dict) -> None:
        """Store the matrices and records of one part (a block); it counts as done when this returns."""
        flat, schemes = {}, {}
        for name, qt in tensors.items():
            schemes[name] = {"scheme": qt.scheme.to_dict(), "shape": list(qt.shape), "dtype": qt.dtype}
            for key, value in parts.store(qt).items():
                flat[f"{name}|{key}"] = value
        self.save_tensors(part, flat)
        write_text(self.folder / f"{part}.json", json.dumps({"records": records, "tensors": schemes}, indent=1) + "\n")

    def records(self, part: str) -> dict:
        return read_json(self.folder / f"{part}.json")["records"]

    def quantized(self, part: str) -> dict[str, LazyQuantized]:
        """The stored matrices of a part, lazily."""
        stored = self._open(part)
        return {name: _lazy(stored, name, Scheme.from_dict(entry["scheme"]), tuple(entry["shape"]), entry["dtype"]) for name, entry in read_json(self.folder / f"{part}.json")["tensors"].items()}

    def has_tensors(self, part: str) -> bool:
        return (self.folder / f"{part}.safetensors").exists()

    def save_tensors(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Store plain tensors, whole or not at all."""
        save_tensors(tensors, self.folder / f"{part}.safetensors")

    def tensors(self, part: str) -> dict[str, Tensor]:
        """What save_tensors stored."""
        return {name: lazy.load() for name, lazy in self._open(part).items()}

    def _open(self, part: str) -> dict[str, LazyTensor]:
        try:
            return open_file(self.folder / f"{part}.safetensors")
        except CheckpointError as error:
            raise JobError(f"{self.folder / part}.safetensors is damaged ({error.__cause__ or error}). Begin anew with --overwrite.") from error

    def finish(self) -> None:
        """Note that the output is whole under its temporary name."""
        write_text(self.folder / FINISHED, "{}\n")

    @property
    def written(self) -> bool:
        """Whether an earlier run got as far as giving the output its name."""
        return (self.folder / FINISHED).exists() and self.output.exists() and not temporary(self.output).exists()

    def remove(self) -> None:
        """Delete the work folder; what says that the job is finished goes last."""
        for file in sorted(self.folder.iterdir(), key=lambda file: (KEY, FINISHED).index(file.name) if file.name in (KEY, FINISHED) else -1):
            file.unlink()
        self.folder.rmdir()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' save_file, whole or not at all, and synced; OSError where it says in words that the system refused."""
    sibling = path.with_suffix(".tmp")
    try:
        save_file(tensors, sibling)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    sync(sibling)
    os.replace(sibling, path)


def _lazy(stored: dict, name: str, scheme: Scheme, shape: tuple[int, int], dtype: str) -> LazyQuantized:
    import torch

    keys = [key for key in stored if key.rpartition("|")[0] == name]

    def load() -> QuantizedTensor:
        return parts.restore({key.rpartition("|")[2]: stored[key].load() for key in keys}, scheme, shape, dtype)

    return LazyQuantized(scheme, shape, getattr(torch, dtype), load, nbytes(scheme, shape))
