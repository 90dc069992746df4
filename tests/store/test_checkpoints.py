"""Which checkpoint a run resumes from, whatever happened to the newest one."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ftray.errors import StorageError
from ftray.store.checkpoints import Checkpoint, Checkpoints, PartInfo
from ftray.store.paths import MARKER, Storage


def save(checkpoints: Checkpoints, step: int, token: str = "a") -> Checkpoint:
    folder = checkpoints.folder(step, token)
    parts = [
        checkpoints.write_part(folder, f"rank{rank}", {f"w{rank}": torch.full((8,), step + rank / 10)})
        for rank in range(2)
    ]
    return checkpoints.commit(folder, step, parts, {"position": step * 16})


@pytest.fixture
def checkpoints(storage: Storage) -> Checkpoints:
    return Checkpoints(storage, "demo")


def test_a_checkpoint_comes_back_as_it_was(checkpoints: Checkpoints):
    saved = save(checkpoints, 12)
    newest = checkpoints.newest()
    assert newest == saved
    assert newest is not None
    assert newest.folder == "runs/demo/checkpoints/step-00000012-a"
    assert newest.meta == {"position": 192}
    tensors = checkpoints.read(newest)
    assert {name: tensor[0].item() for name, tensor in tensors.items()} == pytest.approx({"w0": 12.0, "w1": 12.1})
    assert [name for name, _ in checkpoints.parts(newest)] == ["rank0.safetensors", "rank1.safetensors"]


def test_types_shapes_and_shared_memory_survive(checkpoints: Checkpoints):
    square = torch.arange(16.0).reshape(4, 4)
    tensors = {
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "whole": square,
        "row": square[1],
        "turned": square.T,
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    folder = checkpoints.folder(1, "a")
    saved = checkpoints.commit(folder, 1, [checkpoints.write_part(folder, "all", tensors)], {})
    read = checkpoints.read(saved)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())


def test_there_is_none_before_the_first(checkpoints: Checkpoints):
    assert checkpoints.newest() is None
    assert checkpoints.complete() == []
    checkpoints.prune(2)


def test_a_half_written_checkpoint_is_skipped(checkpoints: Checkpoints):
    save(checkpoints, 1)
    folder = checkpoints.folder(2, "b")
    checkpoints.write_part(folder, "rank0", {"w0": torch.ones(8)})
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    checkpoints.storage.write_bytes(f"{folder}/{MARKER}", b'{"step": 2, "me')
    assert [found.step for found in checkpoints.complete()] == [1]
    checkpoints.storage.write_bytes(f"{folder}/{MARKER}", b"{}")
    assert [found.step for found in checkpoints.complete()] == [1]


def test_a_part_that_was_cut_off_or_lost_is_skipped(checkpoints: Checkpoints):
    for step in (1, 2, 3):
        save(checkpoints, step)
    storage = checkpoints.storage
    cut = "runs/demo/checkpoints/step-00000003-a/rank1.safetensors"
    storage.write_bytes(cut, storage.read_bytes(cut)[:-1])
    storage.remove("runs/demo/checkpoints/step-00000002-a/rank0.safetensors")
    assert [found.step for found in checkpoints.complete()] == [1]


def test_a_corrupt_part_is_skipped_with_a_warning(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture):
    for step in (1, 2):
        save(checkpoints, step)
    key = "runs/demo/checkpoints/step-00000002-a/rank1.safetensors"
    data = bytearray(checkpoints.storage.read_bytes(key))
    data[-1] ^= 1
    checkpoints.storage.write_bytes(key, bytes(data))
    assert [found.step for found in checkpoints.complete()] == [2, 1]
    with caplog.at_level(logging.WARNING):
        newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002-a is corrupt and is skipped" in caplog.text
    # The corrupt one does not push the good one out.
    checkpoints.prune(1)
    assert [found.step for found in checkpoints.complete()] == [1]


def test_a_part_that_other_nodes_wrote_elsewhere_is_refused(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # it waits some seconds for slow shared folders
    folder = checkpoints.folder(1, "a")
    here = checkpoints.write_part(folder, "rank0", {"w0": torch.ones(8)})
    there = PartInfo("rank1.safetensors", 128, "0" * 64)
    with pytest.raises(StorageError, match=r"rank1.safetensors is not here.*not the same from every node"):
        checkpoints.commit(folder, 1, [here, pickle.loads(pickle.dumps(there))], {})
    assert checkpoints.complete() == []
    with pytest.raises(StorageError, match="two workers wrote a part of the same name"):
        checkpoints.commit(folder, 1, [here, here], {})


def test_pruning_keeps_the_newest_and_what_is_being_written(checkpoints: Checkpoints):
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    for step in (2, 4, 5):
        checkpoints.write_part(checkpoints.folder(step, "dead"), "rank0", {"w": torch.ones(1)})
    checkpoints.prune(2)
    names = checkpoints.storage.list("runs/demo/checkpoints")
    assert names == ["step-00000003-a", "step-00000004-a", "step-00000005-dead"]
    checkpoints.prune(0)
    assert [found.step for found in checkpoints.complete()] == [4]


def test_of_one_step_the_later_attempt_counts(checkpoints: Checkpoints):
    for token in ("z", "b", "m"):
        save(checkpoints, 5, token)
    assert [found.folder[-1] for found in checkpoints.complete()] == ["m", "b", "z"]


def test_a_worker_of_an_earlier_life_cannot_bring_the_run_back(storage: Storage):
    save(Checkpoints(storage, "demo", born="old"), 9)
    save(Checkpoints(storage, "demo", born="new"), 3)
    newest = Checkpoints(storage, "demo", born="new").newest()
    assert newest is not None
    assert newest.step == 3
    assert [found.step for found in Checkpoints(storage, "demo").complete()] == [9, 3]


def test_a_tensor_in_two_parts_is_not_merged(checkpoints: Checkpoints):
    folder = checkpoints.folder(1, "a")
    parts = [checkpoints.write_part(folder, name, {"w": torch.ones(2)}) for name in ("one", "two")]
    saved = checkpoints.commit(folder, 1, parts, {})
    with pytest.raises(StorageError, match="repeats tensors of another part"):
        checkpoints.read(saved)


KILLED = """
import sys, time, torch
from ftray.store.checkpoints import Checkpoints
from ftray.store.paths import Storage

checkpoints = Checkpoints(Storage(sys.argv[1]), "demo")
folder = checkpoints.folder(2, "b")
parts = [checkpoints.write_part(folder, f"rank{rank}", {f"w{rank}": torch.ones(8)}) for rank in range(2)]
print("written", flush=True)
time.sleep(60)
checkpoints.commit(folder, 2, parts, {})
"""


def test_kill_9_between_the_parts_and_the_marker_costs_that_checkpoint_only(tmp_path: Path):
    checkpoints = Checkpoints(Storage(str(tmp_path)), "demo")
    save(checkpoints, 1)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        os.kill(writer.pid, signal.SIGKILL)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    save(checkpoints, 2, "c")
    checkpoints.prune(1)
    assert checkpoints.storage.list("runs/demo/checkpoints") == ["step-00000002-c"]
