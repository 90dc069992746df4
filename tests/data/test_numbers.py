"""The number that an answer ends in, by cases made by hand."""

from decimal import Decimal

import pytest

from ftray.data.numbers import is_number, last_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", "18"),
        ("16 - 3 - 4 = 9 eggs, so $18.50 a day", "18.50"),
        ("5-3", "3"),
        ("minus -7 degrees", "-7"),
        ("1,234,567 people", "1234567"),
        ("first 1,2,3", "3"),
        ("She earns 9 * 2 = 18\n#### 18", "18"),
        ("#### 42\nthat is 7 more", "7"),
        ("#### 3\n#### $1,080", "1080"),
        ("it is 12, as I said\n####", "12"),
        ("25% of 80 is 20 dollars", "20"),
        (".5", "0.5"),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == Decimal(number)


def test_a_text_without_a_number_has_none():
    assert last_number("eighteen") is None


def test_numbers_are_the_same_by_value_and_not_by_spelling():
    reference = "16 - 7 = 9\n9 * 2 = 1,800\n#### 1,800"
    for answer in ("1800", "1,800.0", "so $1800.", "#### 1,800", "1800 eggs"):
        assert same_number(answer, reference)
    for answer in ("18", "-1800", "1800 and 1", "none", ""):
        assert not same_number(answer, reference)
    assert not same_number("no", "no")


@pytest.mark.parametrize("text", ["42", " -7\n", "$1,080.50", "€ 3", "25%", "42.", ".5", "2 + 2\n#### 4", "####-4"])
def test_a_number_alone_or_behind_its_mark_is_a_number(text):
    assert is_number(text)


@pytest.mark.parametrize("text", ["", "42 eggs", "it is 42", "4 2", "1,2", "#### four", "#### 4 eggs", "5-4", "####"])
def test_a_text_that_only_holds_a_number_is_none(text):
    assert not is_number(text)
