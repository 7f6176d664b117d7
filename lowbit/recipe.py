"""A recipe: what is quantized how, with which data, into which file. Data only; pipeline/recipes.py parses and resolves it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from .errors import RecipeError
from .scheme import Scheme


@dataclass(frozen=True)
class Calibration:
    """Where calibration text comes from and how much of it is used.

    source: "default" (the text that ships with lowbit), a .txt or .jsonl file, "dataset:NAME" or "self" (sampled from the model itself).
    n_samples windows of seq_len tokens. pad: keep texts apart and pad them, instead of packing them into full windows.
    """

    source: str = "default"
    n_samples: int = 128
    seq_len: int = 2048
    pad: bool = False

    def __post_init__(self) -> None:
        if self.n_samples < 1 or self.seq_len < 2:
            raise RecipeError(f"n_samples is {self.n_samples} and seq_len {self.seq_len}; expected at least 1 and 2.")


@dataclass(frozen=True)
class Rule:
    """For weights whose name matches the glob (without ".weight"): their own scheme (None: keep as they are), algorithm and options."""

    match: str
    scheme: Scheme | None
    algorithm: str | None = None
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """The first rule that matches a weight wins; other linear layers of the blocks take scheme, everything else is kept.

    options: of the algorithm, by its option names. transforms: their options by name, in the order in which they are applied.
    mixture: one of llama-quantize's (checkpoints/gguf_mixtures.py), which then chooses each weight's type in place of scheme; GGUF only.
    true_sequential: quantize what feeds on what in turn (about five passes per block).
    """

    name: str
    scheme: Scheme
    algorithm: str = "gptq"
    options: dict = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    mixture: str | None = None
    transforms: dict[str, dict] = field(default_factory=dict)
    calibration: Calibration = Calibration()
    true_sequential: bool = False
    kv_cache: None = None
    target: str = "compressed-tensors"
    seed: int = 0

    def to_dict(self) -> dict:
        """Plain data for JSON and provenance."""
        return asdict(self)


def from_dict(cls: type, data: dict, *, where: str):
    """Make a dataclass from plain data; a key that it does not have is an error that names those it has."""
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}; expected one of {', '.join(known)}.")
    try:
        return cls(**data)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error
