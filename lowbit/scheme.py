"""What a stored number means: the format, its bits, and which weights share a scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from .errors import RecipeError

LARGEST = 3e38  # of float32, about
RANGES = ("textbook", "half", "full")
SCALE_DTYPES = ("float32", "float16", "bfloat16")
INT = "int"
OWN_GROUPS = ("nf4", "fp4", "fp8_e4m3", "fp8_e5m2", "binary", "ternary")  # other formats than integers whose blocks are chosen, not fixed
CASTS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Scheme:
    """How one weight matrix is stored.

    format: "int" (uniform integers), a cast ("float16", "bfloat16", "float32"), a ggml block type ("q4_0", "q4_k", ...), a codebook ("nf4",
        "fp4"), a small float ("fp8_e4m3", "mxfp4", "nvfp4", ...) or BitNet's "binary" and "ternary".
    block: (rows, columns) that share a scale; -1 is the whole axis. (1, 64) is a group of 64 columns of one row,
        (1, -1) one scale per output channel, (-1, -1) one per tensor. (64, 1) is a column of the matrix seen as [64, out_features * in_features / 64]:
        64 rows of one column, out_features / 64 apart (HQQ's axis 0).
    zero_dtype: of asymmetric integers, "int" (a code) or "float" (any number, in scale_dtype: HQQ).
    outliers: input channels that are kept beside the codes (numerics/outliers.py), in outlier_bits: 16 (float16) or 8 (codes of -127 to 127, a scale for each channel).
    act: how the inputs that the matrix multiplies are rounded when the model runs (None: not at all).
    nested: of NF4 and FP4, how many magnitudes share the second level of double quantization (bitsandbytes: 256).
    range: of symmetric integers, scale = max|x| / (2^(b-1) - 1) ("textbook"), / (2^(b-1) - 0.5) ("half", the convention of
        compressed-tensors and AutoGPTQ) or / 2^(b-1) ("full", the sign of the largest value kept, as ggml's Q4_0 does).
    """

    format: str = INT
    bits: int = 4
    block: tuple[int, int] = (1, 64)
    symmetric: bool = True
    range: str = "half"
    scale_dtype: str = "float32"
    zero_dtype: str = "int"
    nested: int | None = None
    outliers: int | None = None
    outlier_bits: int = 16
    act: Activation | None = None

    def __post_init__(self) -> None:
        if self.outliers is not None and self.outliers < 1:
            raise RecipeError(f"outliers is {self.outliers}; expected at least 1 channel.")
        if self.outlier_bits not in (8, 16):
            raise RecipeError(f"outlier_bits is {self.outlier_bits}; expected 8 or 16.")
        if self.nested is not None and self.nested < 2:
            raise RecipeError(f"nested is {self.nested}; expected at least 2 magnitudes that share a second scale (bitsandbytes: 256).")
        if self.format in ("nf4", "fp4") and (self.block[0] != 1 or self.block[1] < 2):
            raise RecipeError(f"{self.format} has blocks of consecutive weights of a row; block is {self.block}, expected e.g. (1, 64).")
        if self.format != INT:
            return
        if not (1 if self.zero_dtype == "float" and not self.symmetric else 2) <= self.bits <= 8:
            raise RecipeError(f"bits is {self.bits}; integers of 2 to 8 bits are supported (1 bit with float zero-points, as HQQ has them).")
        if self.range not in RANGES:
            raise RecipeError(f"range is {self.range!r}; expected one of {', '.join(RANGES)}.")
        if self.scale_dtype not in SCALE_DTYPES:
            raise RecipeError(f"scale_dtype is {self.scale_dtype!r}; expected one of {', '.join(SCALE_DTYPES)}.")
        rows, columns = self.block
        if not (self.block == (-1, -1) or (rows == 1 and (columns >= 1 or columns == -1)) or (rows > 1 and columns == 1)):
            raise RecipeError(f"block is {self.block}; expected (1, group_size), (1, -1) for a scale per channel, (-1, -1) for one per tensor or (group_size, 1).")
        if self.zero_dtype not in ("int", "float"):
            raise RecipeError(f"zero_dtype is {self.zero_dtype!r}; expected int or float.")

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 for the whole row."""
        return self.block[1]

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def zero_code(self) -> int:
        """The code of zero in a symmetric scheme, 2^(b-1)."""
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Scales per row of in_features columns; a short last group counts."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    @property
    def name(self) -> str:
        """The short form, e.g. int4-sym-g64; what a recipe accepts."""
        if self.act is not None:
            return f"{replace(self, act=None).name}-{self.act.name}"
        if self.outliers is not None:
            return f"{replace(self, outliers=None).name}-out{self.outliers}{'b8' if self.outlier_bits == 8 else ''}"
        if self.format != INT and self.format not in OWN_GROUPS:
            return self.format
        share = {(1, -1): "channel", (-1, -1): "tensor"}.get(self.block, f"g{self.block[1]}" if self.block[0] == 1 else f"g{self.block[0]}-axis0")
        if self.format != INT:
            return f"{self.format}-{share}{'-dq' if self.nested else ''}"
        return f"int{self.bits}-{'sym' if self.symmetric else 'asym'}-{share}"

    @property
    def said(self) -> str:
        """The short form, and what it does not tell."""
        return f"{self.name} with zero-points that are no whole numbers" if self.format == INT and self.zero_dtype == "float" else self.name

    def to_dict(self) -> dict:
        """Plain data for JSON; from_dict is the inverse."""
        return {**asdict(self), "block": list(self.block)}

    @staticmethod
    def from_dict(data: dict) -> Scheme:
        act = data.get("act")
        return Scheme(**{**data, "block": tuple(data["block"]), "act": None if act is None else Activation.from_dict(act)})


ACTIVATIONS = (INT, "fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4")  # number formats of rounded inputs
OBSERVERS = ("minmax", "average", "percentile", "mse", "kl")


@dataclass(frozen=True)
class Activation:
    """How inputs x [tokens, in_features] of a linear layer are rounded when the model runs.

    format, bits, symmetric, range: as of weights (int, fp8_e4m3, fp8_e5m2, mxfp8_e4m3, mxfp4, nvfp4, ...).
    per: "token" or "tensor": what shares a scale. static: the scale is found once, in calibration, by an observer: "minmax", "average" (moving average of
        the extremes of each micro-batch), "percentile" (of |x|, or of both ends), "mse" (least squared error) or "kl" (least KL divergence, symmetric only).
    threshold: columns that hold a magnitude of at least this are left as they are (LLM.int8: 6.0).
    """

    format: str = INT
    bits: int = 8
    symmetric: bool = True
    range: str = "half"
    per: str = "token"
    static: bool = False
    observer: str = "minmax"
    percentile: float = 99.99
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.format not in ACTIVATIONS:
            raise RecipeError(f"activations: format is {self.format!r}; expected one of {', '.join(ACTIVATIONS)}.")
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"activations: bits is {self.bits}; expected 2 to 8.")
        if not self.symmetric and self.format != INT:
            raise RecipeError(f"activations: {self.format} is symmetric; only integers can be asymmetric.")
        if self.static and self.range == "full":
            raise RecipeError('activations: range "full" has scales of either sign, and a static scale is positive; use "half" or "textbook".')
        if self.per not in ("token", "tensor"):
            raise RecipeError(f"activations: per is {self.per!r}; expected token or tensor.")
        if self.static and (self.per != "tensor" or self.threshold is not None or self.format not in (INT, "fp8_e4m3", "fp8_e5m2")):
            raise RecipeError("activations: a static scale is one number for the tensor, of integers or fp8, without a threshold; use per = \"tensor\", or leave static out.")
        if self.observer not in OBSERVERS:
            raise RecipeError(f"activations: observer is {self.observer!r}; expected one of {', '.join(OBSERVERS)}.")
        if self.observer == "kl" and not (self.symmetric and self.format == INT):
            raise RecipeError("activations: the observer kl finds a threshold of |x| for integers; it needs symmetric = true.")
        if not 50 < self.percentile <= 100:
            raise RecipeError(f"activations: percentile is {self.percentile}; expected more than 50 and at most 100.")
        if self.threshold is not None and not 0 < self.threshold < LARGEST:
            raise RecipeError(f"activations: threshold is {self.threshold}; expected a positive number, usually 6.0.")
        _ = self.scheme  # which checks its own

    @property
    def scheme(self) -> Scheme:
        """The scheme of x [tokens, in_features] as a matrix."""
        if self.format == INT:
            return Scheme(INT, self.bits, (1, -1) if self.per == "token" else (-1, -1), self.symmetric, self.range)
        block = {"mxfp8_e4m3": 32, "mxfp8_e5m2": 32, "mxfp6_e2m3": 32, "mxfp6_e3m2": 32, "mxfp4": 32, "nvfp4": 16}.get(self.format)
        return Scheme(self.format, self.bits, (1, block) if block else (1, -1) if self.per == "token" else (-1, -1))

    @property
    def name(self) -> str:
        """The short form, e.g. a8, a8-static, afp8; what a recipe accepts."""
        words = [f"a{self.bits}" if self.format == INT else f"a{self.format}"]
        words += ["aasym"] * (not self.symmetric) + ["static" if self.observer == "minmax" else f"static_{self.observer}"] * self.static
        words += ["atensor"] * (self.per == "tensor" and not self.static)
        return "-".join(words + ([f"t{self.threshold:g}"] if self.threshold is not None else []))

    @staticmethod
    def from_dict(data: dict) -> Activation:
        """The inverse of dataclasses.asdict; RecipeError for an unknown key or a wrong type."""
        known = {f.name: f.default for f in fields(Activation)}
        for key, value in data.items():
            if key not in known:
                raise RecipeError(f"activations: unknown key {key!r}; expected one of {', '.join(known)}.")
            kind = (int, float, type(None)) if key == "threshold" else (int, float) if key == "percentile" else type(known[key])
            if not isinstance(value, kind) or (isinstance(value, bool) and type(known[key]) is not bool):
                raise RecipeError(f"activations: {key} is {value!r}; expected a value like {known[key]!r}.")
        return Activation(**data)


@dataclass(frozen=True)
class Rounding:
    """The rounding of one layer's inputs as it runs: act; scale and zero_point of a static one, else None."""

    act: Activation
    scale: float | None = None
    zero_point: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict) -> Rounding:
        """The inverse of to_dict; RecipeError for what is none."""
        known = {"act", "scale", "zero_point"}
        if not isinstance(data, dict) or set(data) - known or not isinstance(data.get("act"), dict):
            raise RecipeError(f"activations: {data!r} is no rounding; expected act, scale and zero_point.")
        act, scale, zero = Activation.from_dict(data["act"]), data.get("scale"), data.get("zero_point", 0.0)
        for value in (scale, zero):
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
                raise RecipeError(f"activations: scale is {scale!r} and zero_point {zero!r}; expected numbers.")
        if not 0 <= (zero or 0) <= 2**act.bits - 1:
            raise RecipeError(f"activations: zero_point is {zero!r}; expected a code of {act.bits} bits.")
        if act.static != (scale is not None) or (scale is not None and not 1 / LARGEST < scale < LARGEST):
            raise RecipeError(f"activations: scale is {scale!r}; expected a positive number where static is true, and none where it is not.")
        return Rounding(act, None if scale is None else float(scale), float(zero or 0))


@dataclass(frozen=True)
class RangeSearch:
    """How the range of a group is chosen from its values (numerics/ranges.py).

    method: "minmax", "percentile" (keep this percentage of the values, per group), "clamp" (a fixed |x| <= value),
        "mse" (grid) or "golden" (golden-section): the range with the least squared error, weighted where importance is known.
    """

    method: str = "minmax"
    percentile: float = 99.9
    clamp: float = field(default=float("inf"))
    grid: int = 24
    max_shrink: float = 0.6

    def __post_init__(self) -> None:
        known = ("minmax", "percentile", "clamp", "mse", "golden")
        if self.method not in known:
            raise RecipeError(f"range search {self.method!r} is not known; expected one of {', '.join(known)}.")
        if not 0 < self.percentile <= 100:
            raise RecipeError(f"percentile is {self.percentile}; expected more than 0 and at most 100.")
        if not self.clamp > 0:
            raise RecipeError(f"clamp is {self.clamp}; expected a positive number.")
        if not 0 < self.max_shrink < 1 or self.grid < 2:
            raise RecipeError(f"max_shrink is {self.max_shrink} and grid {self.grid}; expected 0 < max_shrink < 1 and grid >= 2.")
