"""What comes out of a sweep: the ranking, the best, its version, and files that tell the whole story."""

from __future__ import annotations

import csv
import io
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.config.load import dump_run
from ftray.config.space import run_of
from ftray.config.sweeping import Sweep
from ftray.sweep.records import DONE, FAILED, Record, SweepFolder, sign_of

if TYPE_CHECKING:
    from ftray.sweep.planning import Planner

ORDER = {DONE: 0, "running": 1, "stopped": 2, "waiting": 3, FAILED: 4}


def ranked(sweep: Sweep, records: Sequence[Record]) -> list[Record]:
    """Finished trials by score, the best first; then those that run, were stopped, wait, failed."""
    sign = sign_of(sweep.metric)

    def place(record: Record) -> tuple[Any, ...]:
        score = record.score(sweep.metric)
        return ORDER[record.status], score is None, sign * (score or 0.0), record.number

    return sorted(records, key=place)


def best(sweep: Sweep, records: Sequence[Record]) -> Record | None:
    """The finished trial with the best score; among finalists the one whose mean over its seeds is best.

    What PBT found, and what a budget cut short, counts only if it came to its end.
    """
    finished = [record for record in ranked(sweep, records) if record.status == DONE and record.of is None]
    sign = sign_of(sweep.metric)
    means = {}
    for record in finished:
        scores = seed_scores(sweep, record, records)
        if len(scores) > 1:
            means[record.number] = sign * statistics.fmean(scores)
    if means:
        number = min(means, key=lambda one: means[one])
        return next(record for record in finished if record.number == number)
    return finished[0] if finished else None


def repeats(sweep: Sweep, searched: Sequence[Record]) -> list[tuple[Record, int]]:
    """The finalists with the seeds they are trained with again."""
    finished = [record for record in ranked(sweep, searched) if record.status == DONE]
    chosen = finished[: sweep.finalists.count]
    return [(one, one.seed + 1 + more) for one in chosen for more in range(sweep.finalists.seeds)]


def seed_scores(sweep: Sweep, record: Record, records: Sequence[Record]) -> list[float]:
    """Its own score and those of its other seeds."""
    mine = [one for one in records if one.status == DONE and record.number in (one.number, one.of)]
    return [score for one in mine if (score := one.score(sweep.metric)) is not None]


def rows(sweep: Sweep, records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a trial, ranked: what trials.csv holds."""
    found = []
    for rank, record in enumerate(ranked(sweep, records), start=1):
        scores = seed_scores(sweep, record, records) if record.of is None else []
        spread = {"mean": statistics.fmean(scores), "spread": statistics.stdev(scores)} if len(scores) > 1 else {}
        found.append(
            {
                "rank": rank,
                "trial": record.number,
                "status": record.status,
                sweep.metric: record.score(sweep.metric),
                "mean": spread.get("mean"),
                "spread": spread.get("spread"),
                "epochs": round(record.epoch, 4),
                "of_epochs": round(record.epochs, 4),
                "seconds": round(record.seconds, 2),
                "parameters": record.parameters,
                "seed": record.seed,
                "repeats": record.of,
                **{key: record.values.get(key) for key in sweep.space},
                "reason": record.end.reason if record.end else "",
            }
        )
    return found


def publish(sweep: Sweep, folder: SweepFolder, planner: Planner, record: Record, records: Sequence[Record]) -> str:
    """The best trial's version in the registry, its sweep in the card; the version's id. Safe to repeat."""
    from ftray.train.publish import conclude

    planned = planner.plan(record.values, seed=record.seed)
    scores = seed_scores(sweep, record, records)
    lineage = {
        "sweep": {
            "name": sweep.name,
            "trial": record.number,
            "trials": len(records),
            "values": record.values,
            "metric": sweep.metric,
            "score": record.score(sweep.metric),
            "scores_by_seed": scores if len(scores) > 1 else None,
            "search": sweep.search.kind,
            "stopping": sweep.stopping.kind,
            "course": _course(folder, record) if sweep.stopping.kind == "pbt" else None,
        }
    }
    trial = folder.run(record.number)
    version, report, comparison = conclude(
        planned.run, folder.storage, trial, known=planned.known, checked=planned.checked, lineage=lineage
    )
    trial.set_state(status="done", version=version, report=report, comparison=comparison, error=None)
    return version


def write(
    sweep: Sweep, folder: SweepFolder, record: Record, records: Sequence[Record], *, version: str
) -> dict[str, str]:
    """sweep.html, sweep.json, trials.csv and best.yaml in the sweep's folder; where the page and the best file lie."""
    from ftray.sweep.page import page

    key = f"{folder.key}/report"
    with tempfile.TemporaryDirectory(prefix="ftray-sweep-") as temp:
        out = Path(temp)
        table = rows(sweep, records)
        (out / "trials.csv").write_text(as_csv(table), encoding="utf-8")
        (out / "best.yaml").write_text(best_file(sweep, folder, record, version=version), encoding="utf-8")
        data = {"sweep": sweep.model_dump(mode="json"), "best": record.number, "version": version, "trials": table}
        (out / "sweep.json").write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
        (out / "sweep.html").write_text(page(sweep, records, best=record, version=version), encoding="utf-8")
        folder.storage.upload(out, key)
    return {"page": folder.storage.uri(f"{key}/sweep.html"), "best": folder.storage.uri(f"{key}/best.yaml")}


def best_file(sweep: Sweep, folder: SweepFolder, record: Record, *, version: str) -> str:
    """The run file of the best trial, ready for `ftray train`, under a name of its own."""
    run = run_of(sweep, record.values, seed=record.seed)
    run = run.model_copy(update={"name": f"{sweep.name[:56]}-best"})
    score = record.score(sweep.metric)
    told = [
        f"# The best of sweep {sweep.name}: trial {record.number}, {sweep.metric} {score:.6g}, registered as {version}."
    ]
    if sweep.stopping.kind == "pbt":
        course = ", ".join(f"{lr:.3g} from step {step}" for step, lr in _course(folder, record))
        told.append(
            f"# PBT moved the rate while it trained ({course}); this file trains with the first one throughout."
        )
    return "\n".join([*told, dump_run(run)])


def as_csv(table: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]))
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in row.items()}
        for row in table
    )
    return text.getvalue()


def column(key: str) -> str:
    """method.rank -> rank; kinds keep their section."""
    return key if key.endswith("kind") else key.rpartition(".")[2]


def shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return str(value.get("kind", json.dumps(value)))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _course(folder: SweepFolder, record: Record) -> list[tuple[int, float]]:
    """(step, peak rate from there on) of a PBT trial."""
    course: list[tuple[int, float]] = []
    for row in record.reports:
        if not course or row["lr"] != course[-1][1]:
            start = 0 if not course else _step_before(record, row["step"])
            course.append((start, row["lr"]))
    return course


def _step_before(record: Record, step: int) -> int:
    return max((row["step"] for row in record.reports if row["step"] < step), default=0)
