"""The outermost middleware: a request gets its id and its record here, and whatever happens ends as an answer."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftray.serve import access_log
from ftray.serve.call import UNKNOWN, Call
from ftray.serve.error_bodies import code_of, is_expected, response_to
from ftray.serve.metrics import Metrics
from ftray.serve.wanted import Disconnected

CLIENT_GONE = 499
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger("ftray.serve")


class Edge:
    """ASGI middleware: request id, access log, metrics, and a 500 with the id instead of a trace."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Call(id=_request_id(scope["headers"]), method=scope["method"])
        call.put_into(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_headers(call)]}
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except (Disconnected, ClientDisconnect):
            call.status, call.error = CLIENT_GONE, "client_gone"
        except Exception as error:  # whatever a route forgot: the client gets an answer, and the log the trace
            call.error = code_of(error)
            if not is_expected(error):
                _log.exception("request %s failed", call.id)
            if call.status:
                raise  # the answer has begun; breaking the connection is the only way to say that it is not whole
            await response_to(error, request_id=call.id)(scope, receive, send_with_id)
        finally:
            self._metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", UNKNOWN)
            self._metrics.record(call, route=route)
            access_log.write(call, route=route, path=scope["path"])


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own where it is a plain word, so that it can be written into logs and headers as it is."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return value.decode("ascii")
    return f"req-{secrets.token_hex(12)}"


def _headers(call: Call) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", call.id.encode())]
    if call.version != UNKNOWN:
        headers.append((b"x-ftray-version", call.version.encode()))
    return headers
