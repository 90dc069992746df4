"""The root: keys, whole files, exclusive creation, and what a user is told when it does not work."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ftray.errors import StorageError
from ftray.store.paths import MARKER, Storage


def test_a_key_cannot_leave_the_root(storage: Storage):
    for wrong in ("../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a\\b"):
        with pytest.raises(StorageError, match="not a key"):
            storage.join(wrong)
        with pytest.raises(StorageError, match="not a key"):
            storage.write_bytes(wrong, b"x")
    assert storage.join("runs", "a/b", "c") == "runs/a/b/c"


def test_what_is_written_is_read_back(storage: Storage):
    storage.write_bytes("runs/a/x.bin", b"\0one")
    storage.write_bytes("runs/a/x.bin", b"\0two")
    storage.write_json("runs/a/y.json", {"b": [1, None, "ü"]})
    assert storage.read_bytes("runs/a/x.bin") == b"\0two"
    assert storage.read_json("runs/a/y.json") == {"b": [1, None, "ü"]}
    assert storage.list("runs") == ["a"]
    assert storage.list("runs/a") == ["x.bin", "y.json"]
    assert storage.files("runs") == {"a/x.bin": 4, "a/y.json": len(storage.read_bytes("runs/a/y.json"))}
    assert storage.exists("runs/a")
    assert storage.exists("runs/a/x.bin")
    assert not storage.exists("runs/a/z")


def test_a_missing_key_is_empty_or_a_file_not_found(storage: Storage):
    assert storage.list("runs/none") == []
    assert storage.files("runs/none") == {}
    storage.remove("runs/none")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("runs/none")
    with pytest.raises(FileNotFoundError):
        storage.download("runs/none", Path("unused"))


def test_a_file_is_created_once(storage: Storage):
    assert storage.create("runs/a/1.json", b"first")
    assert not storage.create("runs/a/1.json", b"second")
    assert storage.read_bytes("runs/a/1.json") == b"first"
    storage.remove("runs/a/1.json")
    assert storage.create("runs/a/1.json", b"third")


def test_a_staged_file_appears_only_when_it_is_done(storage: Storage):
    with storage.staged("runs/a/part") as temp:
        temp.write_bytes(b"half")
        assert storage.list("runs/a") == []
        temp.write_bytes(b"whole")
    assert storage.read_bytes("runs/a/part") == b"whole"


def test_a_staged_file_that_fails_changes_nothing(storage: Storage):
    def fail() -> None:
        with storage.staged("runs/a/part") as temp:
            temp.write_bytes(b"broken")
            raise RuntimeError

    storage.write_bytes("runs/a/part", b"whole")
    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_bytes("runs/a/part") == b"whole"
    assert storage.list("runs/a") == ["part"]


def test_a_folder_goes_up_and_comes_down(storage: Storage, tmp_path: Path):
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    for name in ("a.txt", MARKER, "deep/b.txt"):
        (out / name).write_text(name)
    storage.upload(out, "runs/up")
    assert sorted(storage.files("runs/up")) == [MARKER, "a.txt", "deep/b.txt"]
    folder = storage.download("runs/up", tmp_path / "down")
    assert (folder / "deep/b.txt").read_text() == "deep/b.txt"
    assert (folder == tmp_path / "down") == (not storage.is_local)
    storage.remove("runs/up")
    assert storage.files("runs/up") == {}
    assert not storage.exists("runs/up")


def test_a_probe_passes_and_leaves_nothing(storage: Storage):
    storage.write_bytes("runs/x", b"")
    storage.probe()
    assert storage.list("runs") == ["x"]


def test_a_storage_travels_as_its_root(storage: Storage):
    copy = pickle.loads(pickle.dumps(storage))
    storage.write_bytes("runs/x", b"1")
    assert copy.root == storage.root
    assert copy.read_bytes("runs/x") == b"1"


def test_a_local_root_is_absolute_and_knows_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert Storage("./store").root == str(tmp_path / "store")
    assert Storage("~/store").root == os.path.expanduser("~/store")
    assert Storage(f"file://{tmp_path}/store").root == str(tmp_path / "store")
    assert Storage("s3://bucket/prefix/").root == "s3://bucket/prefix"


def test_a_root_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*file.*set 'storage' to another root"):
        Storage(str(tmp_path / "file")).probe()
    with pytest.raises(StorageError, match="storage root nosuch://x"):
        Storage("nosuch://x").probe()


def test_a_document_that_was_cut_off_is_named(storage: Storage):
    storage.write_bytes("runs/x.json", b'{"a": ')
    with pytest.raises(StorageError, match=r"runs/x.json is not JSON"):
        storage.read_json("runs/x.json")


def test_files_have_the_rights_of_the_umask(tmp_path: Path):
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"")
    with storage.staged("b") as temp:
        temp.unlink()
        os.close(os.open(temp, os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "c").touch()
    assert len({os.stat(tmp_path / name).st_mode for name in "abc"}) == 1


class WordsItsOwnWay(MemoryFileSystem):
    """Says "invalid" where a file exists, and "busy" to every first try, as object stores do."""

    protocol = "wordy"
    tries = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        WordsItsOwnWay.tries += 1
        if mode == "create" and (self.exists(path) or self.tries % 2):
            raise OSError(errno.EINVAL if self.exists(path) else errno.EBUSY, path)
        super().pipe_file(path, value)


class Overwrites(MemoryFileSystem):
    """Knows no exclusive creation."""

    protocol = "overwrites"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value)


class OpensOnly(LocalFileSystem):
    """Has `open` with mode "x" as its only exclusive creation, like SFTP and SMB."""

    protocol = "opens"


for kind in (WordsItsOwnWay, Overwrites, OpensOnly):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


def test_creation_is_exclusive_however_a_server_says_so(tmp_path: Path):
    for root in (f"wordy://{tmp_path.name}", f"opens://{tmp_path}/opens"):
        storage = Storage(root)
        assert storage.create("a/1", b"first")
        assert not storage.create("a/1", b"second")
        assert storage.read_bytes("a/1") == b"first"
        storage.probe()
        assert storage.list("a") == ["1"]


def test_a_root_that_cannot_keep_two_writers_apart_is_refused():
    with pytest.raises(StorageError, match="cannot keep two writers apart"):
        Storage("overwrites://x").probe()


FULL_DISK = """
import sys, torch
from ftray.errors import StorageError
from ftray.store.checkpoints import Checkpoints
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder

storage = Storage(sys.argv[1])
checkpoints, run = Checkpoints(storage, "demo"), RunFolder(storage, "demo")

def save(step, size):
    folder = checkpoints.folder(step, "a")
    part = checkpoints.write_part(folder, "all", {"w": torch.full((size,), 1.0 * step)})
    checkpoints.commit(folder, step, [part], {})

def refused(work):
    try:
        work()
    except StorageError as error:
        assert "disk full while writing" in str(error) and "set 'storage' to another root" in str(error), error
    else:
        raise AssertionError("no error")

save(1, 10)
run.append_metrics([{"kind": "train", "step": 1}])
refused(lambda: save(2, 200_000))
refused(lambda: storage.write_bytes("big", bytes(800_000)))
refused(lambda: storage.create("big", bytes(800_000)))
filler = open(sys.argv[1] + "/filler", "wb", buffering=0)
for size in (1 << 16, 1 << 10, 1):
    try:
        while filler.write(bytes(size)) == size:
            pass
    except OSError:
        pass
refused(lambda: run.append_metrics([{"kind": "train", "step": 2, "text": "x" * 9000}]))
refused(lambda: run.set_state(status="training"))
filler.truncate(0)
assert checkpoints.newest().step == 1
checkpoints.prune(1)
storage.remove("runs/demo/checkpoints/step-00000002-a")
save(3, 10)
run.append_metrics([{"kind": "train", "step": 3}])
assert [row["step"] for row in run.metrics()] == [1, 3], run.metrics()
assert checkpoints.newest().step == 3
"""


def test_a_full_disk_is_said_and_leaves_earlier_results_intact(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=512k none "$0" && exec "$@"', str(disk)]
    try:
        able = subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("no right to mount a small disk here")
    done = subprocess.run([*mount, sys.executable, "-c", FULL_DISK, str(disk)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
