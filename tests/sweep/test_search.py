"""What the next trial tries."""

import pytest
from sweeps import sweep

from ftray.sweep.search import open_search


def test_a_trial_gets_the_same_values_whatever_came_before_it():
    one, other = open_search(sweep()), open_search(sweep())
    before = [one.ask(number) for number in range(5)]
    assert [other.ask(number) for number in (4, 0, 2)] == [before[4], before[0], before[2]]
    assert len({values["optim.lr"] for values in before}) == 5
    assert open_search(sweep(seed=7)).ask(0) != before[0]


def _asked_with_feedback(search, numbers, cost):
    found = []
    for number in numbers:
        values = search.ask(number)
        search.tell(number, [cost(values)])
        found.append(values)
    return found


def cost(values):
    """Best at lr 1e-3, and at rank 16."""
    import math

    return abs(math.log10(values["optim.lr"]) + 3) + (values["method.rank"] != 16)


def test_tpe_draws_where_good_trials_were():
    pytest.importorskip("optuna")
    search = open_search(sweep(search={"kind": "tpe", "startup": 5}))
    found = _asked_with_feedback(search, range(30), cost)
    early, late = found[:5], found[-10:]
    assert sum(map(cost, late)) / 10 < sum(map(cost, early)) / 5
    assert sum(values["method.rank"] == 16 for values in late) > 5


def test_a_continued_tpe_search_goes_on_as_an_undisturbed_one():
    pytest.importorskip("optuna")
    one = sweep(search={"kind": "tpe", "startup": 3})
    undisturbed = _asked_with_feedback(open_search(one), range(9), cost)
    again = open_search(one)
    for number, values in enumerate(undisturbed[:6]):
        again.known(number, values)
        again.tell(number, [cost(values)])
    assert _asked_with_feedback(again, range(6, 9), cost) == undisturbed[6:]


def test_tpe_takes_conditional_keys_and_failed_trials():
    pytest.importorskip("optuna")
    space = {"method.kind": ["lora", "full"], "method.rank": [4, 8], "optim.lr": [1e-3, 1e-2]}
    search = open_search(sweep(space, search={"kind": "tpe", "startup": 2}))
    for number in range(12):
        values = search.ask(number)
        assert ("method.rank" in values) == (values["method.kind"] == "lora")
        search.tell(number, None if number % 3 == 0 else [float(number)])


def test_tpe_weighs_quality_against_size():
    pytest.importorskip("optuna")
    search = open_search(sweep(search={"kind": "tpe", "startup": 4, "against": "parameters"}))
    for number in range(10):
        values = search.ask(number)
        search.tell(number, [cost(values), float(values["method.rank"])])
    assert len(search.study.best_trials) >= 1
