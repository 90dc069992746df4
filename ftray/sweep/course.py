"""One trial's way to its end: which step it reports at next, what it tells there, and how it ends.

A trial that is continued first tells again what an earlier process told, so that schedulers see it as they would have
seen it undisturbed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftray.sweep.records import DONE, FAILED, STOPPED, reports
from ftray.sweep.task import OVER_BUDGET, Task

if TYPE_CHECKING:  # torch
    from ftray.sweep.solo import Solo


class Course:
    """`spent`: seconds that went into the trial; whoever trains it adds to them."""

    def __init__(self, task: Task, told: list[dict[str, Any]] | None = None, *, leads: bool = True):
        """`told`: what earlier processes reported; None: what the trial's folder has. `leads`: this is the one of the
        trial's processes that writes how it ended."""
        found = reports(task.folder) if told is None else told
        self.task, self.leads = task, leads
        self.recorded = list(found) if task.replays else []
        self.told = found[-1]["step"] if self.recorded else 0
        self.spent = found[-1]["seconds"] if found else 0.0

    def again(self) -> dict[str, Any] | None:
        """The next of the reports that were made before, as a result."""
        if not self.recorded:
            return None
        row = self.recorded.pop(0)
        return self.task.result(row, replayed=bool(self.recorded))

    def goal(self, worker: Solo) -> int:
        """The step of its next report; it may have been reached, where a process died before it told."""
        every, told = self.task.every, self.told if self.task.replays else worker.at
        return min(worker.schedule.steps, told // every * every + every)

    def reached(self, worker: Solo, scores: Mapping[str, float]) -> dict[str, Any]:
        """The result of a trial that came to a report, or to its end; it has failed where its score is no number."""
        task, last = self.task, worker.at >= worker.schedule.steps
        if not math.isfinite(scores.get(task.metric, math.nan)):
            return self.failed(f"step {worker.at}: {lacking(task.metric, scores)}", worker)
        row = task.report(step=worker.at, scores=dict(scores), seconds=self.spent, lr=worker.schedule.lr)
        worker.flush(row)
        self.told = worker.at
        ended = self._end(DONE, scores=dict(scores)) if last else {}
        return {**task.result(row), **ended}

    def failed(self, reason: str, worker: Solo | None = None) -> dict[str, Any]:
        if worker is not None:
            worker.flush()
        return self._end(FAILED, reason)

    def over_budget(self, worker: Solo) -> dict[str, Any]:
        worker.flush()
        return self._end(STOPPED, OVER_BUDGET)

    def _end(self, status: str, reason: str = "", scores: dict[str, float] | None = None) -> dict[str, Any]:
        if self.leads:
            return self.task.end(status, reason, scores)
        return {"number": self.task.number, "ended": status}


def lacking(metric: str, scores: Mapping[str, float]) -> str:
    """Why a trial has no score. A score that is not finite may have been left out already."""
    others = ", ".join(name for name in scores if name != metric)
    return f"the held-out {metric} is not a number; lower optim.lr" + (f", or compare by {others}" if others else "")
