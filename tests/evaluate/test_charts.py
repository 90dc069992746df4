"""Axes have round numbers that enclose the data; thinning keeps means."""

import pytest

from ftray.evaluate.charts import MAX_POINTS, Series, _thinned, line_chart, short, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.3, 2.7, [0, 1, 2, 3]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, expected):
    assert ticks(low, high, 4) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(5.0, 5.0), (-3.0, -3.0), (-1e-9, 1e-9), (8000.1, 8000.2), (0, 1e12)])
def test_any_range_gets_a_few_ticks_around_it(low, high):
    values = ticks(low, high, 4)
    assert 2 <= len(values) <= 7
    assert values[0] <= low <= high <= values[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (2e-4, "2e-4"), (12345, "12.3k"), (2.5e6, "2.5M"), (-3, "-3"), (8466.2, "8466")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_thinning_keeps_the_mean_and_the_last_step():
    points = [(float(step), float(step % 2)) for step in range(1, 4801)]
    thin = _thinned(points)
    assert len(thin) == MAX_POINTS
    assert thin[-1][0] == 4800
    assert {y for _, y in thin} == {0.5}


def test_a_chart_of_nothing_is_none():
    assert line_chart("Loss", [Series("a", [], "train"), Series("b", [(1.0, float("nan"))], "eval")]) is None


def test_pointing_at_a_step_tells_every_series_value_there():
    chart = line_chart(
        "Loss", [Series("training", [(1, 2.0), (2, 1.0)], "train"), Series("held-out", [(2, 1.5)], "eval")]
    )
    assert "<title>step 2 · training 1 · held-out 1.5</title>" in chart
    assert "<title>step 1 · training 2</title>" in chart


def test_marks_outside_the_curve_are_left_out():
    chart = line_chart("Loss", [Series("a", [(1, 2.0), (9, 1.0)], "train")], marks=[(5, "inside"), (50, "outside")])
    assert "inside" in chart
    assert "outside" not in chart
