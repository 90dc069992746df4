"""One engine with its versions, as the app sees it: a fleet of one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from ftray.config.serving import Adapters, Limits
from ftray.errors import DeadlineExceeded, Overloaded, ReplicaGone, RequestError
from ftray.serve.engine import Engine, EngineFacts, Generation, Labelled, Piece, Reader, VersionRef
from ftray.serve.fleet import ReplicaState
from ftray.serve.folders import Folders
from ftray.serve.holds import Holds
from ftray.serve.preloads import Preloads
from ftray.serve.recent import Recent
from ftray.serve.residency import WAIT_S, Residency
from ftray.store.registry import Registry

log = logging.getLogger(__name__)
T = TypeVar("T")

TEND_S = 5.0
RESTORE_S = 20.0


class Replica:
    """`app` names the server whose replicas remember together what they used (None: nothing is remembered); `cache` is
    where versions are copied to from an object store; `wait_s`, how long a version waits for room."""

    def __init__(
        self,
        engine: Engine | Reader,
        registry: Registry,
        *,
        id: str,
        limits: Limits,
        adapters: Adapters,
        app: str | None = None,
        cache: Path | None = None,
        wait_s: float = WAIT_S,
        tend_s: float = TEND_S,
    ):
        holder = f"{id} ({socket.gethostname()}, pid {os.getpid()}, {secrets.token_hex(4)})"
        self.id = id
        self._engine = engine
        self._limits = limits
        self._tend_s = tend_s
        self._residency = Residency(
            engine, folders=Folders(registry, cache=cache), holds=Holds(registry, holder=holder), wait_s=wait_s
        )
        self._preloads = Preloads(registry, adapters=adapters, residency=self._residency)
        self._recent: Recent | None = None
        if app is not None:
            self._recent = Recent(registry.storage, app=app, adapters=adapters, residency=self._residency)
        self._started_at = time.time()
        self._entering = 0
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Loads what the serve file names, and what was used last while there is room. What cannot be loaded is logged,
        and no reason not to start."""
        await self._preloads.follow()
        restored = asyncio.create_task(self._restore())
        await asyncio.wait({restored}, timeout=RESTORE_S)
        self._tasks = [restored, asyncio.create_task(self._tend(restored))]

    async def close(self) -> None:
        """Ends the engine too. Requests that come from now on are told to go elsewhere."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._recent is not None:
            await self._recent.note()
            self._recent.close()
        self._preloads.close()
        await self._residency.close()
        await self._engine.close()

    # the fleet

    async def facts(self) -> EngineFacts:
        return self._engine.facts

    async def generate(self, request: Generation, version: VersionRef | None) -> AsyncGenerator[Piece, None]:
        self._check_task("generate")
        self._check_queue()
        facts = self._engine.facts
        if len(request.prompt_ids) + 1 > facts.max_length:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens; {facts.max_length - 1} and one of the answer fit",
                param="messages",
                code="context_length_exceeded",
            )
        ends = request.deadline or time.time() + self._limits.timeout_s
        at = asyncio.get_running_loop().time() + ends - time.time()
        async with self._using(version, at=at) as key:
            engine = cast(Engine, self._engine)
            pieces = engine.generate(replace(request, version=key, deadline=ends))
            async with contextlib.aclosing(cast(AsyncGenerator[Piece, None], pieces)):
                while True:
                    try:
                        async with asyncio.timeout_at(at) as limit:
                            piece = await anext(pieces, None)
                    except TimeoutError as error:
                        raise _too_late() if limit.expired() else error from None
                    if piece is None:
                        return
                    yield piece

    async def embed(self, ids: list[tuple[int, ...]], version: VersionRef | None) -> list[list[float]]:
        self._check_task("embed")
        reader = cast(Reader, self._engine)
        return await self._read(version, lambda key: reader.embed(ids, key))

    async def classify(self, ids: list[tuple[int, ...]], version: VersionRef) -> list[Labelled]:
        self._check_task("classify")
        reader = cast(Reader, self._engine)
        return await self._read(version, lambda key: reader.classify(ids, cast(str, key)))

    async def load(self, version: VersionRef, *, pin: bool = False) -> list[ReplicaState]:
        await self._residency.load(version, pin=pin)
        if pin and self._recent is not None:
            self._recent.pin(version, True)
        return await self.states()

    async def unload(self, version: VersionRef) -> list[ReplicaState]:
        if self._recent is not None:
            self._recent.drop(version)
        await self._residency.unload(version)
        return await self.states()

    async def unpin(self, version: VersionRef) -> list[ReplicaState]:
        if self._recent is not None:
            self._recent.pin(version, False)
        self._residency.unpin(version)
        return await self.states()

    async def states(self) -> list[ReplicaState]:
        engine = self._engine
        return [ReplicaState(self.id, engine.facts, engine.stats(), self._residency.state(), self._started_at)]

    # a request

    @contextlib.asynccontextmanager
    async def _using(self, version: VersionRef | None, *, at: float) -> AsyncIterator[str | None]:
        """The engine's key of a version, loaded while the block runs; `at`, by the loop's clock, is when to give up."""
        async with contextlib.AsyncExitStack() as stack:
            key = None
            if version is not None:
                self._entering += 1
                try:
                    async with asyncio.timeout_at(at) as limit:
                        key = await stack.enter_async_context(self._residency.use(version))
                except TimeoutError as error:
                    raise _too_late() if limit.expired() else error from None
                finally:
                    self._entering -= 1
            yield key

    async def _read(self, version: VersionRef | None, work: Callable[[str | None], Awaitable[T]]) -> T:
        self._check_queue()
        at = asyncio.get_running_loop().time() + self._limits.timeout_s
        async with self._using(version, at=at) as key:
            try:
                async with asyncio.timeout_at(at) as limit:
                    return await work(key)
            except TimeoutError as error:
                raise _too_late() if limit.expired() else error from None

    def _check_task(self, task: str) -> None:
        if self._closed:
            raise ReplicaGone(f"replica {self.id} is being stopped; send the request again")
        facts = self._engine.facts
        if task not in facts.tasks:
            raise RequestError(
                f"the engine here ({facts.kind}) does not {task}; it does {', '.join(facts.tasks)}",
                code="unsupported_task",
            )

    def _check_queue(self) -> None:
        waiting = self._engine.stats().waiting + self._entering
        if waiting >= max(1, self._limits.max_queue):
            raise Overloaded(f"{waiting} requests wait already (limits.max_queue is {self._limits.max_queue})")

    # in the background

    async def _restore(self) -> None:
        if self._recent is not None:
            await self._recent.restore()

    async def _tend(self, restored: asyncio.Task[None]) -> None:
        await asyncio.wait({restored})
        while True:
            await asyncio.sleep(self._tend_s)
            try:
                await self._preloads.follow()
                if self._recent is not None:
                    await self._recent.note()
            except Exception:  # what runs in the background must outlive whatever went wrong once
                log.exception("replica %s could not be tended", self.id)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the request took longer than it may; ask for fewer tokens, or raise limits.timeout_s")
