"""`sweep`: many runs of one file, and the best of them."""

from __future__ import annotations

import argparse

from ftray.cli import show


def sweep(arguments: argparse.Namespace) -> int:
    from ftray.config.load import load_sweep

    asked = load_sweep(arguments.file, arguments.overrides)
    from ftray.sweep.engine import check
    from ftray.sweep.engine import sweep as search

    if arguments.check:
        forecast = check(asked)
        print(show.as_json(forecast.to_json()) if arguments.json else "\n".join(forecast.lines()))
        return 0 if forecast.ok else 2
    outcome = search(asked, fresh=arguments.fresh, as_json=arguments.json)
    if arguments.json:
        print(show.as_json(outcome))
        return 0
    from ftray.sweep.result import shown

    heads = ["rank", "trial", "status", outcome.metric, "epochs", "seconds", *asked.space]
    cells = [[shown(row[head]) for head in heads] for row in outcome.trials]
    print(show.columns([head.rpartition(".")[2] for head in heads], cells))
    resumed = " (resumed)" if outcome.resumed else ""
    lines = {
        "best": f"trial {outcome.best}, {outcome.metric} {outcome.score:.4g}",
        "version": outcome.version,
        "run file": outcome.best_file,
        "report": outcome.page,
        "took": show.duration(outcome.seconds) + resumed,
    }
    print(f"\n{show.pairs(lines)}")
    return 0
