"""`make demo-sweep`: the sample task as its run file has it, then twelve trials over rate, rank and epochs."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.rule import Rule

from ftray.cli import main as ftray
from ftray.config.load import load_run, load_sweep
from ftray.ray_cluster import connect
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder
from ftray.sweep.records import SweepFolder

SWEEP, RUN = "jobs/sweeps/orders.yaml", "jobs/runs/orders.yaml"
QUICK = [
    "data.eval_rows=100",
    "evaluate.generate_rows=0",
    "evaluate.forgetting=false",
    "name=orders-default",
    "evaluate.gate=[loss < base]",
]

console = Console()


def main() -> int:
    asked = load_sweep(SWEEP)
    storage = Storage(asked.run.storage)
    connect(None)  # one Ray for both
    console.print(Rule("1. The run file as it is", align="left"))
    if code := ftray(["train", RUN, *QUICK]):
        return code
    console.print(Rule("2. Twelve trials of it", align="left"))
    if code := ftray(["sweep", SWEEP]):
        return code
    default = RunFolder(storage, load_run(RUN, QUICK).name).state()["comparison"]["after"]["loss"]
    outcome = SweepFolder(storage, asked.name).outcome()
    assert outcome is not None
    card = Registry(storage).resolve(outcome["version"]).card
    console.print(
        f"\nheld-out loss: {default:.4f} as the run file has it, {outcome['score']:.4f} the best of the sweep "
        f"({outcome['version']}, exact match {card['metrics']['after'].get('exact_match', 0):.0%})"
    )
    return 0 if outcome["score"] < default else 1


if __name__ == "__main__":
    sys.exit(main())
