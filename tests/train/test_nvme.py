"""What a machine needs before it can offload to NVMe, and what is said where it lacks it."""

import os
import threading
import time

import pytest
import torch.distributed as dist

from ftray.errors import ClusterError
from ftray.train import nvme


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """A cache of compiled operators in which pin_memory has a lock."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "pin_memory"
    folder.mkdir()
    (folder / "lock").touch()
    return tmp_path


@pytest.fixture
def no_libaio(monkeypatch):
    """DeepSpeed looks for libaio by compiling against it."""
    monkeypatch.setenv("CC", "false")


def test_without_libaio_the_way_out_is_said(tmp_path, no_libaio):
    _, text = nvme.problem(str(tmp_path))
    assert "install libaio" in text
    assert "scale.offload: cpu" in text


def test_all_workers_are_told_of_the_machine_that_lacks_it(tmp_path, no_libaio):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ClusterError, match=f"{os.uname().nodename}: .*install libaio"):
            nvme.make_nvme_ready(str(tmp_path))
    finally:
        dist.destroy_process_group()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    _, text = nvme.problem(str(tmp_path / "file" / "folder"))
    assert text.startswith("scale.nvme_path: cannot write to")


def test_a_lock_that_our_killed_build_left_is_removed_at_once(extensions):
    (extensions / "ftray.lock").write_text("building")
    with nvme.alone():
        assert not (extensions / "pin_memory" / "lock").exists()
    assert (extensions / "ftray.lock").read_text() == ""


def test_a_lock_whose_build_has_long_been_quiet_is_removed(extensions):
    for path in (extensions / "pin_memory" / "lock", extensions / "pin_memory"):
        os.utime(path, (0, time.time() - nvme.QUIET_S - 1))
    with nvme.alone():
        assert not (extensions / "pin_memory" / "lock").exists()


def test_a_build_of_another_program_is_waited_for(extensions):
    ended = []

    def other():
        time.sleep(0.5)
        ended.append(True)
        (extensions / "pin_memory" / "lock").unlink()

    threading.Thread(target=other).start()
    with nvme.alone():
        assert ended


def test_what_a_killed_worker_swapped_is_removed_and_what_others_swap_is_not(tmp_path):
    for rank in (0, 1):
        folder = tmp_path / "zero_stage_3" / "optimizer" / f"rank{rank}"
        folder.mkdir(parents=True)
        (folder / "1.tensor.swp").touch()
    nvme.clear(str(tmp_path), 1)
    assert [path.parent.name for path in tmp_path.rglob("*.swp")] == ["rank0"]
