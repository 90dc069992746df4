"""`runs list` and `runs show`: what was trained under a storage root, and how far it got."""

from __future__ import annotations

import argparse
import difflib
from typing import Any

from ftray.cli import show as shown
from ftray.errors import ConfigError, StorageError


def list_(arguments: argparse.Namespace) -> int:
    from ftray.store.paths import Storage
    from ftray.store.runs import list_runs

    found = list_runs(Storage(arguments.storage))
    if arguments.json:
        print(shown.as_json(found))
    elif not found:
        print(f"No runs under {arguments.storage}. `ftray train run.yaml` makes one; --storage names another root.")
    else:
        rows = [
            [
                run["name"],
                _status(run, live=run["live"]),
                _steps(run),
                run.get("version"),
                shown.when(run.get("updated")),
            ]
            for run in found
        ]
        print(shown.columns(["run", "status", "step", "version", "updated"], rows))
    return 0


def show(arguments: argparse.Namespace) -> int:
    from ftray.store.paths import Storage
    from ftray.store.runs import RunFolder, list_runs

    storage = Storage(arguments.storage)
    folder = RunFolder(storage, arguments.name)
    resolved = folder.resolved()
    if resolved is None:
        names = [run["name"] for run in list_runs(storage)]
        near = difflib.get_close_matches(arguments.name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"
        raise StorageError(f"no run {arguments.name!r} under {arguments.storage}; {hint}")
    state, metrics, holder = folder.state(), folder.metrics(), folder.holder()
    if arguments.json:
        print(shown.as_json({"name": arguments.name, **state, "holder": holder, "metrics": metrics, **resolved}))
        return 0
    print(
        shown.pairs(
            {
                "run": arguments.name,
                "status": _status(state, live=holder is not None),
                "driver": f"pid {holder.get('pid')} on {holder.get('host')}" if holder else None,
                "step": _steps(state),
                "version": state.get("version"),
                "report": state.get("report"),
                "error": state.get("error"),
                "started": shown.when(state.get("started")),
                "updated": shown.when(state.get("updated")),
            }
        )
    )
    if metrics:
        print(f"\nlast metrics\n{_last(metrics)}")
    settings = resolved.get("settings") or {}
    if settings:
        print("\nwhat 'auto' became\n" + "\n".join(f"  {line}" for line in shown.pairs(settings).splitlines()))
    print(f"\nrun file\n{_run_file(resolved['run'])}", end="")
    return 0


def _run_file(resolved: dict[str, Any]) -> str:
    from ftray.config.document import dump
    from ftray.config.load import dump_run, run_from

    try:
        return dump_run(run_from(resolved))  # in the order of the schema
    except ConfigError:  # kept by a release with other keys
        return dump(resolved)


def _status(run: dict[str, Any], *, live: bool) -> str | None:
    stopped = run.get("status") in ("preparing", "training", "evaluating") and not live
    return f"{run['status']}, stopped" if stopped else run.get("status")


def _steps(run: dict[str, Any]) -> str | None:
    if run.get("step") is None:
        return None
    return f"{run['step']}/{run['total_steps']}" if run.get("total_steps") else str(run["step"])


def _last(metrics: list[dict[str, Any]]) -> str:
    newest = {entry.get("kind"): entry for entry in metrics}
    lines = []
    for kind, entry in newest.items():
        values = "  ".join(f"{key} {_short(value)}" for key, value in entry.items() if key != "kind")
        lines.append(f"  {kind}: {values}")
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
