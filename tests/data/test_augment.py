"""Altered copies: what is asked changes, answers and numbers stay, and nothing held out is given away."""

import random

import pytest

from ftray.config.load import run_from
from ftray.config.schema import Augment
from ftray.data.augment import dropped, swapped, typos, with_synonyms
from ftray.errors import ConfigError

PAIRS = [{"prompt": f"please send {n} new cards to my home", "completion": f"sent {n}"} for n in range(60)]
RUN = {"name": "a", "data": {"sources": "a.jsonl"}}


def test_noise_moves_letters_and_words_and_leaves_numbers():
    text = "please send 12 new cards to my home today"
    for seed in range(20):
        rng = random.Random(seed)
        assert sorted(typos(text, rng, rate=0.3)) == sorted(text)
        assert sorted(swapped(text, rng, rate=0.3).split()) == sorted(text.split())
        left = dropped(text, rng, rate=0.3).split()
        assert len(left) == 6
        assert "12" in left
    assert dropped("where is it", random.Random(0), rate=0.5) == "where is it"


def test_synonyms_are_whole_words_and_the_longest_phrase_wins():
    said = {"card": ["plastic"], "credit card": ["visa"]}
    assert with_synonyms("My Credit Card, no cardboard", random.Random(0), said, rate=1) == "My visa, no cardboard"


def test_training_rows_get_copies_that_ask_otherwise_and_held_out_rows_none(write, prepared, tokenizer):
    path = write("a.jsonl", PAIRS)
    plain = prepared(path, eval_fraction=0.2)
    data = prepared(path, eval_fraction=0.2, augment=Augment(copies=2))
    altered = data.report.sources[0].altered
    assert altered > 0.7 * 2 * len(plain.train)
    assert len(data.train) == len(plain.train) + altered
    assert data.report.sources[0].rows_train == len(plain.train)
    assert [q.answer for q in data.questions] == [q.answer for q in plain.questions]
    rows = [(data.train.row_name(i), tokenizer.decode(data.train.ids(i))) for i in range(len(data.train))]
    assert len({*rows}) == len(rows)  # each copy differs from its row and from the others
    for name, text in rows:
        assert f"sent {int(name.rsplit(':', 1)[1]) - 1}<|im_end|>" in text


def test_a_copy_that_asks_what_is_held_out_is_left_out(write, prepared):
    held = write("held.jsonl", [{"prompt": "Hello, where is it", "completion": "there"}])
    path = write("a.jsonl", [{"prompt": "where is it", "completion": "here"}])
    augment = Augment(copies=1, noise=[], templates=["Hello, {text}"])
    assert prepared(path, eval_sources=[{"path": held}], augment=augment).report.sources[0].altered == 0


def test_what_cannot_be_altered_has_no_copy(write, prepared):
    path = write("a.jsonl", [{"prompt": str(n), "completion": "yes"} for n in range(20)])
    data = prepared(path, augment=Augment(copies=3))
    assert data.report.sources[0].altered == 0


@pytest.mark.parametrize(
    ("augment", "says"),
    [
        ({"copies": 1, "noise": []}, "nothing says how copies differ"),
        ({"copies": 1, "templates": ["Hi"]}, "has no {text}"),
        ({"copies": 1, "synonyms": {"card": []}}, "at least one other"),
    ],
)
def test_copies_that_could_not_be_made_are_refused(augment, says):
    with pytest.raises(ConfigError, match=says):
        run_from({**RUN, "data": {"sources": "a.jsonl", "augment": augment}}, source="run.yaml")


def test_the_same_row_has_the_same_copies_whatever_stands_beside_it(write, prepared, tokenizer):
    def copies(pairs):
        data = prepared(write("a.jsonl", pairs), eval_fraction=0, augment=Augment(copies=2))
        return [
            tokenizer.decode(data.train.ids(i)) for i in range(len(data.train)) if data.train.row_name(i)[-2:] == ":1"
        ]

    assert copies(PAIRS[:5]) == copies(PAIRS)
