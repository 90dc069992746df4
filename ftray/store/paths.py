"""The one root that everything kept lies under: a local folder, or any URI that fsspec opens.

Three promises carry the rest of the store, on every backend:
  `write_bytes` and `staged`   a reader sees the old content or the new, never a part (local: temp file, fsync, rename)
  `create`                     of two writers exactly one gets True (local: a hard link, which appears whole)
  `remove`                     a folder loses its marker first (local: it vanishes in one rename), so nobody takes a
                               half-removed folder for a complete one
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.errors import FtrayError, StorageError
from ftray.store import localfiles
from ftray.store.localfiles import HIDDEN

MARKER = "COMPLETE.json"
"""The file that is written last: a folder without it does not count."""

_FULL = {errno.ENOSPC, errno.EDQUOT}


class Storage:
    """Bytes under a root. Keys are relative, with `/`; a key outside the root is a StorageError.

    A missing key raises FileNotFoundError on reading; everything else that the backend refuses is a StorageError
    naming the root and the way out. Pickles as its root, so every worker opens its own connection.
    """

    def __init__(self, root: str):
        self.root = _normalise(root)
        self.is_local = "://" not in self.root

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def __reduce__(self):
        return (Storage, (self.root,))

    def join(self, *parts: str) -> str:
        """A key from parts, each of which may hold several; refuses '..', empty parts and absolute paths."""
        pieces = [piece for part in parts for piece in str(part).split("/")]
        wrong = [piece for piece in pieces if piece in ("", ".", "..") or "\\" in piece or "\0" in piece]
        if wrong or not pieces:
            raise StorageError(f"{'/'.join(map(str, parts))!r} is not a key under {self.root}: {wrong or 'empty'}")
        return "/".join(pieces)

    def uri(self, key: str) -> str:
        """Where a key lies, for people and messages."""
        return f"{self.root.rstrip('/')}/{key}"

    def local_path(self, key: str) -> Path | None:
        """The file or folder of a key under a local root; None elsewhere."""
        key = self.join(key)
        return Path(self.root, key) if self.is_local else None

    # reading

    def read_bytes(self, key: str) -> bytes:
        local = self.local_path(key)
        with self._reading(key):
            if local is not None:
                return local.read_bytes()
            fs, path = self._remote(key)
            return fs.cat_file(path)

    def read_json(self, key: str) -> Any:
        try:
            return json.loads(self.read_bytes(key))
        except ValueError as error:
            raise StorageError(f"{self.uri(key)} is not JSON ({error}); it was cut off or changed by hand") from error

    def exists(self, key: str) -> bool:
        local = self.local_path(key)
        with self._reading(key):
            if local is not None:
                return local.exists()
            fs, path = self._remote(key)
            return fs.exists(path)

    def list(self, key: str) -> list[str]:
        """Names of what lies directly under a key, sorted; nothing there: []."""
        local = self.local_path(key)
        try:
            with self._reading(key):
                if local is not None:
                    names = os.listdir(local)
                else:
                    fs, path = self._remote(key)
                    own = path.strip("/")
                    found = (entry.strip("/") for entry in fs.ls(path, detail=False))
                    names = [entry.rsplit("/", 1)[-1] for entry in found if entry != own]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({name for name in names if not name.startswith(HIDDEN)})

    def files(self, key: str) -> dict[str, int]:
        """Every file under a key, at any depth: {path relative to key: bytes}; nothing there: {}."""
        local = self.local_path(key)
        with self._reading(key):
            if local is not None:
                sizes = localfiles.sizes(local)
            else:
                fs, path = self._remote(key)
                own = path.strip("/") + "/"
                found = fs.find(path, detail=True).items()
                sizes = {p.strip("/").removeprefix(own): info["size"] for p, info in found if p.strip("/") + "/" != own}
        hidden = {name for name in sizes if any(piece.startswith(HIDDEN) for piece in name.split("/"))}
        return {name: sizes[name] for name in sorted(sizes.keys() - hidden)}

    def sha256(self, key: str) -> str:
        """Of a file's content, read in pieces."""
        local = self.local_path(key)
        with self._reading(key):
            if local is not None:
                return localfiles.file_sha256(local)
            fs, path = self._remote(key)
            with fs.open(path, "rb") as file:
                digest = hashlib.sha256()
                while piece := file.read(1 << 22):
                    digest.update(piece)
                return digest.hexdigest()

    def download(self, key: str, into: Path) -> Path:
        """A local folder with the files of a key: the folder itself under a local root, else copies in `into`.

        Each copy appears whole, so that several processes of a machine may fill the same `into`.
        """
        local = self.local_path(key)
        if local is not None:
            if not local.is_dir():
                raise FileNotFoundError(str(local))
            return local
        names = self.files(key)
        if not names:
            raise FileNotFoundError(self.uri(key))
        for name in names:
            self.download_file(self.join(key, name), Path(into, name))
        return Path(into)

    def download_file(self, key: str, into: Path) -> Path:
        """A copy of one file, which appears whole; `into` is the file's new path."""
        local = self.local_path(key)
        try:
            with localfiles.replacing(Path(into)) as temp:
                if local is not None:
                    shutil.copyfile(local, temp)
                else:
                    fs, path = self._remote(key)
                    fs.get_file(path, str(temp))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _failure(f"{into} (a copy of {self.uri(key)})", error) from error
        return Path(into)

    # writing

    def write_bytes(self, key: str, data: bytes) -> None:
        """Replaces a file; a reader sees the old content or the new."""
        local = self.local_path(key)
        with self._writing(key):
            if local is not None:
                localfiles.write(local, data)
            else:
                fs, path = self._remote(key)
                fs.pipe_file(path, data)

    def write_json(self, key: str, value: Any) -> None:
        self.write_bytes(key, json_bytes(value))

    def create(self, key: str, data: bytes) -> bool:
        """Writes a file that must not exist yet; False where it does. Of two writers exactly one gets True."""
        local = self.local_path(key)
        with self._writing(key):
            if local is not None:
                return localfiles.create(local, data)
            fs, path = self._remote(key)
            for wait_s in (0.1, 0.5, None):
                try:
                    _create_remote(fs, path, data)
                    return True
                except FileExistsError:
                    return False
                except OSError:
                    # Servers that only resemble S3 word "exists" in their own way, and S3 itself may answer
                    # "conflict" where two writers come at once: whether it is there now decides.
                    if fs.exists(path):
                        return False
                    if wait_s is None:
                        raise
                    time.sleep(wait_s)
            return False

    @contextlib.contextmanager
    def staged(self, key: str) -> Iterator[Path]:
        """A local file to fill; it appears under `key`, whole, when the block ends without an error."""
        local = self.local_path(key)
        with self._writing(key):
            if local is not None:
                with localfiles.replacing(local) as temp:
                    yield temp
            else:
                with tempfile.TemporaryDirectory(prefix="ftray-") as folder:
                    temp = Path(folder, key.rsplit("/", 1)[-1])
                    yield temp
                    fs, path = self._remote(key)
                    fs.put_file(str(temp), path)

    def upload(self, local_folder: Path, key: str) -> None:
        """Copies a folder's files under a key, a marker last; files of other names that are there stay."""
        names = sorted(localfiles.sizes(Path(local_folder)), key=lambda name: (name.rsplit("/", 1)[-1] == MARKER, name))
        for name in names:
            with self.staged(self.join(key, name)) as temp:
                shutil.copyfile(Path(local_folder, name), temp)

    def remove(self, key: str) -> None:
        """Removes a file, or a folder with all in it; nothing there is fine."""
        local = self.local_path(key)
        with self._writing(key), contextlib.suppress(FileNotFoundError):
            if local is not None:
                localfiles.remove(local)
                return
            fs, path = self._remote(key)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                fs.rm_file(f"{path}/{MARKER}")
            fs.rm(path, recursive=True)

    def probe(self) -> None:
        """Raises StorageError if the root cannot be written, or cannot keep two writers apart."""
        key = f"{HIDDEN}-probe-{secrets.token_hex(8)}"
        try:
            created = self.create(key, b"probe")
            again = self.create(key, b"probe")
            same = self.read_bytes(key) == b"probe"
            self.remove(key)
        except FtrayError:
            raise
        except Exception as error:  # each cloud client has its own errors for a bad key, host or bucket
            raise StorageError(
                f"cannot use storage root {self.root}: {type(error).__name__}: {error}; "
                "check the address and the credentials, or set 'storage' to another root"
            ) from error
        if not (created and same) or again:
            raise StorageError(
                f"storage root {self.root} cannot keep two writers apart (no exclusive creation of files); "
                "set 'storage' to a local or shared folder, s3:// or gs://"
            )

    def failure(self, key: str, error: OSError) -> StorageError:
        """What to raise when writing a key failed: says whether the disk is full, and the way out."""
        return _failure(self.uri(key), error)

    # the backend

    def _remote(self, key: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            # A cached listing hides what other writers did since.
            fs, base = url_to_fs(self.root, use_listings_cache=False)
        except ImportError as error:
            extra = "for s3:// 'pip install ftray[s3]', for gs:// 'pip install ftray[gcs]'"
            raise StorageError(f"storage root {self.root}: {error}; {extra}") from error
        except ValueError as error:
            raise StorageError(f"storage root {self.root}: {error}; use a folder, s3:// or gs://") from error
        return fs, f"{base.rstrip('/')}/{self.join(key)}"

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.failure(key, error) from error

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise StorageError(
                f"cannot read {self.uri(key)}: {error}; check the storage root and its rights"
            ) from error


def json_bytes(value: Any) -> bytes:
    """A document as kept: sorted keys, so that equal documents are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _normalise(root: str) -> str:
    if not root:
        raise StorageError("the storage root is empty; give a folder, s3:// or gs://")
    scheme, colon, rest = root.partition("://")
    if colon and scheme in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest))
    if colon:
        return f"{scheme}://{rest.rstrip('/')}"
    return os.path.abspath(os.path.expanduser(root))


def _failure(where: str, error: OSError) -> StorageError:
    number = error.errno
    if number is None and (inside := re.search(r"os error (\d+)", str(error))):
        number = int(inside[1])
    if number in _FULL:
        return StorageError(
            f"disk full while writing {where}; free space there or set 'storage' to another root "
            "(what was stored before is intact)"
        )
    said = os.strerror(number) if number is not None else f"{type(error).__name__}: {error}"
    return StorageError(
        f"cannot write {where}: {said}; check that the folder exists and may be written, "
        "or set 'storage' to another root"
    )


def _create_remote(fs: Any, path: str, data: bytes) -> None:
    """FileExistsError where the path is taken."""
    from fsspec import AbstractFileSystem

    if type(fs).pipe_file is not AbstractFileSystem.pipe_file:
        fs.pipe_file(path, data, mode="create")
        return
    # The default `pipe_file` looks first and writes then, which two writers can do at once; opening with "x" lets
    # the server decide.
    try:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with fs.open(path, "xb") as file:
            file.write(data)
    except (ValueError, NotImplementedError) as error:
        raise StorageError(
            f"{path}: {type(fs).__name__} cannot create a file exclusively, so two writers would not be kept apart; "
            "set 'storage' to a local or shared folder, s3:// or gs://"
        ) from error
