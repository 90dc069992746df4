"""Which replica a request goes to: one that has its version, unless that one is much busier than others."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

VERSIONS = "versions"
"""Of a replica's routing stats: the keys it has loaded."""
SLACK = 8
"""So many more requests than the least busy may a replica have before others load the version: none is to refuse what
another has room for."""


class AdapterRouter(FIFOMixin, RequestRouter):
    """Ranks replicas for `generate(request, version)` and its like; every other call takes the less busy of two."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._under_way: defaultdict[ReplicaID, Counter[str]] = defaultdict(Counter)
        """By replica, what was sent from here and has not ended: calls of each HTTP request."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        await asyncio.sleep(0)  # what a replica was chosen for in an earlier turn is sent first, and counted
        if not candidate_replicas:
            return []
        key = _key(pending_request)
        others = self._two(candidate_replicas)
        if key is None or len(candidate_replicas) == 1:
            return _in_turn(others)
        having = [one for one in candidate_replicas if key in (one.routing_stats or {}).get(VERSIONS, ())]
        preferred = self._two(having) if having else [_home(key, candidate_replicas)]
        least = min(self._busy(one) for one in candidate_replicas)
        calm = [one for one in preferred if self._busy(one) <= least + SLACK]
        return _in_turn([*calm, *others])

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Counts the request as under way: Ray sends it in this same turn of the loop, and says when it has ended."""
        replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        self._under_way[replica.replica_id][pending_request.metadata.internal_request_id] += 1
        return replica

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._under_way[replica_id] -= Counter([internal_request_id])  # drops what is not there: a broadcast's
        if not self._under_way[replica_id]:
            del self._under_way[replica_id]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """The request that a replica was chosen for. By Ray's mixin it would go to the one that waits longest, which
        may be for another version; its other routers go by an id that the answers to one HTTP request share."""
        waiting = self._pending_requests_to_fulfill
        return next((one for one in waiting if one.metadata is request_metadata and not one.future.done()), None)

    def _two(self, replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
        """Two at random, the less busy first (Mitzenmacher 2001, the power of two choices)."""
        chosen = random.sample(list(replicas), min(2, len(replicas)))
        return sorted(chosen, key=self._busy)

    def _busy(self, replica: RunningReplica) -> int:
        """Its requests. What it said last may be older than what was sent to it since, and counts other ingresses'."""
        sent = self._under_way.get(replica.replica_id, Counter())
        return max(sent.total(), self.replica_queue_len_cache.get(replica.replica_id) or 0)


def _in_turn(replicas: Sequence[RunningReplica]) -> list[list[RunningReplica]]:
    """Ranks of one: of several in a rank, Ray takes the one that said last that it has the fewest."""
    return [[one] for one in replicas]


def _key(pending: PendingRequest | None) -> str | None:
    if pending is None or len(pending.args) < 2:
        return None
    return getattr(pending.args[1], "key", None)


def _home(key: str, replicas: Sequence[RunningReplica]) -> RunningReplica:
    """Where a version that nobody has is loaded, the same for every ingress (rendezvous hashing, Thaler 1998)."""

    def weight(replica: Any) -> bytes:
        return hashlib.sha256(f"{key}\0{replica.replica_id.unique_id}".encode()).digest()

    return max(replicas, key=weight)
