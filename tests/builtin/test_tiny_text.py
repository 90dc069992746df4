"""The text that the built-in model learns from: seeded, varied, and never the sample task."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))
from make_tiny import detokenize
from tiny_text import conversations


@pytest.fixture(scope="module")
def rows():
    return list(conversations(seed=3, count=2000))


def test_equal_seeds_give_equal_rows(rows):
    assert rows[:100] == list(conversations(seed=3, count=100)) != list(conversations(seed=4, count=100))


def test_rows_hardly_repeat(rows):
    assert len({json.dumps(row) for row in rows}) >= 0.97 * len(rows)


def test_roles_alternate_and_nothing_is_empty(rows):
    for row in rows:
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])
        assert not any("{}" in message["content"] for message in row["messages"])


def test_json_answers_parse(rows):
    answers = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    records = [json.loads(answer) for answer in answers if answer.startswith(("{", "["))]
    assert len(records) > 500


def test_the_sample_tasks_menu_is_not_in_it(rows):
    text = json.dumps(rows).lower()
    assert not [word for word in ("latte", "cappuccino", "croissant", "muffin", "pickup", "oat milk") if word in text]


def test_the_marks_of_wikitexts_tokenisation_are_undone():
    line = "a two @-@ part , \" big \" play ( the first ) cost 1 @,@ 000 ; it 's Bob 's ."
    assert detokenize(line) == "a two-part, \"big\" play (the first) cost 1,000; it's Bob's."
