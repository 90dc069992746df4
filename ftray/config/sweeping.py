"""The sweep file: which keys of a run are searched, how, for how long, and what counts as better. No torch, no ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ftray.config.schema import NAME_PATTERN, Run
from ftray.config.section import Section

NAME_MAX = 56  # trials are called <name>.000
When = dict[str, Any]
_WHEN: Any = Field(
    default_factory=dict, description="only where the run has these values, e.g. {optim.schedule: cosine}"
)


class Choice(Section):
    kind: Literal["choice"] = "choice"
    values: list[Any] = Field(min_length=1, description="one of them, each equally likely")
    when: When = _WHEN


class Grid(Section):
    kind: Literal["grid"] = "grid"
    values: list[Any] = Field(min_length=1, description="every one of them, with every value of the other grids")
    when: When = _WHEN


class _Range(Section):
    @model_validator(mode="after")
    def _is_a_range(self):
        low, high = self.low, self.high  # type: ignore[attr-defined]
        if not low < high:
            raise ValueError(f"low {low:g} is not below high {high:g}")
        return self


class Uniform(_Range):
    kind: Literal["uniform"] = "uniform"
    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    when: When = _WHEN


class LogUniform(_Range):
    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0, description="smallest value")
    high: float = Field(gt=0, description="largest value; each power of ten between is equally likely")
    when: When = _WHEN


class RandInt(_Range):
    kind: Literal["randint"] = "randint"
    low: int = Field(description="smallest whole number")
    high: int = Field(description="largest whole number, itself included")
    when: When = _WHEN


Dimension = Annotated[Choice | Grid | Uniform | LogUniform | RandInt, Field(discriminator="kind")]


class RandomSearch(Section):
    """Values drawn independently of each other, and of what came before."""

    kind: Literal["random"] = "random"


class GridSearch(Section):
    """Every combination of the listed values, in order."""

    kind: Literal["grid"] = "grid"


class Tpe(Section):
    """Optuna's tree of Parzen estimators: draws where good trials were. Needs the extra: pip install 'ftray[sweep]'."""

    kind: Literal["tpe"] = "tpe"
    startup: int = Field(5, ge=1, description="trials drawn at random before it learns from them")
    against: Literal["none", "parameters", "seconds"] = Field(
        "none", description="a second objective: few trained parameters, or little time"
    )


SearchKind = Annotated[RandomSearch | GridSearch | Tpe, Field(discriminator="kind")]


class NoStopping(Section):
    """Every trial trains to its end."""

    kind: Literal["none"] = "none"


class Asha(Section):
    """Asynchronous successive halving (arXiv 1810.05934): of the trials that reach a rung, the best go on."""

    kind: Literal["asha"] = "asha"
    reduction: float = Field(3, gt=1, description="one in so many goes on from a rung")
    grace: int = Field(1, ge=1, description="evaluations that every trial may reach")


class Median(Section):
    """A trial stops when its best is worse than the median of the others' running means (Vizier, section 3.2)."""

    kind: Literal["median"] = "median"
    grace: int = Field(1, ge=1, description="evaluations that every trial may reach")
    trials: int = Field(3, ge=1, description="other trials that must have got as far")


class Pbt(Section):
    """Population based training (arXiv 1711.09846) of the learning rate: bad trials go on from good ones' weights."""

    kind: Literal["pbt"] = "pbt"
    quantile: float = Field(0.25, gt=0, le=0.5, description="share that is replaced, and share that is copied")
    factors: list[float] = Field([0.8, 1.25], min_length=1, description="what a copied learning rate is multiplied by")
    every: int = Field(1, ge=1, description="evaluations between exchanges")


Stopping = Annotated[NoStopping | Asha | Median | Pbt, Field(discriminator="kind")]


class Budget(Section):
    """What the search may use; what runs when it is used up is stopped, and the best so far is taken."""

    hours: float | None = Field(None, gt=0, description="of wall time, over all starts of this sweep")
    gpu_hours: float | None = Field(None, gt=0, description="GPUs that trials held x hours")


class Finalists(Section):
    count: int = Field(0, ge=0, description="so many of the best are trained again with other seeds; 0: none")
    seeds: int = Field(2, ge=1, description="further seeds for each; the best mean wins")


class Sweep(Section):
    name: str = Field(description="of the sweep: a-z, 0-9 and -")
    run: Run = Field(description="the run that is varied: a file, or its keys")
    space: dict[str, Dimension] = Field(min_length=1, description="dotted keys of the run, and their values")
    alpha_per_rank: float | None = Field(None, gt=0, description="method.alpha is so many times method.rank")
    trials: int | None = Field(None, ge=1, description="how many; none: all combinations of a grid, else 10")
    parallel: int | None = Field(None, ge=1, description="trials at a time; none: as many as fit")
    fuse: Literal["auto", "off"] = Field(
        "off", description="auto: LoRA trials over one base, data and batch train in one pass, where all of them can"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="of what is drawn")
    metric: str = Field("loss", description="what counts: a metric of the held-out rows, e.g. loss or exact_match")
    every: float = Field(1.0, gt=0, description="epochs between evaluations of a trial, which stopping goes by")
    search: SearchKind = Field(default_factory=RandomSearch)
    stopping: Stopping = Field(default_factory=NoStopping)
    budget: Budget = Field(default_factory=Budget)
    finalists: Finalists = Field(default_factory=Finalists)

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, value: str) -> str:
        if not NAME_PATTERN.fullmatch(value) or len(value) > NAME_MAX:
            raise ValueError(f"{value!r} is not a name; use a-z, 0-9 and -, at most {NAME_MAX} characters")
        return value

    @field_validator("space", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """`method.rank: [4, 8]` is a choice."""
        if not isinstance(value, dict):
            return value
        return {key: {"kind": "choice", "values": one} if isinstance(one, list) else one for key, one in value.items()}

    @model_validator(mode="after")
    def _sections_agree(self) -> Sweep:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def count(self) -> int:
        """Trials of the search, without the finalists' further seeds."""
        combinations = self.combinations
        if self.search.kind == "grid":
            return min(self.trials or combinations, combinations)
        return self.trials or (combinations if combinations > 1 else 10)

    @property
    def combinations(self) -> int:
        """Combinations of the values that are gone through in order."""
        total = 1
        for one in self.space.values():
            if isinstance(one, Grid) or (self.search.kind == "grid" and isinstance(one, Choice)):
                total *= len(one.values)
        return total


def _disagreements(sweep: Sweep):
    run, space = sweep.run, sweep.space
    if sweep.search.kind == "grid":
        for key, one in space.items():
            if not isinstance(one, Choice | Grid):
                yield f"space: {key} has no list of values, so a grid cannot go through them; use search: {{kind: tpe}}"
    if sweep.stopping.kind == "pbt":
        if "optim.lr" not in space:
            yield "space: PBT varies the learning rate while trials run; add optim.lr"
        if sweep.search.kind != "random":
            yield "search: PBT draws its first trials at random and then goes its own way; leave search out"
        if sweep.count < 2:
            yield "trials: a population needs 2 or more"
        if sweep.finalists.count:
            yield "finalists: what PBT finds is a course of rates, not a run file; leave finalists out"
        if run.scale.most > 1:
            yield "stopping: PBT copies weights between trials of one worker; use asha, or scale.workers: 1"
    if run.scale.least != run.scale.most:
        yield "run: scale.workers is a range; trials are compared, so give it one number"
    if "optim.epochs" in space and run.optim.steps is not None and "optim.steps" not in space:
        yield "space: optim.epochs changes nothing while the run has optim.steps; add set: {optim.steps: null}"
    if sweep.alpha_per_rank and "method.alpha" in space:
        yield "alpha_per_rank: method.alpha is in the space too; keep one"
    for key in space:
        if key.split(".")[0] in ("name", "storage", "track"):
            yield f"space: {key} says where results go, not what is learnt; take it out"
