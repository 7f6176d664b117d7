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
NEAR = 20  # a label farther away than this gets a line to its point


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
    area = Box(50, 28, width - 14, height - 44)
    values = [v for p in [*points, original] for v in (p.kl, p.low, p.high) if math.isfinite(v) and v > 0]
    low, high = _log_range(values)
    x_low, x_high = _padded([p.size_bytes for p in [*points, original]])
    x = _linear(x_low, x_high, area.left, area.right)
    log_y = _linear(math.log(low), math.log(high), area.bottom, area.top)

    def y(kl: float) -> float:
        return log_y(math.log(min(high, max(low, kl))))

    best = pareto(points)
    has_floor = original.kl > 0
    lines = [Box(area.left, y(v) - 1, area.right, y(v) + 1) for v in [*_log_ticks(low, high), *([original.kl] if has_floor else [])]]
    taken = [Box(area.left, y(original.kl) - LINE, area.left + 11 * CHARACTER, y(original.kl))] if has_floor else []
    labels = _place_labels([*points, original], x, y, area, taken, lines)
    return svg(
        width, height, _frontier_title(best),
        _log_axis(low, high, y, area), _size_axis(x_low, x_high, x, area),
        [tag("path", d=f"M{area.left:g} {y(original.kl):.1f}H{area.right:g}", class_="floor"),
         tag("text", "noise floor", x=f"{area.left + 4:g}", y=f"{y(original.kl) - 5:.1f}", class_="tick")] if has_floor else None,
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
    low, high = (min(values) / 2, max(values) * 2.5) if values else (0.01, 1.0)
    middle = math.sqrt(low * high)
    return min(low, middle / 3.2), max(high, middle * 3.2)


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = 0.07 * (high - low) or 0.3 * high or 1.0
    return max(0.0, low - 2 * air), high + air


def _linear(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers (1, 2 or 5 times a power of ten apart) within low .. high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1,) if math.log10(high / low) > 2.2 else (1, 2, 5)
    return [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]


def _log_axis(low: float, high: float, y: Callable[[float], float], area: Box) -> list[Html]:
    found = _log_ticks(low, high)
    lines = [tag("path", d="".join(f"M{area.left:g} {y(v):.1f}H{area.right:g}" for v in found), class_="grid")]
    names = [tag("text", significant(v, 1).removeprefix("1×"), x=f"{area.left - 7:g}", y=f"{y(v) + 4:.1f}", class_="tick end") for v in found]
    return [*lines, *names, tag("text", "mean KL divergence, nats", x="2", y="12", class_="axis")]


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


def _place_labels(points: list[Point], x: Callable, y: Callable, area: Box, taken: list[Box], lines: list[Box]) -> list[Html | None]:
    """A label beside each point, moved off other labels, points, interval bars and what else is taken; it crosses a line only where it must."""
    longest = int((area.right - area.left) * 0.72 / CHARACTER)
    places = [(x(p.size_bytes), y(p.kl)) for p in points]
    texts = [p.label if len(p.label) <= longest else f"{p.label[: longest - 1]}…" for p in points]
    obstacles = taken + [Box(a - 6, b - 6, a + 6, b + 6) for a, b in places]
    obstacles += [Box(x(p.size_bytes) - 4, y(p.high) - 1, x(p.size_bytes) + 4, y(p.low) + 1) for p in points if math.isfinite(p.low) and math.isfinite(p.high)]
    steps = _segments([(x(p.size_bytes), y(p.kl)) for p in pareto(points[:-1])])
    chosen: dict[int, tuple[float, Box]] = {}
    for _ in range(3):  # later rounds know where all others are
        for i, (place, text) in enumerate(zip(places, texts, strict=True)):
            others = [box for k, (_, box) in chosen.items() if k != i]
            rivals = [p for p in places if p != place]
            costs = ((_cost(place, c, obstacles, others, lines, steps, area) + _mistaken(place, rivals, c), k, c) for k, c in enumerate(_candidates(place, len(text) * CHARACTER)))
            chosen[i] = min(costs)[2]
    return [part for i, text in enumerate(texts) for part in _label(text, places[i], chosen[i])]


def _segments(places: list[tuple[float, float]]) -> list[Box]:
    """The frontier's steps as thin boxes."""
    made = []
    for (a, b), (c, d) in pairwise(places):
        made += [Box(a, b - 1, c, b + 1), Box(c - 1, min(b, d), c + 1, max(b, d))]
    return made


def _candidates(place: tuple[float, float], width: float) -> list[tuple[float, Box]]:
    """(distance, box) around a point: to the right, to the left, centred above and below, ever farther."""
    a, b = place
    made = []
    for dy in (0, *(sign * step for step in range(8, 136, 8) for sign in (-1, 1))):
        top = b + dy - LINE / 2
        for dx in (10, 36):
            far = math.hypot(dx, dy)
            made += [(far, Box(a + dx, top, a + dx + width, top + LINE)), (far + 1, Box(a - dx - width, top, a - dx, top + LINE))]
        if abs(dy) >= LINE:
            made.append((abs(dy), Box(a - width / 2, top, a + width / 2, top + LINE)))
    return made


def _cost(place: tuple[float, float], candidate: tuple[float, Box], obstacles: list[Box], labels: list[Box], lines: list[Box], steps: list[Box], area: Box) -> float:
    """How bad a place for a label is: out of the plot, then on other labels, on points, through other labels on its way, on lines, far away."""
    far, box = candidate
    outside = (box.right - box.left) * LINE - box.overlap(area)
    covered = 20 * sum(map(box.overlap, labels)) + 10 * sum(map(box.overlap, obstacles))
    return far + 50 * outside + covered + 0.3 * sum(map(box.overlap, lines)) + 1.5 * sum(map(box.overlap, steps)) + _crossed(place, candidate, labels)


def _mistaken(place: tuple[float, float], rivals: list[tuple[float, float]], candidate: tuple[float, Box]) -> float:
    """What it costs to stand nearer to another point than to one's own, or to reach one's own through another."""
    far, box = candidate
    own = math.dist(place, _nearest(place, box))
    cost = sum(40.0 for rival in rivals if math.dist(rival, _nearest(rival, box)) < own)
    return cost + (40.0 * sum(math.dist(sample, rival) < 5 for sample in _leader(place, box) for rival in rivals) if far > NEAR else 0.0)


def _crossed(place: tuple[float, float], candidate: tuple[float, Box], labels: list[Box]) -> float:
    """What a leader costs that runs through other labels, sampled along it."""
    far, box = candidate
    if far <= NEAR:
        return 0.0
    return sum(50.0 for x, y in _leader(place, box) for label in labels if label.left < x < label.right and label.top < y < label.bottom)


def _leader(place: tuple[float, float], box: Box) -> list[tuple[float, float]]:
    """Points along the line from a point to its label."""
    (a, b), (c, d) = place, _nearest(place, box)
    return [(a + (c - a) * t / 8, b + (d - b) * t / 8) for t in range(9)]


def _nearest(place: tuple[float, float], box: Box) -> tuple[float, float]:
    return min(max(place[0], box.left), box.right), min(max(place[1], box.top + 2), box.bottom - 2)


def _label(text: str, place: tuple[float, float], found: tuple[float, Box]) -> list[Html | None]:
    (a, b), (far, box) = place, found
    near = _nearest(place, box)
    leader = tag("path", d=f"M{a:.1f} {b:.1f}L{near[0]:.1f} {near[1]:.1f}", class_="leader") if far > NEAR else None
    anchor, at = ("", box.left) if box.left >= a else ("end", box.right) if box.right <= a else ("mid", (box.left + box.right) / 2)
    return [leader, tag("text", text, x=f"{at:.1f}", y=f"{box.bottom - 3.5:.1f}", class_=f"label {anchor}".strip())]


def layer_bars(title: str, bars: list[Bar], top: float) -> Html:
    """One bar per block, from 0 to top (a relative error); a line above or inside it where plain rounding is."""
    width, height, area = 320, 112, Box(36, 8, 318, 92)
    y = _linear(0, top, area.bottom, area.top)
    pitch = (area.right - area.left) / max(1, len(bars))
    thick = min(22.0, 0.7 * pitch)
    reach = min(4.0, 0.12 * pitch)
    left = [area.left + pitch * i + (pitch - thick) / 2 for i in range(len(bars))]
    scale = ticks(0, top, 3)
    rounded = "".join(f"M{x - reach:.1f} {y(min(top, bar.plain)):.1f}h{thick + 2 * reach:.1f}" for x, bar in zip(left, bars, strict=True) if bar.plain is not None)
    return svg(
        width, height, title,
        tag("path", d="".join(f"M{area.left:g} {y(v):.1f}H{area.right:g}" for v in scale), class_="grid"),
        [tag("text", f"{100 * v:g}%" if v else "0", x=f"{area.left - 5:g}", y=f"{y(v) + 3.5:.1f}", class_="tick end") for v in scale],
        [_bar(bar, x, thick, y(min(top, bar.error or 0.0)), area.bottom) for x, bar in zip(left, bars, strict=True)],
        tag("path", d=rounded, class_="plain") if rounded else None,
        tag("path", d=f"M{area.left:g} {area.bottom:g}H{area.right:g}", class_="base"),
        [tag("text", str(bars[i].block), x=f"{left[i] + thick / 2:.1f}", y=f"{height - 5:g}", class_="tick mid") for i in _some(len(bars))],
        class_="chart bars",
    )  # fmt: skip


def _bar(bar: Bar, x: float, width: float, top: float, base: float) -> Html:
    return tag("rect", tag("title", bar_words(bar)), x=f"{x:.1f}", y=f"{top:.1f}", width=f"{width:.1f}", height=f"{base - top:.1f}")


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
        [tag("text", text, x=f"{x:g}", y="80", class_=f"tick {anchor}".strip()) for text, x, anchor in ((f"-{reach}", 4, ""), ("0", width / 2, "mid"), (reach, width - 4, "end"))],
        class_=f"chart histogram {class_}",
    )  # fmt: skip


def curve(title: str, axis: str, points: list[tuple[int, float]], *, width: int = 640, height: int = 220) -> Html:
    """A measured number (from 0 up) against the step of training, with a dot at each measurement."""
    area = Box(50, 24, width - 14, height - 40)
    last = max((step for step, _ in points), default=0) or 1
    top = 1.1 * max((value for _, value in points), default=0.0) or 1.0
    x, y = _linear(0, last, area.left, area.right), _linear(0, top, area.bottom, area.top)
    scale, steps = ticks(0, top, 4), ticks(0, last, 6)
    line = "".join(f"{'L' if i else 'M'}{x(step):.1f} {y(value):.1f}" for i, (step, value) in enumerate(points))
    return svg(
        width, height, title,
        tag("path", d="".join(f"M{area.left:g} {y(v):.1f}H{area.right:g}" for v in scale), class_="grid"),
        [tag("text", f"{v:g}", x=f"{area.left - 7:g}", y=f"{y(v) + 4:.1f}", class_="tick end") for v in scale],
        tag("text", axis, x="2", y="12", class_="axis"),
        tag("path", d=line, class_="frontier") if line else None,
        [tag("circle", tag("title", f"step {step:,}: {significant(value)}"), cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r="4", class_="dot") for step, value in points],
        tag("path", d=f"M{area.left:g} {area.bottom:g}H{area.right:g}", class_="base"),
        [tag("text", f"{v:,.0f}", x=f"{x(v):.1f}", y=f"{area.bottom + 18:g}", class_="tick mid") for v in steps if v == int(v)],
        tag("text", "step", x=f"{(area.left + area.right) / 2:g}", y=f"{height - 4:g}", class_="axis mid"),
        class_="chart",
    )  # fmt: skip
