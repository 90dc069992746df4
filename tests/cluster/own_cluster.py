"""A cluster of `ray start` processes, whose head can die and come back, and which may grow with what is asked of it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.conftest import free_port

RAY = str(Path(sys.executable).with_name("ray"))
START_S = 90
HEAD_ID = "f" * 51 + "00000"  # the test provider counts its nodes from here
IDLE_S = 30  # longer than a busy machine takes from the nodes' coming to a run's start on them


class OwnCluster:
    """A head without CPUs, and workers as nodes of their own, with a token. `close` ends them all.

    With `most`, Ray's autoscaler starts up to so many more workers and ends idle ones. The tables of the head are kept
    in a folder.
    """

    def __init__(self, folder: Path, *, workers: int, cpus: int, most: int = 0, host: str = "127.0.0.1"):
        self.folder, self.port, self.dashboard_port, self.host = folder, free_port(), free_port(), host
        self.address, self.dashboard = f"{host}:{self.port}", f"http://{host}:{self.dashboard_port}"
        token, self.secret = folder / "token", secrets.token_hex(32)
        token.write_text(self.secret)
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            **self.token,
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "tables"),
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.growing = self._autoscaler(cpus, most) if most else []
        self.head: subprocess.Popen | None = None
        self.workers: list[subprocess.Popen] = []
        try:
            self.start_head()
            for _ in range(workers):
                self.join(cpus)
        except BaseException:
            self.close()
            raise

    def start_head(self) -> None:
        ports = [f"--port={self.port}", f"--dashboard-host={self.host}", f"--dashboard-port={self.dashboard_port}"]
        ports.append(f"--node-ip-address={self.host}")
        temp = Path(f"/tmp/ftray-{self.port}")
        (temp / "ray_current_cluster").unlink(missing_ok=True)  # a new machine would not have it either
        self.head = self._start("head", "--head", "--num-cpus=0", *ports, f"--temp-dir={temp}", *self.growing)
        end = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.dashboard}/api/gcs_healthz", timeout=2).close()
                return
            assert self.head.poll() is None, (self.folder / "head.log").read_text()[-2000:]
            assert time.monotonic() < end, "the head does not come up"
            time.sleep(0.5)

    def _autoscaler(self, cpus: int, most: int) -> list[str]:
        """What makes the head an autoscaling one, by the provider that Ray tests with: nodes are processes here."""
        provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
        config = {
            "cluster_name": "growing",
            "max_workers": most,
            "idle_timeout_minutes": IDLE_S / 60,
            "upscaling_speed": 1.0,
            "provider": {
                "type": "external",
                "module": provider,
                "gcs_address": self.address,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "cpu": {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most},
            },
        }
        config |= {key: {} for key in ("auth", "docker", "file_mounts")} | {"file_mounts_sync_continuously": False}
        config |= {key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")}
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        config |= {f"{key}_commands": [] for key in commands}  # nodes are processes: there is nothing to set up
        path = self.folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        self.environment |= {
            "RAY_enable_autoscaler_v2": "1",  # as KubeRay and `ray up` have it
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        return [f"--autoscaling-config={path}"]

    def join(self, cpus: int, *, inside: Sequence[str] = (), host: str | None = None, **environment: str) -> None:
        """One more worker, waited for: of two that start together on one machine, one may end at once.

        `inside`: a command that runs what follows it, with the worker's own files or network, say.
        """
        count = len(self.workers)
        words = ["--address", self.address, f"--num-cpus={cpus}", f"--node-ip-address={host or self.host}"]
        self.workers.append(self._start(f"worker-{count}", *words, inside=inside, **environment))
        end = time.monotonic() + START_S
        while self.alive() < 2 + count:
            assert time.monotonic() < end, self._ask("/nodes?view=summary")
            time.sleep(0.5)

    def kill_head(self) -> None:
        """All processes of the head at once, as a lost machine would take them."""
        kill(self.head)

    def applications(self, config: dict[str, Any] | None = None) -> dict[str, Any]:
        """What Ray Serve says of its applications, after it was given a config; nothing where it does not answer."""
        if config is not None:
            self._ask("/api/serve/applications/", config)
        try:
            return self._ask("/api/serve/applications/")["applications"]
        except OSError:
            return {}

    def alive(self) -> int:
        """Nodes."""
        nodes = self._ask("/nodes?view=summary")["data"]["summary"]
        return sum(node["raylet"]["state"] == "ALIVE" for node in nodes)

    def _ask(self, path: str, config: dict[str, Any] | None = None) -> Any:
        """Of the dashboard: a document, after it was given a config."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.secret}"}
        body = json.dumps(config).encode() if config else None
        request = urllib.request.Request(self.dashboard + path, body, headers, method="PUT" if config else "GET")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def close(self) -> None:
        for process in [*self.workers, self.head]:
            if process is not None:
                kill(process)

    def _start(self, name: str, *words: str, inside: Sequence[str] = (), **environment: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "a") as log:
            # The usual port of the nodes' agents may be another cluster's.
            command = [*inside, RAY, "start", "--block", f"--dashboard-agent-listen-port={free_port()}", *words]
            env = self.environment | environment
            return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def kill(process: subprocess.Popen) -> None:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
