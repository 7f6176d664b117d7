"""What lowbit can do, from its tables: number formats, algorithms, transforms."""

from __future__ import annotations

from dataclasses import dataclass

from .. import numerics
from ..algorithms import ALGORITHMS, make_options
from ..checkpoints import TARGETS
from ..errors import LowbitError
from ..scheme import INT, Scheme
from ..transforms import TRANSFORMS

SHAPE = (4096, 4096)  # of the matrix that bits and files are shown for


@dataclass(frozen=True)
class Method:
    """One row. data: "none" or what is needed; cost: in words; bits: per weight of a number format; files: targets that hold it as it is."""

    name: str
    kind: str
    description: str
    data: str = ""
    cost: str = ""
    bits: str = ""
    files: tuple[str, ...] = ()


def list_methods() -> list[Method]:
    """Every number format, algorithm and transform."""
    found = [Method(name, "algorithm", entry.description, "calibration text" if entry.needs(make_options(name, {})) else "none", entry.cost) for name, entry in ALGORITHMS.items()]
    found += [Method(name, "transform", entry.description, "calibration text", entry.cost) for name, entry in TRANSFORMS.items()]
    return found + [_number_format(name) for name in numerics.FORMATS]


def _number_format(name: str) -> Method:
    schemes = [numerics.scheme_of(name, bits=bits) for bits in (2, 8)] if name == INT else [numerics.scheme_of(name)]
    bits = [numerics.bits_per_weight(scheme, SHAPE) for scheme in schemes]
    text = f"{bits[0]:.3g}" if len(bits) == 1 else f"{bits[0]:.3g} to {bits[-1]:.3g}"
    return Method(name, "number format", numerics.FORMATS[name].description, bits=text, files=tuple(target for target in TARGETS if any(_holds(target, scheme) for scheme in schemes)))


def _holds(target: str, scheme: Scheme) -> bool:
    """Whether a target's files hold a scheme's codes (dense safetensors hold the values that they stand for, and are not counted)."""
    if target == "safetensors":
        return scheme.format in ("float32", "float16", "bfloat16")
    try:
        TARGETS[target].check(scheme if scheme.format != INT else numerics.scheme_of(INT, bits=scheme.bits, block=(1, 32), scale_dtype="float16"), SHAPE, "weight")
    except LowbitError:
        return False
    return True
