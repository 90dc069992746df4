"""When a trial is stopped before its end: Ray Tune's schedulers, told of what earlier starts of the sweep saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from ftray.config.sweeping import Asha, Choice, Grid, Median, Pbt, Sweep
from ftray.sweep.records import Record

COST, LEAST = "cost", "min"


@dataclass(frozen=True)
class Known:
    """A trial of an earlier start, as far as a scheduler looks at one."""

    trial_id: str


class Rungs(FIFOScheduler):
    """ASHA or the median rule over the trials of the search; what repeats or judges them is left alone."""

    def __init__(self, sweep: Sweep, known: Sequence[Record] = (), *, sign: int = 1):
        super().__init__()
        self.inner: Any = _scheduler(sweep)
        if self.inner is not None:
            self._relive(known, sweep.metric, sign)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if self.inner is not None:
            self.inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self.inner is None or not result.get("searching") or not math.isfinite(result.get("cost", math.nan)):
            return TrialScheduler.CONTINUE
        decision = self.inner.on_trial_result(tune_controller, trial, result)
        # It went on from there once, so it goes on: the decision was made with what was known then.
        return TrialScheduler.CONTINUE if result.get("replayed") else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Every report has been told already; Tune's rungs would take a last one twice."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A failed trial's reports stay."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """A trial that never ran told nothing."""

    def _relive(self, known: Sequence[Record], metric: str, sign: int) -> None:
        """The reports of ended trials in the order they came."""
        trials = {record.number: Known(f"known-{record.number}") for record in known}
        for trial in trials.values():
            self.inner.on_trial_add(None, trial)
        rows = [(row["at"], record.number, row) for record in known for row in record.reports]
        for _, number, row in sorted(rows, key=lambda one: one[:2]):
            result = {"training_iteration": row["iteration"], "iteration": row["iteration"]}
            cost = sign * row["scores"].get(metric, math.nan)
            if math.isfinite(cost):
                self.inner.on_trial_result(None, trials[number], {**result, "cost": cost})


def _scheduler(sweep: Sweep) -> TrialScheduler | None:
    stopping = sweep.stopping
    if isinstance(stopping, Asha):
        return AsyncHyperBandScheduler(
            time_attr="iteration",
            max_t=10**6,
            grace_period=stopping.grace,
            reduction_factor=stopping.reduction,
            stop_last_trials=False,
            metric=COST,
            mode=LEAST,
        )
    if isinstance(stopping, Median):
        return MedianStoppingRule(
            time_attr="iteration",
            grace_period=stopping.grace,
            min_samples_required=stopping.trials,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # never pause a trial to let others come as far
            metric=COST,
            mode=LEAST,
        )
    return None


def population(sweep: Sweep, stopping: Pbt) -> PopulationBasedTraining:
    """PBT of the learning rate alone, within its range where it has one."""
    one: Any = sweep.space["optim.lr"]
    listed = one.values if isinstance(one, Choice | Grid) else None

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        if listed is None:
            config["lr"] = min(one.high, max(one.low, config["lr"]))
        return config

    factors = sorted(stopping.factors)
    return PopulationBasedTraining(
        time_attr="iteration",
        perturbation_interval=stopping.every,
        quantile_fraction=stopping.quantile,
        resample_probability=0.0 if listed is None else 0.25,
        require_attrs=False,  # the end of a trial that failed has no cost
        perturbation_factors=(factors[-1], factors[0]),
        hyperparam_mutations={"lr": listed or tune.uniform(one.low, one.high)},
        custom_explore_fn=explore,
        metric=COST,
        mode=LEAST,
    )
