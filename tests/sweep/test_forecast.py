"""What a sweep will take, said before anything starts."""

import json

import pytest
from sweeps import sweep

from ftray.cli import main
from ftray.store.paths import Storage
from ftray.sweep.forecast import Forecast
from ftray.sweep.planning import Planner
from ftray.train.layout import Node

GIB = 2**30
SWEEP = """\
name: demo-sweep
run: {name: demo, data: {sources: builtin:orders, max_length: 192}, scale: {cpus_per_worker: 1}}
space: {optim.steps: [4, 8], method.rank: [4, 8]}
search: {kind: grid}
"""


@pytest.fixture
def forecast(tmp_path):
    def of(space, nodes, **keys):
        run = {"name": "demo", "data": {"sources": "builtin:orders", "max_length": 192}, "storage": str(tmp_path)}
        asked = sweep(space, run={**run, "scale": {"cpus_per_worker": 1}}, **keys)
        planner = Planner(asked, Storage(str(tmp_path)), nodes)
        planner.check()
        return Forecast.of(planner)

    return of


def test_time_is_of_all_trials_over_those_beside_each_other(forecast):
    space = {"optim.steps": [10, 30], "method.rank": [4]}
    found = forecast(space, [Node("here", cpus=2, ram_bytes=24 * GIB)], trials=8)
    assert found.longest == pytest.approx(3 * found.shortest, rel=1e-6)
    assert (found.parallel, found.cpus) == (2, 1)
    assert found.total == pytest.approx(8 * (found.shortest + found.longest) / 2 / 2)
    four = forecast(space, [Node("here", cpus=4, ram_bytes=24 * GIB)], trials=8)
    assert four.total == pytest.approx(found.total / 2)


def test_two_trials_take_at_least_as_long_as_the_longer(forecast):
    found = forecast({"optim.steps": [10, 30]}, [Node("here", cpus=2, ram_bytes=24 * GIB)], trials=2)
    assert found.total == found.longest


def test_too_little_memory_is_said(forecast):
    found = forecast({"method.rank": [4]}, [Node("here", cpus=1, ram_bytes=GIB // 4)], trials=2)
    assert not found.ok
    assert "does not fit" in "\n".join(found.lines())


def test_check_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    assert main(["sweep", "sweep.yaml", "--check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trials"], told["workers"], told["ok"]) == (4, 1, True)
    assert main(["sweep", "sweep.yaml", "--check"]) == 0
    assert "4 trials" in capsys.readouterr().out
    assert not (tmp_path / "ftray-store" / "sweeps").exists()
    import ray

    assert not ray.is_initialized()


def test_check_refuses_what_a_sweep_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("method.rank: [4, 8]", "method.rang: [4]"))
    assert main(["sweep", "sweep.yaml", "--check"]) == 2
    assert "method.rang" in capsys.readouterr().err
