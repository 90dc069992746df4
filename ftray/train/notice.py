"""Notice that a node will be taken away, or that the run shall stop: reason for a checkpoint between the usual ones."""

from __future__ import annotations

import time

ASK_S = 5.0


class Notices:
    """Asking costs a round through Ray's controller, so worker 0 says when it is time, and all ask together."""

    def __init__(self, rank: int, every_s: float = ASK_S):
        self._rank = rank
        self._every_s = every_s
        self._asked = time.monotonic()
        self._known: frozenset[str] = frozenset()

    @property
    def due(self) -> bool:
        """On worker 0 alone, every few seconds."""
        return self._rank == 0 and time.monotonic() - self._asked > self._every_s

    def new(self) -> bool:
        """Called by all workers together: whether a node of the group is to go that was not when last asked."""
        import ray.train

        self._asked = time.monotonic()
        info = ray.train.get_preemption_info()
        leaving = frozenset(info.preempted_node_ids) if info else frozenset()
        new, self._known = bool(leaving - self._known), leaving
        return new
