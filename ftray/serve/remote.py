"""The fleet over Ray Serve: replicas in processes of their own, reached through a deployment handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from ftray.errors import FtrayError, ReplicaGone
from ftray.serve.engine import EngineFacts, Generation, Labelled, Piece, VersionRef
from ftray.serve.fleet import ReplicaState

T = TypeVar("T")

ANSWER_S = 120.0
STATES_S = 3.0


class RemoteFleet:
    """Implements `fleet.Fleet`."""

    def __init__(self, handle: DeploymentHandle):
        # By gRPC, not as Ray objects: a piece of a stream costs an ingress 0.15 ms so, and 0.38 ms the other way.
        self._handle = handle.options(_by_reference=False)
        self._streams = handle.options(stream=True, _by_reference=False)
        self._facts: EngineFacts | None = None

    async def facts(self) -> EngineFacts:
        """The same for every replica, so it is asked once."""
        if self._facts is None:
            facts: EngineFacts = await self._one(self._handle.facts.remote())
            self._facts = facts
        return self._facts

    async def generate(self, request: Generation, version: VersionRef | None) -> AsyncGenerator[Piece, None]:
        pieces = self._streams.generate.remote(request, version)
        over = False
        try:
            with _plain_errors():
                async for piece in cast(AsyncIterator[Piece | FtrayError], pieces):
                    over = isinstance(piece, FtrayError) or piece.finish is not None
                    if isinstance(piece, FtrayError):
                        raise piece
                    yield piece
            if not over:
                raise ReplicaGone("the replica stopped in the middle of an answer; send the request again")
        finally:
            if not over:
                pieces.cancel()

    async def embed(self, ids: list[tuple[int, ...]], version: VersionRef | None) -> list[list[float]]:
        return await self._one(self._handle.embed.remote(ids, version))

    async def classify(self, ids: list[tuple[int, ...]], version: VersionRef) -> list[Labelled]:
        return await self._one(self._handle.classify.remote(ids, version))

    async def load(self, version: VersionRef, *, pin: bool = False) -> list[ReplicaState]:
        return await self._all("load", version, pin=pin)

    async def unload(self, version: VersionRef) -> list[ReplicaState]:
        return await self._all("unload", version)

    async def unpin(self, version: VersionRef) -> list[ReplicaState]:
        return await self._all("unpin", version)

    async def states(self) -> list[ReplicaState]:
        """Of the replicas that answer; one that is dying or hangs is left out."""
        answers = await self._answers("states", timeout_s=STATES_S)
        return [state for answer in answers if not isinstance(answer, BaseException) for state in answer]

    async def _one(self, response: Awaitable[T]) -> T:
        with _plain_errors():
            return await response

    async def _all(self, method: str, *args: Any, **options: Any) -> list[ReplicaState]:
        answers = await self._answers(method, *args, timeout_s=ANSWER_S, **options)
        states: list[ReplicaState] = []
        with _plain_errors():
            for answer in answers:
                if isinstance(answer, TimeoutError | asyncio.CancelledError):
                    raise ReplicaGone(f"a replica gave no answer in {ANSWER_S:.0f} s; try again")
                if isinstance(answer, BaseException):
                    raise answer
                states += answer
        return states

    async def _answers(
        self, method: str, *args: Any, timeout_s: float, **options: Any
    ) -> list[list[ReplicaState] | BaseException]:
        """What each replica answers or raises. Ray's `results_async` has no answer at all where one replica hangs."""
        with _plain_errors():
            results = await self._handle.broadcast(method, *args, **options)._fetch_replica_results_async()
        waits = (asyncio.wait_for(result.get_async(), timeout_s) for result in results)
        return list(await asyncio.gather(*waits, return_exceptions=True))


@contextmanager
def _plain_errors():
    """What a replica raised as it raised it, and a lost replica as ReplicaGone."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, FtrayError):
            raise cause from None
        if isinstance(cause, RayActorError | asyncio.CancelledError):
            raise ReplicaGone("the replica that worked on the request died; send the request again") from error
        raise
    except (RayActorError, DeploymentUnavailableError, grpc.RpcError) as error:
        raise ReplicaGone("the replica that worked on the request died; send the request again") from error
    except RayServeException as error:
        raise ReplicaGone(f"no replica could take the request ({error}); send it again") from error
