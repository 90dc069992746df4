"""Answers that end in a number, in a whole run: base, prompted base and tuned version are scored by it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from run_drill import run_all, run_of

from ftray.evaluate.compare import Scores, compare

ROWS = {
    "sums": [(f"give me {n}", f"here is {n}\n#### {n}") for n in range(10, 50)],
    "names": [(f"name {letter}", f"the letter {letter}") for letter in "abcdefghijklmnop"],
}


def ends_in(text: str) -> int | None:
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What was kept of the base and of the tuned version: {before: …, after: …}."""
    folder = tmp_path_factory.mktemp("numeric")
    for name, rows in ROWS.items():
        lines = [json.dumps({"prompt": asked, "completion": said}) for asked, said in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    run = run_of(
        folder,
        "numeric",
        {"kind": "sft"},
        model={"base": "builtin:tiny"},
        data={"sources": [str(folder / f"{name}.jsonl") for name in ROWS]},
        optim={"steps": 30, "batch_size": 8, "lr": 5e-3},
        evaluate={"baselines": [0, 2], "max_new_tokens": 16},
    )
    del run["objective"]["max_new_tokens"]
    return {row["kind"]: row for row in run_all(folder, [run])["numeric"]}


def test_the_numbers_that_the_answers_end_in_are_compared_with_those_expected(measured):
    for side in ("before", "after"):
        answers = measured[side]["answers"]
        sums = [answer for answer in answers if answer["task"].endswith("sums.jsonl")]
        assert 0 < len(sums) < len(answers)
        right = [ends_in(answer["given"]) == ends_in(answer["expected"]) for answer in sums]
        scores = Scores.from_json(measured[side]["scores"])
        by_task = {Path(task).stem: of_task for task, of_task in scores.tasks.items()}
        assert scores.pass_at_1 == by_task["sums"].pass_at_1 == pytest.approx(sum(right) / len(right))
        assert by_task["names"].pass_at_1 is None
        assert [answer["right"] for answer in sums] == right
        assert all(answer["right"] is None for answer in answers if answer not in sums)


def test_prompting_the_base_is_scored_by_number_too(measured):
    baselines = {int(count): Scores.from_json(one) for count, one in measured["before"]["baselines"].items()}
    assert list(baselines) == [0, 2]
    before, after = (Scores.from_json(measured[side]["scores"]) for side in ("before", "after"))
    assert before.pass_at_1 < 0.5 < after.pass_at_1
    assert baselines[0].pass_at_1 == before.pass_at_1
    rivals = {name: (by_count, tuned) for name, by_count, tuned in compare(before, after, baselines=baselines).rivals()}
    assert rivals["pass_at_1"] == ([baselines[0].pass_at_1, baselines[2].pass_at_1], after.pass_at_1)
