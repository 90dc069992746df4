"""Clients that load a server and remember what they saw, and one that moves an alias meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import openai

PATIENCE_S = 120.0


@dataclass
class Told:
    """One request as its client saw it. Times are time.monotonic(); `headed`: when the answer began."""

    began: float = field(default_factory=time.monotonic)
    headed: float = 0.0
    ended: float = 0.0
    status: int = 0
    version: str | None = None
    text: str = ""
    finish: str | None = None
    done: bool = False
    error: dict[str, Any] | None = None
    retry_after: str | None = None
    pauses: list[float] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.status == 200 and self.done and self.error is None and self.finish == "length"

    @property
    def code(self) -> str | None:
        return self.error["code"] if self.error else None


class Client:
    """HTTP without a library between: every byte of the stream is looked at, and nothing is sent twice."""

    def __init__(self, url: str):
        self._http = aiohttp.ClientSession(
            url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=PATIENCE_S)
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def get(self, path: str) -> Any:
        async with self._http.get(path) as answer:
            return await answer.json()

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self._http.post(path, json=body) as answer:
            return answer.status, await answer.json()

    async def replicas(self) -> list[dict[str, Any]]:
        """Those that answer."""
        return (await self.get("/v1/adapters"))["replicas"] or []

    async def stream(
        self, model: str, prompt: Sequence[int], *, tokens: int, told: Told | None = None, pieces: int | None = None
    ) -> Told:
        """Streams a greedy answer of so many tokens; hangs up after so many `pieces`."""
        told = told or Told()
        body = {**_body(model, prompt, tokens), "stream": True}
        try:
            async with self._http.post("/v1/completions", json=body) as answer:
                told.headed, told.status = time.monotonic(), answer.status
                told.version = answer.headers.get("x-ftray-version")
                told.retry_after = answer.headers.get("retry-after")
                if answer.status != 200:
                    told.error = (await answer.json())["error"]
                    return told
                last = 0.0
                async for line in answer.content:
                    if not line.startswith(b"data: "):
                        continue
                    now = time.monotonic()
                    if last:
                        told.pauses.append(now - last)
                    last = now
                    _take(told, line.removeprefix(b"data: "))
                    if pieces is not None and len(told.pauses) >= pieces:
                        return told
        except aiohttp.ClientError as error:
            told.error = {"code": f"connection: {error!r}"}
        finally:
            told.ended = time.monotonic()
        return told


def _body(model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def _take(told: Told, data: bytes) -> None:
    if data.strip() == b"[DONE]":
        told.done = True
        return
    document = json.loads(data)
    if "error" in document:
        told.error = document["error"]
        return
    choice = document["choices"][0]
    told.text += choice["text"]
    told.finish = choice["finish_reason"] or told.finish


async def stream_by_openai(
    client: openai.AsyncOpenAI, model: str, prompt: Sequence[int], *, tokens: int, told: Told | None = None
) -> Told:
    """The same through OpenAI's client, which sends nothing twice here."""
    told = told or Told()
    body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
    try:
        answer = await client.completions.with_raw_response.create(
            **body, stream=True, extra_body={"ignore_eos": True}, timeout=PATIENCE_S
        )
        told.headed, told.status = time.monotonic(), answer.status_code
        told.version = answer.headers.get("x-ftray-version")
        last = 0.0
        async for chunk in answer.parse():
            now = time.monotonic()
            if last:
                told.pauses.append(now - last)
            last = now
            told.text += chunk.choices[0].text
            told.finish = chunk.choices[0].finish_reason or told.finish
        told.done = True
    except openai.APIStatusError as error:
        told.status, told.error = error.status_code, {"code": error.code, "message": str(error)}
    except openai.OpenAIError as error:
        told.error = {"code": getattr(error, "code", None) or repr(error)}
    finally:
        told.ended = time.monotonic()
    return told


@dataclass
class Load:
    """Clients that ask one after the other until they are told to stop. `ask(told, turn)` makes a request."""

    ask: Callable[[Told, int], Any]
    clients: int
    told: list[Told] = field(default_factory=list)
    stopping: bool = False

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._go_on(number)) for number in range(self.clients)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopping = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        if kind is None:
            for result in results:
                if isinstance(result, BaseException):
                    raise result

    async def _go_on(self, number: int) -> None:
        turn = number
        while not self.stopping:
            told = Told()
            self.told.append(told)
            await self.ask(told, turn)
            turn += self.clients

    @property
    def ended(self) -> list[Told]:
        return [one for one in self.told if one.ended]

    @property
    def in_flight(self) -> list[Told]:
        return [one for one in self.told if not one.ended]

    async def until(self, what: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """The error of a client that fell over comes out here."""
        async with asyncio.timeout(timeout_s):
            while not what():
                for task in self._tasks:
                    if task.done() and not self.stopping:
                        await task
                await asyncio.sleep(0.01)


async def until(what: Callable[[], Any], timeout_s: float = PATIENCE_S, every_s: float = 0.1) -> Any:
    """What a coroutine function returns, once it is true."""
    async with asyncio.timeout(timeout_s):
        while not (found := await what()):
            await asyncio.sleep(every_s)
    return found


@dataclass(frozen=True)
class Move:
    """An alias came to point at `version` at some moment between the two."""

    begun: float
    ended: float
    version: str


@dataclass
class Mover:
    """Moves an alias over HTTP, and knows where it may have pointed when."""

    client: Client
    name: str
    moves: list[Move] = field(default_factory=list)

    async def promote(self, number: int) -> None:
        await self._move("/v1/adapters/promote", model=f"{self.name}@v{number}")

    async def rollback(self) -> None:
        await self._move("/v1/adapters/rollback", name=self.name)

    async def _move(self, path: str, **body: Any) -> None:
        begun = time.monotonic()
        status, document = await self.client.post(path, **body)
        assert status == 200, document
        [(number, share)] = document["shares"].items()
        assert share == 1.0
        self.moves.append(Move(begun, time.monotonic(), f"{self.name}@{number}"))

    def current(self, begin: float, end: float) -> set[str]:
        """Every version that may have been current at a moment between the two."""
        gone = [move.ended for move in self.moves[1:]] + [float("inf")]
        return {move.version for move, at in zip(self.moves, gone, strict=True) if move.begun <= end and at >= begin}
