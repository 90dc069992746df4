"""Aliases of an adapter: numbered moves, each created exclusively, so that moving is a compare-and-swap.

```text
adapters/<name>/aliases/<alias>/<n>.json    {targets: {"3": 0.9, "4": 0.1}, moved_at, by, reason, restores}
```
The newest move is the alias; the older ones are its history. A move is void once one of its versions is deleted:
deletion is refused while an alias points there, so that can only be the loser of a race, and the move before it counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ftray.errors import BadReference, RegistryError
from ftray.store.numbered import Numbered
from ftray.store.paths import Storage

_ALIAS = re.compile(r"(?!v\d+$)[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_ATTEMPTS = 50


@dataclass(frozen=True)
class AliasState:
    """Where an alias points: {version number: share of the requests}, shares add up to 1.

    `number` is the move's, what `expect` compares with; `restores` the move that a rollback went back to.
    """

    targets: dict[int, float] = field(hash=False)
    moved_at: str
    by: str
    number: int
    reason: str = "promote"
    restores: int | None = None

    @property
    def main(self) -> int:
        """The version with the largest share."""
        return max(self.targets, key=lambda number: (self.targets[number], -number))

    def pick(self, point: float) -> int:
        """The version at a point in [0, 1): a uniform draw gives each its share."""
        for number in sorted(self.targets):
            point -= self.targets[number]
            if point < 0:
                return number
        return max(self.targets)


class Alias:
    """One alias of one adapter."""

    def __init__(self, storage: Storage, name: str, alias: str):
        if not _ALIAS.fullmatch(alias):
            raise BadReference(f"{alias!r} is not an alias; use a-z, 0-9 and -, and not v1, v2, … e.g. prod")
        self.name = name
        self.alias = alias
        self._moves = Numbered(storage, storage.join("adapters", name, "aliases", alias))

    def history(self, deleted: Set[int]) -> list[AliasState]:
        """Moves that count, oldest first."""
        states = (self._state(number) for number in self._moves.numbers())
        return [state for state in states if state is not None and not deleted & state.targets.keys()]

    def state(self, deleted: Set[int]) -> AliasState | None:
        """Where it points; None if it points nowhere."""
        for number in reversed(self._moves.numbers()):
            state = self._state(number)
            if state is not None and not deleted & state.targets.keys():
                return state if state.targets else None
        return None

    def move(
        self,
        targets: Mapping[int, float],
        *,
        by: str,
        reason: str,
        deleted: Set[int],
        expect: int | None = None,
        restores: int | None = None,
    ) -> AliasState:
        """Points it elsewhere. With `expect`, the number of the move that the caller saw (0: none), RegistryError if
        another writer moved it since; without, the last writer wins."""
        document = {"targets": {str(number): share for number, share in targets.items()}, "by": by, "reason": reason}
        for _ in range(_ATTEMPTS):
            last = max(self._moves.numbers(), default=0)
            state = self.state(deleted)
            seen = state.number if state else 0
            if expect is not None and seen != expect:
                raise self._moved(expect, state)
            moved_at = datetime.now(UTC).isoformat(timespec="milliseconds")
            if self._moves.create(last + 1, {**document, "moved_at": moved_at, "restores": restores}):
                return AliasState(dict(targets), moved_at, by, last + 1, reason, restores)
            if expect is not None:
                raise self._moved(expect, self.state(deleted))
        raise RegistryError(f"{self.name}@{self.alias} is being moved by others all the time; try again")

    def before(self, current: AliasState, deleted: Set[int]) -> AliasState | None:
        """The state that a rollback goes back to: the last one before with other targets.

        Rolling back twice goes back two states, not back and forth.
        """
        origin = current.number if current.restores is None else current.restores
        for state in reversed(self.history(deleted)):
            if state.number < origin and state.targets and state.targets != current.targets:
                return state
        return None

    def _state(self, number: int) -> AliasState | None:
        move = self._moves.read(number)
        if move is None:
            return None
        targets = {int(version): float(share) for version, share in move["targets"].items()}
        return AliasState(targets, move["moved_at"], move["by"], number, move["reason"], move["restores"])

    def _moved(self, expect: int, state: AliasState | None) -> RegistryError:
        now = f"move {state.number} by {state.by} at {state.moved_at}" if state else "nowhere"
        return RegistryError(
            f"{self.name}@{self.alias} was moved by another writer: expected move {expect}, it is {now}; "
            "look at it again and repeat the command if it still holds"
        )


def shares(weights: Mapping[Any, float]) -> dict[int, float]:
    """Weights of a split as shares that add up to 1; keys are 3, "3" or "v3". BadReference if one is not positive."""
    if not weights:
        raise BadReference("a split needs at least one version, e.g. {3: 0.9, 4: 0.1}")
    numbers: dict[int, float] = {}
    for version, weight in weights.items():
        match = re.fullmatch(r"v?(\d+)", str(version))
        if match is None or not (math.isfinite(weight) and weight > 0):
            raise BadReference(f"{version!r}: {weight!r} is not a version with a positive weight, e.g. 3: 0.9")
        numbers[int(match[1])] = numbers.get(int(match[1]), 0.0) + weight
    total = sum(numbers.values())
    return {number: weight / total for number, weight in sorted(numbers.items())}
