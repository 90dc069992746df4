"""What the driver does with a worker's rows: keep them, show them, pass them to trackers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ftray.store.runs import RunFolder

Sink = Callable[[list[dict[str, Any]]], None]
POLL_S = 0.5
NOTE_EVERY_S = 5.0
SHOWN = ("reward", "kl", "loss")
LINE_EVERY_S = 10.0  # where the output is no terminal


class Events:
    """An actor without a CPU of its own between driver and workers: rows one way, the word to stop the other way."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.stopping = False

    def put(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        rows, self.rows = self.rows, []
        return rows

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping


class Follower:
    """Fetches rows from the actor in a thread, until `with` ends."""

    def __init__(self, events, folder: RunFolder, *, sinks: list[Sink]):
        self.events, self.folder, self.sinks = events, folder, sinks
        self.stopped_at: int | None = None  # step of the checkpoint that workers left when they were asked to stop
        self._stop_asked = threading.Event()
        self._step = 0
        self._noted = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="ftray-follower", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def ask_to_stop(self) -> None:
        """Workers shall take a checkpoint and end. Safe in a signal handler."""
        self._stop_asked.set()

    @property
    def stop_asked(self) -> bool:
        return self._stop_asked.is_set()

    def _follow(self) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        last, asked, told = False, None, False
        while not last:
            last = self._stop.wait(POLL_S)
            if not ray.is_initialized():
                return
            if self.stop_asked and not told:
                told = True
                self.events.stop.remote()
                self._deliver(self.sinks, [{"kind": "phase", "text": "asked to stop: a checkpoint first"}])
            asked = asked or self.events.take.remote()
            try:
                rows, asked = ray.get(asked, timeout=20), None
            except GetTimeoutError:  # a busy machine: the same answer is waited for again
                continue
            except RayError:  # the actor's process died; it starts again without the rows that it held
                asked = None
                continue
            self.stopped_at = next((row["step"] for row in rows if row["kind"] == "stopped"), self.stopped_at)
            if rows:
                self._deliver([self.folder.append_metrics, partial(self._note_step, now=last)], rows)
                self.sinks = self._deliver(self.sinks, rows)

    def _deliver(self, takers: list[Sink], rows: list[dict[str, Any]]) -> list[Sink]:
        """The takers that took the rows; one that fails is told of, and is not asked again if it is a sink."""
        well = []
        for take in takers:
            try:
                take(rows)
                well.append(take)
            except Exception as error:  # trackers' servers fail in ways of their own; the run must go on without them
                print(f"warning: metrics not kept by {take!r}: {error}", file=sys.stderr)
        return well

    def _note_step(self, rows: list[dict[str, Any]], *, now: bool) -> None:
        """How far the run is, for `ftray runs list`; seldom, since storage may be far away."""
        self._step = max([self._step, *(row["step"] for row in rows if row["kind"] == "train")])
        if now or time.monotonic() - self._noted > NOTE_EVERY_S:
            self._noted = time.monotonic()
            self.folder.set_state(step=self._step)


class Display:
    """A live line in a terminal, plain lines elsewhere, nothing for `--json`."""

    def __init__(self, steps: int, *, silent: bool = False):
        self.steps = steps
        self.silent = silent
        self.terminal = sys.stderr.isatty() and not silent
        self._said = 0.0
        self._workers = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Display:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self.steps, numbers="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            kind = row["kind"]
            if kind == "train":
                self._step(row)
            elif kind == "eval":
                self._say(f"step {row['step']}: held-out {_shown(row)}")
            elif kind == "started":
                how = f"resumed after step {row['step']}" if row["resumed"] else "workers ready"
                self._say(f"{self._change(row['workers'])}{how} ({row['seconds']:.0f} s)")
                self._workers = row["workers"]
            elif kind in ("phase", "warning"):
                self._say(row["text"])

    def _step(self, row: dict[str, Any]) -> None:
        numbers = f"{_shown(row)}  {row['tokens_per_s']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, description="training", completed=row["step"], numbers=numbers)
        elif time.monotonic() - self._said > LINE_EVERY_S or row["step"] == self.steps:
            self._said = time.monotonic()
            self._say(f"step {row['step']}/{self.steps}  {numbers}")

    def _change(self, workers: int) -> str:
        if not self._workers:
            return ""
        if workers > self._workers:
            return f"room for {workers} workers; "
        return f"a worker was lost, {workers} go on; " if workers < self._workers else "a worker was lost; "

    def _say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif not self.silent:
            print(text, file=sys.stderr, flush=True)


def _shown(row: dict[str, Any]) -> str:
    """What counts of a row, e.g. "loss 1.2345"."""
    return "  ".join(f"{name} {row[name]:.4f}" for name in SHOWN if name in row)
