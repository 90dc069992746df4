"""Which rows are held out: chosen by a hash of the prompt, so that rows with equal prompts are on the same side.

A prompt is a candidate where its hash, as a number in [0, 1), is below the fraction: whatever is added to the files,
the choice for a row stays. Where there are more candidates than `limit`, those with the smallest hashes are held out,
taken evenly from the sources; the others are trained on.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from ftray.data.encode import Item


class Split:
    """Takes items one by one and gives back those to train on; the others are held, at most `limit` of them.

    Where no prompt is a candidate, as in small files, the one with the smallest hash is held, so that a run can be
    evaluated at all.
    """

    def __init__(self, *, fraction: float, limit: int):
        self.limit = limit
        self._below = fraction * 2**64 if limit else 0.0
        self._groups: dict[int, list[Item]] = {}  # prompt -> its held items
        self._by_source: dict[int, list[int]] = {}  # source of the first item -> its held prompts, largest last
        self._displaced: set[int] = set()
        self._count = 0
        self._smallest: tuple[int, list[Item]] | None = None  # while there is no candidate

    def add(self, item: Item, prompt: int) -> Iterator[Item]:
        """Items to train on because of this one: none, itself, or those that it displaces. `prompt` is 64 bits."""
        if prompt >= self._below:
            yield from self._keep_smallest(item, prompt)
            return
        if prompt in self._displaced:
            yield item
            return
        yield from self._drop_smallest()
        if prompt not in self._groups:
            self._groups[prompt] = []
            bisect.insort(self._by_source.setdefault(item.source, []), prompt)
        self._groups[prompt].append(item)
        self._count += 1
        while self._count > self.limit:
            yield from self._displace()

    def finish(self, *, trained: bool) -> Iterator[Item]:
        """The last items to train on; `trained`: whether there were any. Then `held` is final."""
        if self._smallest and trained and not self._groups:
            prompt, items = self._smallest
            self._groups[prompt] = items[: self.limit]
            yield from items[self.limit :]
        else:
            yield from self._drop_smallest()

    def held(self) -> list[Item]:
        """The held items, in the order of their sources and rows."""
        items = [item for group in self._groups.values() for item in group]
        return sorted(items, key=lambda item: (item.source, item.file, item.line))

    def _keep_smallest(self, item: Item, prompt: int) -> Iterator[Item]:
        if not self._below or self._groups or self._displaced:
            yield item
        elif self._smallest and prompt == self._smallest[0]:
            self._smallest[1].append(item)
        elif self._smallest and prompt > self._smallest[0]:
            yield item
        else:
            yield from self._drop_smallest()
            self._smallest = (prompt, [item])

    def _drop_smallest(self) -> Iterator[Item]:
        if self._smallest:
            yield from self._smallest[1]
            self._smallest = None

    def _displace(self) -> list[Item]:
        """Takes the prompt with the largest hash from the source that holds the most prompts."""
        source = max(self._by_source, key=lambda source: len(self._by_source[source]))
        prompt = self._by_source[source].pop()
        if not self._by_source[source]:
            del self._by_source[source]
        self._displaced.add(prompt)
        items = self._groups.pop(prompt)
        self._count -= len(items)
        return items
