"""Language modelling's scores, worked by hand."""

import numpy as np

from ftray.objectives.language import scores


def test_sums_are_divided_once_so_long_rows_weigh_more():
    observed = np.array([[2.0, 0, 1], [3.0, 6, 9]])  # nats, right first choices, tokens
    assert scores(observed) == {"loss": 0.5, "token_accuracy": 0.6}  # a mean of means would be (2 + 1/3) / 2


def test_of_no_token_there_is_no_score():
    assert scores(np.zeros((0, 0))) == scores(np.array([[0.0, 0, 0]])) == {}
