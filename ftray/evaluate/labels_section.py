"""The report's account of labels: how well each is told, and which is taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftray.evaluate.compare import written
from ftray.evaluate.markup import Html, join, tag

SIDE = 480  # of the picture, in its own units
MOST_LABELS = 200  # in the picture; more would be less than 2 units each
MOST_PAIRS = 12


def labels_section(details: Mapping[str, Any]) -> Html | None:
    """`details`: {base, tuned}, as label_scores.py or tag_scores.py gives it; None where nothing has labels."""
    base, tuned = details.get("base") or {}, details.get("tuned") or {}
    labels = tuned.get("labels") or []
    if not labels:
        return None
    confusion = tuned.get("confusion") or []
    return join(
        tag("h2", "Labels"),
        tag("p", "The tuned model on the held-out rows; labels that are told worst stand first.", class_="note"),
        tag("div", _table(labels, base.get("labels") or [], tuned.get("of", "rows")), class_="card scroll"),
        tag("div", _picture(labels, confusion), _pairs(labels, confusion), class_="cells two") if confusion else None,
    )


def _table(labels: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], of: str) -> Html:
    """`of`: what has a label, and is counted."""
    before = {label["name"]: label["f1"] for label in base}
    lines = [
        tag(
            "tr",
            tag("td", label["name"], class_="wrap"),
            tag("td", f"{label['rows']:,}", class_="n"),
            *(tag("td", written(name, label[name]), class_="n") for name in ("precision", "recall")),
            tag("td", tag("b", written("f1", label["f1"])), class_="n"),
            tag("td", written("f1", before.get(label["name"])), class_="n"),
        )
        for label in sorted(labels, key=lambda label: (label["f1"], label["name"]))
    ]
    heads = ("label", f"held-out {of}", "precision", "recall", "F1", "F1 of the base")
    head = tag("tr", *(tag("th", text, class_="n" if index else None) for index, text in enumerate(heads)))
    table = tag("table", tag("thead", head), tag("tbody", *lines))
    if len(lines) <= MOST_PAIRS:
        return table
    return tag("details", tag("summary", f"all {len(lines)} labels"), table)


def _picture(labels: Sequence[Mapping[str, Any]], confusion: Sequence[Sequence[int]]) -> Html | None:
    """A square for each pair of labels that occurs, the darker the larger its share of the right label's rows."""
    count = len(labels)
    if count > MOST_LABELS:
        return None
    side = SIDE / count
    squares = []
    for right, said, rows in confusion:
        share = rows / max(1, labels[right]["rows"])
        told = "" if right == said else f", taken for {labels[said]['name']}"
        title = tag("title", f"{labels[right]['name']}{told}: {rows} of {labels[right]['rows']}")
        squares.append(
            tag(
                "rect",
                title,
                x=f"{said * side:.2f}",
                y=f"{right * side:.2f}",
                width=f"{side:.2f}",
                height=f"{side:.2f}",
                fill="currentColor",
                fill_opacity=f"{0.08 + 0.92 * share:.2f}",
            )
        )
    frame = tag("rect", width=SIDE, height=SIDE, fill="none", stroke="currentColor", stroke_opacity="0.3")
    return tag(
        "figure",
        tag("figcaption", tag("b", "Right label (down) and given label (across)")),
        tag("svg", *squares, frame, viewBox=f"0 0 {SIDE} {SIDE}", role="img", aria_label="Confusion matrix"),
        class_="chart card",
    )


def _pairs(labels: Sequence[Mapping[str, Any]], confusion: Sequence[Sequence[int]]) -> Html | None:
    wrong = [(right, said, rows) for right, said, rows in confusion if right != said][:MOST_PAIRS]
    if not wrong:
        return None
    lines = [
        tag(
            "tr",
            tag("td", labels[right]["name"], class_="wrap"),
            tag("td", labels[said]["name"], class_="wrap"),
            tag("td", f"{rows} of {labels[right]['rows']}", class_="n"),
        )
        for right, said, rows in wrong
    ]
    head = tag("tr", tag("th", "right"), tag("th", "taken for"), tag("th", "rows", class_="n"))
    return tag("div", tag("h3", "Most often confused"), tag("table", head, *lines), class_="card scroll")
