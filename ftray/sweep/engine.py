"""`ftray sweep`, from the driver's side: Ray Tune runs the trials, and the best becomes a version.

Tune holds no state that is not in the sweep's folder: a sweep that is started again reads there which trials ended,
tells the search and the schedulers of them, and takes up the others where their checkpoints are.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ftray.config.sweeping import Pbt, Sweep
from ftray.errors import ClusterError, ConfigError, TrainError
from ftray.evaluate.compare import check_gate
from ftray.evaluate.tasks import check_benchmarks
from ftray.store.lease import Lease
from ftray.store.paths import Storage
from ftray.sweep import result
from ftray.sweep.forecast import Forecast
from ftray.sweep.planning import Planner, check_answers, check_metric, largest
from ftray.sweep.records import DONE, FAILED, STOPPED, End, Record, SweepFolder, sign_of
from ftray.sweep.search import open_search
from ftray.sweep.table import Board
from ftray.sweep.task import Task
from ftray.train import cluster, room
from ftray.train.known import Known
from ftray.train.launch import by_number, connecting, names_versions
from ftray.train.layout import Node

MAY_CHANGE = {"parallel", "budget", "fuse"}
QUIET = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune takes Ctrl-C for a normal end
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no score
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # what a sweep needs to continue is in its own folder
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "1000000",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Outcome:
    """What a sweep left. `best` is the number of its trial; `trials` as in trials.csv; places are files or URIs."""

    sweep: str
    best: int
    values: dict[str, Any]
    metric: str
    score: float
    version: str
    page: str
    best_file: str
    trials: list[dict[str, Any]]
    seconds: float
    resumed: bool


def sweep(asked: Sweep, *, fresh: bool = False, as_json: bool = False) -> Outcome:
    """Search to the end, or go on where it stopped. Raises FtrayError for what the user can fix."""
    with cluster.quiet():
        began = time.monotonic()
        storage = _storage(asked)
        folder = SweepFolder(storage, asked.name)
        with folder.lease() as lease:
            asked = _based(asked, folder, fresh=fresh)
            if not fresh:
                _refuse_other(asked, folder)
                if (kept := folder.outcome()) is not None:
                    return Outcome(**{**kept, "seconds": time.monotonic() - began, "resumed": True})
            ray_ready = connecting(asked.run.scale.address)
            known = Known.of(asked.run, storage, ray_ready=ray_ready)
            ray_ready()
            nodes = _nodes(asked, silent=as_json)
            cluster.check_storage(storage)
            planner = _planner(asked, storage, nodes, known)
            resumed = not fresh and folder.resolved() is not None
            folder.begin(asked.model_dump(mode="json"), fresh=fresh)
            with Board(asked, silent=as_json) as board:
                for line in Forecast.of(planner).lines():
                    board.say(line)
                drive = Drive(asked, folder, planner, lease, board)
                drive.run()
            return _conclude(asked, folder, planner, began=began, resumed=resumed)


def check(asked: Sweep) -> Forecast:
    """The same checks, and what the sweep would take, on the cluster that `scale.address` or RAY_ADDRESS names, else on
    this machine. Nothing is started. Raises FtrayError for what the user can fix."""
    with cluster.quiet():
        storage = _storage(asked)
        asked = _based(asked, SweepFolder(storage, asked.name), fresh=False)
        known = Known.of(asked.run, storage)
        nodes = room.nodes_in_sight(asked.run.scale.model_copy(update={"workers": largest(asked)}), storage)
        return Forecast.of(_planner(asked, storage, nodes, known))


def _storage(asked: Sweep) -> Storage:
    check_metric(asked)
    check_gate(asked.run.evaluate.rules)
    check_benchmarks(asked.run)
    storage = Storage(asked.run.storage)
    storage.probe()
    return storage


def _planner(asked: Sweep, storage: Storage, nodes: list[Node], known: Known) -> Planner:
    """Every trial's plan, checked."""
    check_answers(asked, known.data)
    planner = Planner(asked, storage, nodes)
    planner.remember(asked.run, known)
    planner.check()
    return planner


def _nodes(asked: Sweep, *, silent: bool) -> list[Node]:
    """With room for `parallel` trials where the cluster can grow so far, else for one."""
    workers = largest(asked)
    for trials in sorted({min(asked.parallel or 1, asked.count), 1}, reverse=True):
        try:
            return room.nodes_for(asked.run.scale.model_copy(update={"workers": workers * trials}), silent=silent)
        except ClusterError:
            if trials == 1:
                raise
    raise AssertionError("one trial was tried")


class Drive:
    """The trials of one start, from Tune's calls: which is next, how one ended, when it is enough."""

    def __init__(self, sweep: Sweep, folder: SweepFolder, planner: Planner, lease: Lease, board: Board):
        self.sweep, self.folder, self.planner, self.lease, self.board = sweep, folder, planner, lease, board
        self.search = open_search(sweep)
        self.sign = sign_of(sweep.metric)
        self.records = {record.number: record for record in folder.records()}
        self.earlier = [record for record in self.records.values() if record.end]
        self.live: dict[str, int] = {}  # by Tune's id of the trial
        self.judged = False
        self.compared: Record | None = None  # the trial in whose folder the base's scores are
        self.began, self.before = time.time(), folder.spent()
        self.gpu_seconds, self._spent_at = 0.0, 0.0
        for record in sorted(self.records.values(), key=lambda one: one.number):
            if record.of is None:
                self.search.known(record.number, record.values)
                if record.end:
                    self.search.tell(record.number, self._costs(record))
        self.waiting = [number for number, record in sorted(self.records.items()) if not record.end]
        board.show(self.records.values())

    def run(self) -> None:
        if self.planner.fusing is not None:
            from ftray.sweep import groups

            groups.run(self)
            return
        from ftray.sweep import tuning

        stopping = self.sweep.stopping
        if isinstance(stopping, Pbt):
            for number in range(self.sweep.count):
                if number not in self.records:
                    self._add(self.planner.record(number, self.search.ask(number)))
            self.waiting = []
            if open_ones := [record for record in self._searched() if not record.end]:
                tuning.run_population(self, open_ones, stopping)
        tuning.run(self)

    # what is next

    def next(self, tune_id: str) -> Any:
        """The next task, None while others must end first, False when there is nothing more to do."""
        self.lease.check()
        if len(self.live) >= self.planner.parallel:
            return None
        record = self._next_record()
        if record is not None:
            self.live[tune_id] = record.number
            return self.task(record.number)
        best = result.best(self.sweep, list(self.records.values()))
        if self.live:
            return self._meanwhile(tune_id, best)
        if self.judged:
            return False
        self.judged = True
        if best is None or self._is_judged(best):
            return False
        self._take_over_base(best)
        self.live[tune_id] = best.number
        self.board.say(f"scoring trial {best.number} in full")
        return self.planner.task(best, self.folder, judge="version")

    def task(self, number: int, *, judge: Literal["base", "version"] | None = None) -> Task:
        """What a trial's process is given, now."""
        return self.planner.task(self.records[number], self.folder, deadline=self._deadline(), judge=judge)

    def _meanwhile(self, tune_id: str, best: Record | None) -> Any:
        """While the last trials run, a free seat scores the base, which the best is compared with at the end."""
        if best is None or self.compared is not None or self.planner.workers > 1 or self.planner.fusing is not None:
            return None
        self.compared = best
        self.live[tune_id] = best.number
        return self.planner.task(best, self.folder, judge="base")

    def _take_over_base(self, best: Record) -> None:
        """The base's scores that were made for another trial, where they hold for the best too."""
        if self.compared is None or not self.planner.same_base(self.compared, best):
            return
        storage = self.folder.storage
        there, here = (f"{self.folder.run(record.number).key}/before.json" for record in (self.compared, best))
        if storage.exists(there) and not storage.exists(here):
            storage.write_json(here, storage.read_json(there))

    def _next_record(self) -> Record | None:
        while self.waiting:
            number = self.waiting.pop(0)
            if self.records[number].of is None and self._over_budget():
                self._end(number, End(STOPPED, "the budget was used up"))
                continue
            return self.records[number]
        searched = len(self._searched())
        if searched < self.sweep.count and not self._over_budget():
            return self._add(self.planner.record(searched, self.search.ask(searched)))
        if self.live:
            return None
        for number, (of, seed) in enumerate(result.repeats(self.sweep, self._searched()), start=self.sweep.count):
            if number not in self.records:
                return self._add(self.planner.record(number, of.values, seed=seed, of=of.number))
        return None

    def _add(self, record: Record) -> Record:
        self.folder.add(record)
        self.records[record.number] = record
        self.board.show(self.records.values())
        return record

    def _searched(self) -> list[Record]:
        return [record for record in self.records.values() if record.of is None]

    def _is_judged(self, record: Record) -> bool:
        key = self.folder.run(record.number).key
        return all(self.folder.storage.exists(f"{key}/{name}.json") for name in ("before", "after"))

    # what came

    def told(self, row: dict[str, Any]) -> None:
        """A report, for the table and the budget."""
        number = row["number"]
        if "scores" in row and number in self.records:
            kept = [old for old in self.records[number].reports if old["step"] < row["step"]]
            self.records[number] = replace(self.records[number], reports=(*kept, row))
            self.board.show(self.records.values())
        self._spend()

    def ended(self, tune_id: str, *, error: bool) -> None:
        """Tune is through with a trial: it came to its end, was stopped, or lost its process too often."""
        number = self.live.pop(tune_id, None)
        if number is None or self.records[number].end:
            return
        end = self.folder.ended(number)
        if end is None and error:
            end = End(FAILED, f"its process ended {self.sweep.run.scale.retries + 1} times; see Ray's session folder")
        elif end is None:
            end = End(STOPPED, "others were better at the same point")
        self._end(number, end)

    def _end(self, number: int, end: End) -> None:
        self.folder.end(number, end)
        self.records[number] = replace(self.folder.record(number), end=end)
        self.folder.run(number).set_state(
            status="done" if end.status == DONE else "failed", error=end.reason or None, step=self._steps(number)
        )
        if self.records[number].of is None:
            self.search.tell(number, self._costs(self.records[number]))
        self.board.show(self.records.values())

    def _steps(self, number: int) -> int:
        told = self.records[number].reports
        return told[-1]["step"] if told else 0

    def _costs(self, record: Record) -> list[float] | None:
        score = record.score(self.sweep.metric)
        if score is None or (record.end and record.end.status == FAILED):
            return None
        against = getattr(self.sweep.search, "against", "none")
        second = {"none": [], "parameters": [float(record.parameters)], "seconds": [record.seconds]}[against]
        return [self.sign * score, *second]

    # the budget

    def _spend(self) -> None:
        now = time.time() - self.began
        held = self.planner.held(len(self.live))
        self.gpu_seconds += held * (now - self._spent_at)
        self._spent_at = now
        hours = self.before["hours"] + now / 3600
        self.folder.spend({"hours": hours, "gpu_hours": self.before["gpu_hours"] + self.gpu_seconds / 3600})

    def _deadline(self) -> float | None:
        """When what runs must stop. GPU hours end when all seats are taken until then."""
        budget, ends = self.sweep.budget, []
        if budget.hours:
            ends.append(self.began + (budget.hours - self.before["hours"]) * 3600)
        if budget.gpu_hours and (held := self.planner.held(self.planner.parallel)):
            left = budget.gpu_hours - self.before["gpu_hours"] - self.gpu_seconds / 3600
            ends.append(time.time() + left * 3600 / held)
        return min(ends, default=None)

    def _over_budget(self) -> bool:
        deadline = self._deadline()
        return deadline is not None and time.time() >= deadline


def _conclude(asked: Sweep, folder: SweepFolder, planner: Planner, *, began: float, resumed: bool) -> Outcome:
    records = folder.records()
    best = result.best(asked, records)
    if best is None:
        reasons = {record.end.reason for record in records if record.end and record.end.reason}
        raise TrainError(
            f"sweep {asked.name}: no trial came to its end ({'; '.join(sorted(reasons)) or 'none was started'}); "
            "allow more, or start with a run that trains, then `--fresh`"
        )
    version = result.publish(asked, folder, planner, best, records)
    places = result.write(asked, folder, best, records, version=version)
    score = best.score(asked.metric)
    assert score is not None
    outcome = Outcome(
        sweep=asked.name,
        best=best.number,
        values=best.values,
        metric=asked.metric,
        score=score,
        version=version,
        page=places["page"],
        best_file=places["best"],
        trials=result.rows(asked, records),
        seconds=time.monotonic() - began,
        resumed=resumed,
    )
    folder.conclude(asdict(outcome))
    return outcome


def _based(asked: Sweep, folder: SweepFolder, *, fresh: bool) -> Sweep:
    """The sweep with the versions that it names by number: those that it began with, where it did."""
    before = folder.resolved() if not fresh and names_versions(asked.run) else None
    run = by_number(asked.run, folder.storage, began=before["sweep"]["run"] if before else None)
    return asked.model_copy(update={"run": run})


def _refuse_other(asked: Sweep, folder: SweepFolder) -> None:
    """ConfigError where another sweep of this name was begun."""
    before = folder.resolved()
    if before is None:
        return
    old, new = Sweep.kept(before["sweep"]), asked.model_dump(mode="json")
    changed = [key for key in new if key not in MAY_CHANGE and old.get(key) != new[key]]
    if changed:
        problems = [(key, "is not what this sweep was begun with") for key in changed]
        way_out = f"`--fresh` starts sweep {asked.name} over, another name keeps both"
        raise ConfigError(asked.name, [*problems, ("", way_out)])


def silence() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
