"""Intervals and losses against values worked by hand, and the simulation against the formula."""

import math

import pytest

from ftray.train import failures


def test_youngs_interval_by_hand():
    assert failures.young_daly_s(save_s=2, mtbf_s=3600) == 120  # sqrt(2 x 2 x 3600)
    assert failures.young_daly_s(save_s=1000, mtbf_s=100) == 100  # never longer than failures are apart


def test_failures_of_gpus_add_up():
    assert failures.mtbf_s(1000, gpu_mtbf_h=50_000) == 50 * 3600


def test_without_failures_a_run_costs_its_work_and_its_checkpoints():
    run = failures.simulate(100, interval_s=10, save_s=1, restart_s=5, mtbf_s=1e12)
    assert (run.wall_s, run.saving_s, run.repeated_s, run.failures) == (109, 9, 0, 0)  # none after the last part


def test_every_second_of_a_simulated_run_is_accounted_for():
    run = failures.simulate(50_000, interval_s=300, save_s=10, restart_s=60, mtbf_s=2000, seed=3)
    assert run.failures > 5
    assert run.wall_s == pytest.approx(50_000 + run.saving_s + run.repeated_s + run.restarting_s)


@pytest.mark.parametrize("mtbf_s", [1000, 5000, 50_000])
def test_simulated_runs_take_as_long_as_the_formula_expects(mtbf_s):
    settings = {"interval_s": 400, "save_s": 20, "restart_s": 100, "mtbf_s": mtbf_s}
    walls = [failures.simulate(40_000, **settings, seed=seed).wall_s for seed in range(300)]
    spread = (sum((wall - sum(walls) / 300) ** 2 for wall in walls) / 299) ** 0.5 / math.sqrt(300)
    # four standard errors, and the last checkpoint that the formula counts and a run does not make
    assert sum(walls) / 300 == pytest.approx(failures.expected_s(40_000, **settings), abs=4 * spread + 25)


def test_the_best_interval_is_no_worse_than_any_other_and_youngs_when_failures_are_rare():
    settings = {"save_s": 30, "restart_s": 200, "mtbf_s": 4000}
    best = failures.best_interval_s(**settings)
    costs = {t: failures.expected_s(1, interval_s=t, **settings) for t in (best, *range(50, 4000, 10))}
    assert min(costs, key=costs.get) == pytest.approx(best, abs=10)
    rare = failures.best_interval_s(save_s=1, restart_s=200, mtbf_s=1e6)
    assert rare == pytest.approx(failures.young_daly_s(save_s=1, mtbf_s=1e6), rel=0.01)


def test_lost_hours_are_those_of_all_gpus():
    run = failures.Outcome(wall_s=0, saving_s=1800, repeated_s=900, restarting_s=900, failures=1)
    assert failures.lost_gpu_hours(run, gpus=16) == 16
