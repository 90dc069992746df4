"""The replicas as the app sees them, and what they say of themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from ftray.serve.engine import EngineFacts, EngineStats, Generation, Labelled, Piece, Room, VersionRef

ResidentState = Literal["loading", "loaded", "failed"]


@dataclass(frozen=True)
class Resident:
    """A version in a replica: where it lies, who uses it; `reason`: why it failed. Times are time.time() seconds."""

    version: VersionRef
    state: ResidentState
    room: Room | None = None
    pinned: bool = False
    in_use: int = 0
    last_used: float = 0.0
    load_s: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ReplicaState:
    """One replica now."""

    id: str
    facts: EngineFacts
    stats: EngineStats
    residents: tuple[Resident, ...] = ()
    started_at: float = 0.0


class Fleet(Protocol):
    """What the app asks for. A single replica is a fleet of one."""

    async def facts(self) -> EngineFacts: ...

    def generate(self, request: Generation, version: VersionRef | None) -> AsyncIterator[Piece]:
        """Loads the version if it is not there; None is the base. `request.version` is filled in by the replica.

        Closing the iterator cancels. AdapterError, RequestError, Overloaded, DeadlineExceeded, ReplicaGone: before the
        first piece, or in the middle.
        """
        ...

    async def embed(self, ids: list[tuple[int, ...]], version: VersionRef | None) -> list[list[float]]: ...

    async def classify(self, ids: list[tuple[int, ...]], version: VersionRef) -> list[Labelled]: ...

    async def load(self, version: VersionRef, *, pin: bool = False) -> list[ReplicaState]:
        """On every replica; `pin` also keeps it there. AdapterError when one cannot."""
        ...

    async def unload(self, version: VersionRef) -> list[ReplicaState]:
        """On every replica, once nothing uses it any more; a pin ends too."""
        ...

    async def unpin(self, version: VersionRef) -> list[ReplicaState]: ...

    async def states(self) -> list[ReplicaState]: ...
