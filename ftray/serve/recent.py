"""Which versions a server's replicas used last and were told to pin, so that one that comes back loads them unasked.

```text
<storage>/serving/<app>/recent.json    {versions: [{name, number, digest, used, pinned}]}, most recently used first
```
One note for all replicas of an app. Each adds its own to what it finds; of two that write at once the last one counts,
and the other adds its own again with its next note.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ftray.config.schema import NAME_PATTERN
from ftray.config.serving import Adapters
from ftray.errors import FtrayError, StorageError
from ftray.serve.engine import VersionRef
from ftray.serve.residency import Residency
from ftray.store.paths import Storage
from ftray.store.watch import check_reachable

log = logging.getLogger(__name__)
T = TypeVar("T")

KEPT = 256
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Used:
    """A version, when it was used last (time.time()), and whether somebody asked for it to be pinned."""

    version: VersionRef
    used: float
    pinned: bool = False


class Recent:
    """A replica's part in the note of its app. Where the storage fails, a line in the log says so, and nothing else."""

    def __init__(self, storage: Storage, *, app: str, adapters: Adapters, residency: Residency):
        self._storage, self._app = storage, app
        self._adapters = adapters
        self._residency = residency
        self._pins: dict[str, bool] = {}
        self._dropped: set[str] = set()
        self._noted: object = None
        self._is_failing = False
        self._thread = ThreadPoolExecutor(1, "recent-versions")

    def pin(self, version: VersionRef, pinned: bool) -> None:
        """Somebody asked for it, or for the end of it."""
        self._pins[version.key] = pinned

    def drop(self, version: VersionRef) -> None:
        """It is not to come back by itself."""
        self._pins[version.key] = False
        self._dropped.add(version.key)

    async def restore(self) -> None:
        """Loads what the note says: pinned ones, then the others, most recently used first, while there is room."""
        for entry in sorted(await self._in_thread(partial(read, self._storage, self._app)) or [], key=_restore_order):
            if self._adapters.serve != "all" and entry.version.name not in self._adapters.serve:
                continue
            try:
                await self._residency.load(entry.version, pin=entry.pinned, spare=True, used_at=entry.used)
            except FtrayError as error:
                log.warning("%s was in use before, and cannot be loaded again: %s", entry.version.id, error)

    async def note(self) -> None:
        """Writes the note, if it would say something new."""
        loaded = [one for one in self._residency.state() if one.state == "loaded"]
        mine = [Used(one.version, one.last_used) for one in sorted(loaded, key=lambda one: -one.last_used)]
        now = ([entry.version.key for entry in mine], dict(self._pins), set(self._dropped))
        if now == self._noted or not (mine or self._dropped):
            return
        dropped, self._dropped = self._dropped, set()
        call = partial(write, self._storage, self._app, mine, pins=dict(self._pins), dropped=dropped)
        if await self._in_thread(call) is None:
            self._dropped |= dropped
        else:
            self._noted = (now[0], now[1], set())

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], T]) -> T | None:
        """None where it fails."""
        try:
            async with asyncio.timeout(_PATIENCE_S):  # Python 3.11's wait_for may swallow a cancellation
                found = await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except Exception as error:  # a note is a convenience: whatever the storage says, serving goes on
            if not self._is_failing:
                self._is_failing = True
                log.warning("the note of recently used versions fails: %s", str(error) or "no answer")
            return None
        self._is_failing = False
        return found


def read(storage: Storage, app: str) -> list[Used]:
    """Most recently used first; [] before the first note. StorageError when there is one that cannot be read."""
    try:
        note = storage.read_json(_key(storage, app))
        found = [_used(entry) for entry in note["versions"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{storage.uri(_key(storage, app))} is no note of versions: {error!r}") from error
    return sorted(found, key=lambda entry: -entry.used)


def write(
    storage: Storage, app: str, mine: Iterable[Used], *, pins: Mapping[str, bool], dropped: Iterable[str]
) -> bool:
    """Adds `mine`. By VersionRef.key: `pins`, what was pinned or unpinned; `dropped`, what is to leave the note. True,
    once it is written."""
    check_reachable(storage)  # writing would make a folder where the storage is to be mounted
    try:
        theirs = read(storage, app)
    except StorageError:
        theirs = []  # it is written anew
    entries = {entry.version.key: entry for entry in theirs if entry.version.key not in set(dropped)}
    for entry in mine:
        before = entries.get(entry.version.key)
        used = max(entry.used, before.used) if before else entry.used
        entries[entry.version.key] = Used(entry.version, used, before.pinned if before else False)
    ordered = sorted(entries.items(), key=lambda item: -item[1].used)
    versions = [
        {
            "name": entry.version.name,
            "number": entry.version.number,
            "digest": entry.version.digest,
            "used": entry.used,
            "pinned": pins.get(key, entry.pinned),
        }
        for key, entry in ordered[:KEPT]
    ]
    storage.write_json(_key(storage, app), {"versions": versions})
    return True


def _key(storage: Storage, app: str) -> str:
    return storage.join("serving", app, "recent.json")


def _used(entry: Any) -> Used:
    ref = VersionRef(str(entry["name"]), int(entry["number"]), str(entry["digest"]))
    if not (NAME_PATTERN.fullmatch(ref.name) and _DIGEST.fullmatch(ref.digest)):
        raise ValueError(f"{entry} is no version")
    return Used(ref, float(entry["used"]), bool(entry["pinned"]))


def _restore_order(entry: Used) -> tuple[bool, float]:
    return not entry.pinned, -entry.used
