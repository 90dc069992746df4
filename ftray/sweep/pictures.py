"""Pictures of a sweep as inline SVG: parallel coordinates, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftray.evaluate.charts import short, ticks
from ftray.evaluate.markup import Html, tag

WIDTH, HEIGHT = 1040, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 60, 34, 24
POWERS_FROM = 10  # largest over smallest from which an axis is in powers of ten


@dataclass(frozen=True)
class Axis:
    """One key. Numbers lie on a line, in powers of ten where they span many; other values stand in a row."""

    name: str
    values: Sequence[Any]

    @cached_property
    def known(self) -> list[Any]:
        return [value for value in self.values if value is not None]

    @cached_property
    def numeric(self) -> bool:
        return bool(self.known) and all(_is_number(value) for value in self.known)

    @cached_property
    def words(self) -> list[str]:
        return sorted({_word(value) for value in self.known})

    def at(self, value: Any) -> float | None:
        """0 at the bottom, 1 at the top; None where the trial does not have the key."""
        if value is None:
            return None
        if not self.numeric:
            return (self.words.index(_word(value)) + 0.5) / len(self.words)
        low, high = min(self.known), max(self.known)
        if high <= low:
            return 0.5
        if low > 0 and high / low >= POWERS_FROM:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def marks(self) -> list[tuple[float, str]]:
        """(place, text) of each word, or of few numbers, or of the ends of many."""
        inner = sorted(set(self.known)) if self.numeric else []
        if not self.numeric:
            return [((index + 0.5) / len(self.words), word) for index, word in enumerate(self.words)]
        shown = inner if len(inner) <= 5 else [inner[0], inner[-1]]
        return [(place, short(float(value))) for value in shown if (place := self.at(value)) is not None]


@dataclass(frozen=True)
class Line:
    """A trial. `style`: eval for the best, rest, or gone for one that did not come to its end."""

    title: str
    values: Mapping[str, Any]
    style: str


def parallel(title: str, names: Sequence[str], lines: Sequence[Line]) -> Html:
    """One axis a key, one line a trial; pointing at a line shows the trial."""
    axes = [Axis(name, [line.values.get(name) for line in lines]) for name in names]
    gap = (WIDTH - LEFT - RIGHT) / max(1, len(axes) - 1)
    parts = []
    for line in sorted(lines, key=lambda one: one.style == "eval"):
        points = [(LEFT + gap * index, axis.at(line.values.get(axis.name))) for index, axis in enumerate(axes)]
        there = [(x, _y(place)) for x, place in points if place is not None]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in there)
        shape = tag("path", d=path, class_=f"line {line.style}")
        parts.append(tag("g", shape, tag("title", line.title), class_="trial"))
    for index, axis in enumerate(axes):
        x = LEFT + gap * index
        parts.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=HEIGHT - BOTTOM, class_="axis"))
        parts.append(tag("text", axis.name, x=f"{x:.1f}", y=TOP - 14, class_="name", text_anchor="middle"))
        for place, text in axis.marks():
            parts.append(tag("text", text, x=f"{x + 7:.1f}", y=f"{_y(place):.1f}", class_="tick", dy="0.32em"))
    return _figure(title, parts)


def scatter(title: str, across: str, up: str, points: Sequence[tuple[float, float, str, str]]) -> Html | None:
    """(x, y, title, style) of each trial; the way along those that no other beats in both is drawn (less is better)."""
    points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if not points:
        return None
    xs = ticks(min(0.0, min(p[0] for p in points)), max(p[0] for p in points), 8)
    ys = ticks(min(p[1] for p in points), max(p[1] for p in points), 4)

    def place(x: float, y: float) -> tuple[str, str]:
        right = LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        return f"{right:.1f}", f"{_y((y - ys[0]) / (ys[-1] - ys[0])):.1f}"

    parts = []
    for y in ys:
        _, down = place(xs[0], y)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=down, y2=down, class_="grid"))
        parts.append(tag("text", short(y), x=LEFT - 8, y=down, class_="tick", text_anchor="end", dy="0.32em"))
    for x in xs[:-1]:
        parts.append(tag("text", short(x), x=place(x, ys[0])[0], y=HEIGHT - 6, class_="tick", text_anchor="middle"))
    parts.append(tag("text", across, x=WIDTH - RIGHT, y=HEIGHT - 6, class_="tick", text_anchor="end"))
    parts.append(tag("text", up, x=LEFT, y=TOP - 14, class_="name"))
    for x, y, text, style in points:
        right, down = place(x, y)
        parts.append(tag("g", tag("circle", cx=right, cy=down, r=6, class_=style), tag("title", text), class_="trial"))
    return _figure(title, parts)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats in both (Pareto), less being better."""
    return [
        index
        for index, (x, y) in enumerate(points)
        if not any((a <= x and b <= y) and (a < x or b < y) for a, b in points)
    ]


def importance(values: Sequence[Any], scores: Sequence[float]) -> float:
    """The share of the scores' variance that a key's value explains alone, 0 to 1.

    The correlation ratio over its values, numbers in up to four groups of equal size, with the correction for small
    samples of Kelley (epsilon squared): 1 - (1 - eta^2) (n - 1) / (n - k).
    """
    groups = _grouped(values)
    count, kinds = len(scores), len(set(groups))
    mean = sum(scores) / count
    total = sum((score - mean) ** 2 for score in scores)
    if kinds < 2 or count <= kinds or not total:
        return 0.0
    within = 0.0
    for kind in set(groups):
        mine = [score for score, group in zip(scores, groups, strict=True) if group == kind]
        middle = sum(mine) / len(mine)
        within += sum((score - middle) ** 2 for score in mine)
    return max(0.0, 1 - within / total * (count - 1) / (count - kinds))


def _grouped(values: Sequence[Any]) -> list[Any]:
    numbers = [value for value in values if _is_number(value)]
    if len(numbers) < len(values) or len(set(numbers)) <= 4:
        return [_word(value) for value in values]
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups = [0] * len(values)
    for rank, index in enumerate(order):
        groups[index] = rank * 4 // len(values)
    return groups


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("kind", value))
    return short(float(value)) if isinstance(value, float) else str(value)


def _y(place: float) -> float:
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)


def _figure(title: str, parts: Sequence[Html]) -> Html:
    drawing = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", tag("b", title)), drawing, class_="chart")
