"""What a look at the registry finds, and what it does not read again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from store_drills import save_adapter

from ftray.errors import StorageError
from ftray.store import watch
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.versions import Version


@pytest.fixture
def registry(storage: Storage, tmp_path: Path) -> Registry:
    registry = Registry(storage)
    for name in ("bot", "cat"):
        registry.publish(name, save_adapter(tmp_path / name), {}, key="run-1")
    return registry


def brief(version: Version) -> str:
    return version.digest


def look(registry: Registry, known: dict, **options) -> watch.Changes[str]:
    """Looks, and takes over what was found."""
    changes = watch.look(registry.storage, known, brief, **options)
    known.update(changes.read)
    for name in changes.gone:
        del known[name]
    return changes


def test_a_look_finds_versions_aliases_and_what_is_gone(registry: Registry, tmp_path: Path):
    known: dict = {}
    assert sorted(look(registry, known).read) == ["bot", "cat"]
    assert known["bot"].versions == {1: registry.resolve("bot").digest}
    registry.publish("bot", save_adapter(tmp_path / "two", 2.0), {}, key="run-2")
    registry.promote("bot@v2")
    look(registry, known)
    assert (sorted(known["bot"].versions), known["bot"].aliases["prod"].main) == ([1, 2], 2)
    registry.delete("bot@v1")
    look(registry, known, only="bot")
    assert list(known["bot"].versions) == [2]
    registry.storage.remove("adapters/cat")
    assert list(look(registry, known).gone) == ["cat"]
    assert "dog" not in look(registry, known, only="dog").read


def test_a_storage_that_lost_everything_is_not_taken_for_an_empty_registry(registry: Registry):
    known: dict = {}
    look(registry, known)
    registry.storage.remove("adapters")
    for only in (None, "bot"):
        with pytest.raises(StorageError, match="mounted"):
            watch.look(registry.storage, known, brief, only=only)
    assert watch.look(registry.storage, {}, brief).read == {}


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    registry = Registry(Storage(str(tmp_path / "store")))
    registry.publish("bot", save_adapter(tmp_path / "bot"), {}, key="run-1")
    registry.promote("bot@v1", "canary")
    return registry


def settle(registry: Registry) -> None:
    """All folders were changed a minute ago."""
    for folder, _, _ in os.walk(registry.storage.root):
        os.utime(folder, (time.time() - 60, time.time() - 60))


def test_folders_that_keep_no_times_of_change_are_listed_now_and_then(local: Registry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "RELIST_S", 0.2)
    settle(local)
    known: dict = {}
    look(local, known)
    look(local, known)
    assert look(local, known).read == {}
    local.promote("bot@v1")
    settle(local)  # the file system says that nothing happened
    deadline = time.monotonic() + 5
    while "prod" not in known["bot"].aliases:
        assert time.monotonic() < deadline
        look(local, known)


def test_a_folder_that_changed_just_now_is_listed_again(local: Registry):
    known: dict = {}
    look(local, known)
    before = {folder: os.stat(folder) for folder, _, _ in os.walk(local.storage.root)}
    local.promote("bot@v1")
    for folder, times in before.items():  # within one tick of the file system's clock
        os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
    look(local, known)
    assert "prod" in known["bot"].aliases


def test_an_adapter_that_cannot_be_read_stays_as_it_was_known(local: Registry, tmp_path: Path):
    class Failing(Storage):
        def read_bytes(self, key: str) -> bytes:
            if "bot" in key:
                raise StorageError(f"cannot read {key}: input/output error")
            return super().read_bytes(key)

    local.publish("cat", save_adapter(tmp_path / "cat"), {}, key="run-1")
    known: dict = {}
    look(local, known)
    changes = watch.look(Failing(local.storage.root), known, brief, only="bot")
    assert "input/output error" in changes.failed["bot"]
    assert (list(changes.read), list(changes.gone)) == ([], [])
