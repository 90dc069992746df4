"""A server without keys answers only to this machine's own names.

A web page can make its own name point at 127.0.0.1 (DNS rebinding). It would then be of the server's origin, and could
read answers and move aliases; but its requests carry its name.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ftray.errors import RequestError
from ftray.serve.call import Call
from ftray.serve.error_bodies import response_to

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NAMES = {b"127.0.0.1", b"localhost", b"[::1]"}


class LocalHosts:
    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (host := _host(scope)) not in _NAMES:
            error = RequestError(
                f"this server answers to localhost, not to {host.decode('latin-1')!r}; configure keys and http.host",
                code="unknown_host",
                status=403,
            )
            Call.of(scope).error = error.code
            await response_to(error, request_id=Call.of(scope).id)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _host(scope: Scope) -> bytes:
    """Without its port."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    head, colon, port = host.rpartition(b":")
    return head if colon and port.isdigit() else host
