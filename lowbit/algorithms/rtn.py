"""RTN: every weight is rounded to the nearest code of its group's grid (round to nearest), the baseline of all methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import numerics
from ..errors import RecipeError
from ..scheme import RangeSearch, Scheme
from ..stats import LayerStats
from ..tensor import QuantizedTensor


@dataclass(frozen=True)
class RtnOptions:
    """search: how each group's range is found (minmax, percentile, clamp, mse, golden). weighted: by calibrated activation importance E[x^2]."""

    search: str = "minmax"
    percentile: float = 99.9
    clamp: float = float("inf")
    grid: int = 24
    max_shrink: float = 0.6
    weighted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weighted, bool):
            raise RecipeError(f"weighted is {self.weighted!r}; expected true or false.")
        self.range_search  # noqa: B018  (checks the values)

    @property
    def range_search(self) -> RangeSearch:
        return RangeSearch(self.search, self.percentile, self.clamp, self.grid, self.max_shrink)


def rtn(W: Tensor, scheme: Scheme, stats: LayerStats | None, options: RtnOptions, notes: list[str]) -> QuantizedTensor:
    """Round W [out_features, in_features] to the nearest codes; W is not changed. stats.sum_sq is used when options.weighted."""
    importance = stats.importance() if options.weighted and stats is not None else None
    return numerics.quantize(W, scheme, options.range_search, importance)
