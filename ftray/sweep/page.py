"""sweep.html: the ranking, learning curves, what mattered, quality against cost. One file, no script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

from ftray import __version__
from ftray.config.document import dump
from ftray.config.sweeping import Sweep
from ftray.evaluate.charts import Series, bars, line_chart
from ftray.evaluate.compare import METRICS, written
from ftray.evaluate.facts_section import duration
from ftray.evaluate.markup import Html, join, tag
from ftray.sweep.pictures import Line, front, importance, parallel, scatter
from ftray.sweep.records import DONE, FAILED, STOPPED, Record, sign_of
from ftray.sweep.result import column, ranked, rows, shown

ENOUGH = 5  # scored trials from which importance is told


def page(sweep: Sweep, records: Sequence[Record], *, best: Record, version: str) -> Html:
    sections = [
        _head(sweep, records, best, version),
        _table(sweep, records, best),
        _course(sweep, records, best),
        _parallel(sweep, records, best),
        _costs(sweep, records, best),
        _sweep_file(sweep),
        tag("footer", f"Written by ftray {__version__}. Beside this file: trials.csv, sweep.json and best.yaml."),
    ]
    template = Template(files("ftray.evaluate").joinpath("page.html").read_text(encoding="utf-8"))
    return Html(template.substitute(title=join(sweep.name, " · ftray sweep"), body=join(*sections)))


def _head(sweep: Sweep, records: Sequence[Record], best: Record, version: str) -> Html:
    counts = {status: sum(record.status == status for record in records) for status in (DONE, STOPPED, FAILED)}
    about = [f"{count} {word}" for word, count in counts.items() if count]
    stopping = "" if sweep.stopping.kind == "none" else f" with {sweep.stopping.kind}"
    values = ", ".join(f"{column(key)} {shown(value)}" for key, value in best.values.items())
    seconds = sum(record.seconds for record in records)
    tiles = [
        (
            METRICS[sweep.metric].label,
            written(sweep.metric, best.score(sweep.metric)),
            f"trial {best.number}: {values}",
        ),
        ("Trials", str(len(records)), ", ".join(about)),
        ("Time in trials", duration(seconds), f"{best.seconds:.0f} s of it the best"),
    ]
    return tag(
        "header",
        tag("p", "Sweep report", class_="kicker"),
        tag("div", tag("h1", sweep.name), tag("span", version, class_="chip good"), class_="top"),
        tag("p", f"{sweep.search.kind} search{stopping} over {', '.join(sweep.space)}", class_="lead"),
        tag("div", *(_tile(*tile) for tile in tiles), class_="cells tiles"),
    )


def _tile(name: str, value: str, below: str) -> Html:
    parts = (("name", name), ("value", value), ("from", below))
    return tag("div", *(tag("div", text, class_=kind) for kind, text in parts), class_="card tile")


def _table(sweep: Sweep, records: Sequence[Record], best: Record) -> Html:
    heads = ["", "trial", sweep.metric, "epochs", "time", "parameters", *map(column, sweep.space), ""]
    lines = []
    order = ranked(sweep, records)
    for row, record in zip(rows(sweep, records), order, strict=True):
        chip = {DONE: "good", FAILED: "bad"}.get(record.status, "")
        score = written(sweep.metric, row[sweep.metric])
        if row["spread"] is not None:
            spread = f"{written(sweep.metric, row['mean'])} ± {row['spread']:.2g} over seeds"
            score = join(score, tag("small", spread))
        name = f"{record.number}" if record.of is None else f"{record.number}, seed {record.seed} of {record.of}"
        cells = [
            tag("td", tag("span", record.status, class_=f"chip {chip}")),
            tag("td", tag("b", name) if record.number == best.number else name),
            tag("td", score, class_="n"),
            tag("td", f"{record.epoch:.2g} / {record.epochs:.2g}", class_="n"),
            tag("td", duration(record.seconds), class_="n"),
            tag("td", f"{record.parameters:,}", class_="n"),
            *(tag("td", shown(record.values.get(key)), class_="n") for key in sweep.space),
            tag("td", row["reason"], class_="what"),
        ]
        lines.append(tag("tr", *cells))
    head = tag(
        "tr", *(tag("th", text, class_="n" if 1 < index < len(heads) - 1 else None) for index, text in enumerate(heads))
    )
    return join(
        tag("h2", "Ranking"),
        tag("div", tag("table", tag("thead", head), tag("tbody", *lines)), class_="card scroll"),
    )


def _course(sweep: Sweep, records: Sequence[Record], best: Record) -> Html | None:
    """Learning curves, and beside them what mattered."""
    cards = [_curves(sweep, records, best), _importance(sweep, records)]
    shown_cards = [tag("div", card, class_="card") for card in cards if card]
    note = "Held-out rows, at each evaluation. Dashed: stopped before its end."
    if not shown_cards:
        return None
    return join(
        tag("h2", "Learning curves"), tag("p", note, class_="note"), tag("div", *shown_cards, class_="cells two")
    )


def _curves(sweep: Sweep, records: Sequence[Record], best: Record) -> Html | None:
    series = []
    for record in sorted(records, key=lambda one: one.number == best.number):
        points = [(row["step"], row["scores"].get(sweep.metric, math.nan)) for row in record.reports]
        listed = record.number == best.number
        name = "best" if listed else f"trial {record.number}"
        series.append(Series(name, points, _style(record, best), listed))
    return line_chart(METRICS[sweep.metric].label, series)


def _parallel(sweep: Sweep, records: Sequence[Record], best: Record) -> Html:
    names = [*map(column, sweep.space), sweep.metric]
    lines = []
    for record in records:
        score = record.score(sweep.metric)
        values = {column(key): record.values.get(key) for key in sweep.space} | {sweep.metric: score}
        lines.append(Line(_title(sweep, record), values, _style(record, best)))
    return join(tag("h2", "What was tried"), tag("div", parallel("Values and score", names, lines), class_="card"))


def _importance(sweep: Sweep, records: Sequence[Record]) -> Html | None:
    """At the last evaluation that every trial reached: scores after more or less training do not compare."""
    told = [record for record in records if record.reports and record.of is None]
    if len(told) < ENOUGH:
        return None
    place = min(len(record.reports) for record in told)
    scored = [(record, record.reports[place - 1]["scores"].get(sweep.metric, math.nan)) for record in told]
    scored = [(record, score) for record, score in scored if math.isfinite(score)]
    shares = [
        (column(key), round(100 * importance([r.values.get(key) for r, _ in scored], [s for _, s in scored])))
        for key in sweep.space
    ]
    note = (
        f"Share of the scores' variance, in percent, that each key explains alone at evaluation {place}, which all "
        f"{len(scored)} reached. Few trials make it rough."
    )
    return join(bars("What mattered", sorted(shares, key=lambda one: -one[1])), tag("p", note, class_="note"))


def _costs(sweep: Sweep, records: Sequence[Record], best: Record) -> Html | None:
    done = [record for record in records if record.status == DONE]
    against = getattr(sweep.search, "against", "none")
    kinds = [("Trained parameters", lambda one: float(one.parameters))] if against == "parameters" else []
    kinds += [("Seconds", lambda one: one.seconds)]
    sign = sign_of(sweep.metric)
    cards = []
    for name, cost in kinds:
        points = [(cost(one), one.score(sweep.metric) or math.nan) for one in done]
        kept = set(front([(x, sign * y) for x, y in points]))
        marked = [
            (x, y, _title(sweep, one), "eval" if one.number == best.number else "train" if index in kept else "rest")
            for index, ((x, y), one) in enumerate(zip(points, done, strict=True))
        ]
        if chart := scatter(
            f"{METRICS[sweep.metric].label} against {name.lower()}", name.lower(), sweep.metric, marked
        ):
            cards.append(tag("div", chart, class_="card"))
    note = "Blue: no other trial is better in both. Orange: the best."
    return join(tag("h2", "Quality and cost"), tag("p", note, class_="note"), *cards) if cards else None


def _sweep_file(sweep: Sweep) -> Html:
    text = dump(sweep.model_dump(mode="json"))
    return tag("details", tag("summary", "The sweep, every value written out"), tag("pre", text), class_="card")


def _style(record: Record, best: Record) -> str:
    if record.number == best.number:
        return "eval"
    return "rest" if record.status == DONE else "gone"


def _title(sweep: Sweep, record: Record) -> str:
    values: list[Any] = [f"{column(key)} {shown(value)}" for key, value in record.values.items()]
    score = f"{sweep.metric} {written(sweep.metric, record.score(sweep.metric))}"
    return f"trial {record.number}: {score} · {' · '.join(values)}"
