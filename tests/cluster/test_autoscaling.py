"""A cluster without workers, on which Ray's autoscaler starts nodes for a run and ends them when they are idle."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.cluster.own_cluster import OwnCluster

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    cluster = OwnCluster(tmp_path_factory.mktemp("growing"), workers=0, cpus=1, most=2)
    try:
        wait_for_nodes(cluster, 1)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def submit(growing, run_file, orders, tmp_path):
    """Starts `ftray submit` of a run for so many workers; GPUs or not is left to it."""
    folder = tmp_path / "away"
    folder.mkdir()
    shutil.copy(orders / "train.jsonl", folder)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "RAY_J"))}

    def start(name, workers):
        file = run_file(name=name, data__sources=["train.jsonl"], optim__steps=6, scale__workers=workers)
        shutil.move(file, folder / f"{name}.yaml")
        command = [sys.executable, "-m", "ftray.cli", "submit", f"{name}.yaml", "--address", growing.dashboard]
        return subprocess.Popen(
            [*command, "--python", sys.executable],
            cwd=folder,
            env=clean | growing.token,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def wait_for_nodes(cluster, count, timeout_s=120):
    """Seconds until the cluster has so many, the head included."""
    began = time.monotonic()
    while cluster.alive() != count:
        assert time.monotonic() < began + timeout_s, f"{cluster.alive()} nodes after {timeout_s} s"
        time.sleep(0.2)
    return time.monotonic() - began


def test_a_run_for_more_than_can_come_is_refused(growing, submit):
    job = submit("large", 3)
    told = job.communicate(timeout=120)[0]
    assert job.returncode == 2, told[-3000:]
    assert "3 workers with 1 CPU each, and the cluster has room for 0" in told
    assert "Its autoscaler cannot start them: raise max_workers" in told
    assert growing.alive() == 1


@pytest.mark.slow  # nodes start, and are idle for half a minute before they end
def test_nodes_come_for_a_run_and_go_after_it(growing, submit):
    job = submit("grown", 2)
    up = wait_for_nodes(growing, 3)
    began = time.monotonic()
    told = job.communicate(timeout=300)[0]
    trained = time.monotonic() - began
    assert job.returncode == 0, told[-3000:]
    assert "Waiting for nodes: room for 0 of 2 workers" in told
    assert "grown@v1" in told
    down = wait_for_nodes(growing, 1)
    print(f"two nodes {up:.0f} s after `ftray submit`, trained {trained:.0f} s later, gone {down:.0f} s after that")
