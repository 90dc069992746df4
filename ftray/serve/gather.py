"""Pieces of an answer put together, so that a stream costs few messages between processes however fast it comes.

The first piece goes out at once. After it, pieces of all streams of a replica together are held to about 1 / MESSAGE_S
a second: alone a stream is sent token by token, and 32 of them in pieces a tenth of a second apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from ftray.serve.engine import Piece

MESSAGE_S = 0.003


class Gatherer:
    """All streams of one replica."""

    def __init__(self, message_s: float = MESSAGE_S):
        self._message_s = message_s
        self._streams = 0

    async def gathered(self, pieces: AsyncIterator[Piece], *, streamed: bool) -> AsyncGenerator[Piece, None]:
        """The same answer in fewer pieces; one, where nobody reads along. An error comes after what came before it."""
        held: Piece | None = None
        error: Exception | None = None
        there = asyncio.Event()
        over = False

        async def read() -> None:
            nonlocal held, error, over
            try:
                async for piece in pieces:
                    held = piece if held is None else held.then(piece)
                    if streamed:
                        there.set()
            except Exception as raised:  # handed to whoever reads the answer
                error = raised
            finally:
                over = True
                there.set()

        self._streams += 1
        reading = asyncio.create_task(read())
        try:
            while not (over and held is None):
                await there.wait()
                there.clear()
                if held is not None:
                    piece, held = held, None
                    yield piece
                    if not over:
                        await asyncio.wait({reading}, timeout=self._streams * self._message_s)
                if over:
                    there.set()
            if error is not None:
                raise error
        finally:
            self._streams -= 1
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
