"""What an answer is worth: one scorer a kind of reward, a row each in SCORERS. Functions of texts. No torch: a reward
model comes from the worker, through `Rewards.meet`."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftray.config.rewards import ByVersion, JsonSchema, Length, Python, Regex, RewardSection
from ftray.data.numbers import same_number
from ftray.errors import ConfigError, TrainError

SHOWN = 3


@dataclass(frozen=True)
class Answered:
    """An answer and what it answers. `reference` is "" where the row has none; `tokens` those of the answer; `ids` both
    with the token that ended it."""

    prompt: str
    prompt_ids: Sequence[int]
    answer: str
    tokens: int
    reference: str
    row: str  # file:line
    ids: Sequence[int] = ()


Scorer = Callable[[Sequence[Answered]], Sequence[float]]


class Rewards:
    """All rewards of a run. Raises ConfigError where one cannot be made, with every problem."""

    def __init__(self, sections: Sequence[RewardSection]):
        self.sections = sections
        self.scorers: list[Scorer] = []
        problems: list[tuple[str, str]] = []
        for index, section in enumerate(sections):
            try:
                self.scorers.append(SCORERS[section.kind](section))
            except _Unfit as unfit:
                problems.append((f"objective.rewards.{index}.{unfit.key}", unfit.text))
        if problems:
            raise ConfigError("rewards", problems)

    def meet(self, worth: Callable[[str], Callable[[Sequence[Sequence[int]]], np.ndarray]]) -> None:
        """Gives reward models their weights: `worth(version)` scores texts as ids."""
        for section, scorer in zip(self.sections, self.scorers, strict=True):
            if isinstance(scorer, _Version) and isinstance(section, ByVersion):
                scorer.worth = worth(section.version)

    def __call__(self, answered: Sequence[Answered]) -> np.ndarray:
        """What each reward gives for each answer, float64 [answers, rewards], not weighted. TrainError where one
        fails or gives no finite number."""
        given = np.zeros((len(answered), len(self.scorers)))
        for index, (section, scorer) in enumerate(zip(self.sections, self.scorers, strict=True)):
            given[:, index] = scorer(answered) if len(answered) else []
            if len(bad := np.flatnonzero(~np.isfinite(given[:, index]))):
                one = answered[int(bad[0])]
                raise TrainError(
                    f"objective.rewards.{index}: {section.kind} gave {given[bad[0], index]} for an answer to "
                    f"{one.row}: {one.answer[:80]!r}; a reward is a finite number"
                )
        return given

    @property
    def weights(self) -> np.ndarray:
        return np.array([section.weight for section in self.sections], np.float64)

    @property
    def compares(self) -> list[str]:
        """Those that need a reference, by their keys."""
        return [f"objective.rewards.{n}: {one.kind}" for n, one in enumerate(self.sections) if one.compares]

    @property
    def deciding(self) -> int | None:
        """The first reward that says whether an answer is right."""
        return next((index for index, section in enumerate(self.sections) if section.decides_right), None)


class _Unfit(Exception):
    def __init__(self, key: str, text: str):
        super().__init__(key, text)
        self.key, self.text = key, text


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same up to white space."""
    return float(answer.split() == reference.split())


def too_long(tokens: int, limit: int) -> float:
    """0 up to `limit` tokens, then down in a line to -1 at twice as many."""
    return -min(1.0, max(0, tokens - limit) / limit)


def _each(score: Callable[[Answered], float]) -> Scorer:
    return lambda answered: [score(one) for one in answered]


def _regex(section: Regex) -> Scorer:
    found = re.compile(section.pattern).search
    return _each(lambda one: float(found(one.answer) is not None))


def _json_schema(section: JsonSchema) -> Scorer:
    try:
        import jsonschema
    except ImportError:
        raise _Unfit("kind", "json_schema needs the package jsonschema; install it, or take the reward out") from None
    kind = jsonschema.validators.validator_for(section.fits, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(section.fits)
    except jsonschema.SchemaError as error:
        at = ".".join(map(str, error.absolute_path)) or "the top"
        raise _Unfit("fits", f"is no JSON schema: {error.message} (at {at})") from None
    fits = kind(section.fits).is_valid
    return _each(lambda one: float((value := _parsed(one.answer)) is not _NOT_JSON and fits(value)))


_NOT_JSON = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _length(section: Length) -> Scorer:
    return _each(lambda one: too_long(one.tokens, section.tokens))


class _Version:
    """A reward model; it has no weights before a worker gives it some."""

    worth: Callable[[Sequence[Sequence[int]]], np.ndarray] | None = None

    def __call__(self, answered: Sequence[Answered]) -> Sequence[float]:
        assert self.worth is not None, "Rewards.meet comes first"
        return self.worth([one.ids for one in answered]).tolist()


def _python(section: Python) -> Scorer:
    assert section.trusted, "the schema lets no other pass"
    function = _function(section)

    def score(one: Answered) -> float:
        try:
            return float(function(prompt=one.prompt, answer=one.answer, reference=one.reference or None))
        except Exception as error:  # the user's code: whatever it raises is told with the answer it met
            raise TrainError(
                f"{section.function} failed on an answer to {one.row}: {type(error).__name__}: {error}; "
                f"the answer was {one.answer[:80]!r}"
            ) from error

    return _each(score)


def _function(section: Python) -> Callable[..., Any]:
    path = Path(section.file).expanduser()
    if not path.is_file():
        raise _Unfit("function", f"there is no file {section.file} here or beside the run file, on every node")
    name = f"ftray_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # what it imports may lie beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code
        raise _Unfit("function", f"{section.file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, section.name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(section.name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
        raise _Unfit("function", f"{section.file} has no function {section.name!r}; {hint}")
    return function


SCORERS: dict[str, Callable[[Any], Scorer]] = {
    "exact_match": lambda section: _each(lambda one: exact_match(one.answer, one.reference)),
    "numeric": lambda section: _each(lambda one: float(same_number(one.answer, one.reference))),
    "regex": _regex,
    "json_schema": _json_schema,
    "length": _length,
    "python": _python,
    "version": lambda section: _Version(),
}
