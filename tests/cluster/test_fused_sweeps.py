"""Sweeps whose trials share a worker group: the tables of trials alone, through stops, failures and deaths."""

import json
import os
import signal
from pathlib import Path

import pytest
from files_here import run_writer, sweep_writer
from sweeps_here import driver_of, folder_of, swept, table_of, until

from ftray.store.registry import Registry

pytestmark = pytest.mark.ray

LR = {"kind": "loguniform", "low": 1e-3, "high": 1e-2}
SPACE = {"optim.lr": LR, "method.rank": [2, 4, 8], "optim.steps": [4, 6]}


def fused_writer(write_sweep):
    def write(name, **keys):
        run = {"scale__cpus_per_worker": 2, **keys.pop("run", {})}
        given = {"space": SPACE, "trials": 6, "parallel": 4, "seed": 5, "fuse": "auto", **keys}
        return write_sweep(name, run=run, **given)

    return write


@pytest.fixture
def fused_file(sweep_file):
    """A sweep of six LoRA trials, four at a time, in one group of one worker."""
    return fused_writer(sweep_file)


@pytest.fixture(scope="module")
def alone(cluster, small_base, orders, tmp_path_factory):
    """The table of the same trials, each in a process of its own."""
    folder = tmp_path_factory.mktemp("alone")
    write = fused_writer(sweep_writer(run_writer(small_base, orders, folder), folder))
    path = write("alone", fuse="off", parallel=2, run={"scale__cpus_per_worker": 1})
    swept(path)
    return table_of(folder_of(path))


def same(table, other):
    """Sums run in another order when trials share passes, so losses differ in the seventh digit."""
    plain, losses = zip(*[({**row, "loss": None}, row["loss"]) for row in table], strict=True)
    others, other_losses = zip(*[({**row, "loss": None}, row["loss"]) for row in other], strict=True)
    return plain == others and losses == pytest.approx(other_losses, abs=2e-5)


def started(folder):
    """(pid, trial) of every start of a trial, of several at the same step too."""
    logs = {number: Path(folder.storage.root, folder.run(number).key, "metrics.jsonl") for number in folder.numbers()}
    lines = [(number, line) for number, log in logs.items() if log.exists() for line in log.read_text().splitlines()]
    return [(json.loads(line)["pid"], number) for number, line in lines if '"kind": "started"' in line]


def test_the_table_is_that_of_trials_alone_and_all_ran_in_one_process(cluster, fused_file, alone):
    path = fused_file("together")
    outcome = swept(path)
    folder = folder_of(path)
    assert same(table_of(folder), alone)
    assert len({pid for pid, _ in started(folder)}) == 1
    version = Registry(folder.storage).resolve(outcome.version)
    assert version.card["metrics"]["after"]["loss"] == pytest.approx(outcome.score, abs=1e-6)


def test_a_trial_that_is_no_number_or_is_stopped_leaves_alone_and_others_take_its_seat(cluster, fused_file):
    space = {"optim.lr": [1e-2, 1e-4, 1e30], "method.rank": [2, 4]}
    path = fused_file("leaving", space=space, search={"kind": "grid"}, stopping={"kind": "asha", "reduction": 2})
    rows = swept(path).trials
    by_status = {}
    for row in rows:
        by_status.setdefault(row["status"], []).append(row)
    assert {row["optim.lr"] for row in by_status["failed"]} == {1e30}
    assert all("is not a number" in row["reason"] for row in by_status["failed"])
    assert by_status["stopped"]
    assert all("others were better" in row["reason"] for row in by_status["stopped"])
    assert max(row["optim.lr"] for row in by_status["done"]) == 1e-2
    assert len({pid for pid, _ in started(folder_of(path))}) == 1


def test_trials_go_on_when_their_process_and_then_their_driver_is_killed(cluster, fused_file, alone):
    path = fused_file("killed")
    folder = folder_of(path)
    driver = driver_of(cluster, path)
    until(lambda: any(record.reports for record in folder.records()), driver)
    first = {pid for pid, _ in started(folder)}
    os.kill(next(iter(first)), signal.SIGKILL)
    until(lambda: {pid for pid, _ in started(folder)} - first, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert folder.outcome() is None
    assert driver_of(cluster, path).wait(timeout=1800) == 0
    assert same(table_of(folder), alone)
    assert len({pid for pid, _ in started(folder)}) == 3


def test_a_group_of_two_workers_gives_the_same_table(cluster, fused_file, alone):
    path = fused_file("pair", run={"scale__workers": 2, "scale__cpus_per_worker": 1})
    swept(path)
    assert same(table_of(folder_of(path)), alone)
