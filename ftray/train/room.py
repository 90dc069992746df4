"""Room on a cluster that grows: its autoscaler is asked for nodes, and says at once what it cannot start."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ftray.config.schema import Scale
from ftray.errors import ClusterError
from ftray.ray_cluster import connect
from ftray.store.paths import Storage
from ftray.train import cluster, resolve
from ftray.train.layout import Node

ANSWER_S = 30.0  # an autoscaler looks at what is wanted every five seconds; where none runs, nobody answers
WAIT_S = 3600.0  # for a machine to be found, started, and to pull its image
LOOK_S = 0.5


def nodes_for(scale: Scale, *, silent: bool, wait_s: float = WAIT_S) -> list[Node]:
    """The cluster's nodes, with room for the least workers: waited for where the autoscaler can start what lacks.

    Raises ClusterError at once where nothing will come, and after `wait_s` where it did not.
    """
    found = cluster.nodes()
    try:
        resolve.place(scale, found)
        return found
    except ClusterError as error:
        if not grows():
            raise
        short = error
    for asked in _kinds(scale, found):
        with _wanting(asked) as group:
            can_come = _can_come(group)
            if can_come is None:
                raise short
            if can_come:
                _wait(asked, silent=silent, wait_s=wait_s)
                return cluster.nodes()
    raise ClusterError(
        f"{short}. Its autoscaler cannot start them: raise max_workers (maxReplicas), or add such a kind"
    )


def nodes_in_sight(scale: Scale, storage: Storage) -> list[Node]:
    """For a plan that starts nothing: those of the cluster that `address` or RAY_ADDRESS names, else this machine."""
    if not scale.address and not os.environ.get("RAY_ADDRESS"):
        return cluster.this_machine()
    connect(scale.address)
    found = nodes_here(scale)
    cluster.check_storage(storage)
    return found


def nodes_here(scale: Scale) -> list[Node]:
    """The cluster's nodes, none asked for. ClusterError where they have no room, and whether others may come."""
    found = cluster.nodes()
    try:
        resolve.place(scale, found)
    except ClusterError as error:
        if not grows():
            raise
        raise ClusterError(f"{error}. Its start asks the autoscaler for more, a check does not") from None
    return found


def grows() -> bool:
    """Whether the cluster has Ray's autoscaler v2, KubeRay's and `ray up`'s; v1 does not tell what it can start."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2(fetch_from_server=True, gcs_client=_gcs())


def _kinds(scale: Scale, nodes: list[Node]) -> Iterator[Scale]:
    """What to ask for, in turn. On a cluster without workers `auto` is a GPU each where some can come, else CPUs."""
    gpus = scale.gpus_per_worker
    any_here = any(node.gpus for node in nodes)
    for each in [gpus] if gpus != "auto" else [1.0] if any_here else [1.0, 0.0]:
        yield scale.model_copy(update={"gpus_per_worker": each})


@contextmanager
def _wanting(scale: Scale) -> Iterator[Any]:
    """A placement group for the least workers: the autoscaler counts it, and it goes with this driver."""
    from ray.util.placement_group import placement_group, remove_placement_group

    gpus = float(scale.gpus_per_worker)
    bundle = {"CPU": _cpus(scale)} | ({"GPU": gpus} if gpus else {})
    group = placement_group([bundle] * scale.least, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def _can_come(group: Any) -> bool | None:
    """What the autoscaler says once it has seen a state of the cluster with the group; None where it is silent."""
    name = group.id.hex()
    seen = None
    end = time.monotonic() + ANSWER_S
    while time.monotonic() < end:
        if group.wait(0):
            return True
        status = _status()
        state, answer = status.cluster_resource_state, status.autoscaling_state
        if seen is None and any(one.details.startswith(name) for one in state.pending_gang_resource_requests):
            seen = state.cluster_resource_state_version
        if seen is not None and answer.last_seen_cluster_resource_state_version >= seen:
            return not any(one.details.startswith(name) for one in answer.infeasible_gang_resource_requests)
        time.sleep(LOOK_S)
    return None


def _wait(scale: Scale, *, silent: bool, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    told = None
    while True:
        alive = cluster.alive()
        try:
            resolve.place(scale, alive)
            return
        except ClusterError as error:
            short = error
        free = resolve.seats(alive, float(scale.gpus_per_worker), _cpus(scale))
        if free != told and not silent:
            print(f"Waiting for nodes: room for {free} of {scale.least} workers", file=sys.stderr, flush=True)
        told = free
        if time.monotonic() > end:
            raise ClusterError(
                f"{short}. They did not come in {wait_s / 60:g} min: `ray status` on the head says why; "
                "the same command waits again"
            )
        time.sleep(LOOK_S)


def _cpus(scale: Scale) -> float:
    """The least that a worker takes: `auto` is one where there is no more."""
    return 1.0 if scale.cpus_per_worker == "auto" else scale.cpus_per_worker


def _status() -> Any:
    """The raw answer: the public one leaves out which groups cannot come."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # made at import

    return GetClusterStatusReply.FromString(_gcs().get_cluster_status(timeout_s=ANSWER_S))


def _gcs() -> Any:
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(ray.get_runtime_context().gcs_address)
