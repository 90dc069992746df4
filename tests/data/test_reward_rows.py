"""Rows of a reward model: pairs with and without a margin, judged answers, and both in one run."""

import numpy as np
import pytest

from ftray.config.objectives import Dpo, RewardModel
from ftray.errors import DataError

PAIRS = [{"prompt": f"Question {n}?", "chosen": f"Right {n}.", "rejected": f"Wrong {n}!"} for n in range(6)]
JUDGED = [{"prompt": f"Ask {n}?", "completion": f"Answer {n}.", "label": n % 2 == 0} for n in range(6)]


def test_pairs_and_judged_answers_stand_in_one_run(write, prepared, tokenizer):
    sources = [write("pairs.jsonl", PAIRS), write("judged.jsonl", JUDGED)]
    data = prepared(sources, objective=RewardModel())
    cut, good = data.train.column("cut"), data.train.column("good")
    assert sorted(good.tolist()) == [-1] * 6 + [0] * 3 + [1] * 3
    assert ((cut > 0) == (good < 0)).all()
    row = int(np.flatnonzero(good == 0)[0])
    assert "Answer" in tokenizer.decode(data.train.ids(row)[data.train.trained(row)])


def test_a_margin_is_read_where_rows_have_one_and_only_for_a_reward_model(write, prepared):
    rows = [{**pair, "margin": n / 2} for n, pair in enumerate(PAIRS)]
    path = write("a.jsonl", [*rows, {**PAIRS[0], "prompt": "other", "margin": "large"}])
    data = prepared(path, objective=RewardModel())
    assert sorted(data.train.column("margin").tolist()) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert data.report.sources[0].examples[0].reason == "a margin is no number: 'large'"
    assert len(prepared(path, objective=Dpo()).train) == 7


def test_rows_that_are_neither_say_what_is_needed(write, prepared):
    with pytest.raises(DataError, match=r"reward learns from pairs rows, which need columns 'chosen'.* or judged rows"):
        prepared(write("a.jsonl", [{"prompt": "a", "completion": "b"}]), objective=RewardModel())


def test_answers_that_are_all_good_are_an_error(write, prepared):
    rows = [{**row, "label": 1} for row in JUDGED]
    with pytest.raises(DataError, match="all 6 answers to learn from are good, and a reward model tells both apart"):
        prepared(write("a.jsonl", rows), objective=RewardModel())
