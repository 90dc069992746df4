"""Records of many domains (bookings, parcels, contacts, supply lists …), said in free words and written down as notes.

One record gives a whole conversation: read it back, write it as JSON or `key: value` lines, answer questions about it,
change a value. The domain of the sample task, café orders, is left out on purpose.
"""

# ruff: noqa: E501 — a table of phrasings reads better with one phrasing on a line

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tiny_values import (
    any_of,
    city,
    clock,
    code,
    date,
    email,
    first_name,
    full_name,
    invented,
    phone,
    plural,
    price,
    small,
    street,
    with_article,
)
from tiny_words import ADJECTIVES, COLORS, DAYS, GROUPS, NUMBER_WORDS, THINGS

Turn = tuple[str, str]


@dataclass(frozen=True)
class Field:
    make: Callable[[Random], Any]
    clauses: tuple[str, ...]  # how a speaker says it; {} is the value
    question: str


def _field(make: Callable[[Random], Any], clauses: str, question: str) -> Field:
    return Field(make, tuple(clauses.split("|")), question)


_NAME = "for {}|under the name {}|the name is {}|my name is {}"
_WHEN = "on {}|it is for {}|the date is {}"
_TIME = "at {}|the time is {}|around {}"
_CITY = "in {}|it is in {}|somewhere in {}"
_PHONE = "my number is {}|call me on {}|phone {}"
_COUNT = "for {} people|we are {} people|{} of us are coming"

# domain -> (what it is called, how a customer begins, fields)
DOMAINS: dict[str, tuple[str, str, dict[str, Field]]] = {
    "hotel": ("hotel booking", "I need a hotel room|Please book a room|I would like to stay", {
        "name": _field(full_name, _NAME, "Who is the guest?"),
        "city": _field(city, _CITY, "Which city is it in?"),
        "nights": _field(small, "for {} nights|I stay {} nights|{} nights", "How many nights is the stay?"),
        "room": _field(any_of("single|double|twin|family|corner|quiet"), "a {} room|I want a {} room", "What kind of room is it?"),
        "arrival": _field(date, "from {}|I arrive on {}|arriving {}", "When does the guest arrive?"),
    }),
    "train": ("train ticket", "I want a train ticket|Can you book a train|I have to travel", {
        "from": _field(city, "from {}|leaving {}|I start in {}", "Where does the trip start?"),
        "to": _field(city, "to {}|going to {}|my destination is {}", "Where does the trip end?"),
        "date": _field(date, _WHEN, "What is the date?"),
        "time": _field(clock, _TIME, "What time does it leave?"),
        "seat": _field(any_of("window|aisle|table|quiet"), "a {} seat|I like a {} seat", "Which seat is wanted?"),
    }),
    "flight": ("flight", "I need a flight|Find me a flight|We want to fly", {
        "airline": _field(invented, "with {}|on {} airlines|I fly with {}", "What is the airline?"),
        "to": _field(city, "to {}|we fly to {}", "Where does it go?"),
        "passengers": _field(small, "for {} passengers|{} passengers|there are {} of us", "How many passengers are there?"),
        "class": _field(any_of("economy|business|first"), "in {} class|{} class", "Which class is it?"),
        "code": _field(code, "the code is {}|flight {}", "What is the flight code?"),
    }),
    "parcel": ("parcel", "I am sending a parcel|Please pick up a package|I have a parcel", {
        "sender": _field(full_name, "from {}|the sender is {}|sent by {}", "Who sent it?"),
        "address": _field(street, "to {}|it goes to {}|deliver it to {}", "What is the address?"),
        "weight": _field(lambda rng: f"{rng.randint(1, 30)} kg", "it weighs {}|with a weight of {}", "How heavy is it?"),
        "number": _field(code, "tracking number {}|the number is {}", "What is the number?"),
        "content": _field(lambda rng: rng.choice(THINGS), "there is a {} inside|it holds a {}", "What is inside?"),
    }),
    "appointment": ("appointment", "I need an appointment|Can I come in|I would like to see someone", {
        "name": _field(full_name, _NAME, "Who is it for?"),
        "service": _field(any_of("haircut|dentist|doctor|eye test|massage|vet|tax advice|driving lesson"),
                          "it is a {}|for the {}|about a {}", "Which service is it?"),
        "day": _field(lambda rng: rng.choice(DAYS), "on {}|{} would be good", "Which day is it?"),
        "time": _field(clock, _TIME, "What time is it?"),
        "phone": _field(phone, _PHONE, "What is the phone number?"),
    }),
    "contact": ("contact card", "Please save a contact|Here is a new contact|Write down this person", {
        "name": _field(full_name, "the name is {}|it is {}|called {}", "What is the name?"),
        "phone": _field(phone, "the number is {}|phone {}", "What is the phone number?"),
        "email": _field(email, "the email is {}|write to {}", "What is the email?"),
        "city": _field(city, "living in {}|based in {}|from {}", "Which city is it?"),
        "job": _field(any_of("teacher|nurse|pilot|painter|lawyer|farmer|engineer|writer|plumber|chemist|librarian"),
                      "who works as a {}|the job is {}", "What is the job?"),
    }),
    "rental": ("car rental", "I want to rent a car|Is a car free|We need a vehicle", {
        "car": _field(any_of("small car|van|estate|sports car|minibus|truck"), "a {}|it should be a {}", "Which car is it?"),
        "color": _field(lambda rng: rng.choice(COLORS), "in {}|a {} one", "Which colour is it?"),
        "days": _field(small, "for {} days|{} days", "How many days is it?"),
        "city": _field(city, "picked up in {}|in {}", "Where is it picked up?"),
        "driver": _field(full_name, "the driver is {}|driven by {}", "Who drives?"),
    }),
    "event": ("event ticket", "I want tickets|Are there tickets left|Please reserve seats", {
        "event": _field(any_of("concert|play|opera|football match|circus|exhibition|film|ballet|comedy night"),
                        "for the {}|it is the {}", "Which event is it?"),
        "tickets": _field(small, "{} tickets|we need {} tickets", "How many tickets are there?"),
        "place": _field(lambda rng: f"{invented(rng)} Hall", "at {}|in {}", "Where is it?"),
        "date": _field(date, _WHEN, "When is it?"),
        "row": _field(code, "row {}|in row {}", "Which row is it?"),
    }),
    "repair": ("repair ticket", "Something is broken|I need a repair|Please send someone", {
        "object": _field(lambda rng: rng.choice(GROUPS["electronics"] + GROUPS["furniture"]),
                         "the {} is broken|it is the {}|my {} does not work", "What is broken?"),
        "name": _field(full_name, _NAME, "Who asked for it?"),
        "address": _field(street, "at {}|I live at {}|the address is {}", "What is the address?"),
        "day": _field(lambda rng: rng.choice(DAYS), "on {}|come on {}", "Which day is it?"),
        "price": _field(price, "it may cost {}|the limit is {}", "What is the price?"),
    }),
    "meeting": ("meeting", "Let us meet|Please plan a meeting|We need to talk", {
        "topic": _field(lambda rng: f"the {rng.choice(ADJECTIVES)} {rng.choice(THINGS)}", "about {}|the topic is {}", "What is the topic?"),
        "host": _field(full_name, "{} is the host|hosted by {}", "Who is the host?"),
        "people": _field(small, _COUNT, "How many people come?"),
        "time": _field(clock, _TIME, "When does it begin?"),
        "room": _field(code, "in room {}|room {}", "Which room is it?"),
    }),
    "course": ("course sign-up", "I want to join a course|Please sign me up|Is there a place left", {
        "course": _field(any_of("pottery|chess|yoga|Spanish|painting|swimming|guitar|cooking|first aid|photography"),
                         "for {}|the {} course", "Which course is it?"),
        "name": _field(full_name, _NAME, "Who joins?"),
        "level": _field(any_of("beginner|middle|advanced"), "at {} level|the level is {}", "What is the level?"),
        "day": _field(lambda rng: rng.choice(DAYS), "on {}|every {}", "Which day is it?"),
        "fee": _field(price, "the fee is {}|it costs {}", "What is the fee?"),
    }),
    "pet": ("pet card", "I have a pet|Please register my pet|We have a new animal", {
        "pet": _field(lambda rng: rng.choice(GROUPS["animals"]), "it is a {}|a {}", "Which animal is it?"),
        "name": _field(invented, "called {}|its name is {}", "What is its name?"),
        "age": _field(small, "{} years old|it is {} years old", "How old is it?"),
        "color": _field(lambda rng: rng.choice(COLORS), "{} all over|the colour is {}", "Which colour is it?"),
        "owner": _field(full_name, "owned by {}|the owner is {}", "Who is the owner?"),
    }),
}  # fmt: skip

_GREETINGS = ["", "", "", "Hi, ", "Hello, ", "Good morning, ", "Hey there, ", "Hello! ", "Hi! "]
_THANKS = ["", "", "", " Thanks.", " Thank you!", " Please.", " That is all."]


def _said(clause: str, value: str) -> str:
    article = re.search(r"\ba \{\}", clause)
    return clause.replace("a {}", with_article(value)) if article else clause.format(value)


def spoken(value: Any, rng: Random) -> str:
    """A number is said as a word or a digit; what is written down is always the digit."""
    if isinstance(value, int):
        return NUMBER_WORDS[value] if rng.random() < 0.6 else str(value)
    return str(value)


@dataclass(frozen=True)
class Record:
    title: str
    values: dict[str, Any]
    questions: dict[str, str]
    said: str


def record(rng: Random) -> Record:
    """One record with a free-form sentence that says all its values, in an order of its own."""
    title, openers, fields = DOMAINS[rng.choice(sorted(DOMAINS))]
    keys = rng.sample(sorted(fields), rng.randint(2, len(fields)))
    values = {key: fields[key].make(rng) for key in keys}
    clauses = [_said(rng.choice(fields[key].clauses), spoken(values[key], rng)) for key in keys]
    opener = rng.choice(openers.split("|"))
    if rng.random() < 0.5:
        opener = opener[0].lower() + opener[1:]
    style = rng.randrange(4)
    if style == 0:
        body = f"{opener}, " + ", ".join(clauses[:-1]) + f" and {clauses[-1]}"
    elif style == 1:
        body = f"{opener} {clauses[0]}. " + ". ".join(clause[0].upper() + clause[1:] for clause in clauses[1:])
    elif style == 2:
        body = ", ".join(clauses)
    else:
        body = f"{opener}, " + ", ".join(clauses)
    greeting = rng.choice(_GREETINGS)
    body = body[0].lower() + body[1:] if greeting.endswith(", ") and not body.startswith("I ") else body
    said = greeting + body.rstrip(". ") + rng.choice([".", ".", ".", "!"]) + rng.choice(_THANKS)
    if rng.random() < 0.5:
        rng.shuffle(keys)
    return Record(title, {key: values[key] for key in keys}, {key: fields[key].question for key in keys}, said)


def as_json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False)


def as_lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())


def record_turns(rng: Random) -> list[Turn]:
    """Write a record down, then questions and changes."""
    rec = record(rng)
    keys = list(rec.values)
    named = ", ".join(keys)
    write, show = rng.choice(
        [(as_json, "JSON"), (as_json, "JSON"), (as_lines, "notes"), (_sentence, "a list of values")]
    )
    shown = write(rec.values)
    ask = rng.choice([
        f"Write the {rec.title} as {show} with {named}.\n{rec.said}", f"{show}, please ({named}): {rec.said}",
        f"{rec.said}\nWrite this as {show} with the keys {named}.", f"Turn this into {show}: {named}.\n\n{rec.said}",
        f"Keys: {named}\nFormat: {show}\nText: {rec.said}",
    ])  # fmt: skip
    turns = [(ask, shown)]
    for _ in range(rng.randint(0, 3)):
        key = rng.choice(keys)
        value = rec.values[key]
        kind = rng.randrange(4)
        if kind == 0:
            fields = next(fields for title, _, fields in DOMAINS.values() if title == rec.title)
            rec.values[key] = new = fields[key].make(rng)
            turns.append(
                (
                    rng.choice(
                        [
                            f"Change the {key} to {spoken(new, rng)}.",
                            f"Sorry, {key} should be {spoken(new, rng)}.",
                            f"The {key} is now {spoken(new, rng)}.",
                        ]
                    ),
                    write(rec.values),
                )
            )
        elif kind == 1:
            turns.append(
                (rng.choice([rec.questions[key], f"What is the {key}?", f"Give me only the {key}."]), str(value))
            )
        elif kind == 2:
            some = rng.sample(keys, rng.randint(1, len(keys)))
            turns.append((f"Only {', '.join(some)} as JSON.", as_json({name: rec.values[name] for name in some})))
        else:
            missing = rng.choice(["manager", "tax number", "middle name", "website", "discount", "weather", "nickname"])
            turns.append((f"What is the {missing}?", f"The {missing} is not given."))
    return turns


def _sentence(values: dict[str, Any]) -> str:
    return "; ".join(f"{key} {value}" for key, value in values.items())


def readback_turns(rng: Random) -> list[Turn]:
    """A customer speaks, the assistant reads back and confirms."""
    rec = record(rng)
    summary = ", ".join(f"{key} {value}" for key, value in rec.values.items())
    turns = [
        (
            rec.said,
            rng.choice(
                [
                    "Let me read that back: {}. Is that right?",
                    "I have {}. Is that correct?",
                    "Just to confirm: {}. Shall I go ahead?",
                ]
            ).format(summary),
        )
    ]
    if rng.random() < 0.5:
        turns.append(
            (
                rng.choice(["Yes.", "Yes, that is right.", "Correct, thank you.", "Yes please."]),
                rng.choice(
                    ["Great, your {} is done.", "Thank you, the {} is confirmed.", "Done. Your {} is ready."]
                ).format(rec.title),
            )
        )
    else:
        key = rng.choice(list(rec.values))
        turns.append(
            (
                rng.choice(["No, cancel it.", "No, leave it.", "Stop, I changed my mind."]),
                f"All right, the {rec.title} is cancelled.",
            )
        )
        turns.append((f"What was the {key} again?", f"The {key} was {rec.values[key]}."))
    return turns


# what a line of a list calls the thing, its kind, its count, its remarks
_LINE_KEYS = [
    ("thing", "kind", "count", "notes"), ("item", "type", "quantity", "details"), ("article", "size", "amount", "extras"),
    ("product", "color", "number", "options"), ("name", "style", "pieces", "remarks"), ("what", "which", "how_many", "with"),
]  # fmt: skip
_REMARKS = [
    "gift wrap", "spare parts", "no label", "extra box", "a receipt", "in a bag", "a cover", "name tag", "new paint",
    "long handle", "no logo",
]  # fmt: skip
_SIZES = ["small", "medium", "large", "tiny", "huge", "size S", "size M", "size L"]


def supply_turns(rng: Random) -> list[Turn]:
    """Several things with counts and details, as nested JSON or a list: a shopping trip, a store room, a packing list."""
    things = rng.sample(GROUPS[rng.choice(sorted(GROUPS))], rng.choice([1, 1, 2, 2, 3]))
    keys = [rng.choice(choices) for choices in zip(*_LINE_KEYS, strict=True)]
    order = rng.sample(range(4), 4) if rng.random() < 0.5 else [0, 1, 2, 3]
    lines, counts, parts = [], [], []
    for thing in things:
        count = rng.choice([1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 10, 12])
        kind = rng.choice([None, rng.choice(COLORS), rng.choice(ADJECTIVES), rng.choice(_SIZES)])
        remarks = rng.sample(_REMARKS, rng.choice([0, 0, 1, 1, 2]))
        values = [thing, kind, count, remarks]
        lines.append({keys[at]: values[at] for at in order if values[at] is not None})
        counts.append(count)
        said = f"{kind + ' ' if kind else ''}{thing if count == 1 else plural(thing)}"
        parts.append(_counted(count, said, rng) + (f" with {' and '.join(remarks)}" if remarks else ""))
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
    who, when = first_name(rng), clock(rng)
    said = rng.choice([f"I need {listed}. {who} fetches them at {when}.", f"Please pack {listed} for {who}, ready by {when}.",
                       f"{who} wants {listed} at {when}", f"Hello, this is {who}. We are short of {listed}. I come by at {when}.",
                       f"Can I get {listed}? Name {who}, time {when}.", f"for {who}: {listed}. at {when}",
                       f"{listed[0].upper()}{listed[1:]} for {who} at {when}, please."])  # fmt: skip
    if rng.random() < 0.75:
        top = rng.choice(["list", "things", "lines", "products", "goods"])
        person, time = rng.choice(["name", "for", "customer", "person"]), rng.choice(["time", "when", "ready", "at"])
        named = f"{top} ({', '.join(keys[at] for at in order)}), {person}, {time}"
        asked = rng.choice(
            [
                f"Write the list as JSON with {named}.\n{said}",
                f"{said}\nAs JSON, please: {named}.",
                f"JSON: {named}\nText: {said}",
            ]
        )
        answer = as_json({top: lines, person: who, time: when})
    else:
        asked = f"Make a list with one line for each thing.\n{said}"
        answer = "\n".join(f"- {count} x {thing}" for count, thing in zip(counts, things, strict=True))
    turns = [(asked, answer)]
    if rng.random() < 0.4:
        at = rng.randrange(len(things))
        turns.append((f"How many {plural(things[at])} are on the list?", str(counts[at])))
    if rng.random() < 0.2:
        turns.append(("How many different things are there?", str(len(things))))
    if rng.random() < 0.2:
        turns.append(("Who is it for and when?", f"For {who} at {when}."))
    return turns


def _counted(count: int, said: str, rng: Random) -> str:
    if count == 1:
        return rng.choice([with_article(said), f"one {said}", f"1 {said}"])
    if count == 2 and rng.random() < 0.2:
        return f"a couple of {said}"
    return f"{NUMBER_WORDS[count] if rng.random() < 0.7 else count} {said}"
