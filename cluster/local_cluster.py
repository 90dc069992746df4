"""A head without CPUs and workers as nodes of their own on this machine, with a token. See local.sh."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
START_S = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workers", type=int, nargs="?", default=2)
    parser.add_argument("cpus", type=int, nargs="?", default=1, help="of each worker")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--dashboard-port", type=int, default=8265)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="ftray-ray-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_worker_niceness": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    ports = [f"--port={arguments.port}", f"--dashboard-port={arguments.dashboard_port}"]
    head = [RAY, "start", "--head", "--block", "--num-cpus=0", *ports, f"--temp-dir={folder / 'head'}"]
    nodes = [_start(head, environment, folder / "head.log")]
    dashboard = f"http://127.0.0.1:{arguments.dashboard_port}"
    try:
        _wait_for(dashboard, nodes[0], folder / "head.log")
        join = [RAY, "start", "--block", f"--address=127.0.0.1:{arguments.port}", f"--num-cpus={arguments.cpus}"]
        nodes += [_start(join, environment, folder / f"worker-{i}.log") for i in range(arguments.workers)]
        print(f"dashboard {dashboard}\ntoken     {token}\nlogs      {folder}\nCtrl-C ends it.", flush=True)
        while all(node.poll() is None for node in nodes):
            time.sleep(0.5)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait()


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("w") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def _wait_for(dashboard: str, head: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_S
    while head.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{dashboard}/api/gcs_healthz", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the head does not come up; {log} says why:\n{log.read_text()[-1500:]}")


if __name__ == "__main__":
    sys.exit(main())
