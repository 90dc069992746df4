"""The worker group of a run: placed by Ray Train, followed to its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ftray import errors
from ftray.config.schema import Run
from ftray.errors import Lost, Stopped, TrainError
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from ftray.train.known import Known
from ftray.train.layout import Layout
from ftray.train.progress import Display, Events, Follower
from ftray.train.schedule import Schedule
from ftray.train.track import open_trackers
from ftray.train.worker import Job, entry

# For the cluster to place the workers. Ray Train counts a lost node's room for up to 20 s, so a run with a range of
# workers first asks for too many; one with a fixed number can only wait.
PLACED_S, PLACED_IN_RANGE_S = 60.0, 10.0
RESIZE_S = 60.0  # between looks for room for more workers; growing repeats the steps since the last checkpoint


class Checked(Protocol):
    """What the group needs of a checked run."""

    @property
    def layout(self) -> Layout: ...
    @property
    def schedule(self) -> Schedule: ...


def fit(
    run: Run,
    storage: Storage,
    folder: RunFolder,
    known: Known,
    checked: Checked,
    *,
    silent: bool,
    version_key: str | None = None,
) -> None:
    """Place the workers and follow them to the end. Ray restarts the group after a lost worker or node.

    Raises what a worker left as its verdict, Lost when the retries are used up, TrainError when memory was too little.
    """
    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ftray.train.meeting import Meeting

    # With the driver: Ray puts an actor that asks for nothing on any node, and with that node the log would end.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = ray.remote(num_cpus=0, max_restarts=-1)(Events).options(scheduling_strategy=here).remote()
    job = Job(
        run=for_workers(run, storage),
        layout=checked.layout,
        schedule=checked.schedule,
        data_key=known.data.key,
        base=known.base,
        born=folder.state()["born"],
        folder=folder.name,
        version_key=version_key,
        events=events,
    )
    resources = {"CPU": checked.layout.cpus_per_worker}
    if checked.layout.gpus_per_worker:
        resources["GPU"] = checked.layout.gpus_per_worker
    trainer = TorchTrainer(
        entry,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=run.scale.workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=checked.layout.device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # A name of its own for each start: recovery is ours, by the checkpoints of the run.
            name=f"{run.name}-{int(time.time() * 1000)}",
            storage_path=storage.uri(f"{folder.key}/ray"),
            failure_config=FailureConfig(max_failures=run.scale.retries),
        ),
        torch_config=Meeting(backend="nccl" if checked.layout.device == "cuda" else "gloo"),
    )
    # A worker that does not even answer Ray (a frozen machine) is given up as a hang is.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{min(600, max(30, run.scale.hang_timeout_s)):g}"
    placed_s = PLACED_IN_RANGE_S if isinstance(run.scale.workers, tuple) else PLACED_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{placed_s:g}"
    with ExitStack() as stack:
        first = max((row.get("step", 0) for row in folder.metrics() if row.get("kind") == "checkpoint"), default=0)
        sinks = open_trackers(run, storage, folder.key, stack, first=first)
        display = stack.enter_context(Display(checked.schedule.steps, silent=silent))
        follower = stack.enter_context(Follower(events, folder, sinks=[display.show, *sinks]))
        try:
            with _on_sigterm(follower):
                trainer.fit()
        except TrainingFailedError as error:
            _raise_verdict(folder)
            raise _last_words(run, error) from error
    _raise_verdict(folder)
    storage.remove(f"{folder.key}/ray")
    if follower.stopped_at is not None:
        raise Stopped(f"run {run.name} stopped after step {follower.stopped_at}; the same command resumes it")


@contextmanager
def _on_sigterm(follower: Follower) -> Iterator[None]:
    """The first SIGTERM asks the workers for a checkpoint and their end; a second one ends this process at once."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def handle(number: int, frame: object) -> None:
        if follower.stop_asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        follower.ask_to_stop()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def for_workers(run: Run, storage: Storage) -> dict[str, Any]:
    """The run with absolute paths: workers do not start in the driver's folder."""
    values = run.model_dump(mode="json")
    values["storage"] = storage.root
    if Path(run.model.base).expanduser().is_dir():
        values["model"]["base"] = _absolute(run.model.base)
    if isinstance(run.evaluate.forgetting, str):
        values["evaluate"]["forgetting"] = _absolute(run.evaluate.forgetting)
    if run.evaluate.lm_eval.folder:
        values["evaluate"]["lm_eval"]["folder"] = _absolute(run.evaluate.lm_eval.folder)
    for reward in values["objective"].get("rewards", []):
        if reward["kind"] == "python":
            file, _, name = reward["function"].rpartition(":")
            reward["function"] = f"{_absolute(file)}:{name}"
    return values


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _raise_verdict(folder: RunFolder) -> None:
    if verdict := folder.verdict():
        raise getattr(errors, verdict["kind"])(verdict["message"])


def _last_words(run: Run, error: BaseException) -> TrainError:
    """What ended the last try. Too little memory will be too little again; anything else may go better elsewhere."""
    reason = _reason(error)
    kind: type[TrainError] = Lost
    if "out of memory" in reason.lower() or "OutOfMemory" in reason:
        reason = f"a node or a GPU ran out of memory; lower optim.micro_batch_size or data.max_length ({reason})"
        kind = TrainError
    times = f"{run.scale.retries + 1} times" if run.scale.retries else "once"
    return kind(
        f"run {run.name} failed {times}, last with: {reason}\n"
        "Its checkpoints are kept: the same command resumes it. Workers' logs are in Ray's session folder, logs/train."
    )


def _reason(error: BaseException) -> str:
    """One line: of a traceback, Ray's too, the last, which has the error; of anything else the first."""
    failures = getattr(error, "worker_failures", None)
    deepest = next(iter(failures.values())) if failures else getattr(error, "controller_failure", error)
    lines = [line for line in str(deepest).splitlines() if line.strip()] or [type(deepest).__name__]
    return (lines[-1] if any(line.startswith('  File "') for line in lines) else lines[0]).strip()
