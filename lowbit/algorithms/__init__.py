"""Algorithms choose the codes of one weight: (W, scheme, stats, options, notes) -> QuantizedTensor. Block-level ones choose those of a whole block, see autoround.py.

Adding one is a file and an entry in ALGORITHMS; tests/algorithms/test_contract.py then runs on it by itself. An algorithm never changes its
input, is deterministic, and writes what deviated (raised damping, a fallback) to notes, which end up in the provenance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..numerics import additive, ggml, grids, lattice
from ..recipe import from_dict
from ..scheme import INT, Scheme
from .aqlm import AqlmOptions, aqlm
from .autoround import AutoRoundOptions, autoround
from .gptq import GptqOptions, gptq
from .hqq import HqqOptions, hqq
from .ldlq import LdlqOptions, ldlq
from .rtn import RtnOptions, rtn


@dataclass(frozen=True)
class Algorithm:
    """run: see the module. options: its dataclass. needs: the statistics it asks for, given its options. formats: None for all.

    level: "weight": of one matrix; "block": (weights, schemes, task, options, seed=) of all matrices of a block, see autoround.py.
    rowwise: each output row is quantized on its own, so layers that share an input can be done in one call. cost: what it takes, in words.
    """

    run: Callable[..., Any]
    options: type
    needs: Callable[[Any], tuple[str, ...]]
    formats: tuple[str, ...] | None
    rowwise: bool
    description: str
    cost: str = ""
    level: str = "weight"


ALGORITHMS: dict[str, Algorithm] = {
    "rtn": Algorithm(rtn, RtnOptions, lambda o: ("sum_sq",) if o.weighted else (), None, True, "round to nearest; no data needed (with weighted=true: calibrated)", "seconds"),
    "gptq": Algorithm(
        gptq,
        GptqOptions,
        lambda o: ("hessian", *(("loss",) if o.guided else ()), *(("cross", "reference") if o.alpha else ())),
        grids.FORMATS,
        True,
        "error feedback through the Hessian of the layer's inputs; needs calibration text (guided: a backward sweep, too)",
        "two passes over the text; guided: twice that",
    ),
    "hqq": Algorithm(hqq, HqqOptions, lambda o: (), (INT,), False, "zero-points fitted to a norm that forgives outliers; no data needed", "seconds"),
    "autoround": Algorithm(
        autoround,
        AutoRoundOptions,
        lambda o: ("reference",),
        (INT,),
        False,
        "rounding and ranges of a block learned by sign descent on its output; needs calibration text",
        "some fifteen times GPTQ's",
        "block",
    ),
    "ldlq": Algorithm(
        ldlq,
        LdlqOptions,
        lambda o: ("hessian", *(("loss",) if o.guided else ())),
        tuple(lattice.KINDS),
        False,
        "error feedback onto lattice points, eight weights at a time (QuIP#); needs calibration text",
        "a few times GPTQ's",
    ),
    "aqlm": Algorithm(
        aqlm,
        AqlmOptions,
        lambda o: ("hessian", *(("loss",) if o.guided else ())),
        tuple(additive.KINDS),
        False,
        "additive codebooks: vectors of 8 weights as sums of codebook entries, codes and codebooks fitted in turn; needs calibration text",
        "some seven times GPTQ's",
    ),
}


def algorithm(name: str) -> Algorithm:
    """The table entry of an algorithm, or RecipeError naming those there are."""
    if name not in ALGORITHMS:
        raise RecipeError(f"algorithm {name!r} is not known; expected one of {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[name]


def make_options(name: str, options: dict) -> object:
    """The options of an algorithm from plain data; unknown keys and wrong values are RecipeErrors."""
    return from_dict(algorithm(name).options, options, where=f"options of {name}")


def check_format(name: str, scheme: Scheme) -> None:
    """Raise RecipeError when an algorithm cannot make a number format."""
    if scheme.outliers is not None and algorithm(name).level == "block":
        raise RecipeError(f"{name} learns a block as a whole, and cannot leave channels out ({scheme.name}); use rtn, gptq or hqq with outliers.")
    if scheme.format in ggml.BLOCK_TYPES and scheme.format not in ggml.WRITTEN:
        raise RecipeError(ggml.only_read(scheme.format))
    formats = algorithm(name).formats
    if formats is not None and scheme.format not in formats:
        raise RecipeError(f"{name} makes {', '.join(formats)} and not {scheme.format}; use rtn for {scheme.format}.")
