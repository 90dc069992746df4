"""Benchmarks of lm-evaluation-harness over the live model. Only where a run names some: lm_eval is an extra.

Every worker runs the whole harness and computes its share of each kind of request; the answers are put together before
anything is scored, so all workers have the same scores, whatever their number.
"""

from __future__ import annotations

import copy
import logging
import random
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lm_eval
import numpy as np
import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM

from ftray.config.schema import LM_EVAL, LmEval
from ftray.errors import TrainError
from ftray.evaluate.tasks import manager_of
from ftray.objectives.rollout import shared

BEAT_S = 1.0
FETCH_S = 1800.0  # a data set that is not there by then hangs, as the watchdog says of anything else
FETCHING = (
    "its data set is not on {host} and cannot be fetched: fetch it there first, with a network and without "
    "HF_HUB_OFFLINE, or name its files by absolute paths in {file}"
)
LOADING = "look at {file} on {host}, or leave the task out"
NOWHERE = "lm_eval knows no such task on {host}; {needed} must be on every node"
SCORING = "where that is the task's own, mend it there; else leave the task out"


def benchmarks(
    model: Any,
    tokenizer: Any,
    *,
    asked: LmEval,
    batch_size: int,
    computing: Callable[[], AbstractContextManager],
    beat: Callable[[], None],
) -> dict[str, float]:
    """Scores by lm_eval/<task>/<metric>, of the filters that a task has by lm_eval/<task>/<metric>/<filter>.

    Collective: all workers call it. `computing()`: what a forward stands in. TrainError where a task cannot be had, or
    scores no answers.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    harness = _Harness(_Watched(model, computing=computing, beat=beat), tokenizer, batch_size)
    with _random_state_kept():
        tasks = _Fetched(asked, beat)
        try:
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=list(asked.tasks),
                task_manager=tasks,
                num_fewshot=asked.few_shot,
                limit=asked.limit,
                apply_chat_template=asked.chat,
                bootstrap_iters=0,
                log_samples=False,
            )
        except Exception as error:  # tasks have templates and Python of their own, which lm_eval runs
            if isinstance(error, TrainError) or error in (harness.failed, tasks.failed):
                raise
            raise TrainError(_told(", ".join(asked.tasks), error, SCORING)) from error
    return shared([found and _by_name(found)])[0]  # on each node only the first worker is given them


class _Watched:
    """The model as the harness calls it: in the run's own precision, and with a sign of life at each call."""

    def __init__(self, model: Any, *, computing: Callable[[], AbstractContextManager], beat: Callable[[], None]):
        self._model, self._computing, self._beat = model, computing, beat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._beat()
        with self._computing():
            return self._model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._beat()
        with self._computing():
            return self._model.generate(*args, **kwargs)


class _Fetched:
    """lm_eval's manager of tasks. They load their data as they are made: it fetches them with a sign of life."""

    failed: Exception | None = None
    """How another worker was lost meanwhile: no fault of a task."""

    def __init__(self, asked: LmEval, beat: Callable[[], None]):
        self._asked, self._beat = asked, beat
        with _beating(beat):
            self._manager = manager_of(asked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def load(self, names: Sequence[str]) -> Any:
        """Collective: where one worker cannot have a task, TrainError on all, which else would wait for it."""
        loaded, problem = None, None
        with _beating(self._beat):
            try:
                parts = [part for name in names for part in self._parts(name)]
                loaded = self._manager.load(parts)
            except TrainError as error:
                problem = str(error)
            except ValueError as error:  # a task is in two of them
                problem = _told(", ".join(names), error, "leave one out")
        try:
            problems = [one for one in shared([problem]) if one]
        except Exception as error:
            self.failed = error
            raise
        if problems:
            raise TrainError(problems[0])
        return loaded

    def _parts(self, name: str) -> list[Any]:
        """A group, or tasks."""
        try:
            found = self._manager.load([name])
        except Exception as error:  # whatever its data set's reader says, or Python of its own
            entry, host = self._manager.task_index.get(name), socket.gethostname()
            if entry is None:
                needed = f"evaluate.lm_eval.folder: {self._asked.folder}" if self._asked.folder else "the same lm_eval"
                told = NOWHERE.format(host=host, needed=needed)
                raise TrainError(f"evaluate.lm_eval.tasks: {name}: {told}") from error
            way_out = FETCHING if isinstance(error, OSError) else LOADING
            way_out = way_out.format(file=entry.yaml_path or "its file", host=host)
            raise TrainError(_told(name, error, way_out)) from error
        return [found["groups"][name]] if name in found.get("groups", {}) else list(found["tasks"].values())


class _Harness(HFLM):
    """lm_eval's own reading of a Hugging Face model, each worker asked for its share."""

    failed: Exception | None = None
    """What the model or another worker could not do: no fault of a task."""

    def __init__(self, model: _Watched, tokenizer: Any, batch_size: int):
        tokenizer = copy.deepcopy(tokenizer)  # it may be given another padding token
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
        return self._together(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list:
        return self._together(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:
        return self._together(super().generate_until, requests)

    def _together(self, ask: Callable[..., list], requests: list) -> list:
        mine = requests[dist.get_rank() :: dist.get_world_size()]
        try:
            return shared(ask(mine, disable_tqdm=True) if mine else [])
        except Exception as error:
            self.failed = error
            raise


def _told(tasks: str, error: Exception, way_out: str) -> str:
    """With the place that raised it: a task's Python, lm_eval's, or that of a library."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
    return f"evaluate.lm_eval.tasks: {tasks}: {said}; {way_out}"


def _by_name(found: Mapping[str, Any]) -> dict[str, float]:
    """Of groups and of their members."""
    return {name: value for task, values in found["results"].items() for name, value in _scores(task, values).items()}


def _scores(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """From lm_eval's names, "acc,none" and "acc_stderr,none"."""
    found = {}
    for key, value in values.items():
        metric, _, kept_by = key.partition(",")
        if kept_by and not metric.endswith("_stderr") and isinstance(value, int | float):
            found[f"{LM_EVAL}{task}/{metric}{'' if kept_by == 'none' else f'/{kept_by}'}"] = float(value)
    return found


@contextmanager
def _beating(beat: Callable[[], None]) -> Iterator[None]:
    """Inside, a thread gives a sign of life every second, for FETCH_S."""
    done, end = threading.Event(), time.monotonic() + FETCH_S

    def work() -> None:
        beat()
        while not done.wait(BEAT_S) and time.monotonic() < end:
            beat()

    thread = threading.Thread(target=work, name="ftray-fetching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The harness seeds every generator there is."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
