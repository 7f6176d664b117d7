"""Charts as inline SVG, made by pure functions; colours and type come from the page's style sheet (style.css)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from .markup import Html, svg, tag
from .records import Bar
from .words import percent, significant, size

CHARACTER = 6.9  # width of an average character of a label, in the drawing's units (12 px type)
LINE = 15


@dataclass(frozen=True)
class Point:
    """A model in the plane of size and loss (KL in nats); low, high: the interval of its loss, NaN where unknown."""

    label: str
    size_bytes: int
    kl: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Box:
    """A rectangle that labels must keep off."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Common area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both size and loss, from small to large."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size_bytes, p.kl)):
        if not kept or point.kl < kept[-1].kl:
            kept.append(point)
    return kept


def frontier(points: list[Point], original: Point, *, width: int, height: int, class_: str) -> Html:
    """Size against loss (log), the frontier as steps, intervals as bars. original: drawn at its noise floor; kl 0 puts it on the bottom line."""
    area = Box(54, 12, width - 14, height - 44)
    values = [v for p in [*points, original] for v in (p.kl, p.low, p.high) if math.isfinite(v) and v > 0]
    low, high = _log_range(values)
    x_low, x_high = _padded([p.size_bytes for p in [*points, original]])
    x = _linear(x_low, x_high, area.left, area.right)
    log_y = _linear(math.log(low), math.log(high), area.bottom, area.top)

    def y(kl: float) -> float:
        return log_y(math.log(min(high, max(low, kl))))

    best = pareto(points)
    labels = _place_labels([*points, original], x, y, area, int((area.right - area.left) * 0.72 / CHARACTER))
    return svg(
        width, height, _frontier_title(best),
        _log_axis(low, high, y, area), _size_axis(x_low, x_high, x, area),
        tag("line", x1=f"{area.left:g}", x2=f"{area.right:g}", y1=f"{y(original.kl):.1f}", y2=f"{y(original.kl):.1f}", class_="floor") if original.kl > 0 else None,
        tag("path", d=_steps([(x(p.size_bytes), y(p.kl)) for p in best]), class_="frontier"),
        [_interval_bar(p, x, y) for p in points],
        _diamond(original, x(original.size_bytes), y(original.kl)),
        [_dot(p, x(p.size_bytes), y(p.kl), p in best) for p in points],
        labels,
        class_=f"chart {class_}",
    )  # fmt: skip


def _frontier_title(best: list[Point]) -> str:
    listed = "; ".join(f"{p.label}: {size(p.size_bytes)}, {significant(p.kl)} nats" for p in best)
    return f"File size against mean KL divergence. On the frontier, from small to large: {listed}"


def _log_range(values: list[float]) -> tuple[float, float]:
    """At least one decade, with air around the values."""
    low, high = (min(values) / 1.8, max(values) * 1.8) if values else (0.01, 1.0)
    middle = math.sqrt(low * high)
    return min(low, middle / 3.2), max(high, middle * 3.2)


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = 0.07 * (high - low) or 0.3 * high or 1.0
    return max(0.0, low - air), high + air


def _linear(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers (1, 2 or 5 times a power of ten apart) within low .. high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_axis(low: float, high: float, y: Callable[[float], float], area: Box) -> list[Html]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1,) if math.log10(high / low) > 2.2 else (1, 2, 5)
    found = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
    lines = [tag("path", d="".join(f"M{area.left:g} {y(v):.1f}H{area.right:g}" for v in found), class_="grid")]
    names = [tag("text", significant(v, 1), x=f"{area.left - 7:g}", y=f"{y(v) + 4:.1f}", class_="tick end") for v in found]
    middle = (area.top + area.bottom) / 2
    return [*lines, *names, tag("text", "mean KL divergence, nats", transform=f"translate(12 {middle:g})rotate(-90)", class_="axis mid")]


def _size_axis(low: float, high: float, x: Callable[[float], float], area: Box) -> list[Html]:
    factor, unit = (1e9, "GB") if high >= 2e9 else (1e6, "MB") if high >= 2e6 else (1e3, "kB")
    found = ticks(low / factor, high / factor, 6 if area.right - area.left > 500 else 4)
    baseline = tag("path", d=f"M{area.left:g} {area.bottom:g}H{area.right:g}" + "".join(f"M{x(v * factor):.1f} {area.bottom:g}v4" for v in found), class_="base")
    names = [tag("text", f"{v:g}", x=f"{x(v * factor):.1f}", y=f"{area.bottom + 18:g}", class_="tick mid") for v in found]
    return [baseline, *names, tag("text", f"file size, {unit}", x=f"{(area.left + area.right) / 2:g}", y=f"{area.bottom + 38:g}", class_="axis mid")]


def _steps(places: list[tuple[float, float]]) -> str:
    return "".join(f"M{a:.1f} {b:.1f}" if i == 0 else f"H{a:.1f}V{b:.1f}" for i, (a, b) in enumerate(places)) or "M0 0"


def _interval_bar(point: Point, x: Callable, y: Callable) -> Html | None:
    if not (math.isfinite(point.low) and math.isfinite(point.high)):
        return None
    place = x(point.size_bytes)
    low, high = y(point.low), y(point.high)
    return tag("path", d=f"M{place:.1f} {low:.1f}V{high:.1f}M{place - 4:.1f} {low:.1f}h8M{place - 4:.1f} {high:.1f}h8", class_="whisker")


def _dot(point: Point, x: float, y: float, on_frontier: bool) -> Html:
    return tag("circle", tag("title", _detail(point)), cx=f"{x:.1f}", cy=f"{y:.1f}", r="5", class_="dot" if on_frontier else "dot beaten")


def _diamond(point: Point, x: float, y: float) -> Html:
    return tag("path", tag("title", _detail(point)), d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z", class_="original")


def _detail(point: Point) -> str:
    interval = f" ({significant(point.low)} to {significant(point.high)})" if math.isfinite(point.low) and math.isfinite(point.high) else ""
    return f"{point.label}: {size(point.size_bytes)}, mean KL {significant(point.kl)}{interval}"


def _place_labels(points: list[Point], x: Callable, y: Callable, area: Box, longest: int) -> list[Html]:
    """A label beside each point, moved off other labels, points and interval bars; a line leads to one that had to go far."""
    places = [(x(p.size_bytes), y(p.kl)) for p in points]
    texts = [p.label if len(p.label) <= longest else f"{p.label[: longest - 1]}…" for p in points]
    obstacles = [Box(a - 6, b - 6, a + 6, b + 6) for a, b in places]
    obstacles += [Box(x(p.size_bytes) - 4, y(p.high) - 1, x(p.size_bytes) + 4, y(p.low) + 1) for p in points if math.isfinite(p.low) and math.isfinite(p.high)]
    lines = _segments([(x(p.size_bytes), y(p.kl)) for p in pareto(points[:-1])])
    chosen: list[tuple[float, Box] | None] = [None] * len(points)
    for _ in range(2):  # the second round knows where all others are
        for i, (place, text) in enumerate(zip(places, texts, strict=True)):
            others = [found[1] for k, found in enumerate(chosen) if found and k != i]
            chosen[i] = min(_candidates(place, len(text) * CHARACTER), key=lambda c: _cost(c, obstacles, others, lines, area))  # noqa: B023
    return [_label(text, place, found) for text, place, found in zip(texts, places, chosen, strict=True)]


def _segments(places: list[tuple[float, float]]) -> list[Box]:
    """The frontier's steps as thin boxes."""
    made = []
    for (a, b), (c, d) in pairwise(places):
        made += [Box(a, b - 1, c, b + 1), Box(c - 1, min(b, d), c + 1, max(b, d))]
    return made


def _candidates(place: tuple[float, float], width: float) -> list[tuple[float, Box]]:
    """(distance, box) around a point: beside it, above and below, ever farther."""
    a, b = place
    made = []
    for far in (10, 16, 26, 38, 52, 68, 86, 106):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7)):
            left = a + dx * far - (width if dx < 0 else width / 2 if dx == 0 else 0)
            top = b + dy * far - (LINE if dy < 0 else LINE / 2 if dy == 0 else 0)
            made.append((far, Box(left, top, left + width, top + LINE)))
    return made


def _cost(candidate: tuple[float, Box], obstacles: list[Box], labels: list[Box], lines: list[Box], area: Box) -> float:
    far, box = candidate
    outside = (box.right - box.left) * LINE - box.overlap(area)
    return far + 50 * outside + 20 * sum(map(box.overlap, labels)) + 10 * sum(map(box.overlap, obstacles)) + 0.5 * sum(map(box.overlap, lines))


def _label(text: str, place: tuple[float, float], found: tuple[float, Box]) -> list[Html | None]:
    (a, b), (far, box) = place, found
    near = (min(max(a, box.left), box.right), min(max(b, box.top + 2), box.bottom - 2))
    leader = tag("path", d=f"M{a:.1f} {b:.1f}L{near[0]:.1f} {near[1]:.1f}", class_="leader") if far > 20 else None
    anchor, at = ("", box.left) if box.left >= a else ("end", box.right) if box.right <= a else ("mid", (box.left + box.right) / 2)
    return [leader, tag("text", text, x=f"{at:.1f}", y=f"{box.bottom - 3.5:.1f}", class_=f"label {anchor}".strip())]


def layer_bars(title: str, bars: list[Bar], top: float) -> Html:
    """One bar per block, from 0 to top (a relative error); a line above or inside it where plain rounding is."""
    width, height, area = 320, 112, Box(36, 8, 318, 92)
    y = _linear(0, top, area.bottom, area.top)
    pitch = (area.right - area.left) / max(1, len(bars))
    thick = min(22.0, 0.7 * pitch)
    left = [area.left + pitch * i + (pitch - thick) / 2 for i in range(len(bars))]
    scale = ticks(0, top, 3)
    rounded = "".join(f"M{x - 0.12 * pitch:.1f} {y(min(top, bar.plain)):.1f}h{thick + 0.24 * pitch:.1f}" for x, bar in zip(left, bars, strict=True) if bar.plain is not None)
    return svg(
        width, height, title,
        tag("path", d="".join(f"M{area.left:g} {y(v):.1f}H{area.right:g}" for v in scale), class_="grid"),
        [tag("text", percent(v) if v else "0", x=f"{area.left - 5:g}", y=f"{y(v) + 3.5:.1f}", class_="tick end") for v in scale],
        [tag("rect", tag("title", bar_words(bar)), x=f"{x:.1f}", y=f"{y(_height(bar, top)):.1f}", width=f"{thick:.1f}", height=f"{area.bottom - y(_height(bar, top)):.1f}") for x, bar in zip(left, bars, strict=True)],
        tag("path", d=rounded, class_="plain") if rounded else None,
        tag("path", d=f"M{area.left:g} {area.bottom:g}H{area.right:g}", class_="base"),
        [tag("text", str(bars[i].block), x=f"{left[i] + thick / 2:.1f}", y=f"{height - 5:g}", class_="tick mid") for i in _some(len(bars))],
        class_="chart bars",
    )  # fmt: skip


def _height(bar: Bar, top: float) -> float:
    return min(top, bar.error or 0.0)


def bar_words(bar: Bar) -> str:
    """What a bar says when it is touched."""
    found = "not measured" if bar.error is None else percent(bar.error)
    plain = "" if bar.plain is None else f", plain rounding {percent(bar.plain)}"
    worst = "" if bar.worst is None else f", worst expert {percent(bar.worst)}"
    return f"block {bar.block}: {found}{plain}{worst}"


def _some(count: int) -> list[int]:
    """First and last index and round ones between, at most about 6."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count <= 6 * s)
    middle = [i for i in range(0, count - 1, step) if count - 1 - i >= 0.6 * step]
    return [*middle, count - 1] if count else []


def histogram(title: str, counts: list[int], reach: str, class_: str) -> Html:
    """Counts over equal bins from -reach to reach (written below, in standard deviations)."""
    width, height, base = 152, 84, 66
    peak = max(counts) or 1
    step = (width - 8) / len(counts)
    tops = [f"V{base - 58 * n / peak:.1f}H{4 + step * (i + 1):.1f}" for i, n in enumerate(counts)]
    return svg(
        width, height, title,
        tag("path", d=f"M4 {base}{''.join(tops)}V{base}z", class_="mass"),
        tag("path", d=f"M4 {base}H{width - 4}M{width / 2:g} {base}v3", class_="base"),
        tag("text", f"-{reach}", x="4", y=f"{height - 4}", class_="tick"), tag("text", "0", x=f"{width / 2:g}", y=f"{height - 4}", class_="tick mid"), tag("text", reach, x=f"{width - 4}", y=f"{height - 4}", class_="tick end"),
        class_=f"chart histogram {class_}",
    )  # fmt: skip
