"""Seeded synthetic conversations for pre-training the built-in model: copying, structure, short sums, small talk."""

# ruff: noqa: E501 — a table of phrasings reads better with one phrasing on a line

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from tiny_records import Turn, as_json, readback_turns, record_turns, supply_turns
from tiny_values import city, clock, code, email, first_name, full_name, invented, phone, plural, with_article
from tiny_words import (
    ADJECTIVES,
    CAPITALS,
    CITIES,
    COLORS,
    DAYS,
    GROUPS,
    MONTHS,
    NUMBER_WORDS,
    OPPOSITES,
    PAST,
    PLACES_OF_USE,
    PLURALS,
    THINGS,
)


def arithmetic(rng: Random) -> list[Turn]:
    kind = rng.randrange(6)
    a, b = (rng.randint(1, 20), rng.randint(1, 20)) if rng.random() < 0.6 else (rng.randint(1, 99), rng.randint(1, 99))
    if kind == 0:
        return [(rng.choice(["What is {} + {}?", "{} plus {}?", "Add {} and {}."]).format(a, b), str(a + b))]
    if kind == 1:
        a, b = max(a, b), min(a, b)
        return [(rng.choice(["What is {} - {}?", "{} minus {}?", "Take {1} away from {0}."]).format(a, b), str(a - b))]
    if kind == 2:
        a, b = rng.randint(2, 10), rng.randint(2, 10)
        return [(rng.choice(["What is {} times {}?", "{} x {} =", "Multiply {} by {}."]).format(a, b), str(a * b))]
    if kind == 3:
        return [(f"Which is larger, {a} or {b}?", str(max(a, b))), ("And which is smaller?", str(min(a, b)))]
    if kind == 4:
        who, thing, a, b = first_name(rng), rng.choice(THINGS), rng.randint(2, 12), rng.randint(1, 12)
        if rng.random() < 0.5:
            story = f"{who} has {a} {plural(thing)} and buys {b} more. How many {plural(thing)} does {who} have now?"
            return [(story, f"{a} + {b} = {a + b}. {who} has {a + b} {plural(thing)}.")]
        a, b = a + b, b
        story = f"{who} had {a} {plural(thing)} and gave away {b}. How many {plural(thing)} are left?"
        return [(story, f"{a} - {b} = {a - b}. There are {a - b} {plural(thing)} left.")]
    hour, add = rng.randint(1, 15), rng.randint(1, 8)
    return [(f"It is {hour}:00. What time is it in {add} hours?", f"It will be {hour + add}:00.")]


def lists(rng: Random) -> list[Turn]:
    """Sort, reverse, count, pick, filter: one list, several questions."""
    source = rng.choice([THINGS, CITIES, COLORS, ADJECTIVES, None])
    size = rng.randint(2, 6)
    items = rng.sample(source, size) if source else [first_name(rng) for _ in range(size)]
    shown = ", ".join(items)
    asks: list[Turn] = [
        ("Sort them by the alphabet.", ", ".join(sorted(items))),
        ("Say them backwards.", ", ".join(reversed(items))),
        ("How many are there?", str(size)),
        ("Which one is first?", items[0]),
        ("Which one is last?", items[-1]),
        ("Put one on each line.", "\n".join(items)),
        ("Make bullet points.", "\n".join(f"- {item}" for item in items)),
        ("Number them.", "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))),
        ("Write them as a JSON list.", as_json(items)),
        ("Repeat the list.", shown),
        ("Leave out the first one.", ", ".join(items[1:])),
        (f"Is {items[size // 2]} in the list?", "Yes."),
        (f"Is {invented(rng)} in the list?", "No."),
        ("Which word is the longest?", max(items, key=len)),
        (f"What comes after {items[0]}?", items[1]),
        (f"Add {(extra := invented(rng))} at the end.", ", ".join([*items, extra])),
    ]
    chosen = rng.sample(asks, rng.randint(1, 3))
    start = rng.choice([f"Here is a list: {shown}.", f"List: {shown}.", f"{shown}."])
    return [(f"{start} {chosen[0][0]}", chosen[0][1]), *chosen[1:]]


def copying(rng: Random) -> list[Turn]:
    text = rng.choice([
        lambda: " ".join(invented(rng) for _ in range(rng.randint(1, 5))),
        lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(COLORS)} {rng.choice(THINGS)}",
        lambda: code(rng),
        lambda: phone(rng),
        lambda: email(rng),
        lambda: _statement(rng).text,
        lambda: f"{full_name(rng)}, {city(rng)}, {clock(rng)}",
    ])()  # fmt: skip
    kind = rng.randrange(6)
    if kind == 0:
        return [
            (
                rng.choice(
                    ["Repeat: {}", "Say this again: {}", "Copy this text.\n{}", "Read it back to me: {}"]
                ).format(text),
                text,
            )
        ]
    if kind == 1:
        times = rng.randint(2, 3)
        return [(f"Repeat {NUMBER_WORDS[times]} times: {text}", "\n".join([text] * times))]
    if kind == 2:
        return [(f"Put quotes around it: {text}", f'"{text}"')]
    if kind == 3:
        return [(f"Write in capital letters: {text}", text.upper())] if len(text) < 30 else [(f"Repeat: {text}", text)]
    if kind == 4:
        key = rng.choice(["code", "note", "message", "title", "word", "answer", "label"])
        return [
            (
                rng.choice([f"The {key} is {text}. Write it as JSON.", f"JSON with the key {key}: {text}"]),
                as_json({key: text}),
            )
        ]
    return [(f"Remember this: {text}", "I will remember it."), ("What did I say?", text)]


class _Statement:
    """A sentence with what can be asked about it."""

    def __init__(self, text: str, asks: list[Turn]):
        self.text, self.asks = text, asks


def _statement(rng: Random) -> _Statement:
    who, other, place = full_name(rng), first_name(rng), city(rng)
    color, thing, adjective = rng.choice(COLORS), rng.choice(THINGS), rng.choice(ADJECTIVES)
    day, when, count = rng.choice(DAYS), clock(rng), rng.randint(2, 20)
    year, (_, past) = rng.randint(1800, 2024), rng.choice(PAST)
    return rng.choice([
        lambda: _Statement(f"{who} bought {with_article(color)} {thing} in {place}.", [
            ("Who bought it?", who), ("What was bought?", f"{with_article(color).capitalize()} {thing}."), ("Where was it bought?", place),
            (f"Which colour is the {thing}?", color)]),
        lambda: _Statement(f"On {day}, {who} met {other} at {when}.", [
            ("Who did they meet?", other), ("On which day?", day), ("At what time?", when)]),
        lambda: _Statement(f"The {adjective} {thing} belongs to {who}, who lives in {place}.", [
            (f"Who owns the {thing}?", who), ("Where does the owner live?", place), (f"How is the {thing} described?", adjective)]),
        lambda: _Statement(f"{who} was born in {place} in {year} and moved to {city(rng)} later.", [
            ("Who is this about?", who), ("In which year?", str(year)), ("Where was the person born?", place)]),
        lambda: _Statement(f"There are {count} {color} {plural(thing)} in the {adjective} box.", [
            ("How many are there?", str(count)), ("Which colour are they?", color), ("Where are they?", f"In the {adjective} box.")]),
        lambda: _Statement(f"{other} {past} with {who} near {place} on {day}.", [
            ("What day was it?", day), (f"Who was with {other}?", who), ("Near which place?", place)]),
        lambda: _Statement(f"The shop in {place} opens at {when} and is run by {who}.", [
            ("When does it open?", when), ("Who runs the shop?", who), ("Where is the shop?", place)]),
    ])()  # fmt: skip


def reading(rng: Random) -> list[Turn]:
    """Questions about one sentence, or about one of several."""
    statements = [_statement(rng) for _ in range(rng.choice([1, 1, 1, 2]))]
    target = rng.choice(statements)
    asks = rng.sample(target.asks, rng.randint(1, len(target.asks))) if len(statements) == 1 else []
    text = " ".join(statement.text for statement in statements)
    if not asks:
        return [
            (f"{text}\nHow many sentences are there?", str(len(statements))),
            ("Repeat the first one.", statements[0].text),
        ]
    ask = rng.choice([f"{text}\n{asks[0][0]}", f"Read: {text} {asks[0][0]}", f"{asks[0][0]}\n\n{text}"])
    return [(ask, asks[0][1]), *asks[1:]]


def words(rng: Random) -> list[Turn]:
    kind = rng.randrange(9)
    if kind == 0:
        a, b = rng.choice(OPPOSITES)
        a, b = (a, b) if rng.random() < 0.5 or a in {"young", "old", "short"} else (b, a)
        return [(rng.choice([f"What is the opposite of {a}?", f"Opposite of {a}?"]), b)]
    if kind == 1:
        one = rng.choice(sorted(PLURALS))
        return [(f"What is the plural of {one}?", PLURALS[one])]
    if kind == 2:
        base, past = rng.choice(PAST)
        return [(f"What is the past tense of {base}?", past)]
    if kind == 3:
        country, capital = rng.choice(CAPITALS)
        return [
            (
                rng.choice([f"What is the capital of {country}?", f"Capital of {country}?"]),
                f"The capital of {country} is {capital}.",
            )
        ]
    if kind == 4:
        group = rng.choice(sorted(GROUPS))
        thing = rng.choice(GROUPS[group])
        return [
            (f"Which group does {thing} belong to?", group),
            (f"Name another from {group}.", rng.choice([x for x in GROUPS[group] if x != thing])),
        ]
    if kind == 5:
        word = rng.choice([*THINGS, *COLORS]) if rng.random() < 0.7 else invented(rng).lower()
        return [(f"Spell {word}.", "-".join(word)), ("How many letters is that?", str(len(word)))]
    if kind == 6:
        thing = rng.choice(sorted(PLACES_OF_USE))
        one = "scissors" if thing == "scissors" else with_article(thing)
        verb = "are" if thing == "scissors" else "is"
        asked = rng.choice([f"What {verb} {one} for?", f"Why do people use {one}?"])
        return [(asked, f"{one.capitalize()} {verb} used {PLACES_OF_USE[thing]}.")]
    if kind == 7:
        names = rng.choice([DAYS, MONTHS])
        at = rng.randrange(len(names))
        return [(f"What comes after {names[at]}?", names[(at + 1) % len(names)])]
    number = rng.randrange(len(NUMBER_WORDS))
    return (
        [(f"Write {number} as a word.", NUMBER_WORDS[number])]
        if rng.random() < 0.5
        else [(f"Write {NUMBER_WORDS[number]} as a number.", str(number))]
    )


_PRAISE = ["great", "lovely", "excellent", "perfect", "wonderful", "brilliant"]
_BLAME = ["terrible", "awful", "poor", "useless", "broken", "horrible"]


def labels(rng: Random) -> list[Turn]:
    """Short texts with a label: the feeling of a review, what a message is about."""
    thing, who = rng.choice(THINGS), first_name(rng)
    if rng.random() < 0.5:
        good = rng.random() < 0.5
        word = rng.choice(_PRAISE if good else _BLAME)
        text = rng.choice(
            [
                f"The {thing} is {word}.",
                f"{who} says the {thing} was {word}.",
                f"What {with_article(word)} {thing}!",
                f"I found the {thing} {word}.",
            ]
        )
        return [(f"Is this positive or negative? {text}", "positive" if good else "negative")]
    about = {
        "travel": [f"I want to go to {city(rng)}.", f"When does the train to {city(rng)} leave?"],
        "weather": [f"Will it rain in {city(rng)}?", f"How warm is it in {city(rng)} on {rng.choice(DAYS)}?"],
        "shopping": [f"How much is the {rng.choice(COLORS)} {thing}?", f"I want to buy {with_article(thing)}."],
        "repair": [f"My {thing} is broken.", f"Can you fix the {thing}?"],
        "greeting": [f"Hello, I am {who}.", f"Good evening, {who} here."],
    }
    label = rng.choice(sorted(about))
    return [
        (
            rng.choice(["What is this about: {}?\n{}", "Choose a label from {}.\n{}"]).format(
                ", ".join(about), rng.choice(about[label])
            ),
            label,
        )
    ]


def small_talk(rng: Random) -> list[Turn]:
    who = first_name(rng)
    return rng.choice([
        [(f"{rng.choice(['Hi', 'Hello', 'Hey'])}, I am {who}.", f"Hello {who}, how can I help you?"), ("What is my name?", f"Your name is {who}.")],
        [(rng.choice(["Hi", "Hello", "Hello there", "Good morning", "Hey"]), rng.choice(["Hello! How can I help you?", "Hi! What can I do for you?"]))],
        [(rng.choice(["Who are you?", "What are you?"]), "I am a very small language model. I can copy, list and summarise short texts.")],
        [(rng.choice(["Thanks!", "Thank you.", "Thanks a lot."]), rng.choice(["You are welcome.", "My pleasure.", "You are welcome. Have a nice day."]))],
        [(rng.choice(["Bye.", "Goodbye.", "See you."]), rng.choice(["Goodbye!", "Bye, have a good day.", "See you soon."]))],
        [(f"Greet {who} in {city(rng)}.", f"Hello {who}!"), ("Now say goodbye.", f"Goodbye {who}!")],
        [(f"Ask {who} about the {rng.choice(THINGS)}.", f"{who}, could you tell me about it, please?")],
        [(f"What did {full_name(rng)} say yesterday?", "I do not know that.")],
    ])  # fmt: skip


def story(rng: Random) -> list[Turn]:
    who, friend, place = first_name(rng), first_name(rng), city(rng)
    thing, adjective, color = rng.choice(THINGS), rng.choice(ADJECTIVES), rng.choice(COLORS)
    begin = rng.choice(
        [
            f"{who} lived in {place} and loved the {thing}.",
            f"One {rng.choice(DAYS)}, {who} found {with_article(color)} {thing} in {place}.",
            f"In {place} there was {with_article(adjective)} {thing} that belonged to {who}.",
        ]
    )
    middle = rng.choice(
        [
            f"{friend} came by and asked for the {thing}.",
            f"But the {thing} was {adjective} and nobody could use it.",
            f"Then {friend} lost it on the way home.",
            f"{who} showed it to {friend}, who had never seen one so {adjective}.",
        ]
    )
    end = rng.choice(
        [
            f"In the end, {who} and {friend} shared the {thing}.",
            f"At last {friend} helped {who} to repair it.",
            f"So {who} gave the {thing} to {friend} and they became friends.",
            f"From then on, {who} kept the {thing} at home.",
        ]
    )
    turns = [
        (
            rng.choice(["Tell a short story about {} and {}.", "Write three sentences about {} and {}."]).format(
                who, with_article(thing)
            ),
            f"{begin} {middle} {end}",
        )
    ]
    if rng.random() < 0.5:
        turns.append(
            rng.choice(
                [
                    ("Who is in the story?", f"{who} and {friend}."),
                    (f"Where does {who} live?" if "lived" in begin else "Where is it?", place),
                    (
                        "Give it a title.",
                        f"{who} and the {adjective} {thing}"
                        if adjective in begin + middle
                        else f"{who} and the {thing}",
                    ),
                ]
            )
        )
    return turns


# task -> how often it is drawn
TASKS: dict[Callable[[Random], list[Turn]], int] = {
    record_turns: 8, supply_turns: 6, readback_turns: 3, copying: 4, reading: 4, lists: 3, words: 2, arithmetic: 2,
    labels: 1, small_talk: 1, story: 1,
}  # fmt: skip

_SYSTEM = [
    "You are a helpful assistant.", "You answer briefly.", "You are a careful clerk.", "Answer with the result only.",
    "You take notes for a busy office.", "Be polite and short.", "You turn messages into structured notes.",
]  # fmt: skip


def conversations(*, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yields `count` rows {"messages": [...]}, each with one to five tasks after another; equal seeds, equal rows."""
    rng = Random(seed)
    tasks, weights = list(TASKS), list(TASKS.values())
    for _ in range(count):
        messages = []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
        for task in rng.choices(tasks, weights, k=rng.choice([1, 1, 2, 3, 4, 5])):
            for asked, answered in task(rng):
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        yield {"messages": messages}
