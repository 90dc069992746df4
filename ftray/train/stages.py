"""A file's stages, one run after the other. All are checked before the first starts; finished ones are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftray.config.schema import VERSION, Run
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from ftray.train import cluster
from ftray.train.known import Known
from ftray.train.launch import CheckResult, Outcome, based, check, train


def train_all(runs: Sequence[Run], *, fresh: bool = False, as_json: bool = False) -> list[Outcome]:
    """Each run to its end, or as far as it was finished before. FtrayError ends all: the same call goes on there."""
    if len(runs) > 1:
        _prepare(runs, fresh=fresh)
    outcomes: list[Outcome] = []
    for run in runs:
        if outcomes and (left := outcomes[-1].version):
            run = _with_base(run, f"{VERSION}{left}")
        outcomes.append(train(run, fresh=fresh, as_json=as_json))
    return outcomes


def check_all(runs: Sequence[Run]) -> list[CheckResult]:
    """As `check`, of every stage. A stage has the shape and tokens of the first one's base, whatever is trained."""
    results = []
    for run in runs:
        result = check(_with_base_of(runs[0], run))
        results.append(replace(result, run=run.model_dump(mode="json")) if len(runs) > 1 else result)
    return results


def heading(runs: Sequence[Run], number: int) -> list[str]:
    """What a stage's output begins with; of a single run nothing."""
    if len(runs) == 1:
        return []
    run = runs[number - 1]
    return ["", f"Stage {number} of {len(runs)}: {run.name} ({run.objective.kind}, {run.method.kind})", ""]


def _prepare(runs: Sequence[Run], *, fresh: bool) -> None:
    """Reads, checks and prepares what is not finished: a mistake in the last stage's rows shows before the first."""
    with cluster.quiet():
        storage = Storage(runs[0].storage)
        storage.probe()
        first = based(runs[0], RunFolder(storage, runs[0].name), fresh=fresh)
        for run in runs:
            if fresh or RunFolder(storage, run.name).state().get("status") != "done":
                Known.of(_with_base_of(first, run), storage)


def _with_base_of(first: Run, run: Run) -> Run:
    return run.model_copy(update={"model": first.model})


def _with_base(run: Run, base: str) -> Run:
    return run.model_copy(update={"model": run.model.model_copy(update={"base": base})})
