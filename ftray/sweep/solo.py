"""A trial of one worker, trained step by step in a process that has trained others before it.

The process keeps what every trial needs and none may change: the process group, the base's weights, the prepared data.
A trial gets its own modules over them, its own optimiser and engine, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import socket
import time
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ftray.config.schema import Feature, Lora, Run
from ftray.evaluate.compare import Scores
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from ftray.sweep.task import Task
from ftray.train.track import open_trackers
from ftray.train.worker import Job, Worker


@dataclass
class Bench:
    """What a process keeps between trials."""

    bases: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def prepare(self, device: str) -> None:
        """A process group of this process alone, and the imports of every trial, once.

        What they leave behind is put out of the garbage collector's sight: else each trial's end looks through it.
        """
        import peft  # noqa: F401
        import torch.distributed as dist

        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
        if dist.is_initialized():
            return
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1)


class Solo(Worker):
    """The worker of one trial: `begin`, `advance` to the step of each report, `finish`; and `close`, whatever comes."""

    ASK_S = math.inf  # a sweep's trials are not Ray Train's to warn

    def __init__(self, job: Job, run: Run, folder: RunFolder, bench: Bench, *, metric: str, whole: bool):
        """`whole`: what the sweep compares is all that the run measures, so a trial's end is not judged once more."""
        bench.prepare(job.layout.device)
        self.bench, self.metric, self.whole = bench, metric, whole
        self.rows: list[dict[str, Any]] = []
        self.sinks: list[Any] = []
        self.stack = contextlib.ExitStack()
        super().__init__(job, run, folder, time.monotonic())

    def begin(self) -> None:
        with self.watched() as self.watchdog:
            self._build()
            self.at = self._resume()
        named = self.run.model_copy(update={"name": self.folder.name.replace(".", "-")})
        if self.rank == 0:
            self.sinks = open_trackers(named, self.storage, self.folder.key, self.stack, first=self.at)

    def advance(self, step: int) -> None:
        """Train until `step` updates are done."""
        with self.watched() as self.watchdog:
            while self.at < step:
                self._step(self.at)
                self.at += 1
            if self.keeper.waiting:
                self.keeper.finish()

    def measure(self) -> dict[str, float]:
        """The scores of the held-out rows that the sweep's metric needs, by name."""
        with self.watched() as self.watchdog:
            own = self.metric in self.run.objective.reports
            scores = Scores.of(self.meter.quick()) if own else self.meter.full().scores
        return self._scored(scores)

    def finish(self) -> dict[str, float]:
        """Write the version's files, read them back, and score what was read."""
        with self.watched() as self.watchdog:
            output = self._write_output()
            self._read_back(output)
            if self.whole:
                measured = self.meter.full()
                self._keep("after.json", measured)
                return self._scored(measured.scores)
        return self.measure()

    def _scored(self, scores: Scores) -> dict[str, float]:
        found = scores.values()
        self.log({"kind": "eval", "step": self.at, **found})
        return found

    def flush(self, *more: dict[str, Any]) -> None:
        """Worker 0's rows to storage and to the trackers. A tracker that fails must not end a trial."""
        rows, self.rows = [*self.rows, *more], []
        if self.rank:
            return
        self.folder.append_metrics(rows)
        for sink in list(self.sinks):
            try:
                sink(rows)
            except Exception:  # trackers' servers fail in ways of their own
                self.sinks.remove(sink)

    def close(self) -> None:
        """Give back what the trial held."""
        self.stack.close()
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.destroy()
        for name in ("engine", "model", "learnt", "named", "meter", "keeper", "objective"):
            self.__dict__.pop(name, None)
        gc.collect()

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    # what is shared

    def _device(self):
        import torch

        return torch.device("cuda")

    def _node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""

    def _data(self):
        found = self.bench.data.get(self.job.data_key)
        if found is None:
            found = self.bench.data[self.job.data_key] = super()._data()
        return found

    def _base(self):
        """The base as it was loaded: frozen weights are shared between trials, weights that change are copied."""
        if self.layout.zero == 3 or getattr(self.run.method, "bits", None) or isinstance(self.run.method, Feature):
            return super()._base()  # DeepSpeed and bitsandbytes change the weights' own tensors; a feature head is new
        return self._copied(alone=_leaves_base_alone(self.run.method))

    def _copied(self, *, alone: bool, resident: bool = False):
        """New modules over the process's base, loaded once; `alone`: over the same weights too, which, if `resident`,
        stay on the device."""
        model, layout, bits = self.run.model.model_dump(), self.layout, getattr(self.run.method, "bits", None)
        key = json.dumps([model, layout.dtype, layout.attention, bits], sort_keys=True)
        if key not in self.bench.bases:
            self.bench.bases.clear()  # one base at a time: two may not fit
            self.bench.bases[key] = super()._base()
            if resident and not bits:
                self.bench.bases[key][0].to(self.device)
        base, tokenizer = self.bench.bases[key]
        return copy.deepcopy(base, _shared(base) if alone else {}), tokenizer

    def _report(self, metrics: dict[str, Any]) -> None:
        """Ray Train has no part in this."""


Kind = TypeVar("Kind", bound=Solo)


class Banked(Solo):
    """The worker of a trial that makes its steps together with others (`train/together.py`), over one base.

    `watchdog` is the group's. Everything but the steps is each trial's own.
    """

    @property
    def _steps_plainly(self) -> bool:
        return True

    def _base(self):
        return self._copied(alone=True, resident=True)

    def base_for_all(self):
        """The base once more, for the pass that trials share."""
        base, _ = self._base()
        if self.layout.gradient_checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": False})
        base.config.use_cache = False
        return base


def open_trial(job: Job, bench: Bench, *, metric: str, whole: bool = False, kind: type[Kind] = Solo) -> Kind:  # type: ignore[assignment]
    """The trial's worker; its run is taken from the job."""
    run = Run.model_validate(job.run)
    folder = RunFolder(Storage(run.storage), job.folder)
    return kind(job, run, folder, bench, metric=metric, whole=whole)


def judge(task: Task, bench: Bench) -> dict[str, Any]:
    """Score the base, and the trial's version if asked, as `ftray evaluate` does; scores go to the run's folder."""
    version_key = task.version_key if task.judge == "version" else None
    worker: Solo = open_trial(replace(task.job, version_key=version_key), bench, metric="loss")
    worker.sinks = []
    try:
        worker.evaluate(version_key)
    finally:
        worker.close()
    return {"number": task.number, "searching": False, "ended": "judged", "done": True}


def _leaves_base_alone(method: Any) -> bool:
    """LoRA learns beside the base's weights; PiSSA takes its start out of them."""
    return isinstance(method, Lora) and method.init != "pissa"


def _shared(model: Any) -> dict[int, Any]:
    """A memo for deepcopy that keeps every weight: new modules over the same tensors."""
    return {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
