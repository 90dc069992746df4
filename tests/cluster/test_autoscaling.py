"""Ray's own autoscaler over a provider that starts nodes on this machine: from no worker up, and down to none again."""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IDLE_MINUTES = 0.1
DRIVER = """
import json, sys, time
import ray

ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1, label_selector={"ray.io/market-type": "spot"})
def where():
    return ray.get_runtime_context().get_node_id()

def workers():
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())

before, began = workers(), time.monotonic()
node = ray.get(where.remote(), timeout=150)
up_s, during = time.monotonic() - began, workers()
labels = next(one["Labels"] for one in ray.nodes() if one["NodeID"] == node)
began = time.monotonic()
while workers() and time.monotonic() - began < 150:
    time.sleep(0.5)
print(json.dumps({"before": before, "during": during, "after": workers(), "up_s": up_s,
    "down_s": time.monotonic() - began, "market": labels.get("ray.io/market-type")}))
"""


@pytest.fixture
def empty_cluster(tmp_path):
    """The address of a head without CPUs, whose autoscaler may start two kinds of workers."""
    head_id, port = secrets.token_hex(28), free_port()
    kinds = {
        name: {"resources": {"CPU": 1}, "labels": {"ray.io/market-type": market}, "node_config": {}}
        | {"min_workers": 0, "max_workers": 2}
        for name, market in (("spot", "spot"), ("on-demand", "on-demand"))
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": head_id,
            "launch_multiple": True,
        },
        "available_node_types": {"head": head, **kinds},
        "head_node_type": "head",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "docker": {},
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
    }
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--num-cpus=0", f"--port={port}", f"--autoscaling-config={file}"]
    command += [f"--temp-dir=/tmp/ftray-fake-{port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait(60)


def test_a_labelled_worker_comes_when_it_is_asked_for_and_goes_when_idle(empty_cluster):
    began = time.monotonic()
    command = [sys.executable, "-c", DRIVER, empty_cluster]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"up after {told['up_s']:.0f} s, down after {told['down_s']:.0f} s, {time.monotonic() - began:.0f} s in all")
    assert (told["before"], told["during"], told["after"]) == (0, 1, 0)
    assert told["market"] == "spot"
