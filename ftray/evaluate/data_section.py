"""The report's account of the data: what was read, kept and dropped, how long examples are, and one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftray.evaluate.charts import bars
from ftray.evaluate.markup import Html, join, tag

MANY_LABELS = 16  # from there on only the largest and the smallest are shown


def data_section(data: Mapping[str, Any]) -> Html:
    """`data` is DataReport.to_json(); what it lacks is left out."""
    sources = data.get("sources") or []
    lengths = [
        (f"{low:,}–{2 * low - 1:,}" if low > 1 else "1", count) for low, count in data.get("length_histogram") or []
    ]
    preview = data.get("preview")
    labels = data.get("labels") or []
    of = "words" if data.get("trained_tokens") else "rows"
    cards = [
        tag("div", _totals(data), class_="card"),
        tag("div", bars("Tokens per training example", lengths), class_="card") if lengths else None,
        tag("div", bars(f"Training {of} per label", _label_rows(labels)), class_="card") if labels else None,
    ]
    return join(
        tag("h2", "Data"),
        tag("div", *cards, class_="cells two"),
        tag("div", _source_table(sources), class_="card scroll") if sources else None,
        _dropped(sources),
        *(tag("p", note, class_="note") for note in data.get("notes") or []),
        _preview(preview, marked=bool(data.get("trained_tokens"))) if preview else None,
    )


def _totals(data: Mapping[str, Any]) -> Html:
    tokens, trained = data.get("tokens") or 0, data.get("trained_tokens") or 0
    dropped = sum((data.get("dropped") or {}).values())
    named = {
        "Rows read": data.get("rows_read"),
        "Rows kept": data.get("rows_kept"),
        "Rows dropped": dropped or None,
        "Training examples": data.get("train_examples"),
        "Held-out examples": data.get("eval_examples"),
        "Questions asked": data.get("questions") if trained or not tokens else None,
        "Cut to max_length": data.get("truncated") or None,
        "Training tokens": tokens or None,
    }
    lines = [join(tag("dt", name), tag("dd", f"{value:,}")) for name, value in named.items() if value is not None]
    if trained:
        lines.append(join(tag("dt", "with loss"), tag("dd", f"{trained:,} ({trained / tokens:.0%})")))
    if data.get("digest"):
        lines.append(join(tag("dt", "Digest"), tag("dd", tag("code", str(data["digest"])[:16]))))
    return tag("dl", *lines)


def _source_table(sources: Sequence[Mapping[str, Any]]) -> Html:
    head = ("source", "format", "use", "rows read", "train", "held out", "dropped", "tokens", "with loss")
    lines = []
    for source in sources:
        counts = (
            source.get("rows_read", 0),
            source.get("rows_train", 0),
            source.get("rows_eval", 0),
            sum((source.get("dropped") or {}).values()),
            source.get("tokens", 0),
            source.get("trained_tokens", 0),
        )
        columns = ", ".join(f"{ours} = {theirs}" for ours, theirs in (source.get("columns") or {}).items())
        lines.append(
            tag(
                "tr",
                tag("td", source.get("path", ""), tag("small", columns) if columns else None, class_="wrap"),
                tag("td", source.get("format", ""), class_="plain"),
                tag("td", _use(source), class_="plain"),
                *(tag("td", f"{count:,}", class_="n") for count in counts),
            )
        )
    heads = (tag("th", text, class_="n" if index > 2 else None) for index, text in enumerate(head))
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines))


def _use(source: Mapping[str, Any]) -> str:
    return "held out" if source.get("held_out") else f"weight {source.get('weight', 1):g}"


def _dropped(sources: Sequence[Mapping[str, Any]]) -> Html | None:
    counts: dict[str, int] = {}
    for source in sources:
        for reason, count in (source.get("dropped") or {}).items():
            counts[reason] = counts.get(reason, 0) + count
    if not counts:
        return None
    most = sorted(counts.items(), key=lambda item: -item[1])
    reasons = [
        tag("tr", tag("td", f"{count:,}", class_="n"), tag("td", reason, class_="wrap")) for reason, count in most
    ]
    named = [
        tag(
            "tr",
            tag("td", tag("code", f"{one['file']}:{one['line']}"), class_="wrap"),
            tag("td", one["reason"], class_="wrap"),
        )
        for source in sources
        for one in source.get("examples") or []
    ]
    rows = tag("details", tag("summary", f"{len(named)} of these rows"), tag("table", *named)) if named else None
    return join(
        tag("h3", "Dropped rows"),
        tag("div", tag("table", *reasons), rows, class_="card scroll"),
    )


def _label_rows(labels: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(label, training rows), most first; of many labels the two ends."""
    ranked = sorted(((label["name"], label["train"]) for label in labels), key=lambda pair: (-pair[1], pair[0]))
    return ranked if len(ranked) <= MANY_LABELS else [*ranked[:6], *ranked[-6:]]


def _preview(text: str, *, marked: bool = True) -> Html:
    """«trained» parts become marks; the signs themselves are left out."""
    pieces = re.split(r"«([^»]*)»", text)
    shown = (tag("mark", piece) if index % 2 else piece for index, piece in enumerate(pieces))
    return join(
        tag("h3", "One training example, as the model reads it" + ("; the loss is on the marked tokens" * marked)),
        tag("div", tag("pre", *shown, dir="auto"), class_="card"),
    )
