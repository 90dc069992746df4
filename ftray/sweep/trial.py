"""Where trials run: Tune's actors. `Seat` trains one trial after the other in the same process; `GroupSeat` starts the
worker group of a trial that asks for several workers.

Both report at the same points, and tell first what an earlier process of the trial has told already, so that Tune's
schedulers see a continued trial as they would have seen it undisturbed.
"""

from __future__ import annotations

import json
import math
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune

from ftray.config.schema import Run
from ftray.errors import FtrayError
from ftray.evaluate.compare import METRICS, Scores
from ftray.models import leave_out_bitsandbytes
from ftray.sweep.course import Course, lacking
from ftray.sweep.records import DONE, FAILED, STOPPED, reports
from ftray.sweep.task import OVER_BUDGET, Task


class Seat(tune.Trainable):
    """One process, one trial after the other. A trial that fails is an end like others: the process goes on."""

    def setup(self, config: dict[str, Any], tasks: dict[int, Task] | None = None) -> None:
        from ftray.sweep.solo import Bench

        first = config["task"] if tasks is None else next(iter(tasks.values()))
        if not first.takes_bitsandbytes:
            leave_out_bitsandbytes()
        self.tasks = tasks  # of a population, by number
        self.bench = Bench()
        self.worker: Any = None
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        task = self.task
        if task.judge:
            return self._judge()
        if (row := self.course.again()) is not None:
            return row
        began = time.monotonic()
        while True:
            try:
                return self._train(began)
            except FtrayError as error:
                return self._failed(str(error))
            except Exception as error:  # a trial may fail in any way, and the others must go on
                halved = self._micro()
                self._close()
                if type(error).__name__ == "OutOfMemoryError" and self._micro() != halved:
                    continue
                traceback.print_exc()
                verdict = task.folder.verdict()
                return self._failed(verdict["message"] if verdict else f"{type(error).__name__}: {error}")

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For PBT, which copies it to other trials: weights, moments and the step."""
        from safetensors.torch import save_file

        from ftray.train import state

        meta = {"number": self.task.number, "seconds": self.course.spent, "step": 0}
        if self.worker is not None:
            tensors = {
                name: tensor.clone().contiguous()
                for name, tensor in state.gather(self.worker.engine, self.worker.named)
            }
            save_file(tensors, Path(checkpoint_dir, "state.safetensors"))
            meta["step"] = self.worker.at
        Path(checkpoint_dir, "meta.json").write_text(json.dumps(meta))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        from safetensors.torch import load_file

        from ftray.train import state

        meta = json.loads(Path(checkpoint_dir, "meta.json").read_text())
        if not meta["step"]:
            return
        worker = self._open()
        tensors = load_file(Path(checkpoint_dir, "state.safetensors"))
        state.restore(worker.engine, worker.named, tensors, steps=meta["step"])
        worker.at, self.course.spent = meta["step"], max(self.course.spent, meta["seconds"])
        if meta["number"] != self.task.number:
            lr = worker.schedule.lr
            worker.log({"kind": "copied", "step": worker.at, "from": meta["number"], "lr": lr, "at": time.time()})

    def cleanup(self) -> None:
        self._close()

    def _take(self, config: dict[str, Any]) -> None:
        """Another trial. In a population its number is in its Tune name: PBT gives it the configuration of another."""
        self._close()
        task: Task = self.tasks[int(self.trial_name.rpartition("-")[2])] if self.tasks else config["task"]
        lr = config.get("lr")
        if lr is not None and not task.replays:
            task = replace(task, job=replace(task.job, schedule=replace(task.job.schedule, lr=lr)))
        self.task, self.course = task, Course(task)

    def _open(self):
        from ftray.sweep.solo import open_trial

        if self.worker is None:
            self.worker = open_trial(self.task.job, self.bench, metric=self.task.metric, whole=self.task.whole)
            self.worker.begin()
        return self.worker

    def _train(self, began: float) -> dict[str, Any]:
        """Up to the next report, or to the end."""
        task, worker, course = self.task, self._open(), self.course
        goal = course.goal(worker)
        while worker.at < goal:
            if task.deadline and time.time() > task.deadline:
                return course.over_budget(worker)
            worker.advance(min(goal, worker.at + 1) if task.deadline else goal)
        scores = worker.finish() if worker.at >= worker.schedule.steps else worker.measure()
        course.spent += time.monotonic() - began
        result = course.reached(worker, scores)
        if result.get("ended") == FAILED:
            self._close()
        return result

    def _failed(self, reason: str) -> dict[str, Any]:
        result = self.course.failed(reason, self.worker)
        self._close()
        return result

    def _judge(self) -> dict[str, Any]:
        from ftray.sweep.solo import judge

        return judge(self.task, self.bench)

    def _micro(self) -> Any:
        key = f"{self.task.folder.key}/micro.json"
        storage = self.task.storage
        return storage.read_json(key) if storage.exists(key) else None

    def _close(self) -> None:
        worker, self.worker = getattr(self, "worker", None), None
        if worker is not None:
            worker.close()


class GroupSeat(tune.Trainable):
    """A trial of several workers: Ray Train places them. They end with this process."""

    def setup(self, config: dict[str, Any]) -> None:
        self.task: Task = config["task"]
        self.recorded = reports(self.task.folder)
        self.told = len(self.recorded)
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.began = time.monotonic()
        self.before = self.recorded[-1]["seconds"] if self.recorded else 0.0

    def step(self) -> dict[str, Any]:
        task = self.task
        if self.recorded:
            row = self.recorded.pop(0)
            return task.result(row, replayed=bool(self.recorded))
        if self.thread is None:
            self.thread = threading.Thread(target=self._fit, daemon=True)
            self.thread.start()
        while self.thread.is_alive():
            if task.deadline and time.time() > task.deadline:
                return task.end(STOPPED, OVER_BUDGET)
            if (new := self._next()) is not None:
                return task.result(new)
            time.sleep(0.2)
        if self.error is not None:
            return task.end(FAILED, str(self.error))
        if task.judge:
            return {"number": task.number, "searching": False, "ended": "judged", "done": True}
        if (new := self._next()) is not None:
            return task.result(new)
        return self._last()

    def _fit(self) -> None:
        from ftray.train.group import fit

        job, task = self.task.job, self.task
        run = Run.model_validate(job.run)
        known: Any = SimpleNamespace(data=SimpleNamespace(key=job.data_key), base=job.base)
        checked: Any = SimpleNamespace(layout=job.layout, schedule=job.schedule)
        key = task.version_key if task.judge else None
        try:
            fit(run, task.storage, task.folder, known, checked, silent=True, version_key=key)
        except Exception as error:  # becomes the trial's end, whatever it is
            self.error = error

    def _next(self) -> dict[str, Any] | None:
        """The next report, made of what the workers have logged."""
        rows = sorted((r for r in self.task.folder.metrics() if r["kind"] == "eval"), key=lambda row: row["step"])
        if len(rows) <= self.told or self.task.judge:
            return None
        row = rows[self.told]
        self.told += 1
        scores = Scores.from_json({name: row[name] for name in METRICS if name in row})
        return self._tell(row["step"], scores.values())

    def _last(self) -> dict[str, Any]:
        kept = self.task.storage.read_json(f"{self.task.folder.key}/after.json")
        scores = Scores.from_json(kept["scores"]).values()
        if not math.isfinite(scores.get(self.task.metric, math.nan)):
            return self.task.end(FAILED, lacking(self.task.metric, scores))
        row = self._tell(self.task.job.schedule.steps, scores)
        return {**self.task.result(row), **self.task.end(DONE, scores=scores)}

    def _tell(self, step: int, scores: dict[str, float]) -> dict[str, Any]:
        seconds = self.before + time.monotonic() - self.began
        row = self.task.report(step=step, scores=scores, seconds=seconds, lr=self.task.job.schedule.lr)
        self.task.folder.append_metrics([row])
        return row
