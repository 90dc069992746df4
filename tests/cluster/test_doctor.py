"""`ftray doctor` on a real cluster, and faults planted there; a cluster with a token, and keys that do not fit."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

from ftray.config.load import load_run
from ftray.doctor.visit import visit
from tests.cluster.conftest import free_port
from tests.cluster.own_cluster import OwnCluster

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


def by_about(found):
    return {one.about: one for one in found if one.level == "fault"}


def test_every_node_is_asked_and_adds_up_a_tensor(cluster, run_file):
    found = visit(cluster.address, load_run(run_file()))
    print("\n".join(one.line() for one in found))
    told = {one.about: one for one in found}
    assert told["cluster"].what == "3 nodes"
    for about in ("versions", "clock", "model", "network", "storage"):
        assert told[about].level == "ok", told[about]
    assert "all-reduce over 3 nodes" in told["network"].what


def test_a_storage_and_a_model_that_are_not_there_are_found_on_a_cluster(cluster, run_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = load_run(run_file(storage=str(tmp_path / "file" / "store"), model__base=str(tmp_path / "none")))
    found = by_about(visit(cluster.address, run))
    assert str(tmp_path / "file") in found["storage"].what
    assert "every node mounts" in found["model"].way_out


PLANT = """
set -e
mount -t tmpfs -o size=16m none "$STORE"
mount -t tmpfs -o size=16m none "$TMPDIR"
mount -t tmpfs -o size=32m none /dev/shm
mount --bind "$OTHER" "$MODEL"
sed 's/^Version: .*/Version: 0.0.1/' "$TRL/METADATA" > "$STORE/METADATA"
mount --bind "$STORE/METADATA" "$TRL/METADATA"
exec "$@"
"""
"""What one machine sees of its files, in a mount namespace: a store and a small disk of its own, little shared memory,
another model under the same name, and another version of a package."""


@pytest.fixture
def own(tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a machine with its own files needs a mount namespace, and this user may not make one")
    cluster = OwnCluster(tmp_path, workers=1, cpus=1)
    yield cluster
    cluster.close()


def test_faults_planted_on_one_machine_are_found_there(own, run_file, small_base, tmp_path):
    store, other, small = tmp_path / "store", tmp_path / "other", tmp_path / "small"
    for folder in (store, small):
        folder.mkdir()
    shutil.copytree(small_base, other)
    with (other / "config.json").open("r+") as config:
        values = json.load(config) | {"rms_norm_eps": 0.5}
        config.seek(0)
        config.truncate()
        json.dump(values, config)
    paths = {"STORE": store, "OTHER": other, "MODEL": small_base, "TMPDIR": small}
    paths["TRL"] = distribution("trl").locate_file(f"trl-{version('trl')}.dist-info")
    inside = ["unshare", "-m", "sh", "-c", PLANT, "sh"]
    own.join(1, inside=inside, **{name: str(path) for name, path in paths.items()})
    run = run_file(scale__address=own.address)
    asked = in_a_process("doctor", str(run), "--json", **own.token)
    assert asked.returncode == 2, asked.stderr
    found = {one["about"]: one for one in json.loads(asked.stdout) if one["level"] == "fault"}
    assert found.keys() == {"storage", "disk", "shared memory", "model", "versions"}
    assert "does not see what the driver writes" in found["storage"]["what"]
    assert "0.0 of 0 GiB free" in found["disk"]["what"]
    assert "32 MiB of /dev/shm" in found["shared memory"]["what"]
    assert "differs" in found["model"]["what"]
    assert "trl 0.0.1" in found["versions"]["what"]
    assert all(one["way_out"] for one in found.values())


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """(dashboard, port, token file) of a cluster with a token, as cluster/local.sh starts it."""
    port, dashboard = free_port(), free_port()
    command = [sys.executable, str(ROOT / "cluster" / "local_cluster.py"), "1", "1"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    told = dict(process.stdout.readline().split() for _ in range(3))
    yield told["dashboard"], port, told["token"]
    process.terminate()
    process.wait(60)


def in_a_process(*words, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "RAY_J"))}
    command = [sys.executable, "-m", "ftray.cli", *words]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_cluster_with_a_token_answers_whoever_has_it(locked):
    dashboard, _, token = locked
    refused = in_a_process("jobs", "list", "--address", dashboard)
    assert (refused.returncode, "RAY_AUTH_TOKEN" in refused.stderr) == (2, True), refused.stderr
    refused = in_a_process("jobs", "list", "--address", dashboard, RAY_AUTH_TOKEN="0" * 64)
    assert (refused.returncode, "RAY_AUTH_TOKEN" in refused.stderr) == (2, True), refused.stderr
    answered = in_a_process("jobs", "list", "--address", dashboard, "--json", RAY_AUTH_TOKEN_PATH=token)
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout) == []


def test_a_wrong_token_and_a_closed_port_are_told_from_each_other(locked):
    port = locked[1]
    wrong = in_a_process(
        "doctor", "--ray", f"127.0.0.1:{port}", "--json", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64
    )
    assert wrong.returncode == 2
    assert [one["about"] for one in json.loads(wrong.stdout) if one["level"] == "fault"][:1] == ["token"], wrong.stdout
    closed = in_a_process("doctor", "--ray", f"127.0.0.1:{free_port()}", "--json")
    assert closed.returncode == 2
    assert [one["about"] for one in json.loads(closed.stdout) if one["level"] == "fault"][:1] == ["cluster"]
