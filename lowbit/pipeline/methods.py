"""What lowbit can do, from its tables: presets, number formats, algorithms, transforms."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import numerics
from ..algorithms import ALGORITHMS, make_options
from ..checkpoints import TARGETS, holds
from ..numerics import activations
from ..scheme import CASTS, INT, Scheme
from ..transforms import TRANSFORMS
from ..transforms import make_options as make_transform_options
from .recipes import PRESETS, parse

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
    """Every preset, algorithm, transform and number format."""
    found = [Method(name, "algorithm", entry.description, "calibration text" if entry.needs(make_options(name, {})) else "none", entry.cost) for name, entry in ALGORITHMS.items()]
    found += [Method(name, "transform", entry.description, "calibration text" if entry.needs(make_transform_options(name, {})) else "none", entry.cost) for name, entry in TRANSFORMS.items()]
    found += [_preset(name) for name in PRESETS]
    return found + [_number_format(name) for name in numerics.FORMATS]


def _preset(name: str) -> Method:
    recipe = parse(name).recipe
    steps = [(TRANSFORMS[step], make_transform_options(step, given)) for step, given in recipe.transforms.items()]
    needs = (*ALGORITHMS[recipe.algorithm].needs(make_options(recipe.algorithm, recipe.options)), *(need for entry, options in steps for need in entry.needs(options)))
    needs += activations.needs(recipe.scheme.act)
    cost = "; ".join([*(TRANSFORMS[step].cost for step in recipe.transforms), ALGORITHMS[recipe.algorithm].cost])
    scheme = replace(recipe.scheme, scale_dtype="float16") if recipe.scheme.format == INT else recipe.scheme
    files = tuple(target for target in TARGETS if _holds(target, scheme))
    bits = f"{numerics.bits_per_weight(scheme, SHAPE):.3g}" + ("" if recipe.mixture in (None, "q8_0") else " and more")
    return Method(name, "preset", PRESETS[name][1], "calibration text" if needs else "none", cost, bits, files)


def _number_format(name: str) -> Method:
    schemes = [numerics.scheme_of(name, bits=bits) for bits in (2, 8)] if name == INT else [numerics.scheme_of(name)]
    bits = [numerics.bits_per_weight(scheme, SHAPE) for scheme in schemes]
    text = f"{bits[0]:.3g}" if len(bits) == 1 else f"{bits[0]:.3g} to {bits[-1]:.3g}"
    return Method(name, "number format", numerics.FORMATS[name].description, bits=text, files=tuple(target for target in TARGETS if any(_holds(target, scheme) for scheme in schemes)))


def _holds(name: str, scheme: Scheme) -> bool:
    """Whether a target's files hold a scheme's codes (dense safetensors hold the values that they stand for, and are not counted)."""
    return scheme.format in CASTS if name == "safetensors" else holds(name, replace(scheme, block=(1, 32)) if scheme.format == INT and scheme.block[0] == 1 and scheme.block[1] > 1 else scheme)
