"""API keys: made here, kept as hashes, compared in constant time, checked before anything else of a request."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ftray.config.serving import Key
from ftray.config.serving import Scope as KeyScope
from ftray.serve.call import Call
from ftray.serve.error_bodies import Refused, response_to

OPEN_PATHS = frozenset({"/health"})


def make_key(name: str, scopes: Sequence[KeyScope] = ("infer",)) -> tuple[str, Key]:
    """A new secret, shown once, and what the serve file keeps of it."""
    secret = f"ftray-{secrets.token_urlsafe(32)}"
    return secret, Key(name=name, sha256=_sha256(secret.encode()), scopes=list(scopes))


class KeyGuard:
    """ASGI middleware: without a key that is configured, no path but OPEN_PATHS answers, not even with a 404.

    With no keys configured everybody may do everything.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key]):
        self._app = app
        self._keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            call = Call.of(scope)
            try:
                self._check(scope, call)
            except Refused as error:
                call.error = error.code
                await response_to(error, request_id=call.id)(scope, receive, send)
                return
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "there are no websockets here"})
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, call: Call) -> None:
        if not self._keys:
            call.scopes = ("infer", "admin")
            return
        given = Headers(scope=scope).getlist("authorization")
        key = find(self._keys, given[0]) if len(given) == 1 else None
        if key is not None:
            call.key, call.scopes = key.name, tuple(key.scopes)
        elif _path(scope) not in OPEN_PATHS:
            raise _no_key(given)


def find(keys: Sequence[Key], authorization: str) -> Key | None:
    """The key that a header holds. Every key is compared, so that the time tells nothing of which one is near.

    `Bearer <key>` is what clients send; `Basic` with the key as password lets a browser open the playground.
    """
    secret = _secret(authorization)
    digest = _sha256(secret) if secret else ""
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def needs(scope: KeyScope) -> Callable[[Request], Awaitable[None]]:
    """A route's dependency: 403 for a key without this scope."""

    async def check(request: Request) -> None:
        call = Call.of(request.scope)
        if scope not in call.scopes:
            raise Refused(
                f"the key {call.key!r} has no scope {scope!r}, only {', '.join(call.scopes)}; "
                f"add it to the key's scopes in the serve file, or use another key",
                status=403,
                code="insufficient_scope",
            )

    return check


def _secret(authorization: str) -> bytes | None:
    kind, _, value = authorization.strip().partition(" ")
    value = value.strip()
    if kind.lower() == "bearer":
        return value.encode("latin-1", "replace")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def _no_key(given: Sequence[str]) -> Refused:
    way_out = "send it as 'Authorization: Bearer <key>'; `ftray serve --new-key NAME` makes one"
    if not given:
        message, code = f"this server wants a key: {way_out}", "missing_api_key"
    else:
        message, code = f"this key is not one of this server's: {way_out}", "invalid_api_key"
    return Refused(message, status=401, code=code, headers={"WWW-Authenticate": 'Basic realm="ftray", charset="UTF-8"'})


def _path(scope: Scope) -> str:
    """The path as routes see it: without the prefix under which a proxy mounts the app."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _sha256(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
