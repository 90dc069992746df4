"""The comparison says what changed, and the gate what may be promoted."""

import json
import math
from dataclasses import replace

import pytest

from ftray.config.schema import Evaluate
from ftray.errors import ConfigError
from ftray.evaluate.compare import METRICS, Comparison, Scores, check_gate, compare, score, written

BASE = Scores(loss=2.0, token_accuracy=0.5, exact_match=0.0, general_loss=3.0)
TUNED = Scores(loss=0.5, token_accuracy=0.9, exact_match=0.8, general_loss=3.2)


def test_every_metric_of_either_side_has_a_row_and_says_whether_it_is_better():
    rows = {row.metric: row for row in compare(BASE, TUNED).rows}
    assert list(rows) == ["loss", "perplexity", "token_accuracy", "exact_match", "general_loss"]
    assert rows["loss"].change == -1.5
    assert {name: row.better for name, row in rows.items()} == {
        "loss": True,
        "perplexity": True,
        "token_accuracy": True,
        "exact_match": True,
        "general_loss": False,
    }
    assert rows["perplexity"].tuned == pytest.approx(math.exp(0.5))


def test_no_change_and_one_missing_side_are_neither_better_nor_worse():
    rows = compare(Scores(loss=1.0), Scores(loss=1.0, exact_match=0.5)).rows
    assert [(row.metric, row.better) for row in rows] == [("loss", None), ("perplexity", None), ("exact_match", None)]
    assert rows[2].change is None


def test_forgetting_is_the_rise_of_the_general_loss():
    assert compare(BASE, TUNED).forgetting == pytest.approx(0.2)
    assert compare(BASE, Scores(loss=0.5)).forgetting is None


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ("loss < base", True),
        ("loss > base", False),
        ("exact_match >= 0.8", True),
        ("exact_match>0.8", False),
        ("forgetting <= 0.5", True),
        ("forgetting <= 0.1", False),
        ("forgetting <= base", False),
        ("perplexity < 2", True),
        ("f1 >= 0.1", False),  # not measured
    ],
)
def test_the_gate_judges_the_tuned_scores(rule, passed):
    comparison = compare(BASE, TUNED, Evaluate(gate=[rule]).gate)
    assert comparison.passed is passed


def test_one_failed_rule_fails_the_gate_and_no_rule_passes():
    assert not compare(BASE, TUNED, ["loss < base", "exact_match >= 0.9"]).passed
    assert compare(BASE, TUNED, []).passed


def test_a_loss_that_is_not_a_number_never_passes():
    for rule in ("loss < base", "loss > base", "perplexity < 10"):
        assert not compare(BASE, Scores(loss=math.nan), [rule]).passed


def test_the_card_says_why():
    gate = compare(BASE, TUNED, ["exact_match >= 0.9"]).to_json()["gate"]
    assert gate == {
        "passed": False,
        "rules": [{"rule": "exact_match >= 0.9", "value": 0.8, "bound": 0.9, "passed": False}],
    }


def test_a_comparison_reads_back_from_strict_json():
    tasks = {"a": Scores(loss=1.0, f1=0.5), "b": Scores(loss=math.inf)}
    before = Scores(loss=800.0, exact_match=0.1, general_loss=2.0, tasks=tasks)
    comparison = compare(before, TUNED, ["loss < base", "forgetting < 9.5"])
    text = json.dumps(comparison.to_json(), allow_nan=False)
    again = Comparison.from_json(json.loads(text))
    assert again.to_json() == comparison.to_json()
    assert again.before.tasks["a"] == tasks["a"]
    assert again.passed is comparison.passed is True


def test_a_gate_about_no_metric_is_refused_before_the_run():
    check_gate(["f1 >= 0.5", "forgetting <= 0.1", "loss < base"])
    with pytest.raises(ConfigError) as error:
        check_gate(["loss < base", "exact_mach >= 0.5"])
    assert error.value.problems == (("evaluate.gate.1", "no metric 'exact_mach'; did you mean 'exact_match'?"),)


def test_scores_are_told_per_task_where_there_are_several():
    scores = score(
        {"loss": 1.0, "token_accuracy": 0.5},
        by_task={
            "orders": {"loss": 0.5, "token_accuracy": 0.75},
            "chat": {"loss": 1.5, "token_accuracy": 0.25},
        },
        predictions=['{"a": 1}', "hello", "bye"],
        answers=['{"a": 1}', "hello", "no"],
        tasks=["orders", "chat", "chat"],
        general_loss=3.0,
    )
    assert scores.loss == 1.0
    assert scores.token_accuracy == 0.5
    assert scores.exact_match == pytest.approx(2 / 3)
    assert scores.general_loss == 3.0
    assert scores.tasks["orders"] == Scores(loss=0.5, token_accuracy=0.75, exact_match=1.0, json_match=1.0)
    assert scores.tasks["chat"] == Scores(loss=1.5, token_accuracy=0.25, exact_match=0.5)
    assert list(compare(scores, scores).tasks) == ["orders", "chat"]


def test_a_task_is_judged_by_its_own_scores_where_it_has_them():
    tasks = {"orders": Scores(loss=1.0, exact_match=0.2), "chat": Scores(loss=3.0)}
    tuned = {"orders": Scores(loss=0.5, exact_match=0.1), "chat": Scores(loss=2.0)}
    rules = ["loss < base", "exact_match > base", "forgetting < 0.5"]
    whole = compare(replace(BASE, tasks=tasks), replace(TUNED, tasks=tuned), rules)
    orders, chat = whole.of_task("orders"), whole.of_task("chat")
    assert [(r.value, r.passed) for r in orders.gate[:2]] == [(0.5, True), (0.1, False)]
    assert [(r.value, r.passed) for r in chat.gate[:2]] == [(2.0, True), (0.8, True)]
    assert orders.gate[2] == chat.gate[2] == whole.gate[2]
    assert orders.after == tuned["orders"]
    assert orders.forgetting is None
    unseen = whole.of_task("no rows of it were held out")
    assert not unseen.passed
    assert {r.value for r in unseen.gate} == {None}


def test_of_several_tasks_each_version_is_served_that_passed_its_own_gate():
    before, after = Scores(loss=2.0), Scores(loss=1.0)
    tasks = {"red": (Scores(loss=1.0), Scores(loss=1.5)), "blue": (Scores(loss=3.0), Scores(loss=0.5))}
    whole = compare(
        replace(before, tasks={name: sides[0] for name, sides in tasks.items()}),
        replace(after, tasks={name: sides[1] for name, sides in tasks.items()}),
        ["loss < base"],
    )
    assert whole.served("desks@v1", {}) == {"desks@v1": True}
    refs = {"red": "desks-red@v1", "blue": "desks-blue@v1"}
    assert whole.served("desks@v1", refs) == {"desks-red@v1": False, "desks-blue@v1": True}


def test_a_task_of_numbers_is_scored_by_them_and_a_reward_says_first_what_is_right():
    given = {
        "by_task": {"sums": {"loss": 0.5}, "chat": {"loss": 1.5}},
        "predictions": ["6 * 3 = 18", "17", "42"],
        "answers": ["#### 18", "#### 18", "42"],
        "tasks": ["sums", "sums", "chat"],
    }
    scores = score({"loss": 1.0}, **given, numeric={"sums"})
    assert scores.pass_at_1 == scores.tasks["sums"].pass_at_1 == 0.5
    assert scores.tasks["chat"] == Scores(loss=1.5, exact_match=1.0)
    assert score({"loss": 1.0}, **given).pass_at_1 is None
    assert score({"pass_at_1": 0.25}, **given, numeric={"sums"}).pass_at_1 == 0.25
    comparison = compare(Scores(pass_at_1=0.0), scores, ["pass_at_1 > base", "pass_at_1 >= 0.6"])
    assert [result.passed for result in comparison.gate] == [True, False]


def test_benchmarks_have_rows_and_rules_of_their_own():
    names = ["lm_eval/wikitext/word_perplexity", "lm_eval/gsm8k/exact_match/strict-match"]
    before = Scores(loss=2.0, lm_eval=dict(zip(names, [20.0, 0.25], strict=True)))
    after = Scores(loss=1.0, lm_eval=dict(zip(names, [22.0, 0.5], strict=True)))
    gate = Evaluate(gate=[f"{names[1]} > base", f"{names[0]} <= base", "lm_eval/gsm8k/acc > 0"]).gate
    comparison = compare(before, after, gate)
    assert [(row.metric, row.better) for row in comparison.rows[-2:]] == [(names[0], False), (names[1], True)]
    assert [result.passed for result in comparison.gate] == [True, False, False]
    assert (written(names[0], 22.0), written(names[1], 0.5)) == ("22.000", "50.0 %")
    assert comparison.to_json()["after"][names[1]] == 0.5
    assert Comparison.from_json(json.loads(json.dumps(comparison.to_json()))) == comparison


def test_one_task_is_not_told_twice():
    assert score({"loss": 0.5}, by_task={"orders": {"loss": 0.5}}).tasks == {}


def test_values_are_written_as_people_read_them():
    assert written("loss", 1.23456) == "1.235"
    assert written("loss", -0.5, signed=True) == "−0.500"
    assert written("exact_match", 0.8333) == "83.3 %"
    assert written("exact_match", 0.8333, signed=True) == "+83.3 pp"
    assert written("perplexity", 4321.9) == "4,321.9"
    assert written("perplexity", 2.5e9) == "2.50e+09"
    assert written("perplexity", math.inf) == "inf"
    assert written("f1", None) == "–"


def test_every_metric_of_the_table_is_one_a_gate_can_name():
    Evaluate(gate=[f"{name} < base" for name in METRICS])
    check_gate([f"{name} < base" for name in METRICS])
