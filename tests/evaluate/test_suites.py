"""Scores worked by hand."""

import math

import pytest

from ftray.errors import DataError
from ftray.evaluate.suites import (
    answer_scores,
    check_labels,
    exact_match,
    json_match,
    label_scores,
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
    assert answer_scores(["[1]"], ["[1]"]) == {"exact_match": 1.0, "json_match": 1.0}
    assert set(answer_scores(["a"], ["a"], ["a", "b"])) == {"exact_match", "accuracy", "precision", "recall", "f1"}
