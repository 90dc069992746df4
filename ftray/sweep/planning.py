"""Where trials go and what each is told: everything about a sweep that is known before its first trial starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftray.config.objectives import REINFORCEMENT, TokenClassification
from ftray.config.schema import LM_EVAL, LmEval, Run
from ftray.config.space import Values, ends, fixed, run_of, values_of
from ftray.config.sweeping import Sweep
from ftray.data.order import epoch_rows
from ftray.data.prepare import Prepared
from ftray.data.tagged import kind_of
from ftray.errors import ConfigError, ModelError
from ftray.evaluate.compare import METRICS
from ftray.store.paths import Storage
from ftray.sweep import fusing as sharing
from ftray.sweep.records import Record, SweepFolder, sign_of
from ftray.sweep.task import Task
from ftray.train import memory, resolve
from ftray.train.group import for_workers
from ftray.train.known import NO_NUMBERS, Known, check_method, counts_right
from ftray.train.launch import CheckResult, work_out
from ftray.train.layout import Node
from ftray.train.worker import Job

SHAPING = ("model", "data", "objective")  # what decides about tokens, beside the seed
CHECKED = 64  # corners of the space that are laid out before anything starts
LABELLED = ("accuracy", "precision", "recall", "f1")  # of generated answers: with evaluate.labels
JUDGED = ("judge_score", "kl")  # with evaluate.judge


@dataclass(frozen=True)
class Planned:
    """A trial worked out. `steps_per_epoch` is not whole."""

    run: Run
    known: Known
    checked: CheckResult
    steps_per_epoch: float

    @property
    def parameters(self) -> int:
        return memory.learning(self.known.shape, self.run.method).params

    @property
    def epochs(self) -> float:
        return self.checked.schedule.steps / self.steps_per_epoch


@dataclass
class Planner:
    sweep: Sweep
    storage: Storage
    nodes: Sequence[Node]
    fusing: sharing.Fusing | None = None
    alone: str | None = None
    """Why no trials share passes, where they might."""
    corners: list[Planned] = field(default_factory=list)
    """The trials at the corners of the space, once checked."""
    _known: dict[str, Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        workers = self.workers
        gpus, cpus = resolve.place(self.sweep.run.scale.model_copy(update={"workers": workers}), self.nodes)
        seats = resolve.seats(self.nodes, gpus, cpus if self._fixed_cpus else 1.0)
        self.parallel = max(1, min(self.sweep.parallel or seats, seats // workers, self.sweep.count))
        all_at_once = self.sweep.run.scale.model_copy(update={"workers": workers * self.parallel})
        self.gpus, self.cpus = resolve.place(all_at_once, self.nodes)
        self.beside = self.parallel  # with what each has then, as the times of trials are reckoned

    @property
    def workers(self) -> int:
        return largest(self.sweep)

    def held(self, live: int) -> float:
        """GPUs that so many trials hold."""
        return self.gpus * self.workers * (min(live, self.fusing.groups) if self.fusing else live)

    def notes(self) -> list[str]:
        """How trials share the cluster, where that was asked for."""
        if self.fusing is not None:
            return [self.fusing.line(workers=self.workers, cpus=self.cpus, gpus=self.gpus)]
        return [f"each trial alone: {self.alone}"] if self.alone else []

    @property
    def takes_bitsandbytes(self) -> bool:
        searched = {"method.bits", "method.kind", "method", "optim.optimizer"} & self.sweep.space.keys()
        return bool(searched) or self.sweep.run.takes_bitsandbytes

    @property
    def _fixed_cpus(self) -> bool:
        return self.sweep.run.scale.cpus_per_worker != "auto"

    def remember(self, run: Run, known: Known) -> None:
        self._known[_shaping(run)] = known

    def plan(self, values: Values, *, seed: int | None = None) -> Planned:
        """A trial's run laid out. The data stay those of the sweep's own seed, so that all are scored on the same."""
        run = run_of(self.sweep, values)
        known = self._known.get(_shaping(run))
        if known is None:
            known = Known.of(run, self.storage)
            self.remember(run, known)
        if seed is not None:
            run = run.model_copy(update={"seed": seed})
        placed: dict[str, Any] = {"gpus_per_worker": self.gpus, "cpus_per_worker": self.cpus}
        if self.fusing is not None:
            placed["zero"] = 0  # adapters are small, and each is whole on every worker
        scale = run.scale.model_copy(update=placed)
        run = run.model_copy(update={"scale": scale})
        rows = epoch_rows(known.data.train, [source.weight for source in run.data.sources])
        per_epoch = rows / run.optim.batch_size
        return Planned(run, known, work_out(run, known, list(self.nodes)), per_epoch)

    def check(self) -> None:
        """Lay out the corners of the space, and decide how trials share the cluster. ConfigError with every value that
        the base or the budget does not allow."""
        from ftray.models import chain
        from ftray.models.load import load_config

        problems: dict[str, str] = {}
        for values in corners(self.sweep):
            try:
                run = chain.here(run_of(self.sweep, values), self.storage)
                check_method(run, load_config(run.model))
                planned = self.plan(values)
            except ModelError as error:
                key, _, text = str(error).partition(": ")
                where = next((one for one in values if key.startswith(one)), next(iter(values), "run"))
                problems.setdefault(f"space.{where}", f"with {values}: {text or key}")
                continue
            self.corners.append(planned)
        problems |= self._budget_problems(min(self.times(), default=0.0))
        if problems:
            raise ConfigError(self.sweep.name, list(problems.items()))
        if self.sweep.fuse == "auto":
            self._fuse(self.corners, load_config(chain.here(self.sweep.run, self.storage).model))

    def times(self) -> list[float]:
        """Seconds of training, of the trials whose time is known."""
        return [one.checked.plan.seconds for one in self.corners if one.checked.plan.seconds]

    def _fuse(self, planned: Sequence[Planned], config: Any) -> None:
        """Let trials share passes, where all can."""
        cpus = sum(node.cpus for node in self.nodes)
        seats = resolve.seats(self.nodes, self.gpus, self.cpus if self._fixed_cpus else 1.0)
        if not self.gpus and not self._fixed_cpus:
            seats = int(cpus // sharing.GROUP_CPUS)
        found: sharing.Fusing | str | None = sharing.why_not(self.sweep, planned, config)
        if found is None:
            found = sharing.fit(self.sweep, planned, self.nodes, room=seats // self.workers)
        if isinstance(found, str):
            self.alone = found
            return
        self.fusing = found
        self.parallel = min(found.groups * found.seats, self.sweep.count)
        at_once = self.sweep.run.scale.model_copy(update={"workers": self.workers * found.groups})
        self.gpus, self.cpus = resolve.place(at_once, self.nodes)

    def _budget_problems(self, shortest: float) -> dict[str, str]:
        budget, found = self.sweep.budget, {}
        gpu_hours = self.gpus * self.workers * shortest / 3600
        if budget.hours and budget.hours * 3600 < shortest:
            found["budget.hours"] = (
                f"{budget.hours * 3600:.0f} s is less than one trial, about {shortest:.0f} s at the least; "
                f"allow {2 * self.sweep.count * shortest / self.parallel / 3600:.2g}, or search fewer epochs"
            )
        if budget.gpu_hours and not self.gpus:
            found["budget.gpu_hours"] = "trials hold no GPUs here; use budget.hours"
        elif budget.gpu_hours and budget.gpu_hours < gpu_hours:
            found["budget.gpu_hours"] = f"less than one trial, which needs about {gpu_hours:.2g}"
        return found

    def record(self, number: int, values: Values, *, seed: int | None = None, of: int | None = None) -> Record:
        planned = self.plan(values, seed=seed)
        return Record(number, dict(values), planned.run.seed, of, planned.parameters, planned.epochs)

    def same_base(self, one: Record, other: Record) -> bool:
        """Whether the base scores alike for two trials."""
        first, second = (self.plan(record.values, seed=record.seed).run for record in (one, other))
        return all(getattr(first, name) == getattr(second, name) for name in ("model", "data", "objective", "evaluate"))

    def task(
        self,
        record: Record,
        folder: SweepFolder,
        *,
        deadline: float | None = None,
        judge: Literal["base", "version"] | None = None,
    ) -> Task:
        planned = self.plan(record.values, seed=record.seed)
        sweep, run = self.sweep, planned.run
        every = max(1, round(sweep.every * planned.steps_per_epoch))
        whole = run.evaluate == _trimmed(run, sweep.metric).evaluate
        if not judge:
            run = _trimmed(run, sweep.metric)
        evaluated = every if self.workers > 1 and not judge and self.fusing is None else 0
        schedule = replace(planned.checked.schedule, checkpoint_every=every, eval_every=evaluated)
        trial = folder.run(record.number)
        if trial.resolved() is None:
            settings = planned.checked.settings
            trial.begin({"run": planned.run.model_dump(mode="json"), "settings": settings}, fresh=False)
            trial.set_state(status="training", total_steps=schedule.steps)
        trial.clear_verdict()
        job = Job(
            run=for_workers(run, self.storage),
            layout=planned.checked.layout,
            schedule=schedule,
            data_key=planned.known.data.key,
            base=planned.known.base,
            born=trial.state()["born"],
            folder=trial.name,
        )
        return Task(
            sweep=folder.name,
            number=record.number,
            job=job,
            every=every,
            steps_per_epoch=planned.steps_per_epoch,
            metric=sweep.metric,
            sign=sign_of(sweep.metric),
            searching=record.of is None and not judge,
            deadline=None if judge or record.of is not None else deadline,
            judge=judge,
            whole=whole,
            takes_bitsandbytes=self.takes_bitsandbytes,
            replays=sweep.stopping.kind != "pbt",
        )


def largest(sweep: Sweep) -> int:
    """Workers of the largest trial."""
    one = sweep.space.get("scale.workers")
    return max([int(end) for end in ends(one)] if one else [sweep.run.scale.most])


def check_metric(sweep: Sweep) -> None:
    """ConfigError unless every trial will report the sweep's metric, if its rows have it at all."""
    import difflib

    metric, evaluate, objective = sweep.metric, sweep.run.evaluate, sweep.run.objective
    own = metric in objective.reports
    known = reported(objective)
    problem = None
    if metric == "forgetting":
        problem = "it compares with the base; use general_loss, which has the same order"
    elif metric.startswith(LM_EVAL):
        problem = f"trials leave benchmarks out, and the best version is given them; use one of {', '.join(known)}"
    elif metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
        problem = f"no metric {metric!r}; {hint}"
    elif metric not in known:
        problem = f"{objective.kind} reports no {metric}; use one of {', '.join(known)}"
    elif metric == "general_loss" and not evaluate.forgetting:
        problem = "no trial reports general_loss with evaluate.forgetting: false"
    elif _generated(metric, objective) and not evaluate.generate_rows:
        way_out = "set it" if own else f"set it, or use {objective.reports[0]}"
        problem = f"no trial reports {metric} with evaluate.generate_rows: 0; {way_out}"
    elif metric == "pass_at_1" and evaluate.numeric is False and not sweep.run.rewards_decide:
        problem = "no trial reports pass_at_1 with evaluate.numeric: false; leave it out"
    elif not own and metric in LABELLED and not evaluate.labels:
        problem = f"no trial reports {metric} without evaluate.labels; set them, or use exact_match"
    elif not own and metric in JUDGED and not evaluate.judge:
        problem = f"no trial reports {metric} without evaluate.judge; name a reward version, or use exact_match"
    elif not own and sweep.run.scale.most > 1 and sweep.stopping.kind != "none":
        problem = (
            f"trials of several workers report {objective.reports[0]} on the way and {metric} at their end; "
            f"use {objective.reports[0]}, or no stopping"
        )
    if problem:
        raise ConfigError(sweep.name, [("metric", problem)])


def check_answers(sweep: Sweep, data: Prepared) -> None:
    """ConfigError where the held-out rows do not have the sweep's metric: numbers for answers, or tags of entities."""
    metric, problem = sweep.metric, None
    if metric == "pass_at_1" and not counts_right(sweep.run, data):
        problem = NO_NUMBERS
    if isinstance(sweep.run.objective, TokenClassification):
        entities = any(kind_of(label) for label in data.labels)
        if metric == "f1" and entities:
            problem = "the tags are BIO; use entity_f1"
        elif metric.startswith("entity_") and not entities:
            problem = "no tag is BIO; use f1"
    if problem:
        raise ConfigError(sweep.name, [("metric", f"no trial reports {metric}: {problem}")])


def reported(objective: Any) -> tuple[str, ...]:
    """The metrics that a trial can report under an objective."""
    if objective.reads:
        return objective.reports
    answers = () if objective.kind == "pretrain" else ("exact_match", "json_match", "pass_at_1", *LABELLED, *JUDGED)
    return tuple(dict.fromkeys([*objective.reports, *answers, "general_loss"]))


def _generated(metric: str, objective: Any) -> bool:
    """Whether a metric is of generated answers."""
    own = metric in objective.reports
    return isinstance(objective, REINFORCEMENT) if own else metric != "general_loss"


def corners(sweep: Sweep) -> list[Values]:
    """The values of the space's corners, at most CHECKED, evenly over them."""
    every = [ends(one) for one in sweep.space.values()]
    found = []
    for combination in itertools.islice(itertools.product(*every), 4096):
        chosen = dict(zip(sweep.space, combination, strict=True))
        values = values_of(sweep, fixed(chosen))
        if values not in found:
            found.append(values)
    return found[:: max(1, len(found) // CHECKED)]


def _trimmed(run: Run, metric: str) -> Run:
    """What a trial measures is what the sweep compares; the best is judged in full at the end."""
    rows = run.evaluate.generate_rows if _generated(metric, run.objective) else 0
    changes: dict[str, Any] = {"generate_rows": rows, "baselines": [], "lm_eval": LmEval()}
    if metric != "general_loss":
        changes["forgetting"] = False
    return run.model_copy(update={"evaluate": run.evaluate.model_copy(update=changes)})


def _shaping(run: Run) -> str:
    return json.dumps([getattr(run, name).model_dump(mode="json") for name in SHAPING], sort_keys=True)
