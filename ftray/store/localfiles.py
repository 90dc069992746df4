"""Files of a local or mounted file system that appear whole, exist once, and go at once, wherever a process dies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

HIDDEN = ".tmp"
"""Begins the names of files in the making and of folders on their way out, here and in safetensors; listings leave
them out."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temp file beside `path` that takes its place at the end; on an error `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{HIDDEN}-{secrets.token_hex(6)}-{path.name[-100:]}")
    try:
        temp.touch()
        mode = temp.stat().st_mode
        yield temp
        if temp.stat().st_mode != mode:
            # Some writers make files that only their owner may read; the umask decides that here.
            temp.chmod(mode)
        _sync(temp)
        os.replace(temp, path)
        _sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Replaces a file at once."""

    def attempt() -> None:
        with replacing(path) as temp:
            temp.write_bytes(data)

    _while_folders_vanish(attempt)


def create(path: Path, data: bytes) -> bool:
    """Makes a file that must not exist; False where it does. Of two writers exactly one gets True."""
    return _while_folders_vanish(lambda: _create(path, data))


def remove(path: Path) -> None:
    """Makes a file or a whole folder vanish at once; FileNotFoundError if it is not there."""
    # A rename takes files and folders alike: asking first which it is would be answered too late.
    os.rename(path, path.with_name(f"{HIDDEN}-removed-{secrets.token_hex(6)}"))
    _sync_folder(path.parent)
    # Also what an earlier process was killed over; what is missing here, another process is removing right now.
    for leftover in path.parent.glob(f"{HIDDEN}-removed-*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                leftover.unlink()


def sizes(folder: Path) -> dict[str, int]:
    """Every file under a folder: {relative path with '/': bytes}; {} where it is not there."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):
                found[os.path.relpath(path, folder).replace(os.sep, "/")] = os.stat(path).st_size
    return found


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _while_folders_vanish(attempt: Callable[[], T]) -> T:
    """Repeats what another process disturbed by removing the folder that was just made for it."""
    for _ in range(10):
        try:
            return attempt()
        except (FileNotFoundError, FileExistsError):
            continue
    return attempt()


def _create(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        return False
    temp = path.with_name(f"{HIDDEN}-{secrets.token_hex(6)}-{path.name[-100:]}")
    try:
        temp.write_bytes(data)
        _sync(temp)
        try:
            # A link appears with its whole content or not at all; opening with O_EXCL leaves an empty file to
            # whoever is killed before the write.
            os.link(temp, path)
        except FileExistsError:
            # NFS may answer "exists" to the repeat of a request that it had already carried out.
            return os.stat(temp).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_by_open(path, data)
        _sync_folder(path.parent)
        return True
    finally:
        temp.unlink(missing_ok=True)


def _create_by_open(path: Path, data: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:  # some file systems know no fsync of a folder
        if error.errno not in _NO_FOLDER_SYNC:
            raise
