"""Scores worked by hand."""

import math

import pytest

from ftray.errors import DataError
from ftray.evaluate.suites import (
    answer_scores,
    check_labels,
    check_numbers,
    exact_match,
    json_match,
    label_scores,
    numbered,
    numeric_tasks,
    pass_at_1,
    perplexity,
)


def test_perplexity_is_the_exponential_and_may_overflow():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan)) or perplexity(math.nan) == math.inf


def test_white_space_does_not_count_but_case_does():
    assert exact_match([" two  cups\n", "Two cups"], ["two cups", "two cups"]) == 0.5


@pytest.mark.parametrize(
    ("said", "answer", "equal"),
    [
        ('{"b": 1, "a": [2, "x"]}', '{"a": [2.0, "x"], "b": 1}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": null}', "{}", False),
        ('{"a": 1', '{"a": 1}', False),
        ("[" * 100_000, "[]", False),
        ("", "[]", False),
    ],
)
def test_json_is_compared_by_value(said, answer, equal):
    assert json_match([said], [answer]) == float(equal)


def test_answers_that_are_no_objects_or_lists_are_not_json():
    assert json_match(["42", "yes"], ["42", "yes"]) is None
    assert json_match(["42", "[]"], ["42", "[]"]) == 1.0


def test_pass_at_1_is_the_share_of_answers_that_end_in_the_right_number():
    said = ["3 * 6 = 18\n#### 18", "$18.00", "18 or 19", "I do not know"]
    assert pass_at_1(said, ["9 * 2 = 18\n#### 18"] * 4) == 2 / 4


def test_tasks_whose_answers_are_nearly_all_numbers_are_compared_by_them():
    answers = ["#### 1"] * 19 + ["none"] + ["42"] * 9 + ["Paris"] + [""]
    tasks = ["sums"] * 20 + ["facts"] * 10 + ["sums"]
    assert numeric_tasks(answers, tasks, "auto") == {"sums"}
    assert numeric_tasks(answers, tasks, True) == {"sums", "facts"}
    assert numeric_tasks(answers, tasks, False) == numeric_tasks([], [], "auto") == set()
    assert numbered(answers, tasks, {"sums"}) == list(range(19))
    assert numbered(answers, tasks, {"facts"}) == list(range(20, 29))


def test_answers_without_a_number_are_named_with_their_rows():
    check_numbers(["18 eggs"], ["a.jsonl:1"])
    with pytest.raises(DataError) as error:
        check_numbers(["18 eggs", "none of\nthem"], ["a.jsonl:1", "a.jsonl:2"])
    text = str(error.value)
    assert "evaluate.numeric: 1 held-out answer holds no number" in text
    assert "a.jsonl:2: 'none of them'" in text
    assert "a.jsonl:1" not in text
    with pytest.raises(DataError, match="and 20 more"):
        check_numbers(["none"] * 30, ["a.jsonl:1"] * 30)


def test_label_scores_by_hand():
    #        right  wrong  no label        right
    said = ["Spam ", "spam", "I think ham", "ham"]
    true = ["spam", "ham", "ham", "ham"]
    scores = label_scores(said, true, ["spam", "ham", "never seen here"])
    assert scores.accuracy == 2 / 4
    assert scores.precision == (1 / 2 + 1 / 1) / 2
    assert scores.recall == pytest.approx((1 / 1 + 1 / 3) / 2)
    assert scores.f1 == pytest.approx((2 / 3 + 2 / 4) / 2)


def test_label_scores_where_nothing_is_right_are_zero():
    scores = label_scores(["?", "?"], ["a", "b"], ["a", "b"])
    assert vars(scores) == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_a_label_never_seen_is_named_with_its_row_and_the_near_one():
    with pytest.raises(DataError) as error:
        check_labels(["refund", "delivery"], ["refund", "refnud", "refnud"], ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"])
    text = str(error.value)
    assert "1 held-out answer is no label" in text
    assert "a.jsonl:2: 'refnud'; did you mean 'refund'?" in text
    assert "a.jsonl:3" not in text
    assert "add them to evaluate.labels" in text


def test_many_labels_never_seen_are_counted_not_listed():
    with pytest.raises(DataError, match="and 20 more"):
        check_labels(["x"], [f"stranger {n}" for n in range(30)])


def test_scores_hold_what_the_answers_allow():
    assert answer_scores([], []) == {}
    assert answer_scores(["a"], ["a"]) == {"exact_match": 1.0}
    assert answer_scores(["18", "b"], ["#### 18", "b"], (), [0]) == {"exact_match": 0.5, "pass_at_1": 1.0}
    assert answer_scores(["[1]"], ["[1]"]) == {"exact_match": 1.0, "json_match": 1.0}
    assert set(answer_scores(["a"], ["a"], ["a", "b"])) == {"exact_match", "accuracy", "precision", "recall", "f1"}
