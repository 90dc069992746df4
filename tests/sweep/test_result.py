"""The ranking, the best, and the files that tell of a sweep."""

import csv
import io

import pytest
from sweeps import record, sweep

from ftray.config.load import load_run
from ftray.store.paths import Storage
from ftray.sweep.page import page
from ftray.sweep.pictures import Axis, front, importance
from ftray.sweep.records import SweepFolder
from ftray.sweep.result import as_csv, best, best_file, ranked, repeats, rows
from ftray.sweep.table import line, table

TRIALS = [
    record(0, 2.0, 1.5, 1.2, values={"optim.lr": 1e-3, "method.rank": 4}, parameters=100),
    record(1, 1.8, 1.1, 0.9, values={"optim.lr": 3e-3, "method.rank": 16}, parameters=400),
    record(2, 3.0, status="stopped", values={"optim.lr": 1e-4, "method.rank": 4}, reason="others were better"),
    record(3, status="failed", values={"optim.lr": 9e-3, "method.rank": 8}, reason="step 2: the loss is not a number"),
    record(4, 1.9, status=None, values={"optim.lr": 2e-3, "method.rank": 8}),
    record(5, 2.1, 1.6, 1.0, values={"optim.lr": 2e-3, "method.rank": 4}, parameters=100),
]


def test_finished_trials_rank_by_score_and_the_others_after_them():
    assert [one.number for one in ranked(sweep(), TRIALS)] == [1, 5, 0, 4, 2, 3]
    assert best(sweep(), TRIALS).number == 1
    assert best(sweep(), TRIALS[2:5]) is None


def test_more_is_better_where_the_metric_says_so():
    trials = [record(0, 1.0), record(1, 1.0)]
    for one, share in zip(trials, (0.3, 0.8), strict=True):
        one.end.scores["exact_match"] = share
    assert best(sweep(metric="exact_match"), trials).number == 1


def test_finalists_are_trained_again_and_the_best_mean_wins():
    asked = sweep(finalists={"count": 2, "seeds": 2})
    assert [(one.number, seed) for one, seed in repeats(asked, TRIALS)] == [(1, 43), (1, 44), (5, 43), (5, 44)]
    seeds = [record(6, 1.9, of=1), record(7, 1.6, of=1), record(8, 1.0, of=5), record(9, 0.9, of=5)]
    assert best(asked, [*TRIALS, *seeds]).number == 5
    row = next(row for row in rows(asked, [*TRIALS, *seeds]) if row["trial"] == 5)
    assert row["mean"] == pytest.approx((1.0 + 1.0 + 0.9) / 3)
    assert row["spread"] == pytest.approx(0.0577, abs=1e-4)


def test_the_table_as_csv_has_one_row_a_trial_with_its_reason():
    table = list(csv.DictReader(io.StringIO(as_csv(rows(sweep(), TRIALS)))))
    assert len(table) == 6
    assert (table[0]["trial"], table[0]["loss"], table[0]["method.rank"]) == ("1", "0.9", "16")
    assert table[-1]["reason"] == "step 2: the loss is not a number"


def test_the_best_file_is_a_run_file_with_the_values_in_it(tmp_path):
    folder = SweepFolder(Storage(str(tmp_path)), "demo-sweep")
    text = best_file(sweep(), folder, TRIALS[1], version="demo@v3")
    (tmp_path / "best.yaml").write_text(text)
    run = load_run(tmp_path / "best.yaml")
    assert (run.name, run.optim.lr, run.method.rank) == ("demo-sweep-best", 3e-3, 16)
    assert text.startswith("# The best of sweep demo-sweep: trial 1, loss 0.9, registered as demo@v3.")


def test_the_page_tells_every_trial_and_runs_no_script():
    text = page(sweep(), TRIALS, best=TRIALS[1], version="demo@v3")
    for word in ("Learning curves", "What was tried", "What mattered", "Quality and cost", "demo@v3", "not a number"):
        assert word in text
    assert "<script" not in text


def test_what_a_file_says_never_becomes_markup():
    one = record(0, 1.0, values={"optim.lr": 1e-3, "method.rank": 4}, reason="<script>alert(1)</script>")
    assert "<script" not in page(sweep(), [one], best=one, version="demo@v1")


def test_a_trial_in_one_line_and_in_the_table():
    assert line(sweep(), TRIALS[1]) == "trial 1: loss 0.900 after 3 epochs, 6 s  (lr 0.003, rank 16)"
    assert "failed: step 2: the loss is not a number" in line(sweep(), TRIALS[3])
    assert table(sweep(), TRIALS).row_count == 6


def test_importance_is_what_a_key_explains_alone():
    scores = [1.0, 1.1, 0.9, 3.0, 3.1, 2.9]
    assert importance(["a", "a", "a", "b", "b", "b"], scores) > 0.95
    assert importance(["a", "b", "a", "b", "a", "b"], scores) < 0.3
    # eta^2 = 1 - 0.04 / 6.04 over two groups; epsilon^2 = 1 - 0.04 / 6.04 * 5 / 4
    assert importance([1, 1, 1, 2, 2, 2], scores) == pytest.approx(1 - 0.04 / 6.04 * 5 / 4)
    assert importance(["a"] * 6, scores) == 0.0


def test_the_front_is_what_no_other_beats_in_both():
    assert front([(1, 5), (2, 3), (3, 4), (4, 1)]) == [0, 1, 3]


def test_an_axis_in_powers_of_ten_puts_the_middle_power_in_the_middle():
    axis = Axis("lr", [1e-5, 1e-4, 1e-3])
    assert axis.at(1e-4) == pytest.approx(0.5)
    assert axis.at(None) is None
    assert Axis("kind", ["lora", "full"]).at("full") == 0.25
