"""A process that has trained other trials gives the same as a fresh one."""

import json
import subprocess
import sys
import textwrap

import pytest

TRAIN = """
    import json, math, sys
    from dataclasses import replace
    from pathlib import Path

    from ftray.config.sweeping import Sweep
    from ftray.store.paths import Storage
    from ftray.sweep.planning import Planner
    from ftray.sweep.records import SweepFolder
    from ftray.sweep.solo import Bench, open_trial
    from ftray.train.layout import Node

    root, orders = sys.argv[1], json.loads(sys.argv[2])
    run = {
        "name": "demo",
        "storage": root,
        "data": {"sources": "builtin:orders", "eval_sources": "builtin:orders-eval", "max_length": 192, "eval_rows": 8},
        "optim": {"steps": 3, "batch_size": 4, "lr": 5e-3},
        "evaluate": {"gate": []},
        "track": {"to": []},
    }
    space = {
        "method": [
            {"kind": "lora", "rank": 4, "dropout": 0.1},
            {"kind": "full"},
            {"kind": "lora", "rank": 8, "init": "pissa"},
            {"kind": "freeze", "last_layers": 1},
            {"kind": "lora", "rank": 4, "targets": ["q_proj"], "dora": True},
        ]
    }
    sweep = Sweep.model_validate(
        {"name": "demo-sweep", "run": run, "space": space, "every": 0.001, "search": {"kind": "grid"}}
    )
    planner = Planner(sweep, Storage(root), [Node("here", cpus=1)])
    folder = SweepFolder(Storage(root), "demo-sweep")
    folder.begin({}, fresh=True)
    bench = Bench()
    found = []
    for number, place in enumerate(orders):
        record = planner.record(number, {"method": space["method"][place]})
        folder.add(record)
        worker = open_trial(planner.task(record, folder).job, bench, metric="loss")
        worker.begin()
        worker.advance(2)
        middle = worker.measure()["loss"]
        worker.advance(3)
        losses = [row["loss"] for row in worker.rows if row["kind"] == "train"]
        found.append([*losses, middle, worker.finish()["loss"]])
        worker.close()
    print(json.dumps(found))
"""


def trained(folder, places):
    code = textwrap.dedent(TRAIN)
    command = [sys.executable, "-c", code, str(folder), json.dumps(places)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_trial_in_a_used_process_equals_one_in_a_fresh_process(tmp_path):
    used = trained(tmp_path / "used", [0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    for place in range(5):
        assert used[5 + place] == pytest.approx(used[place], abs=1e-6), f"method {place}, second time"
    for place in (4, 1):
        (fresh,) = trained(tmp_path / f"fresh-{place}", [place])
        assert used[5 + place] == pytest.approx(fresh, abs=1e-6), f"method {place}"
