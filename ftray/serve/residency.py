"""Which versions are in this replica: loaded when they are asked for, kept while they are used, evicted when idle.

```text
            begin               room, then engine.load             nobody uses it, another needs its room
(absent) ----------> loading --------------------------> loaded ------------------------------------------> (absent)
                        |                                   |
                        +--> failed: the reason stays       +-- leaving: new requests wait, and load it anew
```
A version's room is reserved before it is loaded, and its files are checked before that: what cannot be loaded evicts
nothing. Those who find every place taken wait in line. Where all of them are busy all the time, versions that have
been here for a while leave as soon as their requests end, so that nobody waits for an idle moment that never comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ftray.errors import AdapterError, FtrayError, Overloaded, RequestError, StorageError
from ftray.serve.engine import Engine, Reader, Room, VersionRef
from ftray.serve.fleet import Resident
from ftray.serve.folders import Folders
from ftray.serve.holds import Holds

log = logging.getLogger(__name__)

WAIT_S = 60.0
TENURE_S = 1.0
RETRY_S = 5.0
_FAILURES = 64
_FETCHES = 4
_RELEASE_S = 5.0


@dataclass(eq=False)
class _Slot:
    """A version on its way in, here, or on its way out.

    `room` is reserved as soon as it is set. `leaving`: nobody new may use it; `going`: nobody uses it, and the engine
    is unloading it; `told`: somebody asked for that.
    """

    ref: VersionRef
    coming: asyncio.Task[None] | None = None
    in_line: asyncio.Future[None] | None = None
    room: Room | None = None
    loaded: bool = False
    leaving: bool = False
    going: bool = False
    pinned: bool = False
    told: bool = False
    ended: asyncio.Future[None] | None = None
    users: int = 0
    last_used: float = field(default_factory=time.time)
    loaded_at: float = 0.0
    load_s: float | None = None
    error: Exception | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def may_leave(self) -> bool:
        return self.loaded and not self.leaving and not self.pinned


@dataclass(frozen=True)
class _Failure:
    ref: VersionRef
    error: Exception
    at: float


class Residency:
    """The versions of one engine. All methods belong to one event loop.

    `wait_s`: how long a version waits for room before its requests are Overloaded; `tenure_s`: how long a busy version
    stays before it makes room for one that waits; `retry_s`: how long a failure is answered without another try.
    """

    def __init__(
        self,
        engine: Engine | Reader,
        *,
        folders: Folders,
        holds: Holds,
        wait_s: float = WAIT_S,
        tenure_s: float = TENURE_S,
        retry_s: float = RETRY_S,
    ):
        self._engine = engine
        self._folders = folders
        self._holds = holds
        self._wait_s, self._tenure_s, self._retry_s = wait_s, tenure_s, retry_s
        self._slots: dict[str, _Slot] = {}
        self._lines: dict[Room, deque[_Slot]] = {room: deque() for room in engine.facts.room}
        self._timers: dict[Room, asyncio.TimerHandle] = {}
        self._failures: OrderedDict[str, _Failure] = OrderedDict()
        self._threads = ThreadPoolExecutor(_FETCHES, "versions")
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def use(self, ref: VersionRef) -> AsyncIterator[str]:
        """The engine's key of a version, which stays loaded until the block ends.

        AdapterError, Overloaded, or RequestError 503 when it is not loaded and the registry cannot be reached.
        """
        slot = await self._enter(ref)
        try:
            yield ref.key
        finally:
            self._exit(slot)

    async def load(
        self, ref: VersionRef, *, pin: bool = False, spare: bool = False, used_at: float | None = None
    ) -> None:
        """As if it had been asked for; a failure just before is no reason not to try. `spare`: only into room that is
        free, else nothing happens. `used_at`: when it was last used, time.time()."""
        self._failures.pop(ref.key, None)
        try:
            slot = await self._enter(ref, spare=spare)
        except _NoSpareRoom:
            return
        slot.pinned |= pin
        self._exit(slot)
        if used_at is not None:
            slot.last_used = used_at

    async def unload(self, ref: VersionRef) -> None:
        """Ends its pin, waits for its requests, and takes it out. Requests that come meanwhile load it again after."""
        self._failures.pop(ref.key, None)
        slot = self._slots.get(ref.key)
        if slot is not None:
            slot.pinned, slot.told = False, True
            self._dismiss(slot)
            await slot.gone.wait()
            if slot.ended is not None:
                await asyncio.wait({slot.ended}, timeout=_RELEASE_S)

    def unpin(self, ref: VersionRef) -> None:
        slot = self._slots.get(ref.key)
        if slot is not None:
            slot.pinned = False
            self._settle(slot.room)

    def state(self) -> tuple[Resident, ...]:
        """What is here and what failed lately, by name and number."""
        here = [
            Resident(
                version=slot.ref,
                state="loaded" if slot.loaded else "loading",
                room=slot.room,
                pinned=slot.pinned,
                in_use=slot.users,
                last_used=slot.last_used,
                load_s=slot.load_s,
            )
            for slot in self._slots.values()
        ]
        failed = [
            Resident(version=failure.ref, state="failed", last_used=failure.at, reason=str(failure.error))
            for key, failure in self._failures.items()
            if key not in self._slots
        ]
        return tuple(sorted([*here, *failed], key=lambda one: (one.version.name, one.version.number)))

    async def close(self) -> None:
        """Ends loads and holds. The engine is the caller's."""
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._holds.close()
        for slot in self._slots.values():
            self._folders.release(slot.ref)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # coming

    async def _enter(self, ref: VersionRef, *, spare: bool = False) -> _Slot:
        """The slot of a version that is loaded, with one user more."""
        while True:
            slot = self._slots.get(ref.key) or self._begin(ref, spare=spare)
            if slot.leaving:
                await self._until_gone(slot)
                continue
            slot.users += 1
            slot.last_used = time.time()
            if slot.loaded:
                return slot
            assert slot.coming is not None
            try:
                await asyncio.wait({slot.coming})  # unlike awaiting it: who gives up does not end it for the others
            except asyncio.CancelledError:
                self._exit(slot)
                raise
            if slot.error is None:
                return slot
            self._exit(slot)
            if spare or not isinstance(slot.error, _NoSpareRoom):
                raise copy.copy(slot.error)

    async def _until_gone(self, slot: _Slot) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                await slot.gone.wait()
        except TimeoutError:
            raise Overloaded(f"{slot.ref.id} makes room for others; try again later", self._wait_s / 4) from None

    def _begin(self, ref: VersionRef, *, spare: bool) -> _Slot:
        failure = self._failures.get(ref.key)
        if failure is not None and time.time() - failure.at < self._retry_s:
            raise copy.copy(failure.error)
        slot = self._slots[ref.key] = _Slot(ref)
        slot.coming = self._background(self._come(slot, spare=spare))
        return slot

    async def _come(self, slot: _Slot, *, spare: bool) -> None:
        """Loads a version, or leaves why not in `slot.error`."""
        ref, began = slot.ref, time.perf_counter()
        held = self._background(self._holds.take(ref))  # beside the rest: it may take as long
        loaded = False
        try:
            folder = await self._ready(ref)
            room = self._engine.room_for(folder)
            began += await self._make_room(slot, room, spare=spare)
            slot.room = await self._engine.load(ref.key, folder)
            loaded = True
            await held
        except asyncio.CancelledError:
            slot.error = Overloaded(f"{ref.id} was not loaded: the replica is being stopped")
            self._forget(slot)
            raise
        except Exception as error:  # an engine may fail in any way; the version is refused, the replica stays
            if loaded:
                await self._unload(ref)
            slot.error = self._failed(ref, error)
            self._forget(slot)
            return
        finally:
            held.cancel()
        slot.loaded, slot.loaded_at = True, time.monotonic()
        slot.load_s = time.perf_counter() - began
        self._failures.pop(ref.key, None)
        if slot.leaving:
            self._dismiss(slot)
        self._settle(slot.room)

    async def _ready(self, ref: VersionRef) -> Path:
        work = partial(self._folders.ready, ref)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except StorageError as error:
            raise RequestError(str(error), code="registry_unreachable", status=503) from error

    def _failed(self, ref: VersionRef, error: Exception) -> Exception:
        """The error for the requests that wait; it is kept unless it says nothing about the version."""
        if isinstance(error, Overloaded | _NoSpareRoom):
            return error
        if not isinstance(error, FtrayError):
            log.error("%s could not be loaded", ref.id, exc_info=error)
            error = AdapterError(f"{ref.id} could not be loaded: {type(error).__name__}: {error}")
        else:
            log.warning("%s could not be loaded: %s", ref.id, error)
        self._failures[ref.key] = _Failure(ref, error, time.time())
        self._failures.move_to_end(ref.key)
        while len(self._failures) > _FAILURES:
            self._failures.popitem(last=False)
        return error

    # room

    async def _make_room(self, slot: _Slot, room: Room, *, spare: bool) -> float:
        """Reserves a place, and says how many seconds it took."""
        capacity = self._engine.facts.room.get(room, 0)
        if not capacity:
            way = "adapters.own" if room == "own" else "adapters.slots"
            raise AdapterError(f"{slot.ref.id} needs a place of kind {room!r}, and there is none; set {way}")
        taken = self._taken(room)
        if spare and len(taken) >= capacity:
            raise _NoSpareRoom
        if len(taken) >= capacity and all(other.pinned for other in taken):
            raise Overloaded(self._no_room(room, "pinned; unpin one"), self._wait_s)
        began = time.perf_counter()
        slot.in_line = asyncio.get_running_loop().create_future()
        self._lines[room].append(slot)
        self._settle(room)
        try:
            async with asyncio.timeout(self._wait_s):
                await slot.in_line
        except TimeoutError:
            raise Overloaded(self._no_room(room, f"in use since {self._wait_s:g} s"), self._wait_s / 4) from None
        finally:
            slot.in_line = None
            with contextlib.suppress(ValueError):
                self._lines[room].remove(slot)
        return time.perf_counter() - began

    def _no_room(self, room: Room, why: str) -> str:
        way = "adapters.own" if room == "own" else "adapters.slots"
        count = self._engine.facts.room[room]
        return f"all places for versions here ({count}) are {why}, try again later, or raise {way}"

    def _taken(self, room: Room) -> list[_Slot]:
        return [slot for slot in self._slots.values() if slot.room == room]

    def _settle(self, room: Room | None) -> None:
        """Gives free places to those in line; where there are too few, sees to it that there will be."""
        if room is None or not (line := self._lines[room]):
            return
        taken = self._taken(room)
        free = self._engine.facts.room[room] - len(taken)
        while line and free > 0:
            slot = line.popleft()
            if slot.in_line is not None and not slot.in_line.done():
                slot.room = room
                slot.in_line.set_result(None)
                free -= 1
        short = max(0, len(line) - sum(slot.leaving for slot in taken))
        for slot in sorted((slot for slot in taken if slot.may_leave), key=_eviction_order)[:short]:
            stays_s = self._tenure_s - (time.monotonic() - slot.loaded_at) if slot.users else 0.0
            if stays_s <= 0:
                self._dismiss(slot)
            elif room not in self._timers:
                self._timers[room] = asyncio.get_running_loop().call_later(stays_s, self._settle_later, room)

    def _settle_later(self, room: Room) -> None:
        del self._timers[room]
        self._settle(room)

    # going

    def _exit(self, slot: _Slot) -> None:
        slot.users -= 1
        slot.last_used = time.time()
        if slot.users:
            return
        if slot.in_line is not None and slot.coming is not None:  # nobody waits for it any more
            slot.leaving = True
            slot.coming.cancel()
        elif slot.leaving:
            self._dismiss(slot)
        self._settle(slot.room)

    def _dismiss(self, slot: _Slot) -> None:
        """Takes a version out once nobody uses it; from now on nobody new does."""
        slot.leaving = True
        if slot.loaded and not slot.users and not slot.going:
            slot.going = True
            self._background(self._go(slot))

    async def _go(self, slot: _Slot) -> None:
        await self._unload(slot.ref)
        self._forget(slot)

    async def _unload(self, ref: VersionRef) -> None:
        try:
            await self._engine.unload(ref.key)
        except Exception:  # whatever the engine says: nobody can use the version any more
            log.exception("%s could not be unloaded", ref.id)

    def _forget(self, slot: _Slot) -> None:
        del self._slots[slot.ref.key]
        if slot.told or slot.error is not None:
            slot.ended = self._holds.end(slot.ref)
        else:
            self._holds.drop(slot.ref)
        self._folders.release(slot.ref)
        slot.gone.set()
        self._settle(slot.room)

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # who needs it has it


class _NoSpareRoom(Exception):
    """A version that was only wanted where there is room."""


def _eviction_order(slot: _Slot) -> tuple[bool, float]:
    """Idle ones first, the least recently used of them first; then busy ones, the longest here first."""
    return bool(slot.users), slot.loaded_at if slot.users else slot.last_used
