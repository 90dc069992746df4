"""Sweeps on a cluster of two nodes: stops, failures, budgets, populations, and deaths in the middle."""

import signal
import time

import pytest
from sweeps_here import driver_of, folder_of, swept, table_of, until

from ftray.config.load import load_run
from ftray.errors import ConfigError
from ftray.store.registry import Registry

pytestmark = pytest.mark.ray


def test_a_sweep_ends_with_its_best_registered_and_failures_are_rows(cluster, sweep_file):
    space = {"method.kind": ["lora", "full"], "method.rank": [2, 4], "optim.lr": [1e-3, 1e-2, 1e30]}
    path = sweep_file("mixed", space=space, trials=6, finalists={"count": 1, "seeds": 1}, seed=3)
    outcome = swept(path)
    by_status = {}
    for row in outcome.trials:
        by_status.setdefault(row["status"], []).append(row)
    assert {row["optim.lr"] for row in by_status["failed"]} == {1e30}
    assert all("is not a number" in row["reason"] for row in by_status["failed"])
    assert {row["optim.lr"] for row in by_status["done"]} <= {1e-3, 1e-2}
    assert all((row["method.rank"] is None) == (row["method.kind"] == "full") for row in outcome.trials)
    best = min((row for row in by_status["done"] if row["repeats"] is None), key=lambda row: row["loss"])
    assert outcome.best == best["trial"]
    assert [row["seed"] for row in outcome.trials if row["repeats"] == best["trial"]] == [43]

    folder = folder_of(path)
    version = Registry(folder.storage).resolve(outcome.version)
    assert version.card["sweep"]["name"] == "mixed"
    assert version.card["sweep"]["values"] == outcome.values
    assert version.card["metrics"]["after"]["loss"] == pytest.approx(outcome.score, abs=1e-6)
    pids = {
        row["pid"] for number in folder.numbers() for row in folder.run(number).metrics() if row["kind"] == "started"
    }
    assert len(pids) <= 4, "a process trains one trial after the other"

    from ftray.train.launch import train

    again = train(load_run(outcome.best_file), as_json=True)
    assert again.comparison["after"]["loss"] == pytest.approx(outcome.score, abs=1e-5), "best.yaml gives the same"
    assert swept(path).resumed, "a finished sweep is told, not repeated"


def test_a_budget_in_time_is_kept_and_what_ended_counts(cluster, sweep_file):
    path = sweep_file("brief", trials=500, parallel=2, run={"optim__steps": 3}, budget={"hours": 25 / 3600})
    began = time.time()
    outcome = swept(path)
    spent = folder_of(path).spent()["hours"] * 3600
    assert spent < 25 + 10
    assert time.time() - began < 120
    assert 1 <= sum(row["status"] == "done" for row in outcome.trials) < 500


def test_a_population_moves_the_learning_rate_and_copies_weights(cluster, sweep_file):
    lr = {"kind": "loguniform", "low": 1e-5, "high": 3e-2}
    stopping = {"kind": "pbt", "quantile": 0.5}
    path = sweep_file("crowd", space={"optim.lr": lr}, trials=4, stopping=stopping, run={"optim__steps": 12})
    outcome = swept(path)
    folder = folder_of(path)
    copies = [row for n in folder.numbers() for row in folder.run(n).metrics() if row["kind"] == "copied"]
    assert copies
    assert all(row["status"] == "done" for row in outcome.trials), outcome.trials
    assert Registry(folder.storage).resolve(outcome.version).card["sweep"]["course"]


def test_trials_of_several_workers_take_their_seats_without_deadlock(cluster, sweep_file):
    path = sweep_file("groups", trials=3, run={"scale__workers": 2, "scale__cpus_per_worker": 1})
    outcome = swept(path)
    assert [row["status"] for row in outcome.trials] == ["done"] * 3
    assert outcome.version == "groups-run@v1"


def test_a_metric_that_no_trial_reports_is_refused_before_anything_starts(sweep_file):
    path = sweep_file("blind", metric="exact_match")
    with pytest.raises(ConfigError, match=r"metric: no trial reports exact_match with evaluate.generate_rows: 0"):
        swept(path)
    with pytest.raises(ConfigError, match=r"did you mean 'loss'"):
        swept(sweep_file("blind", metric="los"))
    assert folder_of(path).resolved() is None


def test_a_budget_smaller_than_one_trial_is_refused_before_anything_starts(cluster, sweep_file):
    path = sweep_file("poor", budget={"hours": 1e-9})
    with pytest.raises(ConfigError, match=r"budget.hours: .* is less than one trial"):
        swept(path)
    with pytest.raises(ConfigError, match=r"trials hold no GPUs here"):
        swept(sweep_file("poor", budget={"gpu_hours": 1}))
    assert folder_of(path).resolved() is None


def test_a_rank_that_the_base_cannot_hold_is_refused_before_anything_starts(cluster, sweep_file):
    with pytest.raises(ConfigError, match=r"space.method.rank: .*4096 is larger than the smaller side"):
        swept(sweep_file("wide", space={"method.rank": [4, 4096]}))


def test_after_the_death_of_driver_and_node_the_table_is_that_of_an_undisturbed_sweep(cluster, sweep_file):
    keys = {"trials": 6, "parallel": 2, "space": {"optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1e-2}}}
    undisturbed = swept(sweep_file("calm", **keys, seed=5))
    path = sweep_file("rough", **keys, seed=5)
    folder = folder_of(path)

    node = cluster.add_node(num_cpus=2)
    driver = driver_of(cluster, path)
    until(lambda: sum(folder.ended(number) is not None for number in folder.numbers()) >= 2, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    ended = {number: folder.ended(number) for number in folder.numbers() if folder.ended(number)}
    assert ended
    assert folder.outcome() is None

    driver = driver_of(cluster, path)
    until(lambda: len(folder.numbers()) > len(ended) + 1, driver)
    cluster.remove_node(node, allow_graceful=False)
    assert driver.wait(timeout=1800) == 0
    assert all(folder.ended(number) == end for number, end in ended.items()), "nothing that ended is done again"
    assert table_of(folder) == table_of(folder_of(sweep_file("calm", **keys, seed=5)))
    assert folder.outcome()["best"] == undisturbed.best
