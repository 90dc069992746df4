"""How the command line shows things: columns, times, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns, two spaces apart, None as '–'."""
    lines = [list(header), *[["–" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, default=_plain, ensure_ascii=False)


def when(moment: float | str | None) -> str | None:
    """A moment in local time to the minute, from seconds since 1970 or ISO text."""
    if moment is None:
        return None
    at = datetime.fromisoformat(moment) if isinstance(moment, str) else datetime.fromtimestamp(moment, UTC)
    return at.astimezone().strftime("%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def pairs(values: Mapping[str, object]) -> str:
    """`key  value` lines with the values under each other; None is left out."""
    shown = {key: value for key, value in values.items() if value is not None}
    width = max((len(key) for key in shown), default=0)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in shown.items())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
