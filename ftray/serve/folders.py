"""Local folders with the files of versions, whose content was checked by this process."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
from pathlib import Path

from ftray.errors import AdapterError, FtrayError, RegistryError, StorageError
from ftray.serve.engine import VersionRef
from ftray.store.admission import content_names, digest
from ftray.store.localfiles import file_sha256
from ftray.store.registry import Registry
from ftray.store.versions import Shelf
from ftray.store.watch import check_reachable

log = logging.getLogger(__name__)

CACHE_GB = 20.0
_LOCK = ".lock"
_REMEMBERED = 4096


class Folders:
    """Under a local root the registry's own folders; else copies in `cache`, named by digest.

    Processes of a machine share the cache: each locks what it has in use, and what nobody has locked is removed, least
    recently used first, beyond `cache_gb`. Methods block; call them in a thread.
    """

    def __init__(self, registry: Registry, *, cache: Path | None = None, cache_gb: float = CACHE_GB):
        self._registry = registry
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._cache = cache or Path(home, "ftray", "versions")
        self._cache_bytes = cache_gb * 1e9
        self._checked: dict[Path, tuple[str, tuple]] = {}
        self._locks: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._guard = threading.Lock()

    def ready(self, ref: VersionRef) -> Path:
        """The version's folder, its content as published. A folder that is here and right needs no registry.

        AdapterError when there is no such version, or its files are not what was published; StorageError when they
        cannot be had now.
        """
        storage = self._registry.storage
        local = storage.local_path(Shelf(storage, ref.name).folder(ref.number))
        folder = local if local is not None else self._locked(ref)
        try:
            if not self._is_right(folder, ref.digest):
                self._fetch(ref, folder)
        except BaseException:
            self.release(ref)
            raise
        if local is None:
            os.utime(folder)
            self._shrink()
        return folder

    def release(self, ref: VersionRef) -> None:
        """The folder may go."""
        with self._guard:
            lock = self._locks.pop(ref.key, None)
        if lock is not None:
            os.close(lock)

    def _is_right(self, folder: Path, wanted: str) -> bool:
        """By the digest, which covers names and contents; a folder that has not changed since is not read again."""
        try:
            stamp = _stamp(folder)
            if self._checked.get(folder) == (wanted, stamp):
                return True
            found = digest({name: {"sha256": file_sha256(folder / name)} for name, *_ in stamp})
        except OSError:  # it is being removed, or was never there
            return False
        if found == wanted:
            self._remember(folder, wanted, stamp)
        return found == wanted

    def _fetch(self, ref: VersionRef, folder: Path) -> None:
        """Fills the folder, or says what is wrong with it."""
        try:
            version = self._registry.resolve(ref.id)
            if version.digest != ref.digest:
                raise AdapterError(
                    f"{ref.id} was asked for with digest {ref.digest[:16]}, but the registry's has "
                    f"{version.digest[:16]}: the registry was made anew; ask again"
                )
            self._registry.fetch(version, folder)
            self._remember(folder, ref.digest, _stamp(folder))
        except RegistryError as error:
            check_reachable(self._registry.storage)  # nothing is found either where nothing is mounted
            raise AdapterError(str(error)) from error
        except FtrayError:
            raise
        except Exception as error:  # every cloud client has errors of its own
            raise StorageError(f"cannot fetch {ref.id}: {type(error).__name__}: {error}") from error

    def _remember(self, folder: Path, wanted: str, stamp: tuple) -> None:
        with self._guard:
            self._checked.pop(folder, None)
            self._checked[folder] = (wanted, stamp)
            while len(self._checked) > _REMEMBERED:
                del self._checked[next(iter(self._checked))]

    def _locked(self, ref: VersionRef) -> Path:
        folder = self._cache / ref.digest
        if ref.key in self._locks:
            return folder
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            folder.mkdir(exist_ok=True)
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:  # removed by another process since it was made
                continue
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_at(lock, folder / _LOCK):
                break
            os.close(lock)
        with self._guard:
            self._locks[ref.key] = lock
        return folder

    def _shrink(self) -> None:
        folders = [folder for folder in self._cache.iterdir() if folder.is_dir()]
        total = sum(map(self._size, folders))
        if total <= self._cache_bytes:
            return
        for folder in sorted(folders, key=_used_at):
            if total > self._cache_bytes and _removed(folder):
                total -= self._sizes.pop(folder.name, 0)

    def _size(self, folder: Path) -> int:
        """What is in a folder does not change once it is there; 0 is asked again."""
        if not self._sizes.get(folder.name):
            try:
                self._sizes[folder.name] = sum(size for _, size, _ in _stamp(folder))
            except FileNotFoundError:  # another process is removing it
                return 0
        return self._sizes[folder.name]


def _removed(folder: Path) -> bool:
    """Removes a folder unless a process has it locked."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)


def _is_at(lock: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(lock).st_ino == path.stat().st_ino
    return False


def _used_at(folder: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """(name, size, time of change) of every file that is content."""
    found = ((name, (folder / name).stat()) for name in content_names(folder))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
