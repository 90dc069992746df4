"""Each planted fault is found, named with its place, and has a way out; a cluster in order has none."""

from dataclasses import replace

import pytest

from ftray.doctor.judge import GIB, Reduced, judge
from ftray.doctor.probe import Facts, look

GOOD = Facts(
    where="10.0.0.1",
    versions={"python": "3.12.4", "ray": "2.60.0", "torch": "2.13.0+cu128", "ftray": "0.1.0"},
    disk=(100 * GIB, 200 * GIB),
    shm=(8 * GIB, 8 * GIB),
    open_files=65536,
    gpus_seen=8,
    gpus_told=8,
    torch_cuda="12.8",
    model="abc",
    clock_s=100.0,
    asked_s=99.0,
    answered_s=101.0,
)
DRIVER = replace(GOOD, where="this machine", gpus_seen=0, gpus_told=0, asked_s=0, answered_s=0)
FAST = Reduced(2, bytes_per_s=5e9)
FAULTS = {
    "full disk": ({"disk": (GIB, 200 * GIB)}, "disk", "1.0 of 200 GiB free", "--temp-dir"),
    "disk at 96 %": ({"disk": (40 * GIB, 1000 * GIB)}, "disk", "40.0 of 1000 GiB free", "--temp-dir"),
    "other ray": (
        {"versions": {**GOOD.versions, "ray": "2.59.0"}},
        "versions",
        "ray 2.59.0 (here 2.60.0)",
        "one image",
    ),
    "other python": ({"versions": {**GOOD.versions, "python": "3.11.9"}}, "versions", "python 3.11.9", "one image"),
    "missing package": ({"versions": {"python": "3.12.1", "ray": "2.60.0"}}, "versions", "torch missing", "one image"),
    "no shared memory": ({"shm": (64 * 2**20,) * 2}, "shared memory", "64 MiB of /dev/shm", "--shm-size"),
    "clock behind": ({"clock_s": 40.0}, "clock", "59 s off", "NTP"),
    "clock ahead": ({"clock_s": 161.0}, "clock", "60 s off", "NTP"),
    "GPU lost": ({"gpus_seen": 7}, "GPUs", "told of 8 GPUs at 10.0.0.1, nvidia-smi sees 7", "--num-gpus"),
    "torch for CPUs": ({"torch_cuda": None}, "GPUs", "without CUDA", "Dockerfile.cuda"),
    "model not there": (
        {"model": None, "model_problem": "no such folder"},
        "model",
        "no such folder",
        "every node mounts",
    ),
    "another model": ({"model": "xyz"}, "model", "differs", "model.revision"),
}


def faults(found):
    return [one for one in found if one.level == "fault"]


def test_a_cluster_in_order_has_no_finding():
    found = judge(DRIVER, [GOOD, GOOD], reduced=FAST)
    assert {one.level for one in found} == {"ok"}
    assert all(one.line() for one in found)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_named_and_has_a_way_out(name):
    changes, about, says, way_out = FAULTS[name]
    [found] = faults(judge(DRIVER, [GOOD, replace(GOOD, **changes)], reduced=FAST))
    assert found.about == about
    assert says in found.what
    assert way_out in found.way_out


def test_a_closed_port_shows_in_the_all_reduce():
    [found] = faults(judge(DRIVER, [GOOD, GOOD], reduced=Reduced(2, problem="timed out connecting")))
    assert "timed out" in found.what
    assert "open all ports" in found.way_out


def test_a_slow_answer_is_no_skewed_clock():
    late = replace(GOOD, asked_s=50.0, clock_s=100.0, answered_s=150.0)
    assert not faults(judge(DRIVER, [late]))


def test_few_open_files_and_a_slow_network_are_warnings():
    found = judge(DRIVER, [replace(GOOD, open_files=1024)], reduced=Reduced(2, bytes_per_s=1e7))
    assert {one.about for one in found if one.level == "warning"} == {"open files", "network"}


def test_this_machine_can_be_asked_and_a_model_that_is_not_there_is_told(tmp_path):
    facts = look("here", model={"base": str(tmp_path / "none")})
    assert facts.versions["ray"] != "missing"
    assert facts.disk[1] > facts.disk[0] > 0
    assert facts.model is None
    assert str(tmp_path / "none") in facts.model_problem
    assert look("here", model={"base": "builtin:tiny"}).model
