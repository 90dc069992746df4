"""From what the workers left in a run's folder to a version in the registry and a report."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from ftray.config.schema import Run
from ftray.evaluate.compare import Comparison, Scores, compare
from ftray.evaluate.report import write_report
from ftray.models.adapt import servability
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder

PACKAGES = ("ftray", "torch", "transformers", "peft", "deepspeed", "ray")


def conclude(run: Run, storage: Storage, folder: RunFolder, *, known, checked) -> tuple[str, str, dict[str, Any]]:
    """Publish the version and write its report; (version id, report's place, comparison). Safe to repeat."""
    before = storage.read_json(f"{folder.key}/before.json")
    after = storage.read_json(f"{folder.key}/after.json")
    comparison = compare(
        Scores.from_json(before["scores"]), Scores.from_json(after["scores"]), list(run.evaluate.gate)
    )
    state = folder.state()
    card = _card(run, known, checked, comparison)
    with tempfile.TemporaryDirectory(prefix="ftray-publish-") as temp:
        files = storage.download(f"{folder.key}/output", Path(temp, "version"))
        version = Registry(storage).publish(run.name, files, card, key=f"{state['born']}:{checked.schedule.steps}")
        report = _report(run, storage, folder, Path(temp), checked, comparison, before, after, version)
    storage.remove(f"{folder.key}/output")
    return version.id, report, comparison.to_json()


def _card(run: Run, known, checked, comparison: Comparison) -> dict[str, Any]:
    return {
        "run": run.name,
        "base": run.model.base,
        "base_revision": run.model.revision,
        "base_fingerprint": known.base,
        "method": run.method.model_dump(mode="json"),
        "objective": run.objective.model_dump(mode="json"),
        "servability": servability(run.method),
        "data": {"digest": known.data.report.digest, "sources": [source.path for source in run.data.sources]},
        "seed": run.seed,
        "steps": checked.schedule.steps,
        "settings": checked.settings,
        "gate": {"passed": comparison.passed, "rules": comparison.to_json()["gate"]},
        "metrics": comparison.to_json(),
        "forgetting": comparison.forgetting,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def _report(run, storage, folder, temp: Path, checked, comparison, before, after, version) -> str:
    metrics = folder.metrics()
    started = next((row["at"] for row in metrics if row.get("kind") == "started"), None)
    last = max((row["at"] for row in metrics if "at" in row), default=None)
    card = {key: version.card[key] for key in ("base", "base_fingerprint", "servability", "created", "seed", "packages")}
    card |= {"id": version.id, "digest": version.digest}
    if started and last:
        card["seconds"] = folder.state()["updated"] - folder.state()["started"]
    key = f"{folder.key}/report"
    write_report(
        temp / "report",
        run=checked.run,
        data=checked.data.to_json(),
        metrics=[*metrics, *_recoveries(metrics)],
        comparison=comparison.to_json(),
        samples=_samples(before["answers"], after["answers"], run.evaluate.samples),
        plan=checked.plan.to_json(),
        card=card,
    )
    storage.upload(temp / "report", key)
    return storage.uri(f"{key}/report.html")


def _recoveries(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    starts = [row for row in metrics if row.get("kind") == "started"]
    return [
        {"kind": "recovery", "step": row["step"], "reason": "workers restarted", "seconds": row["seconds"]}
        for row in starts[1:]
    ]


def _samples(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int) -> list[dict[str, str]]:
    pairs = list(zip(before, after, strict=True))[:count]
    return [
        {"prompt": a["prompt"], "expected": a["expected"], "base": b["given"], "tuned": a["given"]} for b, a in pairs
    ]
