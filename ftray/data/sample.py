"""The sample task: a café customer's order in free words -> compact JSON. Generated, seeded, of our own words.

    "two large oat lattes and a warm scone for Priya at half past eight"
    {"items": [{"item": "latte", "size": "large", "quantity": 2, "extras": ["oat milk"]},
               {"item": "scone", "quantity": 1, "extras": ["warm"]}], "name": "Priya", "pickup": "8:30"}

`size` and `extras` are left out where nothing was said. Which side of the train/held-out line an order falls on is
decided by its text, so no seed and no number of rows can make the two sides overlap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ftray.errors import DataError

TRAIN_ROWS, EVAL_ROWS, SEED = 4000, 200, 7
HELD_OUT = 8  # one order in so many is held out

SIZES = ["small", "medium", "large"]
HOT = ["latte", "cappuccino", "flat white", "americano", "espresso", "mocha", "black tea", "green tea", "hot chocolate"]
COLD = ["iced coffee", "lemonade", "orange juice", "iced tea", "apple juice", "sparkling water"]
BAKED = ["croissant", "muffin", "scone", "bagel", "cinnamon roll", "brownie", "cookie", "pretzel", "banana bread"]
PLATES = ["cheese sandwich", "tuna sandwich", "tomato soup", "lentil soup", "green salad", "fruit salad", "omelette"]
HOT_EXTRAS = ["oat milk", "soy milk", "extra shot", "no sugar", "vanilla syrup", "cinnamon", "whipped cream", "decaf"]
COLD_EXTRAS = ["no ice", "extra ice", "lemon slice", "mint", "straw"]
BAKED_EXTRAS = ["butter", "jam", "honey", "warmed up", "cream cheese"]
PLATE_EXTRAS = ["no onions", "extra cheese", "no salt", "bread", "pickles", "olives"]
MENU = [  # things, what goes with them, sizes
    (HOT, HOT_EXTRAS, SIZES),
    (COLD, COLD_EXTRAS, SIZES),
    (BAKED, BAKED_EXTRAS, []),
    (PLATES, PLATE_EXTRAS, SIZES[::2]),
]

_NAMES = """
Alice Amir Ana Anna Ben Bruno Carla Chloe Clara Dana Daniel David Diego Elena Elias Emma Erik Eva Felix Fiona Grace
Hana Hannah Harry Hugo Ida Iris Ivan Jack Jana Jonas Julia Karim Karen Lara Laura Leo Lena Liam Linda Lucas Lucy Luis
Maria Marco Martin Maya Mia Mila Mina Nadia Nina Noah Nora Olga Oliver Omar Oscar Paula Peter Petra Priya Rafael Raj
Rosa Ruby Ruth Ryan Sam Sara Simon Sofia Stella Susan Tara Theo Thomas Tim Tina Victor Walter Yara Yusuf Zoe
"""
NAMES = _NAMES.split()

COUNTS = ["", "one", "two", "three", "four", "five", "six"]
HOURS = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

SHAPES = [
    "{hello}can I get {items} for {name}? {pickup}.",
    "{hello}I'd like {items}, please. Name is {name}, {pickup}.",
    "{hello}{name} here. {items}, {pickup}.",
    "{hello}could you make {items} for me? {pickup}, for {name}.",
    "Order for {name}: {items}. {pickup}.",
    "{items} for {name}, {pickup}",
    "{hello}this is {name}, {pickup}. I want {items}.",
    "I'll have {items}. It's {name}, {pickup}, thanks!",
    "{hello}we need {items}. {pickup} under {name}, thank you.",
    "{pickup}, please: {items}. For {name}.",
    "My name is {name} and I would love {items}, {pickup}.",
    "{hello}put {name} down for {items}, {pickup}, please.",
]
HELLOS = ["", "", "Hi, ", "Hello, ", "Hey, ", "Good morning, ", "Hi there, ", "Morning! ", "Um, ", "Hello again, "]
PICKUPS = ["at {}", "pickup at {}", "I'll be there at {}", "ready by {}", "I pick it up at {}", "around {}", "for {}"]


@dataclass(frozen=True)
class Order:
    text: str
    answer: dict[str, Any]

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(" ".join(self.text.lower().split()).encode()).digest()
        return digest[0] % HELD_OUT == 0

    def row(self) -> dict[str, Any]:
        """The order as one `messages` row."""
        answer = json.dumps(self.answer, ensure_ascii=False)
        return {"messages": [{"role": "user", "content": self.text}, {"role": "assistant", "content": answer}]}


def order(rng: Random) -> Order:
    """One random order of one or two items."""
    sections = rng.sample(range(len(MENU)), rng.choice([1, 1, 2]))  # two items of one section could be the same
    drawn = [_item(rng, *MENU[section]) for section in sections]
    pickup, said_time = _time(rng)
    name = rng.choice(NAMES)
    text = rng.choice(SHAPES).format(
        hello=rng.choice(HELLOS),
        items=rng.choice([" and ", ", plus ", " and also ", ", "]).join(said for _, said in drawn),
        name=name,
        pickup=rng.choice(PICKUPS).format(said_time),
    )
    answer = {"items": [item for item, _ in drawn], "name": name, "pickup": pickup}
    return Order(_cased(text, rng), answer)


def _item(rng: Random, things: list[str], extras: list[str], sizes: list[str]) -> tuple[dict[str, Any], str]:
    thing, count = rng.choice(things), rng.choice([1, 1, 1, 2, 2, 3, 4, 5, 6])
    size = rng.choice(sizes) if sizes and rng.random() < 0.6 else None
    wanted = rng.sample(extras, rng.choice([0, 0, 0, 1, 1, 1, 2]))
    named = thing if count == 1 else _plural(thing)
    sized = f"{size} {named}" if size else named
    counted = rng.choice(["one", "a", "1"]) if count == 1 else rng.choice([COUNTS[count], COUNTS[count], str(count)])
    said = f"{counted} {sized}"
    if counted == "a" and said[2] in "aeio":
        said = f"an {sized}"
    if size and rng.random() < 0.15:
        said = f"{counted} {named}, {size}" if counted != "a" else f"one {named}, {size}"
    if wanted:
        said += rng.choice([" with ", " with ", ", "]) + rng.choice([" and ", " and ", " plus "]).join(wanted)
    item: dict[str, Any] = {"item": thing}
    item |= {"size": size} if size else {}
    item |= {"quantity": count}
    item |= {"extras": wanted} if wanted else {}
    return item, said


def _plural(thing: str) -> str:
    if thing.endswith(("tea", "coffee", "juice", "water", "bread", "chocolate")):
        return thing
    return thing + ("es" if thing.endswith("ch") else "s")


def _time(rng: Random) -> tuple[str, str]:
    """(as written down, as said)."""
    hour, minute = rng.randint(1, 12), rng.choice([0, 0, 5, 10, 15, 20, 25, 30, 30, 40, 45, 50])
    written = f"{hour}:{minute:02d}"
    words = {0: f"{HOURS[hour]} o'clock", 15: f"quarter past {HOURS[hour]}", 30: f"half past {HOURS[hour]}"}
    return written, words[minute] if minute in words and rng.random() < 0.35 else written


def _cased(text: str, rng: Random) -> str:
    """Sentence case mostly; the rest typed in a hurry, but names stay as they are."""
    if rng.random() < 0.8:
        return ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))
    return text.rstrip(".!")


def orders(*, seed: int, held_out: bool, rows: int) -> Iterator[Order]:
    """Yields `rows` different orders of one side of the line; equal seeds, equal orders."""
    rng = Random(f"{seed}-{held_out}")
    seen: set[str] = set()
    while len(seen) < rows:
        drawn = order(rng)
        if drawn.held_out == held_out and drawn.text not in seen:
            seen.add(drawn.text)
            yield drawn


def write_sample(folder: Path, *, train_rows: int = TRAIN_ROWS, eval_rows: int = EVAL_ROWS, seed: int = SEED) -> None:
    """Writes train.jsonl and eval.jsonl, rows of `messages`, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out, rows in (("train", False, train_rows), ("eval", True, eval_rows)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for drawn in orders(seed=seed, held_out=held_out, rows=rows):
                file.write(json.dumps(drawn.row(), ensure_ascii=False) + "\n")


BUILTIN: dict[str, Callable[[], Iterator[Order]]] = {
    "builtin:orders": partial(orders, seed=SEED, held_out=False, rows=TRAIN_ROWS),
    "builtin:orders-eval": partial(orders, seed=SEED, held_out=True, rows=EVAL_ROWS),
}


def builtin_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a packaged data set, by its path in a run file. DataError for a name that is none."""
    if name not in BUILTIN:
        raise DataError(f"{name}: no such built-in data set; there are {' and '.join(sorted(BUILTIN))}")
    return (drawn.row() for drawn in BUILTIN[name]())
