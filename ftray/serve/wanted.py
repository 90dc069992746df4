"""Work goes on only while somebody waits for it: until the client hangs up or the request's time is over."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Receive

from ftray.errors import DeadlineExceeded, RequestError

TIMEOUT_HEADER = "x-request-timeout-seconds"


class Disconnected(Exception):
    """The client hung up; there is nobody to answer."""


@dataclass(frozen=True)
class Deadline:
    """When a request's time is over: by the event loop's clock, and after how many seconds that was."""

    at: float
    allowed_s: float

    @classmethod
    def of(cls, request: Request, *, timeout_s: float) -> Deadline:
        """The server's limit, or the client's where it is lower."""
        asked = request.headers.get(TIMEOUT_HEADER)
        allowed_s = timeout_s if asked is None else min(timeout_s, _seconds(asked))
        return cls(asyncio.get_running_loop().time() + allowed_s, allowed_s)

    @property
    def left_s(self) -> float:
        return self.at - asyncio.get_running_loop().time()


@contextlib.asynccontextmanager
async def while_wanted(receive: Receive, deadline: Deadline) -> AsyncIterator[None]:
    """Cancels its block when the client hangs up (Disconnected) or the time is over (DeadlineExceeded).

    The request's body must have been read: what `receive` still brings is dropped.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        limit.reschedule(0)

    watcher: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout_at(deadline.at) as limit:
            watcher = asyncio.create_task(watch())
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        if gone:
            raise Disconnected from error
        raise DeadlineExceeded(
            f"the request took longer than {deadline.allowed_s:g} s; ask for fewer tokens, or raise limits.timeout_s"
        ) from error
    finally:
        if watcher is not None:
            watcher.cancel()


def _seconds(asked: str) -> float:
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"{TIMEOUT_HEADER}: {asked[:40]!r} is not a number of seconds above 0", param=TIMEOUT_HEADER)
    return seconds
