"""`init`, `check`, `train`, `evaluate`: the commands that take a run file."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ftray.cli import show
from ftray.errors import ConfigError

if TYPE_CHECKING:
    from ftray.train.launch import Outcome


def init(arguments: argparse.Namespace) -> int:
    from ftray.config.init import starter
    from ftray.config.load import run_from

    data = arguments.data or ["train.jsonl"]
    name = arguments.name or _name_from(data[0])
    run_from({"name": name, "data": {"sources": data}}, source="ftray init")
    text = starter(arguments.method, data, name, arguments.base)
    if arguments.out == "-":
        print(text, end="")
        return 0
    out = Path(arguments.out)
    if out.exists() and not arguments.force:
        raise ConfigError(str(out), [("", "the file exists; choose another with --out, or overwrite it with --force")])
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(out), [("", f"cannot be written: {error.strerror}; choose another with --out")]) from None
    print(f"{out} written. Next: `ftray check {shlex.quote(str(out))}`")
    missing = [
        path for path in data if "://" not in path and not path.startswith("builtin:") and not Path(path).exists()
    ]
    if missing:
        print(f"Not there yet: {', '.join(missing)}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    from ftray.config.load import load_runs

    runs = load_runs(arguments.file, arguments.overrides)
    from ftray.train.stages import check_all, heading

    results = check_all(runs)
    if arguments.json:
        found = [result.to_json() for result in results]
        print(show.as_json(found[0] if len(runs) == 1 else found))
        return 0 if all(result.ok for result in results) else 2
    for number, result in enumerate(results, start=1):
        print("\n".join([*heading(runs, number), *result.lines()]))
    return 0 if all(result.ok for result in results) else 2


def train(arguments: argparse.Namespace) -> int:
    from ftray.config.load import load_runs

    runs = load_runs(arguments.file, arguments.overrides)
    from ftray.train.stages import heading, train_all

    outcomes = train_all(runs, fresh=arguments.fresh, as_json=arguments.json)
    if arguments.json:
        print(show.as_json(outcomes[0] if len(runs) == 1 else outcomes))
        return 0
    for number, (run, outcome) in enumerate(zip(runs, outcomes, strict=True), start=1):
        print("\n".join(heading(runs, number)), end="\n" if len(runs) > 1 else "")
        _print_outcome(outcome, storage=run.storage)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from ftray.config.load import load_runs

    run = load_runs(arguments.file, arguments.overrides)[-1]
    from ftray.train.launch import evaluate as judge

    outcome = judge(run, ref=arguments.ref)
    if arguments.json:
        print(show.as_json(outcome))
    else:
        _print_outcome(outcome, storage=run.storage)
    return 0


def _print_outcome(outcome: Outcome, *, storage: str) -> None:
    from ftray.evaluate.compare import Comparison
    from ftray.evaluate.terminal import print_comparison

    comparison = Comparison.from_json(outcome.comparison)
    print_comparison(comparison)
    resumed = " (resumed)" if outcome.resumed else ""
    lines: dict[str, object] = {
        "version": outcome.version,
        **({"of tasks": ", ".join(outcome.tasks.values())} if outcome.tasks else {}),
        "report": outcome.report,
        "took": show.duration(outcome.seconds) + resumed,
    }
    served = comparison.served(outcome.version, outcome.tasks) if outcome.version else {}
    if passed := [ref for ref, may in served.items() if may]:
        where = "" if storage == "./ftray-store" else f" --storage {shlex.quote(storage)}"
        lines["next"] = f"ftray adapters promote {passed[0]}{where}"
    print(f"\n{show.pairs(lines)}")


def _name_from(path: str) -> str:
    stem = Path(path.rstrip("/*")).name.partition(".")[0].lower()
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:64].strip("-") or "my-run"
