"""The fleet over Ray Serve: replicas in processes of their own, reached through a deployment handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import contextmanager
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from ftray.errors import FtrayError, ReplicaGone
from ftray.serve.engine import EngineFacts, Generation, Labelled, Piece, VersionRef
from ftray.serve.fleet import ReplicaState

T = TypeVar("T")

ANSWER_S = 120.0
STATES_S = 5.0


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
            self._facts = await self._one(self._handle.facts.remote())
        return self._facts

    async def generate(self, request: Generation, version: VersionRef | None) -> AsyncGenerator[Piece, None]:
        pieces = self._streams.generate.remote(request, version)
        over = False
        try:
            with _plain_errors():
                async for piece in pieces:
                    over = piece.finish is not None
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
        """Of the replicas that answer; one that is dying is left out."""
        with _plain_errors():
            answers = await self._handle.broadcast("states").results_async(timeout_s=STATES_S, return_exceptions=True)
        return [state for answer in answers if not isinstance(answer, BaseException) for state in answer]

    async def _one(self, response: Awaitable[T]) -> T:
        with _plain_errors():
            return await response

    async def _all(self, method: str, *args: Any, **options: Any) -> list[ReplicaState]:
        with _plain_errors():
            answers = await self._handle.broadcast(method, *args, **options).results_async(timeout_s=ANSWER_S)
        return [state for answer in answers for state in answer]


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
    except (RayActorError, DeploymentUnavailableError) as error:
        raise ReplicaGone("the replica that worked on the request died; send the request again") from error
    except RayServeException as error:
        raise ReplicaGone(f"no replica could take the request ({error}); send it again") from error
