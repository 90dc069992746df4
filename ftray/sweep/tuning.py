"""Ray Tune, as far as a sweep needs it: a searcher that asks the drive, and callbacks that tell it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from ftray.config.sweeping import Pbt
from ftray.sweep.engine import silence
from ftray.sweep.records import Record
from ftray.sweep.stopping import Rungs, population
from ftray.sweep.trial import GroupSeat, Seat

if TYPE_CHECKING:
    from ftray.sweep.engine import Drive

PBT_TRIAL = "trial"


class Asking(Searcher):
    """Tune's view of the search: it asks when a seat is free."""

    def __init__(self, drive: Drive):
        super().__init__()
        self.drive = drive

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes down what it runs, to restore it; this is never restored."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        task = self.drive.next(trial_id)
        return Searcher.FINISHED if task is False else None if task is None else {"task": task}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.drive.ended(trial_id, error=error)

    def save(self, checkpoint_path: str) -> None:
        """A sweep continues from its own folder."""

    def restore(self, checkpoint_path: str) -> None:
        """A sweep continues from its own folder."""


class Telling(tune.Callback):
    """Reports and, where no searcher hears of them, ends."""

    def __init__(self, drive: Drive, *, ends: bool):
        self.drive, self.ends = drive, ends

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.ends:
            self.drive.live[trial.trial_id] = _number(trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any):
        self.drive.told({**result, "number": _number(trial)})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.ends:
            self.drive.ended(trial.trial_id, error=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.ends and trial.status == "ERROR":
            self.drive.ended(trial.trial_id, error=True)


def run(drive: Drive) -> None:
    """Everything that is left to do, trial by trial."""
    scheduler = Rungs(drive.sweep, drive.earlier, sign=drive.sign)
    _fit(drive, scheduler, search=Asking(drive), samples=-1, ends=False)


def run_population(drive: Drive, records: Sequence[Record], stopping: Pbt) -> None:
    """PBT over all trials together; those that find no seat are paused and take turns."""
    deadline = drive._deadline()
    tasks = [drive.planner.task(record, drive.folder, deadline=deadline) for record in records]
    points = [{"number": task.number, "lr": task.job.schedule.lr} for task in tasks]
    search = BasicVariantGenerator(points_to_evaluate=points)
    space = {"number": tune.choice([task.number for task in tasks]), "lr": tune.uniform(0, 1)}  # each is a point
    scheduler = population(drive.sweep, stopping)
    _fit(drive, scheduler, search=search, samples=len(points), ends=True, space=space, tasks=tasks)


def _fit(
    drive: Drive, scheduler: Any, *, search: Any, samples: int, ends: bool, space: dict | None = None, tasks=()
) -> None:
    silence()
    planner = drive.planner
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(planner.parallel)  # else the second waits until the first has begun
    group = planner.workers > 1
    if group:  # Ray Train reserves what the workers need
        resources = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    else:
        bundle = {"CPU": planner.cpus} | ({"GPU": planner.gpus} if planner.gpus else {})
        resources = tune.PlacementGroupFactory([bundle])
    seat: Any = GroupSeat if group else Seat
    if tasks:
        seat = tune.with_parameters(seat, tasks={task.number: task for task in tasks})
    tuner = tune.Tuner(
        tune.with_resources(seat, resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=samples,
            reuse_actors=not group,
            trial_name_creator=lambda trial: f"{PBT_TRIAL}-{_number(trial)}",
            trial_dirname_creator=lambda trial: f"{PBT_TRIAL}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=drive.folder.storage.uri(f"{drive.folder.key}/ray"),
            callbacks=[Telling(drive, ends=ends)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=drive.sweep.run.scale.retries),
            verbose=0,
        ),
    )
    tuner.fit()
    drive.folder.storage.remove(f"{drive.folder.key}/ray")


def _number(trial: Any) -> int:
    """PBT gives a trial the configuration of another, so its name counts once it has one."""
    if trial.custom_trial_name:
        return int(trial.custom_trial_name.rpartition("-")[2])
    return trial.config["number"] if "number" in trial.config else trial.config["task"].number
