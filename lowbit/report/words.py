"""Numbers and findings in words: what the report says with letters."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..evaluation.summary import Estimate
from ..pipeline.evaluate import Comparison, Row

DASH = "–"
HEAD = "full"  # the convention that headline, plot and main table quote

VERDICTS = (  # at least this share of first choices kept, in words
    (0.97, "hardly any loss"),
    (0.92, "a small loss"),
    (0.80, "a noticeable loss"),
    (0.50, "a heavy loss"),
    (0.0, "a model that is broken or nearly so"),
)
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits: 0.0123, 17.1, 1,234, 8.1×10⁻⁶; a dash for NaN."""
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if not -5 < power < 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return f"{value:,.{max(0, digits - 1 - power)}f}"


def size(size_bytes: float) -> str:
    """Decimal units: 113 MB, 4.37 GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= factor:
            return f"{significant(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} bytes"


def percent(share: float, digits: int = 2) -> str:
    """0.0412 is 4.1%."""
    return DASH if math.isnan(share) else f"{significant(100 * share, digits)}%"


def agreement(share: float, like: float | None = None) -> str:
    """A share near 1: 82.1%, 99.96%; with the decimals of another share."""
    return DASH if math.isnan(share) else f"{100 * share:.{2 if (share if like is None else like) >= 0.99 else 1}f}%"


def interval(estimate: Estimate, show: Callable[[float], str]) -> str:
    """low–high, or a dash where a single window leaves no interval; a common power of ten is written once: (1.76–2.21)×10⁻⁵."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return DASH
    (low, _, power), (high, _, other) = show(estimate.low).partition("×"), show(estimate.high).partition("×")
    if power and power == other:
        return f"({low}–{high})×{power}"
    return f"{show(estimate.low)}–{show(estimate.high)}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: list[int]) -> str:
    """0–3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def best_tradeoff(comparison: Comparison) -> Row | None:
    """The model with the smallest sum of its share of the original's file and the share of first choices that changed."""
    original = comparison.rows[0]

    def cost(row: Row) -> float:
        return row.size.file_bytes / original.size.file_bytes + 1 - _value(row.summaries[HEAD].agreement)

    measured = [row for row in comparison.rows[1:] if not math.isnan(cost(row))]
    return min(measured, key=lambda row: (cost(row), row.size.file_bytes), default=None)


def headline(comparison: Comparison, best: Row | None) -> str:
    """What was lost by the best trade-off, in one plain sentence."""
    original = comparison.rows[0]
    if len(comparison.rows) == 1:
        found = original.summaries[HEAD].perplexity.value
        return f"{original.name} has a perplexity of {significant(found, 4)} on {comparison.text}; no other model was compared with it."
    if best is None:
        return "None of the models gives usable numbers: every output that was measured is not a number."
    kept = _value(best.summaries[HEAD].agreement)
    return (
        f"{best.name} is {_ratio(original.size.file_bytes / best.size.file_bytes)} the original, with {verdict(comparison, best)}: "
        f"{_changed(1 - kept)}, and {_perplexity(original, best)}."
    )


def verdict(comparison: Comparison, row: Row) -> str:
    """The loss of one model in words; VERDICTS, unless it drowns in the noise floor."""
    floor = None if comparison.noise_floor is None else comparison.noise_floor[HEAD].kl_mean
    if floor is not None and _value(row.summaries[HEAD].kl_mean) <= floor.value:
        return "no loss beyond the rounding of its own number format"
    return next(words for least, words in VERDICTS if _value(row.summaries[HEAD].agreement) >= least)


def _value(estimate: Estimate | None) -> float:
    return math.nan if estimate is None else estimate.value


def _ratio(ratio: float) -> str:
    if 0.97 <= ratio <= 1.03:
        return "as large as"
    return f"{significant(ratio, 2)} times smaller than" if ratio > 1 else f"{significant(1 / ratio, 2)} times larger than"


def _changed(share: float) -> str:
    if share <= 0:
        return "its first choice for the next token never differs"
    of = next((n for n in (100, 1000, 10_000) if share * n >= 0.95), 100_000)
    return f"its first choice for the next token differs in {max(1, round(share * of))} of {of:,} places"


def _perplexity(original: Row, row: Row) -> str:
    before, after = (r.summaries[HEAD].perplexity.value for r in (original, row))
    first, second = significant(before), significant(after)
    if first == second:
        return f"perplexity stays at {first}"
    return f"perplexity {'rises' if after > before else 'falls'} from {first} to {second} ({100 * (after / before - 1):+.2g}%)"
