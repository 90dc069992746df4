"""Random values that records and sentences are filled with: names, places, dates, codes, numbers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tiny_words import CITIES, FIRST_NAMES, LAST_NAMES, MONTHS, STREETS, SYLLABLES


def plural(thing: str) -> str:
    if thing[-1] == "y" and thing[-2] not in "aeiou":
        return f"{thing[:-1]}ies"
    return {"leaf": "leaves", "shelf": "shelves", "sheep": "sheep"}.get(thing) or thing + (
        "es" if thing[-1] in "sxh" else "s"
    )


def with_article(words: str) -> str:
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def invented(rng: Random) -> str:
    """A word nobody has seen: what can only be copied, not remembered."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def first_name(rng: Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.85 else invented(rng)


def full_name(rng: Random) -> str:
    last = rng.choice(LAST_NAMES) if rng.random() < 0.85 else invented(rng)
    return f"{first_name(rng)} {last}"


def city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.85 else invented(rng)


def street(rng: Random) -> str:
    return f"{rng.randint(1, 180)} {rng.choice(STREETS)} {rng.choice(['Street', 'Road', 'Lane', 'Avenue', 'Square'])}"


def date(rng: Random) -> str:
    return rng.choice([f"{rng.randint(1, 28)} {rng.choice(MONTHS)}", f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"])


def clock(rng: Random) -> str:
    return f"{rng.randint(0, 23)}:{rng.choice([0, 5, 10, 15, 20, 30, 40, 45, 50, 55]):02d}"


def code(rng: Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(['-', ''])}{rng.randint(10, 99999)}"


def phone(rng: Random) -> str:
    return f"{rng.randint(200, 999)}-{rng.randint(200, 999)}-{rng.randint(0, 9999):04d}"


def email(rng: Random) -> str:
    domain = rng.choice(["mail", "post", "office", invented(rng).lower()])
    return f"{first_name(rng).lower()}.{rng.choice(LAST_NAMES).lower()}@{domain}.{rng.choice(['com', 'org', 'net'])}"


def price(rng: Random) -> str:
    return f"${rng.randint(1, 400)}" + (f".{rng.randint(0, 99):02d}" if rng.random() < 0.5 else "")


def small(rng: Random) -> int:
    return rng.randint(1, 12)


def any_of(words: str) -> Callable[[Random], str]:
    choices = words.split("|")
    return lambda rng: rng.choice(choices)
