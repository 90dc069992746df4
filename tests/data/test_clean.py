"""Rows that repeat, are empty or have the wrong size are dropped; a row's prompt decides which side it is on."""

import re

import numpy as np
import pytest

from ftray.config.schema import Clean
from ftray.data.clean import Cleaner, NearDuplicates, key, said
from ftray.data.encode import Item
from ftray.data.format import Example, Unusable
from ftray.data.split import Split

WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("ado", "ile", "orn", "ump", "erish", "ax")]


def _pair(prompt, answer):
    return Example(messages=[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])


def _dropped(examples, **options):
    """Kinds of the dropped examples, None for the kept ones."""
    cleaner = Cleaner(Clean(**options))
    kinds = []
    for number, example in enumerate(examples, 1):
        try:
            cleaner.check(example, said(example), row=f"f:{number}")
            kinds.append(None)
        except Unusable as unusable:
            kinds.append(unusable.reason)
    return kinds


def test_repeated_rows_are_dropped_whatever_their_white_space_and_unicode_form():
    examples = [_pair("Caf\u00e9  au lait", "yes"), _pair("Cafe\u0301 au\nlait ", " yes"), _pair("cafe au lait", "yes")]
    assert _dropped(examples) == [None, "duplicate", None]
    assert _dropped(examples, duplicates="keep") == [None, None, None]


def test_the_border_between_messages_counts():
    assert _dropped([_pair("a b", "c"), _pair("a", "b c")]) == [None, None]


def test_near_duplicates_are_dropped_and_name_what_they_are_like():
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(WORDS, 60))
    other = " ".join(rng.choice(WORDS, 60))
    examples = [
        Example(text=t) for t in (text, other, text.replace(" ", "  ") + " amen", text[:-1], text[: len(text) // 2])
    ]
    first, second, third, fourth, fifth = _dropped(examples, duplicates="near")
    assert first is second is fifth is None
    for reason in (third, fourth):
        assert re.fullmatch(r"near duplicate: like f:1 \((0\.9\d|1\.00)\)", reason)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85, 0.95])
def test_pairs_well_above_the_threshold_are_found_and_pairs_well_below_are_not(threshold):
    rng = np.random.default_rng(1)
    found = {True: 0, False: 0}
    for _ in range(30):
        words = rng.choice(WORDS, 80).tolist()
        for above in (True, False):
            similar = min(threshold + 0.1, 0.99) if above else threshold - 0.15
            # replacing a share q of the end of a text leaves a Jaccard index of (1 - q) / (1 + q)
            keep = round(80 * 2 * similar / (1 + similar))
            other = words[:keep] + [word + "zz" for word in rng.choice(WORDS, 80 - keep)]
            near = NearDuplicates(threshold)
            near.find_or_add(" ".join(words), "first")
            found[above] += near.find_or_add(" ".join(other), "second") is not None
    assert found[True] >= 28
    assert found[False] <= 1


def test_the_estimated_similarity_is_the_jaccard_index():
    left, right = "the quick brown fox jumps over the lazy dog", "the quick brown fox jumped over a lazy dog"
    shingles = [{text[n : n + 5] for n in range(len(text) - 4)} for text in (left, right)]
    jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    near = NearDuplicates(0.85)
    assert (near.signature(left) == near.signature(right)).mean() == pytest.approx(jaccard, abs=0.1)
    assert near.signature("abc").tolist() == near.signature("ABC").tolist()


def test_long_texts_have_the_same_signature_as_in_one_piece():
    near = NearDuplicates(0.85)
    text = "".join(chr(97 + n * n % 23) + chr(97 + n % 7) for n in range(20_000))
    halves = [near.signature(text[:15_002]), near.signature(text[14_998:])]
    assert near.signature(text).tolist() == np.minimum(*halves).tolist()


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (_pair("a", ""), "empty answer: message 2 of 2"),
        (_pair("a", " \n"), "empty answer: message 2 of 2"),
        (_pair(" ", "b"), "empty prompt or message: message 1 of 2"),
        (Example(text=" \n"), "empty text"),
        (_pair("a", "bc"), "shorter than min_chars: 2 characters"),
        (Example(text="ab"), "shorter than min_chars: 2 characters"),
        (_pair("a" * 8, "bcd"), "longer than max_chars: 11 characters"),
        (Example(text="a" * 11), "longer than max_chars: 11 characters"),
        (_pair("a" * 7, "bcd"), None),
    ],
)
def test_empty_short_and_long_rows_are_dropped_with_the_reason(example, reason):
    assert _dropped([example], min_chars=3, max_chars=10) == [reason]


def test_an_answer_that_is_a_tool_call_is_not_empty():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert _dropped([Example(messages=[{"role": "user", "content": "a"}, call])]) == [None]


def test_prompts_are_equal_whatever_their_case_and_answers():
    assert said(_pair("Hello  there", "x")).prompt == said(_pair("hello there", "y")).prompt
    assert said(_pair("Hello", "x")).content != said(_pair("hello", "x")).content


def _split(items, *, fraction=0.1, limit=1000):
    """(trained, held) lines of items, given as (source, line, prompt)."""
    split = Split(fraction=fraction, limit=limit)
    trained = []
    for source, line, prompt in items:
        trained += split.add(Item(source, str(source), line, Example()), key(prompt, 0))
    trained += split.finish(trained=bool(trained))
    return [(item.source, item.line) for item in trained], [(item.source, item.line) for item in split.held()]


def test_about_the_fraction_is_held_out_and_every_row_is_on_one_side():
    trained, held = _split([(0, n, f"p{n}") for n in range(5000)])
    assert 400 < len(held) < 600
    assert sorted(trained + held) == [(0, n) for n in range(5000)]


def test_the_choice_stays_as_files_grow():
    _, before = _split([(0, n, f"p{n}") for n in range(1000)])
    _, after = _split([(0, -1, "new"), *((0, n, f"p{n}") for n in range(2000))])
    assert [row for row in after if 0 <= row[1] < 1000] == before


def test_rows_with_the_same_prompt_are_on_the_same_side_also_when_there_is_a_limit():
    items = [(n % 3, n, f"p{n % 170}") for n in range(3000)]
    trained, held = _split(items, fraction=0.5, limit=200)
    prompt = {(source, line): p for source, line, p in items}
    assert 0 < len(held) <= 200
    assert not {prompt[row] for row in trained} & {prompt[row] for row in held}
    assert sorted(trained + held) == sorted(prompt)


def test_a_limit_is_shared_by_the_sources():
    items = [(0, n, f"a{n}") for n in range(3000)] + [(1, n, f"b{n}") for n in range(300)]
    _, held = _split(items, fraction=0.2, limit=60)
    assert [source for source, _ in held] == [0] * 30 + [1] * 30


def test_a_small_file_holds_out_one_row_at_least():
    trained, held = _split([(0, n, f"p{n}") for n in range(5)], fraction=1e-6)
    assert (len(trained), len(held)) == (4, 1)
    assert _split([(0, 0, "only")], fraction=1e-6) == ([(0, 0)], [])


def test_nothing_is_held_out_when_nothing_is_asked_for():
    items = [(0, n, f"p{n}") for n in range(50)]
    assert _split(items, fraction=0.0)[1] == _split(items, limit=0)[1] == []
