"""The report of a run: report.html, one file that opens from disk with no network and no script, and report.json.

Every text in it came from a data set, a model or a run file, so the page is built from escaped values (markup.py), and
its content policy forbids scripts besides.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from ftray import __version__
from ftray.evaluate.charts import Series, dumbbell, line_chart
from ftray.evaluate.compare import METRICS, Change, Comparison, GateResult, about, with_examples, written
from ftray.evaluate.data_section import data_section
from ftray.evaluate.facts_section import duration, facts_section, number
from ftray.evaluate.labels_section import labels_section
from ftray.evaluate.markup import Html, join, tag
from ftray.evaluate.suites import exact_match, json_match

CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
LONG_PROMPT = 600
SHOWN_ABOVE = {"comparison", "gate", "metrics"}


def write_report(
    out: Path,
    *,
    run: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any],
    card: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.html and report.json into the folder `out`, made if needed, and gives the page's path.

    `run`: the resolved run file. `data`: DataReport.to_json(). `comparison`: Comparison.to_json(). `samples`:
    {prompt, expected, base, tuned, right: {base, tuned}}, right as pass_at_1 counts it. `details`: {base, tuned}, what
    the objective says beside the scores. `plan` and `card`: plain data, shown as they are; of the card the page's head
    uses id, digest, created and seconds. `metrics`: rows with kind and step,

        {kind: train, step, loss, lr, tokens_per_s, grad_norm}    {kind: eval, step, loss}
        {kind: recovery, step, reason, seconds}

    where only kind and step must be there. Empty parts are left out of the page. Passwords in URIs are masked.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "run": run,
        "data": data,
        "metrics": list(metrics),
        "comparison": comparison,
        "samples": list(samples),
        "plan": plan,
        "card": card,
        **({"details": details} if details and any(details.values()) else {}),
    }
    parts = _masked(parts)
    _replace(out / "report.json", json.dumps(_strict(parts), ensure_ascii=False, indent=1))
    _replace(out / "report.html", page(**parts))
    return out / "report.html"


def page(
    *,
    run: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any],
    card: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
) -> Html:
    """The whole page, from the same parts as `write_report`."""
    compared = Comparison.from_json(comparison) if comparison else None
    sections = [
        _head(run, card, compared, _last(metrics, "tokens_per_s")),
        _scores(compared) if compared else None,
        labels_section(details or {}),
        _curves(metrics, compared),
        _samples(samples),
        data_section(data) if data else None,
        _recoveries(metrics),
        facts_section("Plan", plan),
        _version(card, compared),
        _run_file(run),
        tag("footer", f"Written by ftray {__version__}. The same as data: report.json, beside this file."),
    ]
    template = Template(files("ftray.evaluate").joinpath("page.html").read_text(encoding="utf-8"))
    title = join(run.get("name", "run"), " · ftray report")
    return Html(template.substitute(title=title, body=join(*sections)))


def _head(run: Mapping[str, Any], card: Mapping[str, Any], compared: Comparison | None, speed: float | None) -> Html:
    method, model = run.get("method") or {}, run.get("model") or {}
    objective = run.get("objective") or {}
    bits = f" on {method['bits']} bits" if method.get("bits") else ""
    about = [
        f"{method['kind']}{bits}" if method.get("kind") else None,
        objective.get("kind"),
        f"base {model['base']}" if model.get("base") else None,
        card.get("created"),
        duration(card["seconds"]) if number(card.get("seconds")) else None,
        f"{speed:,.0f} tokens/s" if speed else None,
    ]
    gate = None
    if compared and compared.gate:
        gate = tag("span", "gate passed" if compared.passed else "gate failed", class_=_chip(compared.passed))
    return tag(
        "header",
        tag("p", "Fine-tuning report", class_="kicker"),
        tag(
            "div",
            tag("h1", run.get("name", "run")),
            tag("span", card["id"], class_="chip") if card.get("id") else None,
            gate,
            class_="top",
        ),
        tag("p", " · ".join(str(one) for one in about if one), class_="lead"),
        _tiles(compared) if compared else None,
    )


def _tiles(compared: Comparison) -> Html:
    """The few numbers that most readers come for: loss, the best measure of the answers, and what it cost."""
    rows = {row.metric: row for row in compared.rows}
    answers = next((name for name in ("entity_f1", "f1", "json_match", "exact_match", "r2") if name in rows), None)
    every = (
        "loss", "reward", "pass_at_1", "reward_accuracy", "reward_auc", answers, "accuracy", "mae", "token_accuracy",
        "general_loss",
    )  # fmt: skip
    chosen = [name for name in every if name in rows]
    return tag("div", *(_tile(rows[name]) for name in chosen if name), class_="cells tiles")


def _tile(row: Change) -> Html:
    """The tuned value large; of the general loss its rise, which is what forgetting means."""
    shown, value = row.metric, written(row.metric, row.tuned)
    below = join(tag("span", "base ", written(row.metric, row.base)), _changed(row))
    if row.metric == "general_loss":
        shown, value = "forgetting", written("forgetting", row.change, signed=True)
        below = tag("span", "general loss ", written(row.metric, row.base), " → ", written(row.metric, row.tuned))
    return tag(
        "div",
        tag("div", METRICS[shown].label, class_="name"),
        tag("div", value, class_="value"),
        tag("div", below, class_="from"),
        class_="card tile",
        title=METRICS[shown].meaning,
    )


def _scores(compared: Comparison) -> Html:
    return join(
        tag("h2", "Scores"),
        tag("p", "Base and tuned model on the same held-out rows.", class_="note"),
        tag("div", _score_table(compared.rows), class_="card scroll"),
        _rivals(compared) if compared.baselines else None,
        _task_table(compared.tasks) if compared.tasks else None,
        _gate(compared.gate) if compared.gate else None,
    )


def _score_table(rows: Sequence[Change]) -> Html:
    lines = []
    for row in rows:
        metric = about(row.metric)
        shown = None
        if metric.form == "share" and row.base is not None and row.tuned is not None:
            shown = dumbbell(row.base, row.tuned)
        lines.append(
            tag(
                "tr",
                tag("td", metric.label),
                tag("td", written(row.metric, row.base), class_="n"),
                tag("td", tag("b", written(row.metric, row.tuned)), class_="n"),
                tag("td", _changed(row), class_="n"),
                tag("td", shown, class_="mid"),
                tag("td", metric.meaning, class_="what"),
            )
        )
    head = tag(
        "tr",
        tag("th", ""),
        *(tag("th", text, class_="n") for text in ("base", "tuned", "change")),
        tag("th", "0 – 100 %", class_="mid"),
        tag("th", "", class_="what"),
    )
    return tag("table", tag("thead", head), tag("tbody", *lines))


def _rivals(compared: Comparison) -> Html:
    """The base prompted without training beside the tuned model, on the same questions."""
    lines = []
    for metric, by_count, tuned in compared.rivals():
        cells = (tag("td", written(metric, value), class_="n") for value in by_count)
        shown = tag("td", tag("b", written(metric, tuned)), class_="n")
        lines.append(tag("tr", tag("td", METRICS[metric].label), *cells, shown))
    names = (*map(with_examples, compared.baselines), "tuned")
    head = tag("tr", tag("th", ""), *(tag("th", name, class_="n") for name in names))
    table = tag("table", tag("thead", head), tag("tbody", *lines))
    return join(tag("h3", "Without training: the base, prompted"), tag("div", table, class_="card scroll"))


def _task_table(tasks: Mapping[str, Sequence[Change]]) -> Html:
    """One line per task, one column per metric: the tuned value over the base's."""
    metrics = [name for name in METRICS if any(row.metric == name for rows in tasks.values() for row in rows)]
    lines = []
    for task, rows in tasks.items():
        by_name = {row.metric: row for row in rows}
        cells = (tag("td", _tuned_over_base(by_name[name]) if name in by_name else "", class_="n") for name in metrics)
        lines.append(tag("tr", tag("td", task, class_="wrap"), *cells))
    head = tag("tr", tag("th", "task"), *(tag("th", METRICS[name].label, class_="n") for name in metrics))
    table = tag("table", tag("thead", head), tag("tbody", *lines))
    return join(tag("h3", "By task: tuned, and the base below it"), tag("div", table, class_="card scroll"))


def _tuned_over_base(row: Change) -> Html:
    style = {True: "better", False: "worse", None: None}[row.better]
    return join(tag("span", written(row.metric, row.tuned), class_=style), tag("small", written(row.metric, row.base)))


def _changed(row: Change) -> Html | None:
    if row.change is None:
        return None
    arrow = "▲ " if row.change > 0 else "▼ " if row.change < 0 else ""
    style = {True: "better", False: "worse", None: None}[row.better]
    hint = {True: "better", False: "worse", None: "no change"}[row.better]
    return tag("span", arrow, written(row.metric, row.change, signed=True), class_=style, title=hint)


def _gate(gate: Sequence[GateResult]) -> Html:
    lines = []
    for result in gate:
        metric, value, bound = result.rule.split()[0], result.value, result.bound
        said = "not measured" if value is None else f"measured {written(metric, value)}"
        if result.rule.endswith("base") and bound is not None:
            said += f", base {written(metric, bound)}"
        chip = tag("span", "✓ passed" if result.passed else "✗ failed", class_=_chip(result.passed))
        lines.append(tag("li", chip, tag("code", result.rule), tag("span", said)))
    return join(tag("h3", "Gate"), tag("div", tag("ul", *lines, class_="rules"), class_="card"))


def _curves(metrics: Sequence[Mapping[str, Any]], compared: Comparison | None) -> Html | None:
    base = compared.before.loss if compared else None
    marks = [
        (float(row["step"]), f"recovered at step {row['step']}: {row.get('reason', '')}")
        for row in metrics
        if row.get("kind") == "recovery" and number(row.get("step"))
    ]
    loss = [
        Series("training", _points(metrics, "train", "loss"), "train"),
        Series("held-out", _points(metrics, "eval", "loss"), "eval"),
    ]
    charts = [
        line_chart(
            "Loss, nats per token" if not compared or compared.before.is_per_token else "Loss",
            loss,
            smooth=True,
            reference=("base, held-out", base) if base is not None else None,
            marks=marks,
        )
    ]
    for key, title in (("reward", "Reward"), ("kl", "KL to the base, nats per answer"), ("entropy", "Entropy, nats")):
        series = [Series("training", _points(metrics, "train", key), "train")]
        series.append(Series("held-out", _points(metrics, "eval", key), "eval"))
        charts.append(line_chart(title, series, smooth=True, marks=marks))
    for key, title in (("lr", "Learning rate"), ("tokens_per_s", "Tokens per second"), ("grad_norm", "Gradient norm")):
        series = [Series(title, _points(metrics, "train", key), "train")]
        charts.append(line_chart(title, series, smooth=key != "lr", from_zero=True, marks=marks))
    drawn = [tag("div", chart, class_="card") for chart in charts if chart]
    return join(tag("h2", "Curves"), tag("div", *drawn, class_="cells two")) if drawn else None


def _samples(samples: Sequence[Mapping[str, Any]]) -> Html | None:
    if not samples:
        return None
    return join(
        tag("h2", "Samples"),
        tag("p", "Held-out questions, answered greedily by both models.", class_="note"),
        *map(_sample, samples),
    )


def _sample(sample: Mapping[str, Any]) -> Html:
    prompt, expected = sample.get("prompt", ""), sample.get("expected", "")
    asked = tag("pre", prompt, class_="ask", dir="auto")
    if len(prompt) > LONG_PROMPT:
        asked = tag("details", tag("summary", f"{prompt[:160]} …"), asked)
    columns = [tag("div", tag("div", "expected", class_="label"), _said(expected))]
    for side in ("base", "tuned"):
        said = sample.get(side, "")
        right = sample.get("right", {}).get(side)  # of one that counts for pass_at_1
        if right is None:
            right = bool(expected) and (exact_match([said], [expected]) == 1 or json_match([said], [expected]) == 1)
        label = tag("div", side, tag("span", "✓ as expected", class_="better") if right else None, class_="label")
        columns.append(tag("div", label, _said(said), class_=f"is-{side}{' hit-it' if right else ''}"))
    return tag("div", asked, tag("div", *columns, class_="answers"), class_="card sample")


def _said(text: str) -> Html:
    return tag("pre", text, dir="auto") if text.strip() else tag("span", "nothing", class_="empty")


def _recoveries(metrics: Sequence[Mapping[str, Any]]) -> Html | None:
    rows = [row for row in metrics if row.get("kind") == "recovery"]
    if not rows:
        return None
    lines = [
        tag(
            "tr",
            tag("td", row.get("step", "–"), class_="n"),
            tag("td", row.get("reason", ""), class_="wrap"),
            tag("td", duration(row["seconds"]) if number(row.get("seconds")) else "–", class_="n"),
        )
        for row in rows
    ]
    head = tag(
        "tr", tag("th", "step", class_="n"), tag("th", "what happened"), tag("th", "until it ran on", class_="n")
    )
    table = tag("table", tag("thead", head), tag("tbody", *lines))
    return join(tag("h2", "Recoveries"), tag("div", table, class_="card scroll"))


def _version(card: Mapping[str, Any], compared: Comparison | None) -> Html | None:
    promote = None
    if card.get("id"):
        tasks = card.get("tasks", {})
        served = compared.served(card["id"], tasks) if compared else dict.fromkeys(tasks.values() or [card["id"]], True)
        commands = [
            tag("code", f"ftray adapters promote {ref}{'' if passed else ' --force'}") for ref, passed in served.items()
        ]
        promote = tag("p", "To make it the one that is served:", *(join(" ", one) for one in commands), class_="note")
    return facts_section("Version", {key: value for key, value in card.items() if key not in SHOWN_ABOVE}, promote)


def _run_file(run: Mapping[str, Any]) -> Html | None:
    if not run:
        return None
    text = yaml.safe_dump(_strict(run), sort_keys=False, allow_unicode=True, width=100)
    lines = [_yaml_line(line) for line in text.rstrip().split("\n")]
    shown = tag("pre", Html("\n".join(lines)), class_="yaml")
    note = tag("p", "Every auto value as it was resolved; saved as a file, it runs again.", class_="note")
    return join(tag("h2", "Run file"), note, tag("div", shown, class_="card"))


def _yaml_line(line: str) -> Html:
    match = re.fullmatch(r"((?:- | )*)([\w.-]+)(:.*)", line)
    return join(match[1], tag("b", match[2]), match[3]) if match else join(line)


def _points(metrics: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[tuple[float, float]]:
    return [
        (float(row["step"]), float(row[key]))
        for row in metrics
        if row.get("kind") == kind and number(row.get("step")) and number(row.get(key))
    ]


def _last(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    points = _points(metrics, "train", key)
    return points[-1][1] if points else None


def _chip(passed: bool) -> str:
    return f"chip {'good' if passed else 'bad'}"


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return CREDENTIALS.sub("***", value)
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list | tuple) else value


def _strict(value: Any) -> Any:
    """JSON without NaN and infinities, which most readers refuse; other types as text."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a page. Lone surrogates, which no file can hold, become ?."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_bytes(text.encode("utf-8", "replace"))
    os.replace(half, path)
