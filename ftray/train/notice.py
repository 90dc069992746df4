"""Notice that a node will be taken away, or that the run shall stop: reason for a checkpoint between the usual ones."""

from __future__ import annotations

import time
from typing import Any

ASK_S = 5.0
STOP_ASK_S = 0.5


class Notices:
    """Asking costs a round through Ray's controller, so worker 0 says when it is time, and all ask together."""

    def __init__(self, rank: int, every_s: float = ASK_S, *, events: Any = None):
        """`events`: the actor that the driver tells to stop."""
        self._rank = rank
        self._events = events if rank == 0 else None
        self._answer: Any = None
        self._answered = time.monotonic()
        self._every_s = every_s
        self._asked = time.monotonic()
        self._known: frozenset[str] = frozenset()

    @property
    def due(self) -> bool:
        """On worker 0 alone, every few seconds."""
        return self._rank == 0 and time.monotonic() - self._asked > self._every_s

    @property
    def stop(self) -> bool:
        """Whether the driver was asked to stop, on worker 0 alone; never waited for, so an answer may be a step old."""
        import ray
        from ray.exceptions import RayError

        if self._events is None:
            return False
        if self._answer is None:
            if time.monotonic() - self._answered < STOP_ASK_S:
                return False
            self._answer = self._events.is_stopping.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return False
        self._answer, self._answered = None, time.monotonic()
        try:
            return ray.get(ready[0])
        except RayError:  # the actor starts again
            return False

    def new(self) -> bool:
        """Called by all workers together: whether a node of the group is to go that was not when last asked."""
        import ray.train

        self._asked = time.monotonic()
        info = ray.train.get_preemption_info()
        leaving = frozenset(info.preempted_node_ids) if info else frozenset()
        new, self._known = bool(leaving - self._known), leaving
        return new
