"""Steps, rates and windows of a run, against values worked by hand."""

import numpy as np
import pytest

from ftray.config.schema import Optim
from ftray.data.tokens import TokenStore, TokenWriter
from ftray.train.schedule import Windows, course


def course_of(*, rows=100, checkpoint_every="auto", eval_every="auto", **optim):
    return course(
        Optim(**optim),
        lr=1.0,
        rows=rows,
        seed=0,
        checkpoint_every=checkpoint_every,
        eval_every=eval_every,
        log_every=1,
    )


@pytest.fixture
def windows(tmp_path):
    def make(rows=10, weights=(1.0,), sources=1, **optim):
        with TokenWriter(tmp_path / "rows", 100, ["a"] * sources) as writer:
            for line in range(rows):
                writer.add([1, 2, 3], [False, True, True], line % sources, line + 1)
        store = TokenStore.open(tmp_path / "rows")
        return Windows(store, weights, course_of(rows=Windows(store, weights, None).per_epoch, **optim))

    return make


def test_the_rate_rises_over_the_warm_up_and_falls_to_a_tenth():
    cosine = course_of(steps=100, warmup=0.1)
    assert cosine.warmup_steps == 10
    assert [cosine.lr_at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert cosine.lr_at(55) == pytest.approx(0.1 + 0.9 / 2)  # half way down the cosine
    assert cosine.lr_at(100) == pytest.approx(0.1)
    linear = course_of(steps=100, warmup=0.1, schedule="linear")
    assert [linear.lr_at(step) for step in (10, 55, 100)] == pytest.approx([1.0, 0.55, 0.1])
    constant = course_of(steps=100, warmup=0.0, schedule="constant")
    assert {constant.lr_at(step) for step in range(100)} == {1.0}


def test_every_step_has_a_rate_above_zero():
    for steps in (1, 2, 3, 7):
        for kind in ("cosine", "linear", "constant"):
            made = course_of(steps=steps, warmup=0.5, schedule=kind)
            assert all(0 < made.lr_at(step) <= 1 for step in range(steps))


def test_epochs_become_steps_with_a_short_last_window():
    assert course_of(rows=100, epochs=1, batch_size=16).steps == 7
    assert course_of(rows=100, epochs=2.5, batch_size=10).steps == 25
    assert course_of(rows=3, epochs=0.01, batch_size=16).steps == 1
    assert course_of(rows=100, steps=5, batch_size=16).rows is None


def test_auto_is_about_twenty_checkpoints_and_ten_evaluations():
    made = course_of(steps=1000)
    assert (made.checkpoint_every, made.eval_every) == (50, 100)
    short = course_of(steps=3)
    assert (short.checkpoint_every, short.eval_every) == (1, 1)


def test_the_end_is_no_interval():
    made = course_of(steps=10, checkpoint_every=5, eval_every=4)
    assert [done for done in range(1, 11) if made.checkpoints_after(done)] == [5]
    assert [done for done in range(1, 11) if made.evaluates_after(done)] == [4, 8]
    assert not any(course_of(steps=10, eval_every=0).evaluates_after(done) for done in range(1, 11))


def test_an_epoch_shows_every_row_once(windows):
    made = windows(rows=10, epochs=2, batch_size=4)
    seen = [made.rows(step).tolist() for step in range(made.schedule.steps)]
    assert [len(rows) for rows in seen] == [4, 4, 4, 4, 4]
    flat = [row for rows in seen for row in rows]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_the_last_window_of_whole_epochs_is_shorter(windows):
    made = windows(rows=10, epochs=1, batch_size=4)
    assert [len(made.rows(step)) for step in range(3)] == [4, 4, 2]


def test_counted_steps_go_round_the_epochs_with_whole_windows(windows):
    made = windows(rows=5, steps=4, batch_size=12)
    assert [len(made.rows(step)) for step in range(4)] == [12] * 4
    counts = np.bincount(np.concatenate([made.rows(step) for step in range(4)]))
    assert sorted(counts.tolist()) == [9, 9, 10, 10, 10]  # nine epochs and three rows


def test_a_step_can_be_asked_for_without_those_before(windows):
    made = windows(rows=10, epochs=4, batch_size=3)
    later = made.rows(9).tolist()
    again = windows(rows=10, epochs=4, batch_size=3)
    assert [again.rows(step).tolist() for step in range(10)][9] == later


def test_weights_make_an_epoch_longer_or_shorter(windows):
    made = windows(rows=10, sources=2, weights=(2.0, 0.4), epochs=1, batch_size=4)
    assert made.per_epoch == 12
    assert made.schedule.steps == 3
    seen = np.concatenate([made.rows(step) for step in range(3)])
    assert np.bincount(seen % 2).tolist() == [10, 2]


def test_the_epoch_is_counted_in_rows_and_ends_where_the_run_does(windows):
    made = windows(rows=10, epochs=1, batch_size=4)
    assert [made.epoch(step) for step in range(4)] == [0, 0.4, 0.8, 1.0]
