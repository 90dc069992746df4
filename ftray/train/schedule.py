"""When things happen in a run: the rows and the rate of each step, checkpoints and evaluations. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ftray.config.schema import Optim
from ftray.data.order import epoch_rows, order
from ftray.data.tokens import TokenStore


@dataclass(frozen=True)
class Schedule:
    """The course of a run, resolved. Steps count from 0; "after n steps" counts from 1."""

    lr: float
    kind: str  # cosine, linear, constant
    warmup_steps: int
    steps: int
    batch_size: int
    rows: int | None  # rows to see in all; None where steps were asked for
    seed: int
    checkpoint_every: int
    eval_every: int  # 0: only before and after
    log_every: int

    def lr_at(self, step: int) -> float:
        """The rate of step `step`: a linear rise over the warm-up, then cosine or linear to a tenth, or constant."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (0.1 + 0.9 * left)

    def checkpoints_after(self, done: int) -> bool:
        return done % self.checkpoint_every == 0 and done < self.steps

    def evaluates_after(self, done: int) -> bool:
        return bool(self.eval_every) and done % self.eval_every == 0 and done < self.steps


def course(optim: Optim, *, lr: float, rows: int, seed: int, checkpoint_every, eval_every, log_every: int) -> Schedule:
    """The schedule of a run over `rows` rows an epoch; `auto` is about twenty checkpoints and ten evaluations a run."""
    wanted = max(1, round(optim.epochs * rows))
    steps = optim.steps or -(-wanted // optim.batch_size)
    return Schedule(
        lr=lr,
        kind=optim.schedule,
        warmup_steps=math.ceil(optim.warmup * steps),
        steps=steps,
        batch_size=optim.batch_size,
        rows=None if optim.steps else wanted,
        seed=seed,
        checkpoint_every=max(1, -(-steps // 20)) if checkpoint_every == "auto" else checkpoint_every,
        eval_every=max(1, -(-steps // 10)) if eval_every == "auto" else eval_every,
        log_every=log_every,
    )


class Windows:
    """The rows of each step: epoch after epoch in their orders, cut into windows. Any step can be asked for at once,
    so the data position of a run is its step number, whatever the number of workers."""

    def __init__(self, store: TokenStore, weights: Sequence[float], schedule: Schedule):
        self.schedule = schedule
        self.per_epoch = epoch_rows(store, weights)
        self._order = lru_cache(maxsize=2)(lambda epoch: order(store, weights, schedule.seed, epoch))

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the step's window, int64 [batch_size]; the last window of whole epochs may be shorter."""
        start = step * self.schedule.batch_size
        end = start + self.schedule.batch_size
        if self.schedule.rows is not None:
            end = min(end, self.schedule.rows)
        parts = []
        while start < end:
            epoch, at = divmod(start, self.per_epoch)
            part = self._order(epoch)[at : at + end - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        return min(step * self.schedule.batch_size, self.schedule.rows or math.inf) / self.per_epoch
