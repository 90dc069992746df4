"""What the next trial tries: at random, through a grid, or where Optuna's TPE expects good ones.

Values depend on the sweep's seed, the trial's number, and (TPE) on the trials that ended before: a continued sweep
tells its search what it knows, and goes on as an undisturbed one would.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from ftray.config.space import Values, draw_at_random, fixed, grid_value, values_of
from ftray.config.sweeping import Choice, Dimension, Grid, LogUniform, RandInt, Sweep
from ftray.errors import ConfigError


class Search(Protocol):
    def ask(self, number: int) -> Values:
        """The values of a trial."""
        ...

    def known(self, number: int, values: Mapping[str, Any]) -> None:
        """A trial of an earlier start: as if it had been asked for."""
        ...

    def tell(self, number: int, costs: Sequence[float] | None) -> None:
        """How it ended, less is better; None: it failed or was stopped before it had a score."""
        ...


class Independent:
    """Random draws and grids: no trial knows of another."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep

    def ask(self, number: int) -> Values:
        drawn = draw_at_random(random.Random(f"{self.sweep.seed}:{number}"))
        return values_of(self.sweep, fixed(grid_value(self.sweep, number), drawn))

    def known(self, number: int, values: Mapping[str, Any]) -> None:
        pass

    def tell(self, number: int, costs: Sequence[float] | None) -> None:
        pass


class Optuna:
    """TPE over the keys that apply to a trial; each is drawn given those before it."""

    def __init__(self, sweep: Sweep, *, objectives: int):
        try:
            import optuna
        except ImportError as error:
            problem = "optuna is not installed; `pip install 'ftray[sweep]'`, or use search: {kind: random}"
            raise ConfigError(sweep.name, [("search", problem)]) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna, self.sweep, self.objectives = optuna, sweep, objectives
        self.startup = getattr(sweep.search, "startup", 5)
        self.study = optuna.create_study(directions=["minimize"] * objectives)
        self.asked: dict[int, Any] = {}

    def ask(self, number: int) -> Values:
        self.study.sampler = self._sampler(number)
        trial = self.asked[number] = self.study.ask()
        return values_of(self.sweep, fixed(grid_value(self.sweep, number), partial(_suggest, trial)))

    def _sampler(self, number: int) -> Any:
        """Each number has draws of its own: a continued sweep does not begin the same row of draws again."""
        return self.optuna.samplers.TPESampler(
            seed=random.Random(f"{self.sweep.seed}:{number}").randrange(2**32),
            n_startup_trials=self.startup,
            constant_liar=self.objectives == 1,  # trials that run beside each other should not try the same
        )

    def known(self, number: int, values: Mapping[str, Any]) -> None:
        told = {key: _encoded(self.sweep.space[key], value) for key, value in values.items()}
        self.study.enqueue_trial(told)
        self.ask(number)

    def tell(self, number: int, costs: Sequence[float] | None) -> None:
        trial = self.asked.pop(number, None)
        if trial is None:
            return
        if costs is None:
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, list(costs))


def open_search(sweep: Sweep) -> Search:
    if sweep.search.kind == "tpe":
        return Optuna(sweep, objectives=1 if sweep.search.against == "none" else 2)
    return Independent(sweep)


def _suggest(trial: Any, key: str, one: Dimension) -> Any:
    if isinstance(one, Choice | Grid):
        return one.values[trial.suggest_categorical(key, list(range(len(one.values))))]
    if isinstance(one, RandInt):
        return trial.suggest_int(key, one.low, one.high)
    return trial.suggest_float(key, one.low, one.high, log=isinstance(one, LogUniform))


def _encoded(one: Dimension, value: Any) -> Any:
    """Optuna's own word for a value: of a list, its place, since Optuna's choices are plain numbers and text."""
    return one.values.index(value) if isinstance(one, Choice | Grid) else value
