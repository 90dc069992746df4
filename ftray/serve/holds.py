"""Holds on the versions that a replica has, so that nobody deletes them from the registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ftray.errors import AdapterError, FtrayError, RegistryError, StorageError
from ftray.serve.engine import VersionRef
from ftray.store.registry import Registry
from ftray.store.watch import check_reachable

log = logging.getLogger(__name__)

TTL_S = 120.0
LINGER_S = 15.0
_RENEWED_AT = 0.75  # of the time to live is left: three renewals may fail before a hold runs out
_PATIENCE_S = 5.0


@dataclass(eq=False)
class _Hold:
    """`until`, and when it was `dropped`, by time.monotonic(); 0: not held yet."""

    ref: VersionRef
    until: float = 0.0
    dropped: float | None = None


class Holds:
    """Takes, renews and ends holds in one thread, so that they reach the registry in the order they were made.

    A registry that cannot be reached, or not be written, or hangs, stops nothing: there is no hold then, a line in the
    log says so, and the next renewal tries again. A hold that is dropped lasts for `linger_s`: versions that come and
    go all the time are not worth two writes each time.
    """

    def __init__(self, registry: Registry, *, holder: str, ttl_s: float = TTL_S, linger_s: float = LINGER_S):
        self._registry = registry
        self._holder = holder
        self._ttl_s, self._linger_s = ttl_s, linger_s
        self._held: dict[str, _Hold] = {}
        self._thread = ThreadPoolExecutor(1, "registry-holds")
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    async def take(self, ref: VersionRef) -> None:
        """Holds a version until it is dropped. AdapterError when there is none, or one of other content."""
        if self._task is None:
            self._task = asyncio.create_task(self._tend())
        hold = self._held.get(ref.key)
        if hold is not None and hold.until - time.monotonic() > self._ttl_s / 4:
            hold.dropped = None
            return
        hold = self._held[ref.key] = _Hold(ref)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._run(partial(self._hold, hold))
        except RegistryError as error:
            if self._held.get(ref.key) is hold:
                del self._held[ref.key]
            raise AdapterError(str(error)) from error
        except (StorageError, TimeoutError) as error:
            self._say_failing(error)

    def drop(self, ref: VersionRef) -> None:
        """It is not needed now, but may be again soon."""
        if (hold := self._held.get(ref.key)) is not None:
            hold.dropped = time.monotonic()

    def end(self, ref: VersionRef) -> asyncio.Future[None] | None:
        """Ends a hold now, if there is one. What comes back can be waited for, but need not be."""
        if self._held.pop(ref.key, None) is None:
            return None
        ended = self._run(partial(self._registry.release, ref.id, self._holder))
        ended.add_done_callback(lambda done: done.cancelled() or done.exception())  # it runs out by itself
        return ended

    async def close(self) -> None:
        """Ends all of them."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        ended = [self.end(hold.ref) for hold in list(self._held.values())]
        if waiting := [future for future in ended if future is not None]:
            await asyncio.wait(waiting, timeout=_PATIENCE_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(min(self._ttl_s / 8, self._linger_s / 2))
            for hold in list(self._held.values()):
                now = time.monotonic()
                if hold.dropped is not None and now - hold.dropped >= self._linger_s:
                    self.end(hold.ref)
                elif hold.dropped is None and hold.until - now < _RENEWED_AT * self._ttl_s:
                    await self._renew(hold)

    async def _renew(self, hold: _Hold) -> None:
        try:
            await self._run(partial(self._hold, hold))
        except RegistryError as error:
            log.warning("%s is loaded, but not in the registry any more: %s", hold.ref.id, error)
            hold.until = time.monotonic() + self._ttl_s  # it is served on, and not worth a line each time
        except StorageError as error:
            self._say_failing(error)

    def _hold(self, hold: _Hold) -> None:
        """RegistryError: there is no such version. StorageError: the registry cannot say, or cannot be written."""
        ref, now = hold.ref, time.monotonic()
        if self._held.get(ref.key) is not hold:
            return
        try:
            version = self._registry.hold(ref.id, self._holder, self._ttl_s)
        except RegistryError:
            check_reachable(self._registry.storage)  # nothing is found either where nothing is mounted
            raise
        except FtrayError:
            raise
        except Exception as error:  # every cloud client has errors of its own
            raise StorageError(f"cannot hold {ref.id}: {type(error).__name__}: {error}") from error
        if version.digest != ref.digest:
            self._registry.release(ref.id, self._holder)
            raise RegistryError(
                f"{ref.id} was asked for with digest {ref.digest[:16]}, but the registry's has {version.digest[:16]}: "
                "the registry was made anew; ask again"
            )
        hold.until = now + self._ttl_s
        self._failing = False

    def _run(self, call: Callable[[], None]) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _say_failing(self, error: BaseException) -> None:
        if not self._failing:
            self._failing = True
            why = str(error) or "no answer"
            log.warning("cannot tell the registry which versions are loaded here, which may be deleted so: %s", why)
