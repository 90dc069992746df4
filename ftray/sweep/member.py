"""A process of a worker group that trains many trials together: they come, report, are told to go, and end.

Every process of the group is given the same orders, makes the same steps and comes to the same results; the first one
writes and tells them.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftray.errors import FtrayError
from ftray.models import leave_out_bitsandbytes
from ftray.sweep.course import Course
from ftray.sweep.records import reports
from ftray.sweep.solo import Banked, Bench, judge, open_trial
from ftray.sweep.task import Task


@dataclass(frozen=True)
class News:
    """What a group has to tell: results, as of `Seat.step`; and once, when it has been measured, tokens a second by the
    number of trials in one pass."""

    results: list[dict[str, Any]]
    pace: dict[int, float] | None = None


class Member:
    """A Ray actor, or plain in tests. `tokens`: of one pass, at most (train/together.py)."""

    def __init__(self, rank: int, *, tokens: int, takes_bitsandbytes: bool):
        from ftray.train.cluster import stand_still

        stand_still()
        if not takes_bitsandbytes:
            leave_out_bitsandbytes()
        self.rank, self.tokens = rank, tokens
        self.bench = Bench()
        self.courses: dict[int, Course] = {}
        self.workers: dict[int, Banked] = {}
        self.group: Any = None
        self.paced = False

    # how the group meets

    def address(self) -> str:
        """Where the others find this process, host and port."""
        import ray.util

        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"

    def meet(self, address: str, *, world: int, device: str) -> None:
        if world == 1:
            return  # a process alone makes its own group
        import torch.distributed as dist

        from ftray.train.meeting import name_interface

        name_interface()
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=self.rank, world_size=world)

    # what it does

    def work(self, leave: Sequence[int], enter: Sequence[Task]) -> News:
        """Let trials go and come, then train until one or more have something to tell."""
        for number in leave:
            self._release(number)
        results = [result for task in enter for result in self._enter(task)]
        while not results and self.workers:
            results = self._advance()
        return News(results, self._pace())

    def judge(self, task: Task) -> News:
        """Score a trial's version in full, once all have ended."""
        for number in list(self.workers):
            self._release(number)
        self.group = None
        return News([judge(task, self.bench)])

    def _pace(self) -> dict[int, float] | None:
        if self.paced or self.group is None or not self.group.pace.settled(len(self.group.adapters)):
            return None
        self.paced = True
        return dict(self.group.pace.best)

    def _enter(self, task: Task) -> list[dict[str, Any]]:
        """What the trial told before; or that it cannot begin."""
        self.bench.prepare(task.job.layout.device)
        course = self.courses[task.number] = Course(task, self._agreed_reports(task), leads=self.rank == 0)
        began = time.monotonic()
        try:
            self._open(task)
        except FtrayError as error:
            return [self._failed(task.number, str(error))]
        except Exception as error:
            if self._world() > 1:
                raise  # the others may not have met it, so the group begins anew
            traceback.print_exc()
            return [self._failed(task.number, f"{type(error).__name__}: {error}")]
        course.spent += time.monotonic() - began
        told = []
        while (row := course.again()) is not None:
            told.append(row)
        return told

    def _open(self, task: Task) -> None:
        from ftray.train.together import Together

        worker = open_trial(task.job, self.bench, metric=task.metric, whole=task.whole, kind=Banked)
        self.workers[task.number] = worker
        worker.begin()
        if self.group is None:
            self.group = Together(worker.base_for_all(), tokens=self.tokens, device=worker.device)
        self.group.enter(worker)

    def _advance(self) -> list[dict[str, Any]]:
        """A step of those that have not come to their next report; what those tell that have."""
        stepping = {n: w for n, w in self.workers.items() if w.at < self.courses[n].goal(w)}
        if self._too_late(stepping):
            return [self._ended(n, self.courses[n].over_budget(w)) for n, w in list(self.workers.items())]
        results = self._step(stepping) if stepping else []
        for number, worker in list(self.workers.items()):
            course = self.courses[number]
            if number not in stepping or worker.at >= course.goal(worker):
                results.append(self._report(number, course, worker))
        return results

    def _step(self, stepping: dict[int, Banked]) -> list[dict[str, Any]]:
        """One step of these trials; what failed."""
        workers = list(stepping.values())
        began = time.monotonic()
        with workers[0].watched() as watchdog:
            for worker in workers:
                worker.watchdog = watchdog
            problems = self.group.step(workers, [worker.at for worker in workers])
        share = (time.monotonic() - began) / len(workers)
        failed = []
        for (number, worker), problem in zip(stepping.items(), problems, strict=True):
            self.courses[number].spent += share
            if problem is None:
                worker.at += 1
            else:
                failed.append(self._failed(number, str(problem)))
        return failed

    def _report(self, number: int, course: Course, worker: Banked) -> dict[str, Any]:
        began = time.monotonic()
        try:
            if worker.keeper.waiting:
                worker.keeper.finish()
            scores = worker.finish() if worker.at >= worker.schedule.steps else worker.measure()
        except FtrayError as error:
            return self._failed(number, str(error))
        course.spent += time.monotonic() - began
        result = course.reached(worker, scores)
        return self._ended(number, result) if result.get("ended") else result

    def _failed(self, number: int, reason: str) -> dict[str, Any]:
        return self._ended(number, self.courses[number].failed(reason, self.workers.get(number)))

    def _ended(self, number: int, result: dict[str, Any]) -> dict[str, Any]:
        self._release(number)
        return result

    def _release(self, number: int) -> None:
        self.courses.pop(number, None)
        if (worker := self.workers.pop(number, None)) is not None:
            if self.group is not None:
                self.group.leave(worker)
            worker.close()

    def _too_late(self, stepping: dict[int, Banked]) -> bool:
        """Whether the budget has run out, by the first process's clock."""
        from ftray.train.keeper import agreed

        deadline = min((self.courses[n].task.deadline or float("inf") for n in stepping), default=float("inf"))
        if deadline == float("inf"):
            return False
        return bool(agreed(time.time() > deadline))

    def _agreed_reports(self, task: Task) -> list[dict[str, Any]]:
        from ftray.train.keeper import agreed

        return agreed(reports(task.folder) if self.rank == 0 else None)

    def _world(self) -> int:
        import torch.distributed as dist

        return dist.get_world_size()
