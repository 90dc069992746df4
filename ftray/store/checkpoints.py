"""Checkpoints of a run: safetensors parts, and a marker that is written last.

```text
runs/<run>/checkpoints/step-00000012-<token>/
    *.safetensors        written by any worker, each appears whole
    COMPLETE.json        {step, written, born, meta, files: {name: {size, sha256}}}; without it nothing here counts
    CORRUPT.json         put there when a part's content was found changed; the folder does not count any more
```
The token tells attempts at the same step apart, so that a restarted worker never mixes its parts with a dead one's.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ftray.errors import StorageError
from ftray.store.localfiles import file_sha256
from ftray.store.paths import MARKER, Storage

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"step-(\d{8,})-([A-Za-z0-9_.-]+)")
_CORRUPT = "CORRUPT.json"


@dataclass(frozen=True)
class PartInfo:
    """One file of a checkpoint. `size` in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `folder` is its key; `written` in seconds since 1970."""

    folder: str
    step: int
    files: tuple[PartInfo, ...]
    written: float
    meta: dict[str, Any] = field(hash=False)


class Checkpoints:
    """The checkpoints of one run.

    With `born`, the state field that a fresh start renews, only checkpoints written with the same one count: a worker
    that outlived a fresh start cannot bring the old run back.
    """

    def __init__(self, storage: Storage, run: str, born: str | None = None):
        self.storage = storage
        self.run = run
        self.born = born
        self.key = storage.join("runs", run, "checkpoints")

    def folder(self, step: int, token: str) -> str:
        """The key of an attempt at a checkpoint; its workers share the token, and no other attempt has it."""
        name = f"step-{step:08d}-{token}"
        if step < 0 or not _FOLDER.fullmatch(name):
            raise StorageError(f"{name!r} cannot name a checkpoint; a token has letters, digits, '_', '.' and '-'")
        return self.storage.join(self.key, name)

    def write_part(self, folder: str, name: str, tensors: Mapping[str, torch.Tensor]) -> PartInfo:
        """Writes `<name>.safetensors`; any worker may, each under its own name. Raises StorageError on a full disk."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = name if name.endswith(".safetensors") else f"{name}.safetensors"
        plain = _plain(tensors)
        with self.storage.staged(self.storage.join(folder, name)) as temp:
            try:
                save_file(plain, str(temp))
            except SafetensorError as error:
                raise OSError(str(error)) from error
            return PartInfo(name, temp.stat().st_size, file_sha256(temp))

    def commit(self, folder: str, step: int, parts: Sequence[PartInfo], meta: Mapping[str, Any]) -> Checkpoint:
        """Writes the marker, after every part is seen from here.

        StorageError if a part is not there in its full size: then the root is not the same from every node.
        """
        files = {part.name: {"size": part.size, "sha256": part.sha256} for part in parts}
        if len(files) != len(parts):
            names = sorted(part.name for part in parts)
            raise StorageError(f"{self.storage.uri(folder)}: two workers wrote a part of the same name: {names}")
        if missing := self._missing(folder, parts):
            raise StorageError(
                f"{self.storage.uri(folder)}: {', '.join(missing)} is not here as another worker wrote it; the storage "
                "root is not the same from every node: set 'storage' to a folder that every node mounts, s3:// or gs://"
            )
        marker = {"step": step, "written": time.time(), "born": self.born, "meta": dict(meta), "files": files}
        self.storage.write_json(self.storage.join(folder, MARKER), marker)
        return _checkpoint(folder, marker)

    def complete(self) -> list[Checkpoint]:
        """Newest first: those with a marker, and every file there in its size."""
        found = (self._open(name) for name in self.storage.list(self.key) if _FOLDER.fullmatch(name))
        return sorted((c for c in found if c is not None), key=lambda c: (c.step, c.written), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest complete one whose content is unchanged; changed ones are skipped, with a warning.

        Raises StorageError if there are complete ones but none could be read: starting over would hide that.
        """
        unreadable: StorageError | None = None
        for checkpoint in self.complete():
            try:
                changed = self._changed(checkpoint)
            except FileNotFoundError:
                continue  # pruned meanwhile
            except StorageError as error:
                log.warning("checkpoint %s is skipped: %s", self.storage.uri(checkpoint.folder), error)
                unreadable = error
                continue
            if not changed:
                return checkpoint
            log.warning("checkpoint %s is corrupt and is skipped: %s", self.storage.uri(checkpoint.folder), changed)
            self._mark_corrupt(checkpoint, changed)
        if unreadable is not None:
            raise unreadable
        return None

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(part name, tensors on the CPU), one part in memory at a time."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for part in checkpoint.files:
            key = self.storage.join(checkpoint.folder, part.name)
            with TemporaryDirectory(prefix="ftray-") as folder:
                local = self.storage.local_path(key) or self.storage.download_file(key, Path(folder, "part"))
                try:
                    tensors = load_file(str(local))
                except (SafetensorError, OSError) as error:
                    raise StorageError(
                        f"cannot read {self.storage.uri(key)}: {error}; run again to resume from the checkpoint before"
                    ) from error
            yield part.name, tensors

    def read(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """All tensors, merged over the parts."""
        merged: dict[str, torch.Tensor] = {}
        for name, tensors in self.parts(checkpoint):
            if twice := merged.keys() & tensors.keys():
                where = f"{self.storage.uri(checkpoint.folder)}/{name}"
                raise StorageError(f"{where} repeats tensors of another part: {sorted(twice)[:3]}; read it by parts")
            merged |= tensors
        return merged

    def prune(self, keep: int) -> None:
        """Removes complete ones but the newest `keep`, and abandoned attempts that are not newer than the newest."""
        complete = self.complete()
        if not complete:
            return
        kept = {checkpoint.folder for checkpoint in complete[: max(1, keep)]}
        for name in self.storage.list(self.key):
            match = _FOLDER.fullmatch(name)
            folder = self.storage.join(self.key, name)
            if match and folder not in kept and int(match[1]) <= complete[0].step:
                self.storage.remove(folder)

    def _open(self, name: str) -> Checkpoint | None:
        folder = self.storage.join(self.key, name)
        try:
            marker = self.storage.read_json(self.storage.join(folder, MARKER))
            checkpoint = _checkpoint(folder, marker)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (KeyError, TypeError, AttributeError) as error:
            log.warning("checkpoint %s is skipped: its marker lacks %s", self.storage.uri(folder), error)
            return None
        except StorageError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            log.warning("checkpoint %s is skipped: %s", self.storage.uri(folder), error)
            return None
        if self.born is not None and marker.get("born") != self.born:
            return None
        found = self.storage.files(folder)
        if _CORRUPT in found or any(found.get(part.name) != part.size for part in checkpoint.files):
            return None
        return checkpoint

    def _missing(self, folder: str, parts: Sequence[PartInfo]) -> list[str]:
        """Names of the parts that are not here in full; NFS may show what another node wrote some seconds late."""
        for wait_s in (0.1, 0.4, 1.5, 3.0, 0.0):
            found = self.storage.files(folder)
            missing = [part.name for part in parts if found.get(part.name) != part.size]
            if not missing:
                break
            time.sleep(wait_s)
        return missing

    def _changed(self, checkpoint: Checkpoint) -> list[str]:
        """Names of the parts whose content is not what was written."""
        keys = {part: self.storage.join(checkpoint.folder, part.name) for part in checkpoint.files}
        return [part.name for part, key in keys.items() if self.storage.sha256(key) != part.sha256]

    def _mark_corrupt(self, checkpoint: Checkpoint, changed: list[str]) -> None:
        """So that `prune` counts it among the abandoned and keeps the good one before it."""
        try:
            self.storage.write_json(self.storage.join(checkpoint.folder, _CORRUPT), {"changed": changed})
        except StorageError as error:
            log.warning("cannot mark %s as corrupt: %s", checkpoint.folder, error)


def _checkpoint(folder: str, marker: dict[str, Any]) -> Checkpoint:
    files = tuple(PartInfo(name, info["size"], info["sha256"]) for name, info in sorted(marker["files"].items()))
    return Checkpoint(folder, int(marker["step"]), files, float(marker["written"]), dict(marker["meta"]))


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, on the CPU, no two sharing memory: what the format asks for."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return plain
