"""`ftray doctor` on a real cluster, and faults planted there; a cluster with a token, and keys that do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftray.config.load import load_run
from ftray.doctor.visit import visit
from tests.cluster.conftest import free_port

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
