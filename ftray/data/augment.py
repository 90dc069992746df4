"""Altered copies of training rows, for small data: what is asked is put differently, the answer stays.

Noise is that of EDA (Wei and Zou, arXiv 1901.11196) with typing errors beside it; synonyms and templates are the run's
own, since what means the same depends on the subject. A copy is drawn from the text and the run's seed, so the same
row has the same copies wherever it stands. Where nothing can be altered there is no copy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from ftray.config.schema import Augment
from ftray.data.clean import key
from ftray.data.encode import Item
from ftray.data.format import Example

TRIES = 4
Alter = Callable[[str, random.Random], str]


class Augmenter:
    """`copies(item)` gives the altered examples of a row."""

    def __init__(self, augment: Augment, *, seed: int):
        self.augment, self.seed = augment, seed
        noise: dict[str, Alter] = {
            "typos": lambda text, rng: typos(text, rng, rate=augment.rate),
            "drop": lambda text, rng: dropped(text, rng, rate=augment.rate),
            "swap": lambda text, rng: swapped(text, rng, rate=augment.rate),
        }
        self.ways = [noise[name] for name in augment.noise]
        if augment.synonyms:
            said = {word.casefold(): others for word, others in augment.synonyms.items()}
            self.ways.append(lambda text, rng: with_synonyms(text, rng, said, rate=augment.rate))
        if augment.templates:
            self.ways.append(lambda text, rng: rng.choice(augment.templates).replace("{text}", text))

    def copies(self, item: Item) -> Iterator[Example]:
        example = item.example
        at = _asked(example)
        if at is None and example.label is None:
            return
        text = example.text if at is None else example.messages[at]["content"]
        seen = {text}
        for number in range(self.augment.copies):
            rng = random.Random(key(f"{text}\x1f{number}", self.seed))
            for _ in range(TRIES):
                altered = rng.choice(self.ways)(text, rng)
                if altered not in seen:
                    seen.add(altered)
                    yield _with(example, at, altered)
                    break


def typos(text: str, rng: random.Random, *, rate: float) -> str:
    """In some words, two neighbouring letters change places."""

    def alter(word: str) -> str:
        at = rng.randrange(len(word) - 1)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    words = text.split(" ")
    for at in _some([n for n, word in enumerate(words) if word.isalpha() and len(word) > 2], rng, rate, len(words)):
        words[at] = alter(words[at])
    return " ".join(words)


def dropped(text: str, rng: random.Random, *, rate: float) -> str:
    """Some words are missing; numbers stay, and so do texts of fewer than four words."""
    words = text.split(" ")
    if len(words) < 4:
        return text
    gone = {*_some([n for n, word in enumerate(words) if word.isalpha()], rng, rate, len(words))}
    return " ".join(word for n, word in enumerate(words) if n not in gone)


def swapped(text: str, rng: random.Random, *, rate: float) -> str:
    """Some neighbouring words change places."""
    words = text.split(" ")
    pairs = [n for n in range(len(words) - 1) if words[n].isalpha() and words[n + 1].isalpha()]
    for at in _some(pairs, rng, rate, len(words)):
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def with_synonyms(text: str, rng: random.Random, said: dict[str, list[str]], *, rate: float) -> str:
    """Some words or phrases of `said` (its keys in lower case) give way to others that may stand for them."""
    longest_first = sorted(said, key=len, reverse=True)
    found = re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b", re.IGNORECASE)
    places = [match.span() for match in found.finditer(text)]
    chosen = {*_some(list(range(len(places))), rng, rate, max(len(places), len(text.split())))}
    for number in sorted(chosen, reverse=True):
        start, end = places[number]
        text = text[:start] + rng.choice(said[text[start:end].casefold()]) + text[end:]
    return text


def _some(places: list[int], rng: random.Random, rate: float, words: int) -> list[int]:
    """So many of the places as `rate` of the words makes, at least one."""
    return rng.sample(places, min(len(places), max(1, round(rate * words))))


def _asked(example: Example) -> int | None:
    """The message that the last answer answers; None where a text has a label."""
    for at in range(example.last_answer - 1, -1, -1):
        if example.messages[at]["role"] == "user" and example.messages[at].get("content"):
            return at
    return None


def _with(example: Example, at: int | None, text: str) -> Example:
    if at is None:
        return replace(example, text=text)
    messages = [{**message, "content": text} if n == at else message for n, message in enumerate(example.messages)]
    return replace(example, messages=messages)
