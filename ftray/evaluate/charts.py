"""Charts as inline SVG: no script, no network; pointing at a step shows its values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ftray.evaluate.markup import Html, join, tag

WIDTH, HEIGHT = 560, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 28
MAX_POINTS = 240
SMOOTH_FROM = 60  # points from which a noisy curve is drawn faint, with its running mean over it

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named curve; `style` is a CSS class of the page (train, eval, rest). `listed`: it stands in the legend."""

    name: str
    points: Sequence[Point]
    style: str
    listed: bool = True


@dataclass(frozen=True)
class Plane:
    """Where data land in the picture."""

    low: Point
    high: Point

    def x(self, value: float) -> float:
        return LEFT + (value - self.low[0]) / (self.high[0] - self.low[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low[1]) / (self.high[1] - self.low[1]) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    smooth: bool = False,
    from_zero: bool = False,
    reference: tuple[str, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> Html | None:
    """One figure, or None where no series has a finite point.

    `smooth` draws a long training curve faint, with its running mean over it. `reference` is a named dashed level;
    `marks` are (step, text) of events. Long series are thinned by means.
    """
    series = [replace(one, points=_thinned(_finite(one.points))) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return None
    levels = [y for one in series for _, y in one.points] + ([reference[1]] if reference else [])
    steps = [x for one in series for x, _ in one.points]
    y_ticks = ticks(0.0 if from_zero else min(levels), max(levels), 4)
    plane = Plane((min(steps), y_ticks[0]), (max(steps) if max(steps) > min(steps) else min(steps) + 1, y_ticks[-1]))
    parts = [_grid(plane, y_ticks)]
    if reference:
        parts.append(_reference(plane, *reference))
    parts += [_mark(plane, step, text) for step, text in marks if plane.low[0] <= step <= plane.high[0]]
    parts += [_curve(plane, one, smooth) for one in series]
    parts.append(_hover(plane, series))
    return tag(
        "figure",
        tag("figcaption", tag("b", title), *_legend(series)),
        tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title),
        class_="chart",
    )


def bars(title: str, values: Sequence[tuple[str, int]]) -> Html:
    """Horizontal bars, one per (label, count)."""
    most = max((count for _, count in values), default=1) or 1
    lines = [
        tag(
            "div",
            tag("span", label),
            tag("i", tag("i", style=f"width:{100 * count / most:.1f}%"), class_="track"),
            tag("span", f"{count:,}", class_="n"),
            class_="bar",
        )
        for label, count in values
    ]
    return tag("figure", tag("figcaption", tag("b", title)), *lines, class_="bars")


def dumbbell(base: float, tuned: float) -> Html:
    """Two dots on a line from 0 to 1: where a share was, and where it is."""
    left, right = 6 + 108 * _clamped(base), 6 + 108 * _clamped(tuned)
    return tag(
        "svg",
        tag("line", x1=6, x2=114, y1=8, y2=8, class_="rail"),
        tag("line", x1=f"{left:.1f}", x2=f"{right:.1f}", y1=8, y2=8, class_="way"),
        tag("circle", cx=f"{left:.1f}", cy=8, r=4.5, class_="base"),
        tag("circle", cx=f"{right:.1f}", cy=8, r=5.5, class_="tuned"),
        viewBox="0 0 120 16",
        class_="dumbbell",
        aria_hidden="true",
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values whose ends enclose low and high."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """A few digits: 12k, 0.25, 2e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _grid(plane: Plane, y_ticks: Sequence[float]) -> Html:
    lines = []
    for value in y_ticks:
        y = f"{plane.y(value):.1f}"
        lines.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        lines.append(tag("text", short(value), x=LEFT - 8, y=y, class_="tick", text_anchor="end", dy="0.32em"))
    lines.append(tag("text", "step", x=WIDTH - RIGHT, y=HEIGHT - 9, class_="tick", text_anchor="end"))
    for value in ticks(plane.low[0], plane.high[0], 6):
        x = plane.x(value)
        if value == int(value) and LEFT <= x < WIDTH - RIGHT - 44:  # the word step has the corner
            label = f"{int(value):,}"
            lines.append(tag("text", label, x=f"{x:.1f}", y=HEIGHT - 9, class_="tick", text_anchor="middle"))
    return join(*lines)


def _reference(plane: Plane, name: str, level: float) -> Html:
    y = plane.y(level)
    below = y < TOP + 16
    return join(
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="reference"),
        tag("text", name, x=WIDTH - RIGHT, y=f"{y + (15 if below else -6):.1f}", class_="tick", text_anchor="end"),
    )


def _mark(plane: Plane, step: float, text: str) -> Html:
    x = f"{plane.x(step):.1f}"
    return tag(
        "g",
        tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="event"),
        tag("text", "↻", x=x, y=TOP + 2, class_="event", text_anchor="middle"),
        tag("title", text),
    )


def _curve(plane: Plane, one: Series, smooth: bool) -> Html:
    if len(one.points) == 1:
        return _dots(plane, one)
    faint = smooth and one.style == "train" and len(one.points) >= SMOOTH_FROM
    line = tag("path", d=_path(plane, one.points), class_=f"line {one.style}{' faint' if faint else ''}")
    mean = tag("path", d=_path(plane, _running_mean(one.points)), class_=f"line {one.style}") if faint else None
    return join(line, mean, _dots(plane, one) if len(one.points) <= 30 else None)


def _dots(plane: Plane, one: Series) -> Html:
    dots = (
        tag("circle", cx=f"{plane.x(x):.1f}", cy=f"{plane.y(y):.1f}", r=3, class_=f"dot {one.style}")
        for x, y in one.points
    )
    return join(*dots)


def _path(plane: Plane, points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{plane.x(x):.1f} {plane.y(y):.1f}" for x, y in points)


def _hover(plane: Plane, series: Sequence[Series]) -> Html:
    """One invisible strip per step; the page's CSS shows what is in it while the pointer is over it."""
    steps = sorted({x for one in series for x, _ in one.points})
    values = {one.name: dict(one.points) for one in series}
    edges = [plane.x(steps[0]) - 8, *(plane.x((a + b) / 2) for a, b in itertools.pairwise(steps))]
    edges.append(plane.x(steps[-1]) + 8)
    strips = []
    for index, step in enumerate(steps):
        there = [(one, values[one.name][step]) for one in series if step in values[one.name]]
        text = f"step {step:,.0f} · " + " · ".join(f"{one.name} {short(y)}" for one, y in there)
        x, right = plane.x(step), index > len(steps) / 2
        strips.append(
            tag(
                "g",
                tag(
                    "rect",
                    x=f"{edges[index]:.1f}",
                    y=0,
                    width=f"{edges[index + 1] - edges[index]:.1f}",
                    height=HEIGHT - BOTTOM,
                ),
                tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=HEIGHT - BOTTOM),
                *(tag("circle", cx=f"{x:.1f}", cy=f"{plane.y(y):.1f}", r=4, class_=one.style) for one, y in there),
                tag(
                    "text",
                    text,
                    x=f"{x + (-8 if right else 8):.1f}",
                    y=TOP + 8,
                    text_anchor="end" if right else "start",
                ),
                tag("title", text),
                class_="hit",
            )
        )
    return join(*strips)


def _legend(series: Sequence[Series]) -> list[Html]:
    named = len(series) > 1
    return [
        tag("span", one.name if named else "last", " ", tag("b", short(one.points[-1][1])), class_=f"key {one.style}")
        for one in series
        if one.listed
    ]


def _finite(points: Sequence[Point]) -> list[Point]:
    return sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))


def _thinned(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS: the mean of each run of steps, placed at its last step."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """Over a centred window of a tenth of the points, cut at the ends."""
    reach = max(2, len(points) // 20)
    means = []
    for index, (x, _) in enumerate(points):
        around = points[max(0, index - reach) : index + reach + 1]
        means.append((x, sum(y for _, y in around) / len(around)))
    return means


def _clamped(share: float) -> float:
    return min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
