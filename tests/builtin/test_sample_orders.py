"""The sample task: seeded, disjoint, well-formed, varied."""

import json

import pytest

from ftray.data.sample import BUILTIN, builtin_rows, orders, write_sample
from ftray.errors import DataError


def _texts(rows):
    return [row["messages"][0]["content"] for row in rows]


def _answers(rows):
    return [row["messages"][1]["content"] for row in rows]


@pytest.fixture(scope="module")
def train():
    return list(builtin_rows("builtin:orders"))


@pytest.fixture(scope="module")
def held_out():
    return list(builtin_rows("builtin:orders-eval"))


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample(tmp_path / name, train_rows=50, eval_rows=20, seed=seed)
    for file in ("train.jsonl", "eval.jsonl"):
        a, b, c = ((tmp_path / name / file).read_text() for name in "abc")
        assert a == b != c


def test_counts_are_what_is_asked_for(train, held_out):
    assert (len(train), len(held_out)) == (4000, 200)


def test_train_and_held_out_orders_never_overlap(train, held_out):
    assert not set(_texts(train)) & set(_texts(held_out))
    assert len(set(_texts(train))) == len(train)


def test_no_seed_moves_an_order_over_the_line():
    train = {order.text for order in orders(seed=1, held_out=False, rows=1500)}
    held_out = {order.text for order in orders(seed=2, held_out=True, rows=1500)}
    assert not train & held_out


def test_every_answer_is_compact_json_of_one_schema(train, held_out):
    for answer in _answers(train + held_out):
        order = json.loads(answer)
        assert list(order) == ["items", "name", "pickup"]
        assert answer == json.dumps(order)
        for item in order["items"]:
            assert list(item) == [key for key in ("item", "size", "quantity", "extras") if key in item]
            assert 1 <= item["quantity"] <= 6


def test_what_is_answered_was_said(train):
    for text, answer in zip(_texts(train), _answers(train), strict=True):
        order = json.loads(answer)
        assert order["name"] in text
        for item in order["items"]:
            for said in (item["item"].removesuffix("h"), item.get("size", ""), *item.get("extras", [])):
                assert said in text.lower()


def test_answers_vary_so_that_memorising_fails(train, held_out):
    seen = set(_answers(train))
    assert len(seen) > 0.95 * len(train)
    assert sum(answer in seen for answer in _answers(held_out)) <= 0.02 * len(held_out)


def test_an_unknown_built_in_data_set_is_named_with_those_there_are():
    with pytest.raises(DataError, match="builtin:orders and builtin:orders-eval"):
        builtin_rows("builtin:pizza")
    assert set(BUILTIN) == {"builtin:orders", "builtin:orders-eval"}
