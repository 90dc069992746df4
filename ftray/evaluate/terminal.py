"""The comparison in the terminal: a table on a screen, aligned plain lines in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from ftray.evaluate.compare import METRICS, Change, Comparison, about, with_examples, written

HEAD = ("", "base", "tuned", "change")


def print_comparison(comparison: Comparison, *, file: TextIO | None = None) -> None:
    """Scores of base and tuned model, per task where there are several, then the gate rule by rule."""
    file = file or sys.stdout
    tables = [("", comparison.rows), *comparison.tasks.items()]
    tables = [(name, rows) for name, rows in tables if rows]
    if file.isatty():
        _print_rich(tables, comparison, file)
    else:
        _print_plain(tables, comparison, file)
    _print_rivals(comparison, file)


def _print_rich(tables: Sequence[tuple[str, Sequence[Change]]], comparison: Comparison, file: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    for name, rows in tables:
        table = Table(box=box.SIMPLE_HEAD, title=Text(name, style="bold") if name else None, title_justify="left")
        for index, head in enumerate(HEAD):
            table.add_column(head, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            label, base, tuned, change = _cells(row)
            style = {True: "green", False: "red", None: "dim"}[row.better]
            table.add_row(label, Text(base, style="dim"), Text(tuned, style="bold"), Text(change, style=style))
        console.print(table)
    for line, passed in _gate_lines(comparison):
        console.print(Text.assemble((" ✓ " if passed else " ✗ ", "bold green" if passed else "bold red"), line))


def _print_plain(tables: Sequence[tuple[str, Sequence[Change]]], comparison: Comparison, file: TextIO) -> None:
    for name, rows in tables:
        cells = [HEAD, *(_cells(row) for row in rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
        if name:
            print(name, file=file)
        for label, *numbers in cells:
            aligned = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
            print("  ".join((label.ljust(widths[0]), *aligned)).rstrip(), file=file)
    for line, passed in _gate_lines(comparison):
        print(f"{'passed' if passed else 'FAILED'}: {line}", file=file)


def _print_rivals(comparison: Comparison, file: TextIO) -> None:
    """The base prompted without training beside the tuned model: what training was worth."""
    rivals = comparison.rivals()
    if not rivals:
        return
    lines = [("Without training", *map(with_examples, comparison.baselines), "tuned")]
    for metric, by_count, tuned in rivals:
        lines.append((METRICS[metric].label, *(written(metric, value) for value in (*by_count, tuned))))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print(file=file)
    for label, *numbers in lines:
        aligned = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        print("  ".join((label.ljust(widths[0]), *aligned)).rstrip(), file=file)


def _cells(row: Change) -> tuple[str, str, str, str]:
    change = "" if row.change is None else written(row.metric, row.change, signed=True)
    mark = {True: " better", False: " worse", None: ""}[row.better]
    return about(row.metric).label, written(row.metric, row.base), written(row.metric, row.tuned), change + mark


def _gate_lines(comparison: Comparison) -> list[tuple[str, bool]]:
    lines = []
    for result in comparison.gate:
        metric = result.rule.split()[0]
        value = "not measured" if result.value is None else f"measured {written(metric, result.value)}"
        lines.append((f"gate {result.rule}: {value}", result.passed))
    return lines
