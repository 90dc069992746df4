"""What is kept of a sweep, so that it can be shown, and continued after anything died.

```text
sweeps/<name>/
    resolved.json            the sweep as it began
    lease/<n>.json           who drives it now
    spent.json               what the search has used of its budget
    trials/<n>/trial.json    the values of trial n, written before it starts
    trials/<n>/end.json      how it ended, written once
    report/                  sweep.html, trials.csv, best.yaml, sweep.json
runs/<name>.<n>/             a trial is a run: metrics, checkpoints, scores, its version's files
```
"""

from __future__ import annotations

import secrets
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from ftray.evaluate.compare import METRICS
from ftray.store import lease
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder

DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True)
class End:
    """How a trial ended: done, stopped (by the others' results or the budget) or failed, with the reason in words."""

    status: str
    reason: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Record:
    """A trial. `of`: the trial whose values it repeats under another seed; None in the search itself."""

    number: int
    values: dict[str, Any]
    seed: int
    of: int | None
    parameters: int
    epochs: float
    end: End | None = None
    reports: tuple[dict[str, Any], ...] = ()

    @property
    def status(self) -> str:
        return self.end.status if self.end else "running" if self.reports else "waiting"

    @property
    def seconds(self) -> float:
        return self.reports[-1]["seconds"] if self.reports else 0.0

    @property
    def epoch(self) -> float:
        return self.reports[-1]["epoch"] if self.reports else 0.0

    def score(self, metric: str) -> float | None:
        """At its end, or else in its last report."""
        if self.end and metric in self.end.scores:
            return self.end.scores[metric]
        return self.reports[-1]["scores"].get(metric) if self.reports else None


class SweepFolder:
    """The folder of one sweep. One driver writes it; a trial's process writes its own end."""

    def __init__(self, storage: Storage, name: str):
        self.storage, self.name = storage, name
        self.key = storage.join("sweeps", name)

    def lease(self) -> AbstractContextManager[lease.Lease]:
        return lease.holding(self.storage, self._at("lease"), what=f"sweep {self.name}", owner={})

    def resolved(self) -> dict[str, Any] | None:
        key = self._at("resolved.json")
        return self.storage.read_json(key) if self.storage.exists(key) else None

    def begin(self, sweep: dict[str, Any], *, fresh: bool) -> None:
        """Start or continue; `fresh` removes what was before, the mark that it began first."""
        if fresh:
            self.storage.remove(self._at("resolved.json"))
        if self.resolved() is None:
            for number in self.numbers():
                self.storage.remove(self.run(number).key)
            for entry in ("trials", "report", "spent.json", "outcome.json"):
                self.storage.remove(self._at(entry))
        born = (self.resolved() or {}).get("born") or secrets.token_hex(8)
        self.storage.write_json(self._at("resolved.json"), {"sweep": sweep, "born": born})

    @property
    def born(self) -> str:
        resolved = self.resolved()
        assert resolved, "begin comes first"
        return resolved["born"]

    def numbers(self) -> list[int]:
        return sorted(int(name) for name in self.storage.list(self._at("trials")) if name.isdecimal())

    def run(self, number: int) -> RunFolder:
        return RunFolder(self.storage, run_name(self.name, number))

    def add(self, record: Record) -> None:
        kept = {name: value for name, value in asdict(record).items() if name not in ("end", "reports")}
        self.storage.write_json(self._trial(record.number, "trial.json"), kept)

    def end(self, number: int, end: End) -> None:
        """The first end stays: a trial that was done before it was stopped is done."""
        if not self.storage.exists(self._trial(number, "end.json")):
            self.storage.write_json(self._trial(number, "end.json"), asdict(end))

    def ended(self, number: int) -> End | None:
        key = self._trial(number, "end.json")
        return End(**self.storage.read_json(key)) if self.storage.exists(key) else None

    def record(self, number: int) -> Record:
        kept = self.storage.read_json(self._trial(number, "trial.json"))
        return Record(**kept, end=self.ended(number), reports=tuple(reports(self.run(number))))

    def records(self) -> list[Record]:
        return [self.record(number) for number in self.numbers() if self._has(number)]

    def spent(self) -> dict[str, float]:
        key = self._at("spent.json")
        return self.storage.read_json(key) if self.storage.exists(key) else {"hours": 0.0, "gpu_hours": 0.0}

    def spend(self, spent: dict[str, float]) -> None:
        self.storage.write_json(self._at("spent.json"), spent)

    def outcome(self) -> dict[str, Any] | None:
        key = self._at("outcome.json")
        return self.storage.read_json(key) if self.storage.exists(key) else None

    def conclude(self, outcome: dict[str, Any]) -> None:
        self.storage.write_json(self._at("outcome.json"), outcome)

    def _has(self, number: int) -> bool:
        return self.storage.exists(self._trial(number, "trial.json"))

    def _trial(self, number: int, name: str) -> str:
        return self._at("trials", str(number), name)

    def _at(self, *parts: str) -> str:
        return self.storage.join(self.key, *parts)


def sign_of(metric: str) -> int:
    """-1 where more is better: a score times its sign is a cost."""
    return 1 if METRICS[metric].best == "low" else -1


def run_name(sweep: str, number: int) -> str:
    """The name of a trial's run folder; no run file can take it, since names have no dots."""
    return f"{sweep}.{number:03d}"


def reports(folder: RunFolder) -> list[dict[str, Any]]:
    """What a trial has told so far, in order: {step, epoch, iteration, scores, seconds, lr, at}."""
    rows = [row for row in folder.metrics() if row.get("kind") == "report"]
    return sorted(rows, key=lambda row: row["step"])
