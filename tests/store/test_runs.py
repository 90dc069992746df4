"""A run's folder: state, lease, verdict and metrics."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from ftray.errors import StorageError
from ftray.store import process
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder, list_runs


@pytest.fixture
def run(storage: Storage) -> RunFolder:
    return RunFolder(storage, "demo")


def test_a_run_that_never_began_is_empty(run: RunFolder):
    assert run.resolved() is None
    assert run.state() == {}
    assert run.verdict() is None
    assert run.metrics() == []
    assert run.holder() is None
    assert list_runs(run.storage) == []


def test_a_run_keeps_its_state_field_by_field(run: RunFolder):
    run.begin({"name": "demo", "optim": {"lr": 0.1}}, fresh=False)
    run.set_state(status="training", step=3, total_steps=10)
    run.set_state(step=4)
    state = run.state()
    assert (state["status"], state["step"], state["total_steps"]) == ("training", 4, 10)
    assert state["started"] <= state["updated"] <= time.time()
    assert run.resolved() == {"name": "demo", "optim": {"lr": 0.1}}
    with pytest.raises(ValueError, match="none of"):
        run.set_state(status="finished")


def test_beginning_again_resumes_and_beginning_fresh_does_not(run: RunFolder):
    run.begin({"lr": 1}, fresh=False)
    run.set_state(status="failed", step=5, error="lost a node")
    run.set_verdict("TrainError", "NaN in step 5")
    run.append_metrics([{"kind": "train", "step": 5}])
    before = run.state()
    run.begin({"lr": 2}, fresh=False)
    assert run.resolved() == {"lr": 2}
    assert run.verdict() is None
    assert run.metrics() == [{"kind": "train", "step": 5}]
    assert {**before, **run.state()} == {**run.state(), "step": 5, "status": "preparing", "error": None}
    assert (run.state()["born"], run.state()["started"]) == (before["born"], before["started"])
    run.begin({"lr": 3}, fresh=True)
    assert run.metrics() == []
    assert "step" not in run.state()
    assert run.state()["born"] != before["born"]


def test_a_fresh_start_keeps_the_lease(run: RunFolder):
    run.begin({}, fresh=False)
    with run.lease():
        run.begin({}, fresh=True)
        with pytest.raises(StorageError, match="is being trained by"), run.lease():
            pass


def test_a_second_driver_is_refused_with_the_first_ones_place(run: RunFolder):
    with run.lease({"command": "ftray train"}, beat_s=0.02) as lease:
        expected = f"run demo is being trained by pid {os.getpid()} on host {socket.gethostname()}"
        with pytest.raises(StorageError, match=expected), run.lease():
            pass
        lease.check()
        holder = run.holder()
        assert holder is not None
        assert {"host", "pid", "boot_id", "beat", "command"} <= holder.keys()
        run.set_state(status="training")
        assert [(entry["name"], entry["live"]) for entry in list_runs(run.storage)] == [("demo", True)]
        deadline = time.time() + 10
        while run.holder()["beat"] == holder["beat"]:
            assert time.time() < deadline
            time.sleep(0.01)
    assert run.holder() is None
    with run.lease():
        pass
    assert len(run.storage.list("runs/demo/lease")) == 1


def _elsewhere(run: RunFolder, *, beat: float, beat_s: float = 0.05, number: int = 1) -> None:
    there = {"host": "other", "pid": 1, "boot_id": "b", "pid_namespace": "n", "started": 1}
    run.storage.write_json(f"runs/demo/lease/{number}.json", {**there, "beat": beat, "beat_s": beat_s})


def test_a_driver_elsewhere_is_followed_when_its_beat_is_old(run: RunFolder):
    _elsewhere(run, beat=time.time(), beat_s=5.0)
    with pytest.raises(StorageError, match="pid 1 on host other"), run.lease():
        pass
    _elsewhere(run, beat=time.time() - 31)
    with run.lease():
        pass


def test_a_clock_ahead_does_not_keep_a_dead_driver_alive(run: RunFolder):
    _elsewhere(run, beat=time.time() + 3600)
    with run.lease():
        pass


def _beat_with_a_wrong_clock(root: str, ready) -> None:
    run = RunFolder(Storage(root), "demo")
    while True:
        _elsewhere(run, beat=time.time() - 7200, beat_s=0.5)
        ready.set()
        time.sleep(0.1)


def test_a_clock_behind_does_not_make_a_live_driver_dead(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_beat_with_a_wrong_clock, args=(str(tmp_path), ready))
    other.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(StorageError, match="pid 1 on host other"),
            RunFolder(Storage(str(tmp_path)), "demo").lease(),
        ):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()


def test_a_driver_that_was_taken_over_is_told(run: RunFolder):
    with run.lease({}, beat_s=0.02) as lease:
        _elsewhere(run, beat=time.time(), number=2)
        with pytest.raises(StorageError, match="run demo was taken over by another driver"):
            lease.check()
        deadline = time.time() + 10
        while not lease.lost:
            assert time.time() < deadline
            time.sleep(0.01)
    assert run.storage.read_json("runs/demo/lease/2.json")["host"] == "other"


def test_a_process_is_told_from_its_successor_with_the_same_pid():
    me = process.this_process()
    assert process.is_gone(me) is False
    assert process.is_gone({**me, "started": (me["started"] or 0) - 1}) is (me["started"] is not None)
    assert process.is_gone({**me, "pid": 2**22 + 1}) is True
    for other in ({"host": "other"}, {"boot_id": "other"}, {"pid_namespace": "other"}, {"pid": None}):
        assert process.is_gone({**me, **other}) is None


def test_the_first_verdict_stays(run: RunFolder):
    assert run.set_verdict("TrainError", "NaN in step 5; rows a.jsonl:3")
    assert not run.set_verdict("DataError", "the process group died")
    verdict = run.verdict()
    assert verdict is not None
    assert (verdict["kind"], verdict["message"]) == ("TrainError", "NaN in step 5; rows a.jsonl:3")
    run.clear_verdict()
    run.clear_verdict()
    assert run.verdict() is None
    with pytest.raises(ValueError, match="no error of"):
        run.set_verdict("KeyError", "x")


def test_repeated_steps_count_once_with_their_last_values(run: RunFolder):
    run.append_metrics([{"kind": "train", "step": step, "loss": 10.0 - step} for step in (1, 2, 3)])
    run.append_metrics([{"kind": "eval", "step": 2, "loss": 5.0}, {"kind": "recovery", "reason": "node lost"}])
    RunFolder(run.storage, "demo").append_metrics([{"kind": "train", "step": step, "loss": 0.0} for step in (3, 4)])
    run.append_metrics([{"kind": "recovery", "reason": "node lost"}])
    run.append_metrics([])
    rows = run.metrics()
    assert [(row["kind"], row.get("step"), row.get("loss")) for row in rows] == [
        ("train", 1, 9.0),
        ("train", 2, 8.0),
        ("train", 3, 0.0),
        ("eval", 2, 5.0),
        ("recovery", None, None),
        ("train", 4, 0.0),
        ("recovery", None, None),
    ]


def test_half_a_line_costs_that_line_only(tmp_path: Path):
    run = RunFolder(Storage(str(tmp_path)), "demo")
    run.append_metrics([{"kind": "train", "step": 1}, {"kind": "train", "step": 2}])
    path = tmp_path / "runs/demo/metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in run.metrics()] == [1]
    run.append_metrics([{"kind": "train", "step": 3}])
    assert [row["step"] for row in run.metrics()] == [1, 3]


def test_runs_are_listed_with_the_last_begun_first(storage: Storage):
    for name in ("a", "b"):
        RunFolder(storage, name).begin({}, fresh=False)
        time.sleep(0.01)
    storage.write_bytes("runs/broken/state/status.json", b"{")
    assert [entry["name"] for entry in list_runs(storage)] == ["b", "a", "broken"]
