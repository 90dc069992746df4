"""Two kinds of requests that must never be in one batch work in shifts, and neither waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Shifts:
    """Admits any number of requests of one kind at a time.

    Once a request of the other kind waits, nobody new joins: those inside finish, then everybody of the other kind who
    waits by then goes in together. So a shift ends with the longest answer of those who were there when it began.
    """

    def __init__(self) -> None:
        self._kind = ""
        self._inside = 0
        self._queue: list[tuple[str, asyncio.Future[None]]] = []

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def shift(self, kind: str) -> AsyncIterator[None]:
        await self._enter(kind)
        try:
            yield
        finally:
            self._inside -= 1
            self._admit()

    async def _enter(self, kind: str) -> None:
        place = (kind, asyncio.get_running_loop().create_future())
        self._queue.append(place)
        self._admit()
        try:
            await place[1]
        except asyncio.CancelledError:
            if not place[1].cancelled():
                self._inside -= 1  # admitted in the same moment
            self._queue = [other for other in self._queue if other is not place]
            self._admit()
            raise

    def _admit(self) -> None:
        if not self._queue:
            return
        if not self._inside:
            self._kind = self._queue[0][0]
        elif any(kind != self._kind for kind, _ in self._queue):
            return
        for kind, future in self._queue:
            if kind == self._kind and not future.done():  # done: cancelled, and about to be told
                self._inside += 1
                future.set_result(None)
        self._queue = [place for place in self._queue if place[0] != self._kind]
