"""Texts that wait for an encoder, and which of them are read next: fair between versions, and between requests.

Versions take turns, a batch each. Within a version no request is held up by a long one: of each, so many texts belong
to one round, and rounds count from when the request came. The oldest text is always in the next batch; beside it come
those most like it in length, so that little is computed on padding.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

ROUND = 8
"""Texts of one request that belong to one round."""
WINDOW = 4
"""Batches' worth of waiting texts among which those of like length are looked for."""
MOST_PADDING = 0.25
"""Share of a batch that may be padding; beyond it, two batches are faster than one."""


class Reading:
    """One request: texts as token ids, and their answers as they come. `tell` hears the whole of them, or what failed.

    `tell` is called once, in whichever thread brought the last answer.
    """

    def __init__(self, texts: Sequence[tuple[int, ...]], tell: Callable[[list[Any] | Exception], None]):
        self.texts = texts
        self.over = False
        self._tell = tell
        self._answers: list[Any] = [None] * len(texts)
        self._left = len(texts)

    def answer(self, index: int, answer: Any) -> None:
        self._answers[index] = answer
        self._left -= 1
        if not self._left and not self.over:
            self.over = True
            self._tell(self._answers)

    def fail(self, error: Exception) -> None:
        if not self.over:
            self.over = True
            self._tell(error)

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        self.over = True


@dataclass(frozen=True)
class Batch:
    """Texts of one version: (request, which of its texts)."""

    version: str | None
    items: list[tuple[Reading, int]]

    def texts(self) -> list[tuple[int, ...]]:
        return [reading.texts[index] for reading, index in self.items]

    def tell(self, outcome: list[Any] | Exception) -> None:
        """An answer for each text, or what failed for all of them."""
        if isinstance(outcome, Exception):
            for reading, _ in self.items:
                reading.fail(outcome)
        else:
            for (reading, index), answer in zip(self.items, outcome, strict=True):
                reading.answer(index, answer)


@dataclass
class _Lane:
    batches: int = 0
    heap: list[tuple[int, int, Reading, int]] = field(default_factory=list)
    """(round, arrival, request, which text)"""


class Waiting:
    """All that waits. `max_tokens`: of a batch, padding included; a single text may be longer. Not thread-safe."""

    def __init__(self, *, max_batch: int, max_tokens: int):
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self._lanes: dict[str | None, _Lane] = {}
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return sum(not item[2].over for lane in self._lanes.values() for item in lane.heap)

    def add(self, version: str | None, reading: Reading) -> None:
        lane = self._lanes.setdefault(version, _Lane())
        for index in range(len(reading.texts)):
            heapq.heappush(lane.heap, (lane.batches + index // ROUND, next(self._arrivals), reading, index))

    def drop(self, version: str | None) -> Batch:
        """Takes away whatever waits for a version."""
        lane = self._lanes.pop(version, _Lane())
        return Batch(version, [(reading, index) for _, _, reading, index in lane.heap])

    def drop_all(self) -> list[Batch]:
        return [self.drop(version) for version in list(self._lanes)]

    def next(self) -> Batch | None:
        """The batch to read now; None where nothing waits."""
        while self._lanes:
            version, lane = next(iter(self._lanes.items()))
            del self._lanes[version]
            chosen = self._choose(lane)
            if lane.heap:
                self._lanes[version] = lane  # behind the others
            if chosen:
                return Batch(version, chosen)
        return None

    def _choose(self, lane: _Lane) -> list[tuple[Reading, int]]:
        window: list[tuple[int, int, Reading, int]] = []
        while lane.heap and len(window) < WINDOW * self.max_batch:
            item = heapq.heappop(lane.heap)
            if not item[2].over:
                window.append(item)
        if not window:
            return []
        lane.batches += 1
        lengths = {item[1]: len(item[2].texts[item[3]]) for item in window}
        oldest = lengths[window[0][1]]
        order = sorted(window, key=lambda item: (abs(lengths[item[1]] - oldest), item[:2]))
        longest, total, count = 0, 0, 0
        for item in order:
            longest, total, count = max(longest, lengths[item[1]]), total + lengths[item[1]], count + 1
            padded = longest * count
            if count > 1 and (
                count > self.max_batch or padded > self.max_tokens or padded - total > MOST_PADDING * padded
            ):
                count -= 1
                break
        for item in order[count:]:
            heapq.heappush(lane.heap, item)
        return [(reading, index) for _, _, reading, index in order[:count]]
