"""Copying drills for the built-in model: what stands before is said again, whole or in part.

A small model learns late to find a word in its context and to say it (induction heads, Olsson et al. 2022,
arXiv 2209.11895), and nearly every extraction task needs it. Here each row needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import tiny_values as values

ASKS = ["Copy this.", "Say it again.", "Repeat:", "Write the same.", "Once more, please."]
FIELDS = ["name", "time", "city", "thing", "code", "word", "color", "place", "for", "at", "label", "count"]


def copies(words: Sequence[str], *, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows in messages format; `words` is the vocabulary that the drills draw from."""
    rng = Random(seed)
    for _ in range(count):
        question, answer = rng.choice((_whole, _whole, _fields, _fields, _lookup, _after))(words, rng)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _piece(words: Sequence[str], rng: Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(words)
    if kind < 0.65:
        return values.first_name(rng)
    if kind < 0.8:
        return values.clock(rng)
    return rng.choice((values.code, values.invented, values.city))(rng)


def _whole(words: Sequence[str], rng: Random) -> tuple[str, str]:
    text = " ".join(_piece(words, rng) for _ in range(rng.randint(2, 10)))
    return f"{rng.choice(ASKS)}\n{text}", text


def _pairs(words: Sequence[str], rng: Random) -> list[tuple[str, str]]:
    return [(field, _piece(words, rng)) for field in rng.sample(FIELDS, rng.randint(2, 5))]


def _fields(words: Sequence[str], rng: Random) -> tuple[str, str]:
    """Fields said in one order come back in another, as notes or JSON."""
    pairs = _pairs(words, rng)
    told = ", ".join(f"{field} {value}" for field, value in rng.sample(pairs, len(pairs)))
    if rng.random() < 0.5:
        return f"Notes: {told}", "\n".join(f"{field}: {value}" for field, value in pairs)
    return f"JSON: {told}", "{" + ", ".join(f'"{field}": "{value}"' for field, value in pairs) + "}"


def _lookup(words: Sequence[str], rng: Random) -> tuple[str, str]:
    pairs = _pairs(words, rng)
    field, value = rng.choice(pairs)
    told = ". ".join(f"The {name} is {said}" for name, said in pairs)
    return f"{told}. What is the {field}?", value


def _after(words: Sequence[str], rng: Random) -> tuple[str, str]:
    row = rng.sample(words, rng.randint(4, 10))
    at = rng.randrange(len(row) - 1)
    return f"{' '.join(row)}\nWhat comes after {row[at]}?", row[at + 1]
