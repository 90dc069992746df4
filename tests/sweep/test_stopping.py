"""When trials stop early: Ray Tune's rules, without a cluster."""

from dataclasses import dataclass

import pytest
from sweeps import record, report, sweep

from ftray.sweep.stopping import Rungs

CONTINUE, STOP = "CONTINUE", "STOP"


@dataclass(frozen=True)
class Trial:
    trial_id: str


def told(rungs, name, iteration, loss, *, searching=True, replayed=False):
    trial = Trial(name)
    if iteration == 1:
        rungs.on_trial_add(None, trial)
    row = report(iteration, loss)
    result = {"iteration": iteration, "cost": row["scores"]["loss"], "searching": searching, "replayed": replayed}
    return rungs.on_trial_result(None, trial, {**result, "training_iteration": iteration})


def test_asha_lets_the_best_third_of_a_rung_go_on():
    rungs = Rungs(sweep(stopping={"kind": "asha", "reduction": 3}))
    decisions = [told(rungs, f"t{i}", 1, loss) for i, loss in enumerate([1.0, 2.0, 3.0, 0.5, 2.5])]
    assert decisions == [CONTINUE, STOP, STOP, CONTINUE, STOP]


def test_the_median_rule_stops_what_is_worse_than_most():
    rungs = Rungs(sweep(stopping={"kind": "median", "trials": 3}))
    for name, loss in (("a", 1.0), ("b", 1.1), ("c", 1.2)):
        assert told(rungs, name, 1, loss) == CONTINUE
    assert told(rungs, "d", 1, 5.0) == STOP
    assert told(rungs, "e", 1, 0.9) == CONTINUE


def test_without_a_rule_nothing_stops_and_a_loss_that_is_no_number_stops_no_other():
    assert told(Rungs(sweep()), "a", 1, 9e9) == CONTINUE
    rungs = Rungs(sweep(stopping={"kind": "asha"}))
    assert told(rungs, "a", 1, float("nan")) == CONTINUE
    assert told(rungs, "b", 1, 1.0) == CONTINUE


def test_what_an_earlier_start_saw_counts():
    known = [record(0, 1.0, 0.9, at=10.0), record(1, 2.0, status="stopped", at=20.0)]
    rungs = Rungs(sweep(stopping={"kind": "asha", "reduction": 2}), known)
    assert told(rungs, "new", 1, 1.9) == STOP
    assert told(rungs, "better", 1, 0.8) == CONTINUE


def test_a_report_that_is_told_again_never_stops_its_trial_but_counts_for_others():
    rungs = Rungs(sweep(stopping={"kind": "asha", "reduction": 2}), [record(0, 1.0)])
    assert told(rungs, "resumed", 1, 3.0, replayed=True) == CONTINUE
    assert told(rungs, "other", 1, 2.0) == CONTINUE, "the median of 1.0 and 3.0"


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_finalists_are_never_stopped(kind):
    rungs = Rungs(sweep(stopping={"kind": kind}), [record(n, 1.0, at=float(n)) for n in range(4)])
    assert told(rungs, "seed", 1, 9.0, searching=False) == CONTINUE
