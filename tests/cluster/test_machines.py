"""Nodes with addresses and networks of their own, as machines have them: network namespaces on a bridge."""

import json
import os
import subprocess
import sys

import pytest

from ftray.config.load import load_run
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from tests.cluster.conftest import curve, rows
from tests.cluster.own_cluster import OwnCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OWN = f"ft{os.getpid()}"  # an interface's name has at most 15 letters
BRIDGE, NET = f"{OWN}-br", f"10.203.{os.getpid() % 256}"
MACHINES = {f"{OWN}-a": f"{NET}.2", f"{OWN}-b": f"{NET}.3"}


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert not done.returncode, f"ip {' '.join(words)}: {done.stderr}"


def need_namespaces():
    """Skips where this machine does not let us have any."""
    name = f"{OWN}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
        ip("link", "add", name, "type", "bridge")
        ip("link", "del", name)
    except (OSError, AssertionError) as error:
        pytest.skip(f"machines of our own need network namespaces and bridges: {error}")


def inside(name):
    return ["ip", "netns", "exec", name]


@pytest.fixture(scope="module")
def network():
    """Two namespaces that reach each other and us over a bridge."""
    need_namespaces()
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in MACHINES.items():
            ip("netns", "add", name)
            ip("link", "add", f"{name}-0", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}-0", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for words in [*(["netns", "del", name] for name in MACHINES), ["link", "del", BRIDGE]]:
            subprocess.run(["ip", *words], capture_output=True, check=False)


@pytest.fixture(scope="module")
def own(network, tmp_path_factory):
    cluster = OwnCluster(tmp_path_factory.mktemp("machines"), workers=0, cpus=1, host=f"{NET}.1")
    try:
        for name, address in MACHINES.items():
            cluster.join(1, inside=inside(name), host=address)
        yield cluster
    finally:
        cluster.close()


def ftray(own, *words):
    command = [sys.executable, "-m", "ftray.cli", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")} | own.token
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def test_a_run_over_two_machines_learns_what_it_does_on_one(own, run_file, undisturbed):
    path = run_file(scale__address=own.address)
    done = ftray(own, "train", str(path))
    assert done.returncode == 0, done.stderr
    run = load_run(path)
    folder = RunFolder(Storage(run.storage), run.name)
    assert rows(folder, "started")[0]["workers"] == 2
    assert curve(folder) == pytest.approx(undisturbed, abs=1e-4)


def test_doctor_finds_ports_that_are_closed_between_machines(own, run_file):
    path = str(run_file(scale__address=own.address))
    told = {one["about"]: one for one in json.loads(ftray(own, "doctor", path, "--json").stdout)}
    assert "all-reduce over 3 nodes" in told["network"]["what"]
    first, second = MACHINES
    subprocess.run(["ip", "-n", first, "route", "add", "blackhole", MACHINES[second]], check=True)
    try:
        asked = ftray(own, "doctor", path, "--json")
    finally:
        subprocess.run(["ip", "-n", first, "route", "del", "blackhole", MACHINES[second]], check=True)
    assert asked.returncode == 2
    [found] = [one for one in json.loads(asked.stdout) if one["level"] == "fault"]
    assert found["about"] == "network"
    assert "open all ports between nodes" in found["way_out"]
