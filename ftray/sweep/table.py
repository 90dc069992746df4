"""The ranking while a sweep runs: a live table in a terminal, a line an event elsewhere, nothing for `--json`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ftray.config.sweeping import Sweep
from ftray.evaluate.compare import written
from ftray.sweep.records import DONE, FAILED, STOPPED, Record
from ftray.sweep.result import column, ranked, shown

MARKS = {DONE: "✓", STOPPED: "◦", FAILED: "✗", "running": "▸", "waiting": "·"}
STYLES = {DONE: "", STOPPED: "dim", FAILED: "red", "running": "cyan", "waiting": "dim"}


class Board:
    def __init__(self, sweep: Sweep, *, silent: bool = False):
        self.sweep, self.silent = sweep, silent
        self.terminal = sys.stderr.isatty() and not silent
        self.seen: dict[int, str] = {}
        self._live: Any = None

    def __enter__(self) -> Board:
        if self.terminal:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, records: Iterable[Record]) -> None:
        """The trials as they stand. Elsewhere than in a terminal only what is new is told."""
        records = list(records)
        if self._live:
            self._live.update(table(self.sweep, records))
            return
        for record in records:
            if record.end and self.seen.get(record.number) != record.end.status:
                self.seen[record.number] = record.end.status
                self.say(line(self.sweep, record))

    def say(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, highlight=False)
        elif not self.silent:
            print(text, file=sys.stderr, flush=True)


def line(sweep: Sweep, record: Record) -> str:
    """trial 3: loss 0.412 after 1.2 epochs, 9 s  (optim.lr 0.004, rank 8)"""
    values = ", ".join(f"{column(key)} {shown(value)}" for key, value in record.values.items())
    score = record.score(sweep.metric)
    told = f"{sweep.metric} {written(sweep.metric, score)}" if score is not None else record.status
    why = f"; {record.status}: {record.end.reason}" if record.end and record.end.reason else ""
    return f"trial {record.number}: {told} after {record.epoch:.2g} epochs, {record.seconds:.0f} s  ({values}){why}"


def table(sweep: Sweep, records: list[Record]):
    """A rich table, the best first."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD)
    for head in ("", "trial", sweep.metric, "epochs", "time", *map(column, sweep.space)):
        found.add_column(head, justify="right" if head not in ("", "trial") else "left", no_wrap=True)
    for record in ranked(sweep, records):
        score = record.score(sweep.metric)
        name = str(record.number) if record.of is None else f"{record.number} (of {record.of})"
        cells = [MARKS[record.status], name, written(sweep.metric, score)]
        cells += [f"{record.epoch:.2g}/{record.epochs:.2g}", f"{record.seconds:.0f} s"]
        cells += [shown(record.values.get(key)) for key in sweep.space]
        found.add_row(*cells, style=STYLES[record.status])
    return found
