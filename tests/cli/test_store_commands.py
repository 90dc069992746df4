"""`runs` and `adapters` over a store as a training leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftray.cli import main
from ftray.config.load import run_from
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "store"
    monkeypatch.setenv("FTRAY_STORAGE", str(root))
    return root


def a_run(root: Path, name: str, **state) -> RunFolder:
    folder = RunFolder(Storage(str(root)), name)
    folder.begin(run_from({"name": name, "data": {"sources": "x"}}).model_dump(mode="json"), fresh=False)
    folder.append_metrics([{"kind": "train", "step": step, "loss": 3.0 - step} for step in (1, 2)])
    folder.set_state(**state)
    return folder


def test_runs_are_listed_with_their_state(root, capsys):
    assert main(["runs", "list"]) == 0
    assert (
        capsys.readouterr().out
        == f"No runs under {root}. `ftray train run.yaml` makes one; --storage names another root.\n"
    )

    a_run(root, "coffee", status="done", step=2, total_steps=2, version="coffee@v1")
    a_run(root, "tea", status="training", step=1, total_steps=9)
    assert main(["runs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "status", "step", "version", "updated"]
    assert lines[1].split()[:4] == ["tea", "training,", "stopped", "1/9"]
    assert lines[2].split()[:4] == ["coffee", "done", "2/2", "coffee@v1"]

    assert main(["runs", "list", "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["tea", "coffee"]


def test_a_run_is_shown_with_its_last_metrics_and_a_run_file_that_trains_it_again(root, capsys, tmp_path):
    folder = a_run(root, "coffee", status="failed", error="a NaN at step 2")
    with folder.lease():
        assert main(["runs", "show", "coffee"]) == 0
    shown = capsys.readouterr().out
    assert "a NaN at step 2" in shown
    assert "train: step 2  loss 1" in shown
    assert "driver   pid" in shown
    resolved = tmp_path / "again.yaml"
    resolved.write_text(shown.partition("resolved run\n")[2])
    from ftray.config.load import load_run

    assert load_run(resolved).name == "coffee"

    assert main(["runs", "show", "coffee", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"][-1] == {"kind": "train", "step": 2, "loss": 1.0}


def test_an_unknown_run_is_told_its_near_name(root, capsys):
    a_run(root, "coffee", status="done")
    assert main(["runs", "show", "cofee"]) == 2
    assert "no run 'cofee'" in (shown := capsys.readouterr().err)
    assert "did you mean 'coffee'?" in shown
