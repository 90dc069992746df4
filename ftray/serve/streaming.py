"""Server-sent events: an answer that begins when its first piece is there, and stops when nobody reads it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ftray.serve.call import Call
from ftray.serve.error_bodies import body_of, code_of, is_expected, status_of
from ftray.serve.wanted import Deadline, Disconnected, while_wanted

_LAST_WORDS_S = 1.0
_log = logging.getLogger("ftray.serve")


class EventStream(Response):
    """Sends events as they come. An error in the middle is an event of its own, and the last: no [DONE] follows.

    The status has long been sent by then, so a client knows by this event that the answer is not whole. `first` is
    there already: whatever fails before it has a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], *, deadline: Deadline):
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._first, self._events = first, events
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call.of(scope)
        last = b""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with while_wanted(receive, self._deadline):
                await send({"type": "http.response.body", "body": self._first, "more_body": True})
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Disconnected:
            raise
        except Exception as error:  # also what a route forgot: the client is owed an end that says what happened
            if not is_expected(error):
                _log.exception("request %s failed in the middle of its stream", call.id)
            call.error = code_of(error)
            last = _error_event(error, call)
        finally:
            await self._events.aclose()
        with contextlib.suppress(TimeoutError):  # a client that reads nothing is not waited for
            async with asyncio.timeout(_LAST_WORDS_S if last else None):
                await send({"type": "http.response.body", "body": last, "more_body": False})


def _error_event(error: Exception, call: Call) -> bytes:
    body = body_of(error, request_id=call.id)
    body["error"]["status"] = status_of(error)
    return f"data: {json.dumps(body)}\n\n".encode()
