"""Checkpoints of a live run: taken between steps, written behind its back, and what a failed one costs."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ftray.errors import StorageError
from ftray.store.checkpoints import Checkpoints
from ftray.store.paths import Storage
from ftray.train import keeper as module
from ftray.train import state
from ftray.train.keeper import Keeper


@pytest.fixture(autouse=True)
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Training:
    """A model that steps; to `state` it looks as an engine without ZeRO does."""

    def __init__(self, **optimizer):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.named = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, **optimizer)
        self.engine = SimpleNamespace(optimizer=self.optimizer, zero_optimization_stage=lambda: 0)

    def step(self, number: int) -> float:
        loss = self.model(torch.full((1, 3), float(number))).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Disk(Checkpoints):
    """Refuses the next writes with the errors that it is given."""

    errors: tuple[Exception | None, ...] = ()

    def write_part(self, folder, name, tensors):
        error, *rest = self.errors or (None,)
        self.errors = tuple(rest)
        if error is not None:
            raise error
        return super().write_part(folder, name, tensors)


@pytest.fixture
def disk(tmp_path):
    return Disk(Storage(str(tmp_path / "store")), "run", "born")


@pytest.fixture
def rows():
    return []


@pytest.fixture
def keeper(disk, rows):
    return Keeper(disk, keep=2, meta={"workers": 1}, log=rows.append)


def take(keeper, training, step):
    keeper.take(training.engine, training.named, step=step)
    keeper.finish()


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(keeper, fused):
    whole = Training(fused=fused)
    for number in range(3):
        whole.step(number)
    take(keeper, whole, 3)
    resumed = Training(fused=fused)
    checkpoint, tensors = keeper.newest()
    state.restore(resumed.engine, resumed.named, tensors, steps=checkpoint.step)
    assert [resumed.step(n) for n in range(3, 6)] == [whole.step(n) for n in range(3, 6)]


def test_a_checkpoint_is_of_the_moment_it_was_taken_at(keeper):
    training = Training()
    training.step(1)
    before = {name: p.detach().clone() for name, p in training.named.items()}
    keeper.take(training.engine, training.named, step=1)
    training.step(2)
    keeper.finish()
    _, tensors = keeper.newest()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_a_checkpoint_counts_when_all_its_parts_are_there(keeper, disk, rows):
    training = Training()
    training.step(1)
    keeper.take(training.engine, training.named, step=1)
    assert keeper.waiting
    assert disk.complete() == []
    keeper.finish()
    assert not keeper.waiting
    assert [c.step for c in disk.complete()] == [1]
    assert disk.complete()[0].meta == {"workers": 1}
    assert rows == [{"kind": "checkpoint", "step": 1}]


def test_the_newest_are_kept(keeper, disk):
    training = Training()
    for step in range(1, 5):
        training.step(step)
        take(keeper, training, step)
    assert [c.step for c in disk.complete()] == [4, 3]


def test_a_write_that_fails_is_tried_again(keeper, disk, rows):
    training = Training()
    training.step(1)
    disk.errors = (OSError(errno.EIO, "input/output error"), StorageError("no answer"))
    take(keeper, training, 1)
    assert [row["kind"] for row in rows] == ["checkpoint"]


def test_a_failed_checkpoint_costs_only_itself(keeper, disk, rows):
    training = Training()
    training.step(1)
    take(keeper, training, 1)
    disk.errors = (OSError(errno.EIO, "input/output error"),) * module.ATTEMPTS
    take(keeper, training, 2)
    assert rows[-1]["kind"] == "warning"
    assert "input/output error" in rows[-1]["text"]
    assert [c.step for c in disk.complete()] == [1]
    take(keeper, training, 3)
    assert [c.step for c in disk.complete()] == [3, 1]


def test_a_part_that_was_lost_for_any_reason_leaves_no_checkpoint(keeper, disk, rows):
    training = Training()
    training.step(1)
    disk.errors = (MemoryError("out of memory"),) * module.ATTEMPTS
    take(keeper, training, 1)
    assert rows[-1]["kind"] == "warning"
    assert disk.complete() == []


def test_two_failed_checkpoints_in_a_row_stop_the_run(keeper, disk):
    training = Training()
    training.step(1)
    disk.errors = (OSError(errno.EIO, "input/output error"),) * module.ATTEMPTS * 2
    take(keeper, training, 1)
    with pytest.raises(StorageError, match=r"checkpoint after step 2: .*input/output error"):
        take(keeper, training, 2)


def test_a_full_disk_stops_the_run_at_once_and_spares_what_was_there(keeper, disk):
    training = Training()
    training.step(1)
    take(keeper, training, 1)
    disk.errors = (OSError(errno.ENOSPC, "no space left on device"),)
    with pytest.raises(StorageError, match="checkpoint after step 2"):
        take(keeper, training, 2)
    assert [c.step for c in disk.complete()] == [1]
