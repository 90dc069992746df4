"""What a process that trains a trial is given, as plain data, and the reports and ends that it gives back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from ftray.sweep.records import End, SweepFolder
from ftray.train.worker import Job

OVER_BUDGET = "the budget was used up"


@dataclass(frozen=True)
class Task:
    """What a seat is given, as plain data. `every`: steps between reports; `sign`: -1 where more is better.

    `judge`: nothing is trained; the base is scored as `ftray evaluate` does it, and the trial's version after it.
    """

    sweep: str
    number: int
    job: Job
    every: int
    steps_per_epoch: float
    metric: str
    sign: int
    searching: bool
    deadline: float | None = None  # seconds since 1970
    judge: Literal["base", "version"] | None = None
    whole: bool = False  # all that the run measures is what the sweep compares
    takes_bitsandbytes: bool = True  # one of the sweep's trials does; a process trains many
    replays: bool = True  # PBT takes up a trial where it was, and is not told again

    @property
    def storage(self) -> Storage:
        return Storage(self.job.run["storage"])

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.storage, self.job.folder)

    @property
    def version_key(self) -> str:
        return f"{self.folder.key}/output"

    def report(self, *, step: int, scores: dict[str, float], seconds: float, lr: float) -> dict[str, Any]:
        return {
            "kind": "report",
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "iteration": -(-step // self.every),
            "scores": scores,
            "seconds": seconds,
            "lr": lr,
            "at": time.time(),
        }

    def result(self, row: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A report as Tune's result. `cost` is what its schedulers compare: less is better."""
        return {
            **row,
            "number": self.number,
            "searching": self.searching,
            "cost": self.sign * row["scores"][self.metric],
            **more,
        }

    def end(self, status: str, reason: str = "", scores: dict[str, float] | None = None) -> dict[str, Any]:
        SweepFolder(self.storage, self.sweep).end(self.number, End(status, reason, scores or {}))
        return {"number": self.number, "searching": self.searching, "ended": status, "reason": reason, "done": True}
