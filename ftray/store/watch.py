"""What changed in the registry since the last look, cheap enough to ask every second.

What makes up a registry is written once: a version's marker, a tombstone, the move of an alias. So what was read stays
read, and a look only asks which of these files there are:

under a local root      an adapter's folders are listed when one of them has another time of change than at the last
                        look, and now and then whatever the times say: a FUSE mount of a bucket keeps none
in an object store      one listing of everything under `adapters/`
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ftray.config.schema import NAME_PATTERN
from ftray.errors import FtrayError, RegistryError, StorageError
from ftray.store.aliases import Alias, AliasState
from ftray.store.paths import MARKER, Storage
from ftray.store.versions import Shelf, Version

T = TypeVar("T")

RELIST_S = 10.0
_ROOT = "adapters"
_SETTLED_S = 2.0  # a folder that changed so shortly before it was listed may change again within one tick of its clock
_READERS = 16
_FOLDERS = ("", "deleted", "aliases")
_NOT_LOOKED_AT, _UNREADABLE = -1, -2
_DOCUMENT = re.compile(rf"v\d+/{re.escape(MARKER)}|deleted/\d+\.json|aliases/[^/]+/\d+\.json")


@dataclass(frozen=True)
class Shelved(Generic[T]):
    """One adapter when it was last read: what `brief` made of each version, and where its aliases point.

    The rest tells whether it is still so: `marks` are the markers' times of change, `looks` those of `folders`.
    """

    versions: Mapping[int, T]
    aliases: Mapping[str, AliasState]
    marks: Mapping[int, Any]
    folders: tuple[str, ...] = ()
    looks: Any = None
    relist_at: float = 0.0


@dataclass(frozen=True)
class Changes(Generic[T]):
    """`read`: adapters that are new or may have changed; `failed`: why others could not be read; they stay as known."""

    read: Mapping[str, Shelved[T]]
    gone: Collection[str] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def look(
    storage: Storage, known: Mapping[str, Shelved[T]], brief: Callable[[Version], T], *, only: str | None = None
) -> Changes[T]:
    """What differs from `known`; `only` looks at one adapter, and reads it in any case.

    StorageError when the storage cannot be read, or all that was known has vanished at once: a registry forgets no
    name, but a folder that is not mounted looks like an empty one.
    """
    try:
        return _look(storage, known, brief, only)
    except FtrayError:
        raise
    except Exception as error:  # every cloud client has errors of its own
        raise StorageError(f"cannot read {storage.uri(_ROOT)}: {type(error).__name__}: {error}") from error


def check_reachable(storage: Storage) -> None:
    """StorageError where there is no registry. For callers who know that there was one."""
    try:
        there = storage.exists(_ROOT)
    except StorageError:
        raise
    except Exception as error:  # every cloud client has errors of its own
        raise StorageError(f"cannot reach {storage.uri(_ROOT)}: {type(error).__name__}: {error}") from error
    if not there:
        raise StorageError(f"{storage.uri(_ROOT)} is not there any more; is the storage mounted?")


def _look(
    storage: Storage, known: Mapping[str, Shelved[T]], brief: Callable[[Version], T], only: str | None
) -> Changes[T]:
    there = _looks(storage, known, only)
    if known and not there and only is None:
        raise StorageError(f"{storage.uri(_ROOT)} holds no adapters any more; is the storage mounted?")
    stale = [name for name, looks in there.items() if only or name not in known or _is_stale(known[name], looks)]
    reader = _Reader(storage, known, there, brief)
    read, failed = {}, {}
    for name, found in _each(stale, reader.read, parallel=not storage.is_local):
        if isinstance(found, str):
            failed[name] = found
        else:
            read[name] = found
    if known or read:
        check_reachable(storage)  # or it went while we read, and what is missing is not gone
    gone = [name for name in ([only] if only else known) if name in known and name not in there]
    return Changes(read, gone, failed)


def _looks(storage: Storage, known: Mapping[str, Shelved[Any]], only: str | None) -> dict[str, Any]:
    """What each adapter that is there looks like from outside."""
    if storage.is_local:
        names = storage.list(_ROOT) if only is None else [only]
        folders = {name: known[name].folders if name in known else _FOLDERS for name in names}
        found = ((name, _times(storage, name, folders[name])) for name in names if NAME_PATTERN.fullmatch(name))
        return {name: times for name, times in found if times[0] is not None}
    looks: dict[str, Any] = {}
    for path, size in storage.files(storage.join(_ROOT, only) if only else _ROOT).items():
        name, _, rest = path.partition("/") if only is None else (only, "/", path)
        if _DOCUMENT.fullmatch(rest) and NAME_PATTERN.fullmatch(name):
            looks.setdefault(name, set()).add((rest, size))
    return looks


def _times(storage: Storage, name: str, folders: Iterable[str]) -> tuple[int | None, ...]:
    root = f"{storage.root}/{_ROOT}/{name}/"
    return tuple(_time(root + folder) for folder in folders)


def _time(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return _UNREADABLE  # is no reason to think it gone: reading it will say what is wrong


def _is_stale(shelved: Shelved[Any], looks: Any) -> bool:
    return shelved.looks != looks or time.monotonic() >= shelved.relist_at


def _each(names: list[str], work: Callable[[str], Any], *, parallel: bool) -> Iterator[tuple[str, Any]]:
    if parallel and len(names) > 1:
        with ThreadPoolExecutor(_READERS) as pool:
            yield from zip(names, pool.map(work, names), strict=True)
    else:
        yield from ((name, work(name)) for name in names)


@dataclass(frozen=True)
class _Reader(Generic[T]):
    storage: Storage
    known: Mapping[str, Shelved[T]]
    looks: Mapping[str, Any]
    brief: Callable[[Version], T]

    def read(self, name: str) -> Shelved[T] | str:
        """The adapter now, or what is wrong with it: one broken adapter is not the end of the others."""
        try:
            return self._read(Shelf(self.storage, name))
        except Exception as error:  # documents that somebody else wrote, and the storage's own errors
            return f"{type(error).__name__}: {error}"

    def _read(self, shelf: Shelf) -> Shelved[T]:
        before = self.known.get(shelf.name)
        deleted = shelf.deleted()
        numbers = sorted(shelf.numbers() - deleted)
        marks = self._marks(shelf, numbers)
        versions = {}
        for number in numbers:
            if before and number in before.versions and before.marks.get(number) == marks[number]:
                versions[number] = before.versions[number]
            elif (found := _brief(shelf, number, self.brief)) is not None:
                versions[number] = found
        aliases = dict(_aliases(shelf, deleted))
        if not self.storage.is_local:
            return Shelved(versions, aliases, marks, looks=self.looks[shelf.name], relist_at=float("inf"))
        incomplete = [f"v{number}" for number in numbers if number not in versions]
        folders = (*_FOLDERS, *(f"aliases/{alias}" for alias in self.storage.list(shelf.key("aliases"))), *incomplete)
        return Shelved(versions, aliases, marks, folders, *self._until(shelf, before, folders))

    def _marks(self, shelf: Shelf, numbers: Iterable[int]) -> dict[int, Any]:
        """A registry that was made anew has other files under the same numbers."""
        if not self.storage.is_local:
            sizes = dict(self.looks[shelf.name])
            return {number: sizes.get(f"v{number}/{MARKER}") for number in numbers}
        folder = f"{self.storage.root}/{shelf.key()}"
        return {number: _time(f"{folder}/v{number}/{MARKER}") for number in numbers}

    def _until(self, shelf: Shelf, before: Shelved[T] | None, folders: tuple[str, ...]) -> tuple[Any, float]:
        """The times of change to compare with next time, and when to list again even if they stay."""
        # Only times that were taken before the listing say that nothing came after it.
        seen = dict(zip(before.folders if before else _FOLDERS, self.looks[shelf.name], strict=True))
        times = tuple(seen.get(folder, _NOT_LOOKED_AT) for folder in folders)
        if any(changed is not None and changed > (time.time() - _SETTLED_S) * 1e9 for changed in times):
            return times, time.monotonic()
        spread = zlib.crc32(shelf.name.encode()) / (1 << 32)  # not all at once
        return times, time.monotonic() + RELIST_S * (0.5 + spread)


def _brief(shelf: Shelf, number: int, brief: Callable[[Version], T]) -> T | None:
    """None for a version that is not complete, or whose documents are not what a publisher writes."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        version = shelf.version(number)
        return brief(version) if version is not None else None
    return None


def _aliases(shelf: Shelf, deleted: Collection[int]) -> Iterator[tuple[str, AliasState]]:
    for alias in shelf.storage.list(shelf.key("aliases")):
        with contextlib.suppress(RegistryError, KeyError, TypeError, AttributeError, ValueError):
            state = Alias(shelf.storage, shelf.name, alias).state(set(deleted))
            if state is not None:
                yield alias, state
