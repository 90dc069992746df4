"""From what the workers left in a run's folder to a version in the registry and a report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from ftray.config.methods import MultitaskPrompt
from ftray.config.schema import Run
from ftray.evaluate.compare import Comparison, Scores, compare, win_rate
from ftray.evaluate.report import write_report
from ftray.models.adapt import reader_servability, servability
from ftray.models.prompts import by_task
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder
from ftray.store.versions import Version

PACKAGES = ("ftray", "torch", "transformers", "peft", "deepspeed", "ray")


def conclude(
    run: Run, storage: Storage, folder: RunFolder, *, known, checked, lineage: Mapping[str, Any] | None = None
) -> tuple[str, str, dict[str, Any]]:
    """Publish the version and write its report; (version id, report's place, comparison). Safe to repeat.

    `lineage`: more for the card, e.g. the sweep that found it.
    """
    comparison = _comparison(run, storage, folder)
    card = {**_card(run, known, checked, comparison), **(lineage or {})}
    if storage.exists(ranks := f"{folder.key}/ranks.json"):
        card["ranks"] = storage.read_json(ranks)
    key = f"{folder.state()['born']}:{checked.schedule.steps}"
    with tempfile.TemporaryDirectory(prefix="ftray-publish-") as temp:
        files = storage.download(f"{folder.key}/output", Path(temp, "output"))
        registry = Registry(storage)
        if isinstance(run.method, MultitaskPrompt):
            prompts = by_task(files, Path(temp, "tasks"))
            method = {"kind": "prompt", "tokens": run.method.tokens}
            cards = {task: {**_of_task(card, task, run, comparison), "method": method} for task in prompts}
            card["tasks"] = {
                task: registry.publish(f"{run.name}-{task}", prompt, cards[task], key=key).id
                for task, prompt in prompts.items()
            }
        version = registry.publish(run.name, files, card, key=key)
    report, written = write_comparison(run, storage, folder, checked=checked, version=version)
    return version.id, report, written


def write_comparison(
    run: Run, storage: Storage, folder: RunFolder, *, checked, version: Version
) -> tuple[str, dict[str, Any]]:
    """The report of a version's scores in the run's folder; (its place, comparison)."""
    before, after = _scores(storage, folder)
    comparison = _comparison(run, storage, folder).to_json()
    metrics = folder.metrics()
    state = folder.state()
    shown = ("base", "base_fingerprint", "servability", "task", "tasks", "ranks", "created", "seed", "packages")
    card = {key: version.card[key] for key in shown if key in version.card}
    if "ranks" in card:
        card["ranks"] = _by_part(card["ranks"])
    card |= {"id": version.id, "digest": version.digest, "seconds": time.time() - state["started"]}
    key = f"{folder.key}/report"
    with tempfile.TemporaryDirectory(prefix="ftray-report-") as temp:
        write_report(
            Path(temp),
            run=checked.run,
            data=checked.data.to_json(),
            metrics=[*metrics, *_recoveries(metrics)],
            comparison=comparison,
            samples=_samples(before["answers"], after["answers"], run.evaluate.samples),
            plan={**checked.settings, **checked.plan.to_json()},
            card=card,
            details={"base": before.get("details", {}), "tuned": after.get("details", {})},
        )
        storage.upload(Path(temp), key)
    return storage.uri(f"{key}/report.html"), comparison


def _scores(storage: Storage, folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    return storage.read_json(f"{folder.key}/before.json"), storage.read_json(f"{folder.key}/after.json")


def _comparison(run: Run, storage: Storage, folder: RunFolder) -> Comparison:
    before, after = _scores(storage, folder)
    base, tuned = Scores.from_json(before["scores"]), Scores.from_json(after["scores"])
    worth = [[answer.get("worth") for answer in side["answers"]] for side in (after, before)]
    if None not in worth[0] + worth[1] and worth[0]:
        base, tuned = replace(base, win_rate=0.5), replace(tuned, win_rate=win_rate(*worth))
    return compare(
        base,
        tuned,
        run.gate(tuned.values()),
        baselines={int(count): Scores.from_json(values) for count, values in before.get("baselines", {}).items()},
    )


def _card(run: Run, known, checked, comparison: Comparison) -> dict[str, Any]:
    reads: dict[str, Any] = {}
    if run.objective.reads:
        reads = {"task": known.head.task, "labels": list(known.head.labels), "scoring": known.head.scoring}
    return {
        "run": run.name,
        "base": run.model.base,
        "base_revision": run.model.revision,
        "base_fingerprint": known.base,
        **({"lineage": list(known.lineage)} if known.lineage else {}),
        "method": run.method.model_dump(mode="json"),
        "objective": run.objective.model_dump(mode="json"),
        "servability": _served(run, known),
        "data": {"digest": known.data.report.digest, "sources": [source.path for source in run.data.sources]},
        "seed": run.seed,
        "steps": checked.schedule.steps,
        "settings": checked.settings,
        **_measured(comparison),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: installed(name) for name in PACKAGES},
        **reads,
    }


def _of_task(card: Mapping[str, Any], task: str, run: Run, comparison: Comparison) -> dict[str, Any]:
    """The card of a run of several tasks as one task's version has it: its own sources, scores and gate."""
    data = {**card["data"], "sources": [source.path for source in run.data.sources if source.task == task]}
    return {**card, "of_task": task, "data": data, **_measured(comparison.of_task(task))}


def _measured(comparison: Comparison) -> dict[str, Any]:
    metrics = comparison.to_json()
    return {"gate": metrics["gate"], "metrics": metrics, "forgetting": metrics["forgetting"]}


def _served(run: Run, known) -> str:
    if run.objective.reads:
        return reader_servability(run.method, encoder=known.encoder)
    return servability(run.method)


def _by_part(ranks: dict[str, int]) -> dict[str, list[int]]:
    """A list over the blocks for each part of a block: {"mlp.up_proj": [8, 3]} for two blocks."""
    parts: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        pieces = name.split(".")
        inner = [place for place, piece in enumerate(pieces) if piece.isdigit()]
        parts.setdefault(".".join(pieces[inner[-1] + 1 :] if inner else pieces), []).append(rank)
    return parts


def _recoveries(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    starts = [row for row in metrics if row.get("kind") == "started"]
    return [
        {"kind": "recovery", "step": row["step"], "reason": "workers restarted", "seconds": row["seconds"]}
        for row in starts[1:]
    ]


def _samples(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": tuned["prompt"],
            "expected": tuned["expected"],
            "base": base["given"],
            "tuned": tuned["given"],
            "right": {"base": base.get("right"), "tuned": tuned.get("right")},
        }
        for base, tuned in list(zip(before, after, strict=True))[:count]
    ]
