"""The rounds: reaches the cluster, asks every node, tries storage and network, and judges. Holds no CPU and no GPU."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from typing import Any

from ftray.config.schema import Run
from ftray.doctor.judge import Finding, Reduced, judge
from ftray.doctor.probe import Facts, look
from ftray.errors import ClusterError, StorageError

ANSWER_S = 90
ALL_REDUCE_S = 60
ALL_REDUCE_BYTES = 64 * 2**20


def visit(address: str | None, run: Run | None) -> list[Finding]:
    """Findings about the cluster at `address`, around us, or, where there is none, about this machine."""
    from ftray.train import cluster

    model = None if run is None else {**run.model.model_dump(mode="json"), "storage": run.storage}
    with cluster.quiet():
        driver = look("this machine", model=model)
        storage = [] if run is None else _storage(run, everywhere=False)
        address = address or (run.scale.address if run else None)
        if address is None and "RAY_ADDRESS" not in os.environ:
            return [Finding("ok", "cluster", "none named: this machine alone"), *storage, *judge(driver, [])]
        if problem := _reach(address):
            return [problem, *storage, *judge(driver, [])]
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes, silent = _ask(alive, model)
        if run is not None and not storage:
            storage = _storage(run, everywhere=True)
        reduced = _all_reduce(alive) if len(alive) > 1 and not silent else None
        found = [_token(), *silent, *storage, *judge(driver, nodes, reduced=reduced)]
        return [Finding("ok", "cluster", f"{len(alive)} nodes"), *found]


def _reach(address: str | None) -> Finding | None:
    from ftray.ray_cluster import connect

    # Ray tells a refused token no differently from a silent host, and tries a silent one for minutes.
    where = address or os.environ["RAY_ADDRESS"]
    if not _listens(where):
        return Finding("fault", "cluster", f"nobody answers at {where}", "is its port open to this machine?")
    try:
        connect(address)
    except ClusterError as error:
        way_out = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        return Finding("fault", "token", f"somebody listens there, but refuses us: {error}", way_out)
    return None


def _listens(address: str) -> bool:
    """Whether the port can be reached; True for `auto` and the like, which Ray looks up itself."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host:
        return True
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def _token() -> Finding:
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return Finding("ok", "token", "asked for")
    way_out = "start every node with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    return Finding("warning", "token", "none asked for: whoever reaches a port of Ray runs code there", way_out)


def _storage(run: Run, *, everywhere: bool) -> list[Finding]:
    from ftray.store.paths import Storage
    from ftray.train.cluster import check_storage

    try:
        storage = Storage(run.storage)
        storage.probe()
        if everywhere:
            check_storage(storage)
    except StorageError as error:
        return [
            Finding("fault", "storage", str(error), "a folder that every node mounts and may write, s3:// or gs://")
        ]
    return [Finding("ok", "storage", f"{run.storage} is the same from everywhere")] if everywhere else []


def _ask(alive: list[dict], model: dict[str, Any] | None) -> tuple[list[Facts], list[Finding]]:
    import ray
    from ray.exceptions import RayError

    task: Any = ray.remote(num_cpus=0, max_retries=1)(look)  # type: ignore[arg-type]
    flying = []
    for node in alive:
        where = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        on_node = task.options(label_selector={"ray.io/node-id": node["NodeID"]})
        told = node["Resources"].get("GPU", 0.0)
        flying.append((where, time.time(), on_node.remote(where, model=model, gpus_told=told)))
    facts, silent = [], []
    for where, asked_s, answer in flying:
        try:
            one = ray.get(answer, timeout=ANSWER_S)
            facts.append(replace(one, asked_s=asked_s, answered_s=time.time()))
        except RayError as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            way_out = "look at `ray status` and the node's raylet.err; are the same packages installed there?"
            silent.append(Finding("fault", "node", f"{where} does not run a task: {last}", way_out))
    return facts, silent


def _all_reduce(alive: list[dict]) -> Reduced:
    """One process a node adds up a tensor over gloo: ports of the system's choice must be open between all."""
    import ray
    from ray.exceptions import RayError

    def on(node: dict, function: Any) -> Any:
        return ray.remote(num_cpus=0, max_retries=0)(function).options(
            label_selector={"ray.io/node-id": node["NodeID"]}
        )

    try:
        port = ray.get(on(alive[0], _free_port).remote(), timeout=ANSWER_S)
        meet = f"tcp://{alive[0]['NodeManagerAddress']}:{port}"
        answers = [on(node, _add_up).remote(meet, rank, len(alive)) for rank, node in enumerate(alive)]
        return Reduced(len(alive), bytes_per_s=min(ray.get(answers, timeout=ALL_REDUCE_S + ANSWER_S)))
    except RayError as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Reduced(len(alive), problem=last[:200])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _add_up(meet: str, rank: int, world: int) -> float:
    """Bytes a second: of a ring, each process sends 2 (N-1)/N of the tensor."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from ftray.train.cluster import stand_still
    from ftray.train.meeting import name_interface

    stand_still()
    name_interface()
    limit = timedelta(seconds=ALL_REDUCE_S)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=limit)
    try:
        tensor = torch.ones(ALL_REDUCE_BYTES // 4)
        dist.all_reduce(tensor)  # connections are made
        began = time.perf_counter()
        dist.all_reduce(tensor)
        seconds = time.perf_counter() - began
        return ALL_REDUCE_BYTES * 2 * (world - 1) / world / seconds
    finally:
        dist.destroy_process_group()
