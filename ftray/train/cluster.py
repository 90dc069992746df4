"""The Ray cluster a run uses: reaching it, what it has, and whether every node sees the same storage."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from ftray.errors import ClusterError, StorageError
from ftray.store.paths import Storage
from ftray.train.layout import Node

ANSWER_S = 120
AHEAD = 8  # chunks of rows in flight per CPU


def nodes() -> list[Node]:
    """The living nodes of the connected cluster."""
    return _with_gpu_memory(alive())


def alive() -> list[Node]:
    """The same without the memory of their GPUs, for which they would be asked."""
    import ray

    found = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        have = node["Resources"]
        kind = next((key.split(":", 1)[1] for key in have if key.startswith("accelerator_type:")), "")
        found.append(
            Node(
                name=node["NodeManagerAddress"],
                cpus=have.get("CPU", 0.0),
                gpus=have.get("GPU", 0.0),
                gpu_kind=kind,
                ram_bytes=int(have.get("memory", 0)),
            )
        )
    return found


def this_machine() -> list[Node]:
    """This machine as the only node, without starting Ray."""
    import psutil

    gpus = gpus_here()
    return [
        Node(
            name="this machine",
            cpus=float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
            gpus=float(len(gpus)),
            gpu_bytes=min((size for size, _ in gpus), default=0),
            gpu_kind=gpus[0][1] if gpus else "",
            ram_bytes=psutil.virtual_memory().total,
        )
    ]


def _with_gpu_memory(found: list[Node]) -> list[Node]:
    import ray

    if not any(node.gpus for node in found):
        return found
    ask = ray.remote(num_cpus=0)(gpus_here)  # no GPU: they may all be taken, and nvidia-smi sees them without
    asked = [ask.options(resources={f"node:{node.name}": 0.001}).remote() for node in found if node.gpus]
    answers: Iterator[list[tuple[int, str]]] = iter(_all(asked))
    return [
        replace(node, gpu_bytes=min((size for size, _ in next(answers)), default=0)) if node.gpus else node
        for node in found
    ]


def _all(answers: list[Any]) -> list[Any]:
    """The answers of tasks that need no CPU. ClusterError where a node does not answer."""
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        return ray.get(answers, timeout=ANSWER_S)
    except GetTimeoutError:
        raise ClusterError(
            f"a node of the cluster did not answer in {ANSWER_S} s; look at `ray status`, then try again"
        ) from None


def gpus_here() -> list[tuple[int, str]]:
    """(bytes of memory, name) of each GPU of this machine; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = (line.partition(", ") for line in output.splitlines())
        return [(int(mib) * 2**20, name) for mib, _, name in rows]
    return []


def check_storage(storage: Storage) -> None:
    """Every node must see what the driver writes, and the driver what they write. StorageError names the nodes."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2:
        return
    token = secrets.token_hex(8)
    key = f"probes/{token}"
    storage.write_bytes(f"{key}/driver", token.encode())
    try:
        ask = ray.remote(num_cpus=0, max_retries=3, retry_exceptions=True)(_sees)
        answers = []
        for node in alive:
            pinned = ask.options(label_selector={"ray.io/node-id": node["NodeID"]})
            answers.append(pinned.remote(storage.root, key, node["NodeID"]))
        blind = []
        for node, answer in zip(alive, answers, strict=True):
            (problem,) = _all([answer])
            if problem is None and not storage.exists(f"{key}/{node['NodeID']}"):
                problem = "what it writes does not arrive here"
            if problem:
                blind.append(f"{node['NodeManagerAddress']} ({node['NodeID'][:6]}): {problem}")
        if blind:
            raise StorageError(
                f"storage {storage.root} is not the same from every node: {'; '.join(blind)}. Set storage to a folder "
                "that every node mounts, or to s3:// or gs://"
            )
    finally:
        storage.remove(key)


def _sees(root: str, key: str, node: str) -> str | None:
    """On a node: the probe can be read, and answered. Returns what is wrong, or None."""
    try:
        storage = Storage(root)
        if not storage.exists(f"{key}/driver"):
            return "does not see what the driver writes"
        storage.write_bytes(f"{key}/{node}", b"seen")
    except (StorageError, OSError) as error:
        return str(error)
    return None


def spread_over_cpus(fn: Callable[[Any], Any], chunks: Iterable[Any]) -> Iterator[Any]:
    """`map` over the cluster's CPUs, results in order, a few chunks ahead so that memory stays small."""
    import ray

    shared = ray.put(fn)
    task = ray.remote(num_cpus=1)(_apply)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    source = iter(chunks)
    flying = [task.remote(shared, chunk) for chunk in islice(source, AHEAD * cpus)]
    while flying:
        yield ray.get(flying.pop(0))
        flying += [task.remote(shared, chunk) for chunk in islice(source, 1)]


def _apply(fn: Callable[[Any], Any], chunk: Any) -> Any:
    stand_still()
    return fn(chunk)


def stand_still() -> None:
    """In a worker: leave a working folder that Ray has unpacked anew meanwhile, as it does where nodes share a machine.

    Libraries ask for the current folder as they are imported, and a folder that is gone has no path.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir(tempfile.gettempdir())


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing but our own lines on the terminal: libraries log to Ray's files.

    What one prints while it is imported, as DeepSpeed does, goes to stderr: stdout is for `--json`.
    """
    for name in ("ray", "ray.train", "ray.data", "transformers", "datasets", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
