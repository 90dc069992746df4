"""Plain data as a list of names and values people can read: bytes in GiB, seconds in minutes, nested names joined."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ftray.evaluate.markup import Html, join, tag


def facts_section(title: str, facts: Mapping[str, Any], note: Html | None = None) -> Html | None:
    """A card of names and values, and one more per nested mapping; None where there is nothing to show."""
    groups: dict[str, Mapping[str, Any]] = {
        "": {key: value for key, value in facts.items() if not isinstance(value, Mapping)}
    }
    groups |= {key: value for key, value in facts.items() if isinstance(value, Mapping)}
    cards = []
    for group, values in groups.items():
        lines = [join(tag("dt", name), tag("dd", value)) for name, value in _flat(values)]
        if lines:
            head = tag("h3", group.replace("_", " ")) if group else None
            cards.append(tag("div", head, tag("dl", *lines), class_="card facts"))
    if not cards:
        return None
    return join(tag("h2", title), note, tag("div", *cards, class_="cells three" if len(cards) > 1 else "cells"))


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in facts.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += _flat(value, f"{name} · ")
        elif value is not None and value != [] and value != "":
            lines.append(_fact(name, str(key), value))
    return lines


def _fact(name: str, key: str, value: Any) -> tuple[str, str]:
    if isinstance(value, list | tuple):
        return name, ", ".join(
            json.dumps(item, default=str) if isinstance(item, Mapping) else str(item) for item in value
        )
    if isinstance(value, bool):
        return name, "yes" if value else "no"
    if key.endswith("bytes") and number(value):
        return name.removesuffix("bytes").rstrip(" ·") or name, _size(value)
    if (key == "seconds" or key.endswith(("_s", "_seconds"))) and number(value):
        return name.removesuffix(" s"), duration(value)
    if isinstance(value, int):
        return name, f"{value:,}"
    return name, f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
