"""A small client of a running server, on the standard library alone: what `ftray chat --url` speaks."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from ftray.errors import RequestError, ServeError
from ftray.serve.speaker import Question, Said

KEY = "FTRAY_API_KEY"
VERSION_HEADER = "x-ftray-version"
LIST_TIMEOUT_S = 15.0
TIMEOUT_S = 330.0  # a little more than a server's own longest time for a request


class Client:
    """One server. Each call is a connection of its own, in a thread, so that closing it cancels the request."""

    def __init__(self, url: str, key: str | None = None):
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._scheme, self._host, self._port = parts.scheme, parts.hostname or "", parts.port
        except ValueError:
            self._scheme = ""
        if self._scheme not in ("http", "https") or not self._host:
            raise ServeError(f"--url {url}: not a server's address; write e.g. http://127.0.0.1:8000")
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{self._scheme}://{parts.netloc}{self._path}"
        self._key = (key or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ServeError(f"the key in ${KEY} holds characters that no key has; copy it again")

    @property
    def where(self) -> str:
        return self.url

    async def models(self) -> list[str]:
        listed = await asyncio.to_thread(self._get, "/v1/models")
        return [str(model["id"]) for model in listed.get("data", [])]

    async def version_of(self, model: str) -> str:
        found = await asyncio.to_thread(self._get, f"/v1/models/{quote(model, safe='@')}")
        return str(found.get("version") or found.get("id") or model)

    async def answer(self, question: Question) -> AsyncGenerator[Said, None]:
        line = _Line()
        events = _in_thread(lambda: self._events(line, question.body()), stop=line.hang_up)
        async with contextlib.aclosing(events):
            async for event in events:
                yield _said(event)

    async def close(self) -> None:
        return None

    def _get(self, path: str) -> dict[str, Any]:
        connection = self._connect(timeout_s=LIST_TIMEOUT_S)
        try:
            response = self._send(connection, "GET", path)
            return _json(response.read(), self.url)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _events(self, line: _Line, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events of one answer."""
        connection = self._connect(timeout_s=TIMEOUT_S)
        try:
            connection.connect()
            line.socket = connection.sock
            response = self._send(connection, "POST", "/v1/chat/completions", body)
            yield {"version": response.headers.get(VERSION_HEADER)}
            for row in response:
                name, _, value = row.decode("utf-8", errors="replace").strip().partition(":")
                value = value.strip()
                if name == "data" and value == "[DONE]":
                    return
                if name == "data":
                    event = _json(value.encode(), self.url)
                    if "error" in event:
                        raise _refusal(event, status=500)
                    yield event
            raise ServeError(f"{self.url}: the answer broke off before its end; try again")
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _connect(self, *, timeout_s: float) -> http.client.HTTPConnection:
        if self._scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        """The response to a request; ServeError with the server's own words for any status but 200."""
        headers = {"Accept": "application/json, text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, f"{self._path}{path}", content, headers)
        response = connection.getresponse()
        if response.status == 200:
            return response
        said = response.read(65536)
        if response.status == 401:
            way_out = f"the key in ${KEY} is not one of its keys" if self._key else f"put a key into ${KEY}"
            raise RequestError(f"{self.url} asks for a key; {way_out}", status=401, code="invalid_api_key")
        raise _refusal(_json(said, self.url, status=response.status), status=response.status)

    def _unreachable(self, error: Exception) -> ServeError:
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return ServeError(f"{self.url}: no server answers there ({error}); `ftray serve` starts one")
        return ServeError(f"{self.url}: the connection broke ({error or type(error).__name__}); try again")


def _said(event: dict[str, Any]) -> Said:
    choice = (event.get("choices") or [{}])[0]
    text = (choice.get("delta") or {}).get("content") or ""
    tokens = (event.get("usage") or {}).get("completion_tokens")
    return Said(text, tokens, event.get("version"), choice.get("finish_reason"))


def _json(content: bytes, url: str, *, status: int = 200) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        shown = content[:200].decode("utf-8", errors="replace").strip()
        raise ServeError(f"{url} does not speak as an ftray server does (status {status}): {shown!r}; check --url")
    return value


def _refusal(body: dict[str, Any], *, status: int) -> ServeError:
    error = body.get("error")
    if not isinstance(error, dict):
        error = {"message": body.get("detail") or f"the server answered with status {status}"}
    return RequestError(str(error.get("message")), code=str(error.get("code") or "server_error"), status=status)


class _Line:
    """The socket of a request in progress, which http.client gives away once the answer has begun."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None

    def hang_up(self) -> None:
        """Wakes the thread that reads from it; the server sees that nobody listens any more."""
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)


async def _in_thread(events: Callable[[], Iterator[Any]], *, stop: Callable[[], None]) -> AsyncGenerator[Any, None]:
    """A blocking iterator read by a thread of its own. `stop` wakes that thread when the reader leaves early."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[Any, BaseException | None, bool]] = asyncio.Queue()
    left = threading.Event()

    def put(item: Any, error: BaseException | None = None, end: bool = False) -> None:
        if not left.is_set():
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(queue.put_nowait, (item, error, end))

    def read() -> None:
        try:
            for event in events():
                put(event)
            put(None, end=True)
        except Exception as error:  # handed over whole, and raised where the answer is read
            put(None, error)

    threading.Thread(target=read, name="ftray-chat", daemon=True).start()
    try:
        while True:
            item, error, end = await queue.get()
            if error is not None:
                raise error
            if end:
                return
            yield item
    finally:
        left.set()
        stop()
