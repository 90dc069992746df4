"""From a sweep's space to the values of one trial, and to the run they make. Pure: who draws is handed in.

Keys are set from the outside in (`method` before `method.rank`). A key that the run does not have with what was set
before, such as the rank of a full fine-tuning, is left out of that trial.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from ftray.config import explain
from ftray.config.load import put
from ftray.config.schema import Run
from ftray.config.sweeping import Choice, Dimension, Grid, LogUniform, RandInt, Sweep

Values = dict[str, Any]
Draw = Callable[[str, Dimension], Any]
ALL_CORNERS = 256
SAMPLES = 64


def values_of(sweep: Sweep, draw: Draw) -> Values:
    """One trial's values by dotted key; `draw(key, dimension)` is asked for those that apply."""
    data = sweep.run.model_dump(mode="json")
    values: Values = {}
    for key in _outside_in(sweep):
        if _applies(data, key, sweep.space[key]):
            values[key] = draw(key, sweep.space[key])
            _set(data, key, values[key])
    return values


def run_of(sweep: Sweep, values: Mapping[str, Any], *, seed: int | None = None) -> Run:
    """The run with these values set. Raises pydantic's ValidationError where the schema refuses them."""
    return Run.model_validate(_with(sweep, values, seed))


def draw_at_random(rng: random.Random) -> Draw:
    def draw(key: str, one: Dimension) -> Any:
        if isinstance(one, Choice | Grid):
            return rng.choice(one.values)
        if isinstance(one, RandInt):
            return rng.randint(one.low, one.high)
        if isinstance(one, LogUniform):
            return one.low * (one.high / one.low) ** rng.random()
        return rng.uniform(one.low, one.high)

    return draw


def fixed(values: Values, otherwise: Draw | None = None) -> Draw:
    """Gives these values, and draws the others."""

    def draw(key: str, one: Dimension) -> Any:
        return values[key] if otherwise is None or key in values else otherwise(key, one)

    return draw


def grid_value(sweep: Sweep, number: int) -> Values:
    """The values of the keys that are gone through in order, in the `number`-th combination; the last turns fastest."""
    found: Values = {}
    for key in reversed(_outside_in(sweep)):
        one = sweep.space[key]
        if isinstance(one, Grid) or (sweep.search.kind == "grid" and isinstance(one, Choice)):
            number, place = divmod(number, len(one.values))
            found[key] = one.values[place]
    return found


def problems_of(sweep: Sweep) -> list[tuple[str, str]]:
    """(key, what is wrong) of every value that the run's schema refuses, found by building runs from the corners."""
    found: dict[str, str] = {}
    used: set[str] = set()
    for values in _corners(sweep):
        used |= values.keys()
        data = _with(sweep, values)
        try:
            Run.model_validate(data)
        except ValidationError as error:
            for path, text in explain.problems(Run, data, error.errors(include_url=False)):
                dotted = ".".join(map(str, path))
                key = next((k for k in values if dotted == k or dotted.startswith(f"{k}.")), None)
                told = f"with {key}: {values[key]!r}: {text}" if key else f"with {_shown(values)}: {text}"
                found.setdefault(f"space.{key}" if key else dotted, told if key else f"{told}")
    for key in sweep.space.keys() - used:
        found[f"space.{key}"] = _why_never(sweep, key)
    return sorted(found.items())


def _with(sweep: Sweep, values: Mapping[str, Any], seed: int | None = None) -> dict[str, Any]:
    data = sweep.run.model_dump(mode="json")
    for key in sorted(values, key=_depth):
        _set(data, key, values[key])
    method = data["method"]
    if sweep.alpha_per_rank and "rank" in method:
        method["alpha"] = sweep.alpha_per_rank * method["rank"]
    elif sweep.alpha_per_rank and method.get("kind") == "lora":
        method["alpha"] = None
    if seed is not None:
        data["seed"] = seed
    return data


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Another `kind` empties its section: the keys of one kind are unknown to another."""
    path = tuple(key.split("."))
    if path[-1] == "kind" and explain.value_at(data, path) != value:
        put(data, path[:-1], {"kind": value})
    else:
        put(data, path, value)


def _applies(data: dict[str, Any], key: str, one: Dimension) -> bool:
    if explain.field_at(Run, data, tuple(_parts(key))) is None:
        return False
    for other, wanted in one.when.items():
        value = explain.value_at(data, tuple(_parts(other)))
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _corners(sweep: Sweep) -> Iterator[Values]:
    """Every combination of every dimension's ends where they are few; else each end once, and random samples."""
    every = {key: ends(one) for key, one in sweep.space.items()}
    if math.prod(map(len, every.values())) <= ALL_CORNERS:
        for combination in itertools.product(*every.values()):
            yield values_of(sweep, fixed(dict(zip(every, combination, strict=True))))
        return
    at_random = draw_at_random(random.Random(sweep.seed))
    for key, values in every.items():
        for value in values * 4:  # beside other values of the keys it depends on
            yield values_of(sweep, fixed({key: value}, at_random))
    for _ in range(SAMPLES):
        yield values_of(sweep, at_random)


def ends(one: Dimension) -> list[Any]:
    """The values of a list, or the ends of a range; of a range of numbers one inside too, which is no whole number."""
    if isinstance(one, Choice | Grid):
        return list(one.values)
    inside = [] if isinstance(one, RandInt) else [one.low + 0.381966 * (one.high - one.low)]
    return [one.low, *inside, one.high]


def _why_never(sweep: Sweep, key: str) -> str:
    if sweep.space[key].when and explain.field_at(Run, sweep.run.model_dump(mode="json"), tuple(_parts(key))):
        return f"no trial has {sweep.space[key].when}, so it is never set; change `when`"
    data = sweep.run.model_dump(mode="json")
    if problem := put(data, tuple(key.split(".")), 0):
        return problem[1]
    try:
        Run.model_validate(data)
    except ValidationError as error:
        for path, text in explain.problems(Run, data, error.errors(include_url=False)):
            if ".".join(map(str, path)) == key or key.startswith(".".join(map(str, path))):
                return text
    return "the run has no such key"


def _outside_in(sweep: Sweep) -> list[str]:
    return sorted(sweep.space, key=_depth)


def _depth(key: str) -> tuple[int, bool]:
    return key.count("."), not key.endswith("kind")


def _parts(key: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in key.split(".")]


def _shown(values: Values) -> str:
    return ", ".join(f"{key}: {value!r}" for key, value in values.items())
