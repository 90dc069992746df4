"""Checkpoints of a running job: taken between steps, written in the background, complete when every part is there.

The snapshot is a copy on the CPU, so training goes on while files travel to storage. Every worker writes the share of
the tensors that falls to it; the marker follows once all have told so, in the reduction that each step makes anyway.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ftray.errors import StorageError
from ftray.store.checkpoints import Checkpoint, Checkpoints, PartInfo
from ftray.train import state

ATTEMPTS = 3
SPREAD_BYTES = 64 * 2**20  # below that, worker 0 writes all: one file is less than many


@dataclass
class _Pending:
    """A checkpoint whose parts are being written."""

    folder: str
    step: int
    thread: threading.Thread
    parts: list[PartInfo] = field(default_factory=list)
    error: Exception | None = None


class Keeper:
    """Takes and commits the checkpoints of one worker group. All methods are called by all workers together."""

    def __init__(self, checkpoints: Checkpoints, *, keep: int, meta: Mapping[str, Any], log: Callable[[dict], None]):
        self.checkpoints = checkpoints
        self.keep = keep
        self.meta = dict(meta)
        self.log = log
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.token = agreed(secrets.token_hex(4))
        self.failed_in_a_row = 0
        self._pending: _Pending | None = None

    def newest(self) -> tuple[Checkpoint, dict[str, torch.Tensor]] | None:
        """The newest complete checkpoint and its tensors, the same on every worker."""
        found = agreed(self.checkpoints.newest() if self.rank == 0 else None)
        return None if found is None else (found, self.checkpoints.read(found))

    def take(
        self,
        engine,
        named: Mapping[str, torch.nn.Parameter],
        *,
        step: int,
        more: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Snapshot the training state after `step` updates and begin to write it. `more`: tensors all workers share."""
        self.finish()
        spread = sum(state.numel(p) for p in named.values()) * 12 > SPREAD_BYTES
        mine = {}
        for number, (name, tensor) in enumerate(state.gather(engine, named)):
            if self.rank == (number % self.world if spread else 0):
                mine[name] = tensor
        if self.rank == 0:
            mine |= more or {}
        folder = self.checkpoints.folder(step, self.token)
        pending = _Pending(folder, step, threading.Thread(target=lambda: self._write(pending, mine), daemon=True))
        self._pending = pending
        pending.thread.start()

    @property
    def busy(self) -> bool:
        """This worker is still writing its part."""
        return self._pending is not None and self._pending.thread.is_alive()

    @property
    def waiting(self) -> bool:
        """A checkpoint has been taken and not yet committed."""
        return self._pending is not None

    def finish(self) -> None:
        """Wait for the parts and write the marker.

        A failed checkpoint costs nothing but itself, unless the disk is full or the one before failed too: then
        training would go on without a net, and StorageError says why it stops.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.thread.join()
        outcomes: list[Any] = [None] * self.world
        dist.all_gather_object(outcomes, (pending.parts, _told(pending.error)))
        error = next((error for _, error in outcomes if error), None)
        if error is None and self.rank == 0:
            try:
                parts = [part for parts, _ in outcomes for part in parts]
                self.checkpoints.commit(pending.folder, pending.step, parts, self.meta)
                self.checkpoints.prune(self.keep)
            except (StorageError, OSError) as problem:
                error = _told(problem)
        error = agreed(error)
        if error is None:
            self.failed_in_a_row = 0
            self.log({"kind": "checkpoint", "step": pending.step})
            return
        self.failed_in_a_row += 1
        full, text = error
        if full or self.failed_in_a_row > 1:
            raise StorageError(f"checkpoint after step {pending.step}: {text}")
        self.log({"kind": "warning", "step": pending.step, "text": f"no checkpoint after step {pending.step}: {text}"})

    def _write(self, pending: _Pending, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors:
            return
        for attempt in range(ATTEMPTS):
            try:
                pending.parts = [self.checkpoints.write_part(pending.folder, f"rank-{self.rank:05d}", tensors)]
                pending.error = None
                return
            except Exception as error:  # a part that was lost without a word would leave a checkpoint with holes
                pending.error = error
                if _is_full(error):
                    return
                time.sleep(0.5 * 2**attempt)


def _is_full(error: BaseException) -> bool:
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        chain = chain.__cause__
    return "disk full" in str(error).lower() or "no space left" in str(error).lower()


def _told(error: Exception | None) -> tuple[bool, str] | None:
    return None if error is None else (_is_full(error), str(error) or type(error).__name__)


def agreed(value: Any) -> Any:
    """Worker 0's value, on every worker."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
