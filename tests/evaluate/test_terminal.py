"""The comparison reads well on a screen and in a log."""

import io

from ftray.evaluate.compare import Scores, compare
from ftray.evaluate.terminal import print_comparison

COMPARISON = compare(
    Scores(loss=2.0, exact_match=0.0, general_loss=3.0),
    Scores(loss=0.5, exact_match=0.75, general_loss=3.125),
    ["loss < base", "exact_match >= 0.9", "f1 > 0.1"],
)


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_aligned_plain_lines():
    log = io.StringIO()
    print_comparison(COMPARISON, file=log)
    assert log.getvalue().splitlines() == [
        "               base   tuned           change",
        "Loss          2.000   0.500    −1.500 better",
        "Perplexity    7.389   1.649    −5.740 better",
        "Exact match   0.0 %  75.0 %  +75.0 pp better",
        "General loss  3.000   3.125     +0.125 worse",
        "passed: gate loss < base: measured 0.500",
        "FAILED: gate exact_match >= 0.9: measured 75.0 %",
        "FAILED: gate f1 > 0.1: not measured",
    ]


def test_a_screen_gets_a_table(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    screen = Screen()
    print_comparison(COMPARISON, file=screen)
    text = screen.getvalue()
    assert "\x1b[" in text
    assert "✗" in text
    assert "+75.0 pp better" in text


def test_names_of_tasks_are_text_not_style():
    tasks = {"[red]a[/]": Scores(loss=1.0), "b": Scores(loss=2.0)}
    for out in (io.StringIO(), Screen()):
        print_comparison(compare(Scores(tasks=tasks), Scores(tasks=tasks)), file=out)
        assert "[red]a[/]" in out.getvalue()


def test_only_one_side_measured_is_shown_with_a_dash():
    log = io.StringIO()
    print_comparison(compare(Scores(), Scores(exact_match=0.5)), file=log)
    assert "–  50.0 %" in log.getvalue()


def test_prompting_without_training_stands_beside_the_tuned_model():
    log = io.StringIO()
    baselines = {4: Scores(exact_match=0.5, f1=0.25), 0: Scores(exact_match=0.125, f1=0.0)}
    after = Scores(loss=0.5, exact_match=0.75, f1=0.5)
    comparison = compare(Scores(loss=2.0, exact_match=0.125), after, baselines=baselines)
    print_comparison(comparison, file=log)
    assert log.getvalue().splitlines()[-3:] == [
        "Without training  base, no example  base, 4 examples   tuned",
        "Exact match                 12.5 %            50.0 %  75.0 %",
        "F1                           0.0 %            25.0 %  50.0 %",
    ]
    assert comparison.from_json(comparison.to_json()) == comparison
