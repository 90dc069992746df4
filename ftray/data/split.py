"""Which rows are held out: chosen by a hash of the prompt, so that rows with equal prompts are on the same side.

A prompt is a candidate where its hash, as a number in [0, 1), is below the fraction: whatever is added to the files,
the choice for a row stays. Where there are more candidates than `limit`, those with the smallest hashes are held out,
taken evenly from the sources; the others are trained on.
"""

from __future__ import annotations

from collections.abc import Iterator

from ftray.data.encode import Item


class Split:
    """Takes items one by one and gives back those to train on; `held` has the others at the end."""

    def __init__(self, *, fraction: float, limit: int):
        self.fraction, self.limit = fraction, limit
        self._groups: dict[int, list[Item]] = {}  # prompt hash -> its held-out items, all of the first item's source
        self._by_source: dict[int, list[int]] = {}  # source -> its prompt hashes, largest last
        self._trained: set[int] = set()  # prompts below the fraction that are trained on
        self._count = 0

    def add(self, item: Item, prompt: int) -> Iterator[Item]:
        """Items to train on because of this one: none, itself, or those that it displaces. `prompt` is 64 bits."""
        if prompt >= self.fraction * 2**64 or prompt in self._trained or not self.limit:
            yield item
            return
        if prompt not in self._groups:
            self._groups[prompt] = []
            _insert(self._by_source.setdefault(item.source, []), prompt)
        self._groups[prompt].append(item)
        self._count += 1
        while self._count > self.limit:
            yield from self._displaced()

    def held(self) -> list[Item]:
        """Held-out items, in the order of their sources and rows."""
        items = [item for group in self._groups.values() for item in group]
        return sorted(items, key=lambda item: (item.source, item.file, item.line))

    def _displaced(self) -> list[Item]:
        largest = max(self._by_source, key=lambda source: len(self._by_source[source]))
        prompt = self._by_source[largest].pop()
        if not self._by_source[largest]:
            del self._by_source[largest]
        self._trained.add(prompt)
        items = self._groups.pop(prompt)
        self._count -= len(items)
        return items


def _insert(ordered: list[int], value: int) -> None:
    import bisect

    bisect.insort(ordered, value)
