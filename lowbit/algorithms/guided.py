"""Options of every algorithm whose Hessians can weigh tokens by the loss; pipeline/guidance.py finds the weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError


@dataclass(frozen=True)
class GuidedOptions:
    """guided: tokens count in the Hessian by the squared gradient of the loss at the layer's output, to the power guide_power and at most guide_cap times their mean
    (0: no limit).
    """

    guided: bool = False
    guide_power: float = 0.75
    guide_cap: float = 0.0

    def __post_init__(self) -> None:
        if self.guide_power <= 0 or self.guide_cap < 0:
            raise RecipeError(f"guide_power is {self.guide_power} and guide_cap {self.guide_cap}; expected a power above 0 and a cap of 0 (none) or more.")
