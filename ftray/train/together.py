"""Trials that train in one pass: their rows are stacked, one frozen base reads them, and each makes its own update.

A trial is a worker with its own adapter, order of data, optimiser, rate, clipping, dropout and checkpoints. What it
sees and does in a step is what it would alone: its loss is divided by its own window's tokens, and nothing of another
trial reaches its gradients.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ftray.errors import FtrayError
from ftray.models.mixed import Adapter, Mix, Mixed, Rows
from ftray.objectives.language import Batch, stacked, trained_logits
from ftray.train.plain_engine import average
from ftray.train.worker import Seen, Worker

TRIES = 2  # steps by which a width is judged; of these the better
AS_GOOD = 1.03  # a narrower pass is taken where it is so nearly as fast


@dataclass
class _Lesson:
    """What one trial learns in a step: this worker's micro-batches, and what comes of them."""

    trial: Worker
    micros: list[Batch]
    count: int
    tokens: int
    sums: list[torch.Tensor]


class Pace:
    """How many trials' rows go into one pass: tried in the first steps, then what was fastest. None of it changes a
    gradient."""

    def __init__(self) -> None:
        self.best: dict[int, float] = {}  # width -> tokens a second
        self._tries: dict[int, int] = {}

    def width(self, trials: int) -> int:
        """Of so many trials, how many to a pass."""
        widths = _widths(trials)
        for width in widths:
            if self._tries.get(width, 0) < TRIES:
                return width
        fastest = max(self.best[width] for width in widths)
        return min(width for width in widths if self.best[width] * AS_GOOD >= fastest)

    def told(self, width: int, *, tokens: int, seconds: float) -> None:
        self._tries[width] = self._tries.get(width, 0) + 1
        self.best[width] = max(self.best.get(width, 0.0), tokens / seconds)

    def settled(self, trials: int) -> bool:
        return all(self._tries.get(width, 0) >= TRIES for width in _widths(trials))

    def narrow(self, width: int) -> None:
        """So many trials did not fit into one pass."""
        for wide in {width, *(one for one in self._tries if one >= width)}:
            self._tries[wide], self.best[wide] = TRIES, 0.0


class Together:
    """The trials of one worker group, over one base. Every worker of the group makes the same calls."""

    def __init__(self, base: Any, *, tokens: int, device: Any, pace: Pace | None = None):
        """`base`: frozen, with modules of its own, since its layers are replaced. `tokens`: of one pass, at most, but
        for a trial whose own micro-batch is larger. `pace`: none: a new one."""
        self.mixed, self.tokens, self.device = Mixed(base), tokens, device
        self.mixed.model.train()
        self.adapters: dict[int, Adapter] = {}
        self.pace = pace or Pace()

    def enter(self, trial: Worker) -> None:
        """A trial whose model was built over the same base. ModelError where it cannot share a pass."""
        adapter = Adapter.of(trial.model, draws=torch.Generator(self.device))
        self.mixed.admit(adapter)
        self.adapters[id(trial)] = adapter

    def leave(self, trial: Worker) -> None:
        self.adapters.pop(id(trial), None)

    def step(self, trials: Sequence[Worker], steps: Sequence[int]) -> list[FtrayError | None]:
        """One update of each trial, the `steps[i]`-th of trial i. What went wrong, by trial: a loss or gradient that is
        no number, or a checkpoint that could not be kept, ends that trial alone."""
        began = time.monotonic()
        lessons = [self._lesson(trial, step) for trial, step in zip(trials, steps, strict=True)]
        width = self._compute(lessons)
        self.mixed.forget()
        average(p for trial in trials for p in trial.engine.parameters())
        found = [self._update(one, step, began) for one, step in zip(lessons, steps, strict=True)]
        self.pace.told(width, tokens=sum(one.tokens for one in lessons), seconds=time.monotonic() - began)
        return found

    def _lesson(self, trial: Worker, step: int) -> _Lesson:
        store, (rows,) = trial.objective.lessons(step, trial.windows.rows(step))
        self.adapters[id(trial)].draws.manual_seed(trial.seed_at(step))
        for group in trial.engine.optimizer.param_groups:
            group["lr"] = trial.schedule.lr_at(step)
        count = max(1, trial.objective.count(store, rows))
        return _Lesson(trial, trial.micros(store, rows), count, int(store.lengths[rows].sum()), [])

    def _compute(self, lessons: Sequence[_Lesson]) -> int:
        """Gradients of all; the width of the passes."""
        while True:
            width = self.pace.width(len(lessons))
            seeds = [self.adapters[id(one.trial)].draws.get_state() for one in lessons]
            try:
                for turn in range(max(len(one.micros) for one in lessons)):
                    for group in self._passes([one for one in lessons if turn < len(one.micros)], turn, width):
                        self._pass(group, turn)
                return width
            except torch.OutOfMemoryError:
                if width == 1:
                    raise
                self.pace.narrow(width)
                for one, state in zip(lessons, seeds, strict=True):
                    one.sums.clear()
                    one.trial.engine.optimizer.zero_grad()
                    self.adapters[id(one.trial)].draws.set_state(state)

    def _passes(self, lessons: Sequence[_Lesson], turn: int, width: int) -> list[list[_Lesson]]:
        """The trials of each pass. Those that read the same rows keep together, neighbours in length stand together."""
        order = sorted(lessons, key=lambda one: (-one.micros[turn].input_ids.shape[1], one.micros[turn].rows))
        passes: list[list[_Lesson]] = []
        for one in order:
            whole = stacked_tokens([*(other.micros[turn] for other in passes[-1]), one.micros[turn]]) if passes else 0
            if not passes or len(passes[-1]) >= width or whole > self.tokens:
                passes.append([])
            passes[-1].append(one)
        return passes

    def _pass(self, lessons: Sequence[_Lesson], turn: int) -> None:
        """Forward and backward over these trials' micro-batches of a turn."""
        lessons = _repeats_last(lessons, turn)
        batches = [one.micros[turn] for one in lessons]
        joint = stacked(batches)
        packed = joint.position_ids is not None
        width = 1 if packed else joint.input_ids.shape[1]
        rows = [_rows(self.adapters[id(one.trial)], batch, width) for one, batch in zip(lessons, batches, strict=True)]
        world = dist.get_world_size()
        with self.mixed.reading(Mix(rows, packed=packed, device=self.device)) as model:
            with lessons[0].trial.computing():
                logits = trained_logits(model, joint).split([len(batch.targets) for batch in batches])
                totals = [one.trial.objective.nats(*pair) for one, *pair in zip(lessons, logits, batches, strict=True)]
            weighed = [total * (world / one.count) for one, total in zip(lessons, totals, strict=True)]
            torch.stack(weighed).sum().backward()
        for one, total in zip(lessons, totals, strict=True):
            one.sums.append(total.detach())

    def _update(self, lesson: _Lesson, step: int, began: float) -> FtrayError | None:
        trial = lesson.trial
        norm = float(trial.engine.step())
        sums = torch.stack(lesson.sums).tolist()
        seen = Seen(lesson.micros, sums, loss=sum(sums) / lesson.count, grad_norm=norm, tokens=lesson.tokens)
        try:
            trial.stepped(step, seen, began=began)
        except FtrayError as error:
            return error
        return None


def _repeats_last(lessons: Sequence[_Lesson], turn: int) -> list[_Lesson]:
    """In order, but those whose examples another one has already come last."""
    firsts = {_same(one.micros[turn]): one for one in reversed(lessons)}
    news = [one for one in lessons if firsts[_same(one.micros[turn])] is one]
    return [*news, *(one for one in lessons if firsts[_same(one.micros[turn])] is not one)]


def stacked_tokens(batches: Sequence[Batch]) -> int:
    """Tokens of these batches as one, padding included."""
    if batches[0].position_ids is not None:
        return sum(batch.input_ids.shape[1] for batch in batches)
    return sum(len(batch.input_ids) for batch in batches) * max(batch.input_ids.shape[1] for batch in batches)


def _same(batch: Batch) -> Any:
    """Equal for batches of the same examples; one without examples is like no other."""
    return batch.rows or id(batch)


def _rows(adapter: Adapter, batch: Batch, width: int) -> Rows:
    """A batch's tokens; a packed one is rows of one token, as far as adapters are concerned."""
    if batch.position_ids is not None:
        return Rows(adapter, batch.input_ids.shape[1], 1, 1, len(batch.lengths), _same(batch))
    rows, length = batch.input_ids.shape
    return Rows(adapter, rows, length, width, len(batch.lengths), _same(batch))


def _widths(trials: int) -> list[int]:
    """All of them, and 1, 2, 4, … down from there."""
    return [trials, *(2**n for n in reversed(range(trials.bit_length())) if 2**n < trials)]
