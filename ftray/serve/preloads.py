"""What the serve file says is to be loaded before it is asked for, followed where its aliases go."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ftray.config.serving import Adapters
from ftray.errors import FtrayError, Overloaded, RequestError
from ftray.serve.engine import VersionRef
from ftray.serve.residency import Residency
from ftray.store.registry import Registry

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0


class Preloads:
    """`adapters.preload` and `adapters.pin`. A pin that names an alias moves with it: the version that the alias points
    at is pinned, and the one before no longer."""

    def __init__(self, registry: Registry, *, adapters: Adapters, residency: Residency):
        self._registry = registry
        self._pins = dict.fromkeys(adapters.pin)
        self._refs = dict.fromkeys([*adapters.pin, *adapters.preload])
        self._residency = residency
        self._at: dict[str, VersionRef] = {}
        self._tried: dict[str, VersionRef] = {}
        self._said: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, "preloads")

    async def follow(self) -> None:
        """Loads what each names now, unless it was loaded, or could not be, before."""
        for ref in self._refs:
            try:
                call = asyncio.get_running_loop().run_in_executor(self._thread, partial(self._registry.resolve, ref))
                async with asyncio.timeout(_PATIENCE_S):  # Python 3.11's wait_for may swallow a cancellation
                    version = VersionRef.of(await call)
            except Exception as error:  # a registry that is away for a while has many ways to say so
                self._say(ref, str(error) or "the registry gives no answer")
                continue
            if version != self._tried.get(ref):
                await self._load(ref, version)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _load(self, ref: str, version: VersionRef) -> None:
        before = self._at.get(ref)
        try:
            try:
                await self._residency.load(version, pin=ref in self._pins)
            except Overloaded:
                self._unpin(ref, before)  # the pinned ones may fill the room, this among them
                await self._residency.load(version, pin=ref in self._pins)
        except (Overloaded, RequestError) as error:  # not the version's fault: try again
            self._say(ref, str(error))
            return
        except FtrayError as error:
            self._say(ref, str(error))
            self._tried[ref] = version
            return
        self._at[ref] = self._tried[ref] = version
        self._said.pop(ref, None)
        self._unpin(ref, before)

    def _unpin(self, ref: str, before: VersionRef | None) -> None:
        others = [self._at.get(pin) for pin in self._pins if pin != ref]
        if before is not None and ref in self._pins and before not in others:
            self._residency.unpin(before)

    def _say(self, ref: str, why: str) -> None:
        """Once for each reason, however often it is tried."""
        if self._said.get(ref) != why:
            self._said[ref] = why
            log.warning("%s is to be loaded before it is asked for, and cannot be: %s", ref, why)
